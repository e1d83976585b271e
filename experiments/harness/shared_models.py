"""The models that cells share: what their settings say, and how one is trained or fetched."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from flax import linen as nn
from ml_collections import ConfigDict

from tilescan.data import sources, tasks
from tilescan.decoding import text
from tilescan.experiments.harness import records as records_lib
from tilescan.training import config as config_lib
from tilescan.training.train import train

# Of a training config, where a model's settings do not say otherwise, on all devices.
_DEFAULTS = {
    "precision.compute_dtype": "float32",
    "train.progress": False,
    "train.tensorboard": False,
    "train.keep": 1,
}
# What `train_as_set` reads of a model's settings.
_KEYS = ("train", "task", "options", "train_examples")
# make(config, folder): trains in a work folder, as `training.train.train` does.
Make = Callable[[ConfigDict, pathlib.Path], Any]


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model that several cells may read.

    Attributes:
      model: a Linen module.
      params: its parameters.
      folder: the work folder of its training, with metrics.jsonl; of a published checkpoint, what
        says which one it is.
      tokenizer: of a published checkpoint, else None.
    """

    model: nn.Module
    params: Any
    folder: pathlib.Path
    tokenizer: Any = None

    @property
    def config(self) -> Any:
        """The model's configuration, a `LanguageModelConfig`."""
        return self.model.config


def digest(settings: Mapping[str, Any], seed: int) -> str:
    """Returns a short hash that names a model: of settings, seed, and a published file's bytes."""
    if "checkpoint" in settings:
        settings, seed = {**settings, "sha256": _source(settings["checkpoint"]).sha256}, 0
    return records_lib.digest("models", "", settings, seed)


def training_config(settings: Mapping[str, Any], seed: int) -> ConfigDict:
    """Returns the whole training config of a model's settings.

    Raises:
      ValueError: no "train" among the settings, an unknown task, or no checkpoints to keep.
      KeyError, TypeError: an unknown key of the training config, or a value of another type.
    """
    if not isinstance(settings.get("train"), Mapping):
        raise ValueError(
            "settings of a model need 'train', keys of the training config, or 'checkpoint', one "
            f"of {', '.join(text.PRETRAINED)}; they have {', '.join(settings) or 'nothing'}"
        )
    of_task = _task(settings).config_keys if "task" in settings else {}
    config = config_lib.default_config()
    config.update_from_flattened_dict({**_DEFAULTS, **of_task, **settings["train"], "seed": seed})
    if config.train.checkpoint_every < 1:
        raise ValueError(
            "train.checkpoint_every=0 would keep nothing of a model that cells share: leave it out"
        )
    return config


def check_keys(settings: Mapping[str, Any]) -> None:
    """Raises ValueError for settings that `train_as_set` does not read."""
    _refuse_others(settings, _KEYS)


def train_as_set(
    settings: Mapping[str, Any], config: ConfigDict, folder: pathlib.Path
) -> dict[str, Any]:
    """Trains on the text, or on the task, that settings name; returns the final metrics."""
    datasets = None
    if "task" in settings:
        datasets = _task(settings).datasets(
            batch_size=config.data.batch_size,
            seed=config.seed,
            eval_batches=config.train.eval_batches,
            train_examples=settings.get("train_examples"),
        )
    return train(config, folder, datasets=datasets)


def published(settings: Mapping[str, Any], folder: pathlib.Path) -> Trained:
    """Returns a published checkpoint, fetched once into the cache of data.sources.

    Raises:
      ValueError: an unknown name, or settings that nothing reads.
      SourceError: it is neither in the cache nor can it be fetched.
    """
    _refuse_others(settings, ("checkpoint", "dtype"))
    name = _source(settings["checkpoint"]).name
    writer = text.load_writer(name, dtype=settings.get("dtype", "float32"))
    return Trained(writer.model, writer.params, folder, writer.tokenizer)


def _task(settings: Mapping[str, Any]) -> Any:
    return tasks.get(settings["task"], **settings.get("options", {}))


def _refuse_others(settings: Mapping[str, Any], known: tuple[str, ...]) -> None:
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise ValueError(
            f"settings of a model: nothing reads {', '.join(unknown)}; known: {', '.join(known)}"
        )


def _source(name: str) -> sources.Source:
    """Returns the row of a checkpoint that can be fetched, its bytes pinned by a checksum."""
    if name not in text.PRETRAINED:
        raise ValueError(f"checkpoint={name!r} is unknown; known: {', '.join(text.PRETRAINED)}")
    return sources.get_source(name)
