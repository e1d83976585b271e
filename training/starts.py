"""What a run starts from: another run's checkpoint of any step, or a published checkpoint.

    config.train.start_from = "runs/english"     # a run's work folder; "smollm2", a .gguf, a folder
    config.train.start_step = 500                # of its checkpoints; None: the newest
    config.train.start_optimizer = True          # moments too; the schedule begins anew

The new run's model is the one that it starts from, and so is the tokenizer, but that of a folder.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from etils import epath
from jaxtyping import PyTree

from tilescan.data import sources
from tilescan.data.tokenizers import get_tokenizer
from tilescan.decoding.writers import PRETRAINED
from tilescan.models.checkpoints import open_pretrained
from tilescan.training import config as config_lib
from tilescan.training import steps as steps_lib
from tilescan.training.checkpoints import CheckpointError, Checkpoints
from tilescan.training.optimizers import make_optimizer
from tilescan.training.settings import ConfigError, Settings
from tilescan.training.trained import is_run, read_params, saved_settings
from tilescan.training.workdir import saved_steps

# Keys of the model that leave its parameters as they are.
FREE = (
    "attention_implementation", "attention_sequence_parallel", "scan_sequence_parallel",
    "sequence_balance", "remat", "max_len",
)  # fmt: skip


class Start(NamedTuple):
    """A checkpoint to start from.

    Attributes:
      model: fields of its model, as in `Settings.model`.
      tokenizer: its name, None where it has none of `data.tokenizers`.
      read_params: reads its parameters.
    """

    model: dict[str, Any]
    tokenizer: str | None
    read_params: Callable[[], PyTree]


def with_start(c: Settings, workdir: str | os.PathLike) -> Settings:
    """Returns the settings with the model and the tokenizer that the run starts from.

    A run that has a checkpoint of its own keeps what it has.

    Raises:
      ConfigError: a key of the model that was set to something else than the start has, or a start
        that is none.
    """
    if not c.train.start_from:
        return c
    going_on = bool(saved_steps(workdir))
    start = _of_run(epath.Path(workdir), None) if going_on else opened(c)
    default = config_lib.settings(config_lib.default_config())
    model = dict(c.model)
    for key, theirs in start.model.items():
        ours = model.get(key)
        if key in FREE and ours != default.model.get(key):
            continue
        if _plain(ours) not in (_plain(default.model.get(key)), _plain(theirs)):
            raise ConfigError(
                f"model.{key} = {ours!r}, but train.start_from = {c.train.start_from!r} has "
                f"{theirs!r}: leave it out, the model is that of the start"
            )
        model[key] = theirs
    data = c.data
    if start.tokenizer and data.tokenizer == default.data.tokenizer:
        data = dataclasses.replace(data, tokenizer=start.tokenizer)
    have, need = get_tokenizer(data.tokenizer).vocab_size, model["vocab_size"]
    if not start.tokenizer and need and have < need / 2:
        raise ConfigError(
            f"data.tokenizer = {data.tokenizer!r} has {have} tokens, and the model of "
            f"train.start_from = {c.train.start_from!r} {need}: name the tokenizer that it was "
            "trained with, for a folder does not bring it"
        )
    return dataclasses.replace(c, model=model, data=data)


def opened(c: Settings) -> Start:
    """Returns the start that `c.train` names.

    Raises:
      ConfigError: neither a run nor a checkpoint, or a step without a checkpoint.
      SourceError: a published checkpoint that cannot be fetched.
      CheckpointError: one that cannot be read.
    """
    name, step = c.train.start_from, c.train.start_step
    if is_run(name):
        return _of_run(epath.Path(name), step)
    if step is not None or c.train.start_optimizer:
        raise ConfigError(
            f"train.start_step and train.start_optimizer are of runs; {name!r} is none"
        )
    if name not in PRETRAINED and not pathlib.Path(name).exists():
        raise ConfigError(
            f"train.start_from = {name!r} is neither the work folder of a run, nor a checkpoint's "
            f"folder or .gguf file, nor one of {', '.join(PRETRAINED)}"
        )
    path = sources.fetch(name) if name in PRETRAINED else pathlib.Path(name)
    found = open_pretrained(path, param_dtype=c.precision.param_dtype)
    fields = dataclasses.asdict(found.config)
    model = {key: value for key, value in fields.items() if key not in ("dtype", "param_dtype")}
    tokenizer = name if name in PRETRAINED or name.endswith(".gguf") else None
    return Start(model, tokenizer, found.read_params)


def _of_run(workdir: epath.Path, step: int | None) -> Start:
    try:
        c = saved_settings(workdir)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    step = _step_of(workdir, step)
    return Start(dict(c.model), c.data.tokenizer, lambda: read_params(c, workdir, step))


def _step_of(workdir: epath.Path, step: int | None) -> int:
    """Returns the step to start from: the one that is asked for, or the newest."""
    saved = sorted(saved_steps(workdir))
    if not saved or (step is not None and step not in saved):
        raise ConfigError(
            f"train.start_from = {str(workdir)!r} has checkpoints of steps {saved or 'none'}"
            + (f", not of train.start_step = {step}" if step is not None else "")
            + "; train.keep says how many stay"
        )
    return saved[-1] if step is None else step


def started(
    c: Settings,
    state: steps_lib.TrainState,
    abstract_of: Callable[[optax.GradientTransformation], steps_lib.TrainState],
    shardings: steps_lib.TrainState,
) -> steps_lib.TrainState:
    """Returns a state just initialized with what the start has: parameters, or moments as well.

    Args:
      c: the settings, `with_start`.
      state: as `train.sharded_init` initializes it.
      abstract_of: an optimizer -> the abstract state with it, on the run's mesh.
      shardings: of the state.

    Raises:
      CheckpointError: moments of another optimizer.
      ValueError: parameters of another model.
    """
    workdir = epath.Path(c.train.start_from)
    before = saved_settings(workdir) if is_run(workdir) else None
    other = before is None or before.precision.param_dtype != c.precision.param_dtype
    if other and not c.train.start_optimizer:
        return steps_lib.start_from(state, opened(c).read_params(), shardings)

    # Every process reads its shards of the run's state, whose optimizer may be another one.
    optimizer = c.optimizer if c.train.start_optimizer else before.optimizer
    tx, _ = make_optimizer(dataclasses.replace(optimizer, schedule="constant"), c.train.steps)
    saver = Checkpoints(workdir / "checkpoints", read_only=True)
    try:
        old = saver.restore(_step_of(workdir, c.train.start_step), abstract_of(tx))
    except CheckpointError as error:
        if not c.train.start_optimizer:
            raise
        raise CheckpointError(
            f"train.start_optimizer needs the same model, optimizer.name and clipping: {error}"
        ) from error
    finally:
        saver.close()
    if not c.train.start_optimizer:
        return state.replace(params=old.params, masters=old.masters)

    # Moments go on, the schedule begins anew.
    begin = lambda x: x._replace(count=jnp.zeros_like(x.count))
    is_schedule = lambda x: isinstance(x, optax.ScaleByScheduleState)
    opt_state = jax.tree.map(
        lambda x: begin(x) if is_schedule(x) else x, old.opt_state, is_leaf=is_schedule
    )
    return state.replace(params=old.params, opt_state=opt_state, masters=old.masters)


def _plain(value: Any) -> Any:
    """As it is after a round trip through JSON."""
    return json.loads(json.dumps(value, default=str))
