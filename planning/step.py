"""Compiles the training step of a configuration for devices that need not be attached."""

import dataclasses
import re
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from tilescan.models import LanguageModelConfig
from tilescan.ops import lowering
from tilescan.planning import topologies
from tilescan.training import config as config_lib
from tilescan.training import inputs, sharding, steps, train
from tilescan.training.optimizers import make_optimizer
from tilescan.training.settings import Settings

# A compiler's refusal, as libtpu words it: what it needs and what there is.
_REFUSALS = (
    r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)",
    r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm",
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Why a compiler made no program.

    Attributes:
      text: its own words.
      needs, available: bytes that the program needs of a device, and that there are.
    """

    text: str
    needs: float
    available: float


@dataclasses.dataclass(frozen=True)
class Step:
    """A training step, compiled and not run.

    Attributes:
      settings: of the configuration.
      mesh: the devices.
      model: config of the language model or classifier.
      state, batch: the step's arguments, shapes with their shardings.
      compiled: the program, None if the compiler refused for lack of memory.
      refusal: why, None if it did not.
      choices: implementations that ops chose, as of `ops.lowering.choices`.
      seconds: that compiling took.
    """

    settings: Settings
    mesh: Mesh
    model: LanguageModelConfig
    state: Any
    batch: dict[str, jax.ShapeDtypeStruct]
    compiled: jax.stages.Compiled | None
    refusal: Refusal | None
    choices: dict[str, dict[str, str | None]]
    seconds: float


def compile_step(config: config_lib.Config, devices: list, topology: str | None = None) -> Step:
    """Compiles the step that `training.train` runs, without allocating or running anything.

    Args:
      config: of `training.config.default_config()`, or what `training.config.as_dict` gives.
      devices: attached ones, or descriptions from `topologies.devices`.
      topology: their name, None for this machine.

    Raises:
      ValueError: a batch, a length or a mesh that does not fit the devices.
    """
    # The settings on these devices, and the mesh.
    c = config_lib.settings(config).on(devices[0].platform)
    try:
        mesh = sharding.make_mesh(c.mesh, devices)
    except NotImplementedError as error:  # JAX lays no other axis on a torus
        raise ValueError(
            f"{c.mesh} does not lie on topology={topology!r}: there each axis must be one of "
            f"{', '.join(map(str, topologies.torus_axes(topology)))}, products of the slice's sides"
        ) from error
    sharding.check_batch(mesh, c.data.batch_size, c.train.microbatches)

    # The state's shapes with their shardings.
    model = inputs.make_model(c)
    tx, rate = make_optimizer(c.optimizer, c.train.steps)
    batch = _batch(c, mesh)
    example = {k: np.zeros((1, *v.shape[1:]), v.dtype) for k, v in batch.items()}
    shardings, state, _ = train.sharded_init(
        model, tx, example, c.seed, mesh, sharding.rules(c.mesh)
    )

    # The program, or why there is none.
    step = steps.make_train_step(train.make_loss(model, c), tx, rate, c.train.microbatches)
    compiled, refusal, start = None, None, time.perf_counter()
    try:
        with sharding.use(mesh), lowering.choices() as choices:
            out = (shardings, sharding.replicated(mesh))
            traced = jax.jit(step, out_shardings=out, donate_argnums=0).trace(state, batch)
            platform = topologies.platform(topology)
            compiled = traced.lower(lowering_platforms=platform and (platform,)).compile()
    except jax.errors.JaxRuntimeError as error:
        refusal = _refusal(str(error))
        if refusal is None:
            raise
    seconds = time.perf_counter() - start
    return Step(c, mesh, model.config, state, batch, compiled, refusal, choices, seconds)


def _batch(c: Settings, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a batch of `training.inputs.make_datasets`.

    They are sharded as `training.sharding.put_batch` does it.
    """
    B, T = c.data.batch_size, c.data.seq_len
    made = dict.fromkeys(("tokens", "segment_ids", "positions"), ((B, T), np.int32))
    if c.task == "language_model":
        made |= {"targets": ((B, T), np.int32), "weights": ((B, T), np.float32)}
    else:
        made |= {"labels": ((B,), np.int32), "weights": ((B,), np.float32)}
    place = lambda shape: NamedSharding(mesh, sharding.batch_spec(len(shape)))
    return {k: jax.ShapeDtypeStruct(s, d, sharding=place(s)) for k, (s, d) in made.items()}


def _refusal(text: str) -> Refusal | None:
    """Returns a refusal for lack of memory, None for another error."""
    for pattern in _REFUSALS:
        if found := re.search(pattern, text):
            return Refusal(text, *(float(found[i]) * _UNITS[found[i + 1]] for i in (1, 3)))
    return None
