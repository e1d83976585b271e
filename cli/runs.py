"""Checkpoints that commands read: work folders of `tilescan train`, and published ones."""

import typing
from typing import Any, NamedTuple

if typing.TYPE_CHECKING:
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


def load_writer(path: str) -> "text.Writer":
    """Reads a run's newest checkpoint with its tokenizer, or what `decoding.load_writer` takes.

    Raises:
      ValueError, FileNotFoundError, CheckpointError, UnusableCheckpoint: see `load` and
        `decoding.load_writer`.
    """
    from tilescan.data.tokenizers import get_tokenizer
    from tilescan.decoding import text
    from tilescan.training import trained

    if not trained.is_run(path):
        return text.load_writer(path)
    run = trained.load_run(path)
    return text.Writer(run.model, run.params, get_tokenizer(run.settings.data.tokenizer))
