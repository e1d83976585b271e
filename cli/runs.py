"""Checkpoints that commands read: work folders of `tilescan train`, and published ones."""

import typing
from typing import Any, NamedTuple

if typing.TYPE_CHECKING:
    from collections.abc import Callable

    from tilescan.decoding import text
    from tilescan.models import LanguageModelConfig
    from tilescan.training.settings import Settings


class Loaded(NamedTuple):
    """A model's configuration and parameters, and the settings of its run if it is one of ours."""

    config: "LanguageModelConfig"
    params: Any
    settings: "Settings | None"


def load(path: str) -> Loaded:
    """Reads a run's newest checkpoint, or a folder or file that `load_pretrained` takes.

    Raises:
      ValueError, CheckpointError, UnusableCheckpoint: see `training.trained.load_run` and
        `models.checkpoints.load_pretrained`.
    """
    from tilescan.models.checkpoints import load_pretrained
    from tilescan.training import trained

    if trained.is_run(path):
        run = trained.load_run(path)
        return Loaded(run.model.config, run.params, run.settings)
    return Loaded(*load_pretrained(path), None)


def load_writer(
    path: str,
    *,
    dtype: str | None = None,
    prepare: "Callable[[text.Writer], Callable[[], Any]] | None" = None,
) -> "text.Writer":
    """Reads a run's newest checkpoint with its tokenizer, or what `decoding.load_writer` takes.

    Args:
      path: of either.
      dtype: of computation and parameters; default a run's own, of other checkpoints float32.
      prepare: see `decoding.load_writer`; not called for a run.

    Raises:
      ValueError, FileNotFoundError, CheckpointError, UnusableCheckpoint: see `load` and
        `decoding.load_writer`.
    """
    from tilescan.decoding import text

    # What trains is imported only for what was trained.
    published = path in text.PRETRAINED or path.endswith(".gguf")
    if not published:
        from tilescan.training import trained

        published = not trained.is_run(path)
    if published:
        return text.load_writer(path, dtype=dtype or "float32", prepare=prepare)
    return _run_writer(trained.load_run(path), dtype)


def _run_writer(run: Any, dtype: str | None) -> "text.Writer":
    import dataclasses

    import jax

    from tilescan.data.tokenizers import get_tokenizer
    from tilescan.decoding import text
    from tilescan.models import LanguageModel

    model, params = run.model, run.params
    if dtype is not None:
        config = dataclasses.replace(model.config, dtype=dtype, param_dtype=dtype)
        model = LanguageModel(config)
        params = jax.tree.map(lambda a: a.astype(config.param_dtype), params)
    return text.Writer(model, params, get_tokenizer(run.settings.data.tokenizer))
