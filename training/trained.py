"""Reads the model that a finished training run left in its work folder."""

import os
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from flax import linen as nn
from ml_collections import ConfigDict

from tilescan.training import config as config_lib
from tilescan.training import inputs, steps
from tilescan.training.checkpoints import Checkpoints, UnusableCheckpoint
from tilescan.training.optimizers import make_optimizer
from tilescan.training.settings import Settings


def finished_step(config: ConfigDict, workdir: str | os.PathLike) -> int | None:
    """Returns the newest step that a run in `workdir` saved, None before the last of its steps."""
    folder = epath.Path(workdir) / "checkpoints"
    if not folder.exists():
        return None
    saved = [int(path.name) for path in folder.iterdir() if path.name.isdigit()]
    last = config_lib.settings(config).train.steps
    return last if last in saved else None


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
    c = config_lib.settings(config)
    model = inputs.make_model(c) if model is None else model
    if finished_step(config, workdir) is None:
        raise UnusableCheckpoint(
            f"{workdir} holds no checkpoint of the last step, {c.train.steps}: train to the end, "
            "with train.checkpoint_every above 0"
        )

    # What is to be read: shapes of the whole state, for checkpoints hold the optimizer's too.
    tx, _ = make_optimizer(c.optimizer, c.train.steps)
    example = {"tokens": abstract_tokens(c)}
    boxed = jax.eval_shape(lambda tokens: steps.init_state(model, tx, tokens, c.seed), example)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        boxed.replace(params=nn.meta.unbox(boxed.params)),
    )

    saver = Checkpoints(epath.Path(workdir) / "checkpoints", c.train.keep)
    try:
        return model, saver.restore(c.train.steps, abstract).params
    finally:
        saver.close()


def abstract_tokens(c: Settings) -> jax.ShapeDtypeStruct:
    """Returns the shape [1, T] or [1, T, F] of a short input: enough to initialize parameters."""
    features, length = c.model.get("input_features"), min(16, c.data.seq_len)
    shape = (1, length) if features is None else (1, length, features)
    return jax.ShapeDtypeStruct(shape, jnp.int32 if features is None else jnp.float32)
