"""Reads the model that a training run left in its work folder."""

import dataclasses
import json
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath
from flax import linen as nn
from ml_collections import ConfigDict

from tilescan.models import LanguageModel
from tilescan.training import config as config_lib
from tilescan.training import inputs, steps
from tilescan.training.checkpoints import Checkpoints, UnusableCheckpoint
from tilescan.training.optimizers import make_optimizer
from tilescan.training.settings import Settings
from tilescan.training.workdir import saved_steps, with_compute_dtype


def finished_step(config: ConfigDict, workdir: str | os.PathLike) -> int | None:
    """Returns the newest step that a run in `workdir` saved, None before the last of its steps."""
    last = config_lib.settings(config).train.steps
    return last if last in saved_steps(workdir) else None


def load_trained(
    config: ConfigDict, workdir: str | os.PathLike, model: nn.Module | None = None
) -> tuple[nn.Module, Any]:
    """Returns (model, its parameters after the last step), on the first device.

    Args:
      config: the run's, a ConfigDict of `training.config.default_config()`.
      workdir: the run's work folder.
      model: as it was given to `train`, None where config.model describes it.

    Raises:
      UnusableCheckpoint: the run did not reach its last step, or the checkpoint is damaged or of
        another model.
    """
    c = with_compute_dtype(config_lib.settings(config), workdir)
    if c.train.start_from:  # the model is the start's, which the run wrote down
        c = saved_settings(workdir)
    model = inputs.make_model(c) if model is None else model
    if finished_step(config, workdir) is None:
        raise UnusableCheckpoint(
            f"{workdir} holds no checkpoint of the last step, {c.train.steps}: train to the end, "
            "with train.checkpoint_every above 0"
        )

    return model, read_params(c, workdir, c.train.steps, model)


class Run(NamedTuple):
    """What `load_run` finds: the run's settings, its model, and the parameters after `step`."""

    settings: Settings
    model: LanguageModel
    params: Any
    step: int


def is_run(folder: str | os.PathLike) -> bool:
    """Returns whether a folder is the work folder of a training run."""
    folder = epath.Path(folder)
    return (folder / "config.json").exists() and (folder / "checkpoints").is_dir()


def load_run(workdir: str | os.PathLike) -> Run:
    """Reads the language model of a run by its work folder alone, finished or not.

    The folder is left as it is, so the run may be going on. The parameters, those of the newest
    checkpoint, are put on the first device.

    Raises:
      UnusableCheckpoint: no checkpoint, one that is damaged, or of another model than config.json
        describes.
      ValueError: the run trained a classifier, or its config.json cannot be read.
    """
    c = saved_settings(workdir)
    if c.task != "language_model":
        raise ValueError(f"{workdir} is a run of task {c.task!r}; a language model is needed")
    saved = saved_steps(workdir)
    if not saved:
        raise UnusableCheckpoint(
            f"{workdir} holds no checkpoint yet: the first comes at step "
            f"{min(c.train.checkpoint_every or c.train.steps, c.train.steps)}, where "
            "train.checkpoint_every is above 0"
        )
    model = inputs.make_model(c)
    return Run(c, model, read_params(c, workdir, max(saved), model), max(saved))


def saved_settings(workdir: str | os.PathLike) -> Settings:
    """Returns the settings that a run wrote down in its work folder.

    Raises:
      ValueError: its config.json cannot be read.
    """
    path = epath.Path(workdir) / "config.json"
    try:
        return config_lib.settings(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def read_params(
    c: Settings, workdir: str | os.PathLike, step: int, model: nn.Module | None = None
) -> Any:
    """Returns the parameters of a run's checkpoint, on the first device.

    Args:
      c: the run's settings.
      workdir: its work folder.
      step: of a checkpoint that is there.
      model: as it was given to `train`, None where the settings describe it.

    Raises:
      UnusableCheckpoint: it is damaged or of another model.
    """
    model = inputs.make_model(c) if model is None else model
    # What is to be read: shapes of the whole state, for checkpoints hold the optimizer's too. They
    # don't depend on the schedule, which may be a file that is gone.
    optimizer = dataclasses.replace(c.optimizer, schedule="constant")
    tx, _ = make_optimizer(optimizer, c.train.steps)
    example = {"tokens": abstract_tokens(c)}
    boxed = jax.eval_shape(lambda tokens: steps.init_state(model, tx, tokens, c.seed), example)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        boxed.replace(params=nn.meta.unbox(boxed.params)),
    )

    saver = Checkpoints(epath.Path(workdir) / "checkpoints", c.train.keep, read_only=True)
    try:
        return saver.restore(step, abstract).params
    finally:
        saver.close()


def abstract_tokens(c: Settings) -> jax.ShapeDtypeStruct:
    """Returns the shape [1, T] or [1, T, F] of a short input: enough to initialize parameters."""
    features, length = c.model.get("input_features"), min(16, c.data.seq_len)
    shape = (1, length) if features is None else (1, length, features)
    return jax.ShapeDtypeStruct(shape, jnp.int32 if features is None else jnp.float32)
