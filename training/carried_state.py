"""Truncated backpropagation through time: the state goes on over batches, the gradient does not."""

import contextlib
import functools
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
from flax import linen as nn
from ml_collections import ConfigDict

from tilescan.data.batches import Batch
from tilescan.training import config as config_lib
from tilescan.training import inputs, steps
from tilescan.training import workdir as work
from tilescan.training.checkpoints import Checkpoints
from tilescan.training.optimizers import make_optimizer
from tilescan.training.train import check_finite


def train_carried(
    config: ConfigDict, workdir: str | pathlib.Path, dataset: Iterable[Batch], carry: int
) -> None:
    """Trains as `train.train` does, but each batch begins in the state that the last one ended in.

    Nothing is evaluated, one device trains, and an interrupted run begins again.

    Args:
      config: a ConfigDict of `training.config.default_config()`, for a model without attention.
      workdir: folder of the run; the last step is saved.
      dataset: batches whose rows go on where those of the batch before ended.
      carry: every so many steps the state is empty again, and the rows are new ones.

    Raises:
      FloatingPointError: the loss is not finite.
    """
    c, folder = config_lib.settings(config).on(jax.default_backend()), work.prepare(workdir)
    model = inputs.make_model(c)
    tx, rate = make_optimizer(c.optimizer, c.train.steps)

    def loss(params: Any, batch: Batch, key: Any = None) -> tuple[Any, steps.Sums]:
        logits, _ = model.apply({"params": params}, batch["tokens"], state=batch["state"])
        sums = steps.cross_entropy(logits, batch["targets"], batch["weights"])
        return sums["loss"], sums

    update = steps.make_train_step(loss, tx, rate)

    @jax.jit
    def step(state: steps.TrainState, carried: Any, batch: Batch) -> tuple[Any, Any, Any]:
        # The compiler sees that this is the forward pass of the update.
        _, after = model.apply({"params": state.params}, batch["tokens"], state=carried)
        state, metrics = update(state, batch | {"state": carried})
        return state, after, metrics

    iterator, empty = iter(dataset), model.init_state(c.data.batch_size, 1)
    first = next(iter(dataset))
    state = steps.init_state(model, tx, first, c.seed)
    state = state.replace(params=nn.unbox(state.params))
    with contextlib.ExitStack() as stack:
        saver = Checkpoints(folder / "checkpoints", c.train.keep, config_lib.as_dict(c))
        stack.callback(saver.close)
        recorder = stack.enter_context(work.records(folder, c, None))
        for number in range(c.train.steps):
            carried = empty if number % carry == 0 else carried
            state, carried, metrics = step(state, carried, next(iterator))
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            check_finite(number + 1, values, saver)
            recorder.row(number + 1, "train", values)
        saver.save(c.train.steps, state, iterator)
        saver.wait()


def in_parts(long_rows: Callable[[int], Batch], length: int, carry: int) -> Callable[[int], Batch]:
    """Returns the function of a step that gives its batch, of rows that go on over `carry` steps.

    Args:
      long_rows: gives the batch, of rows of carry * length tokens, that begins at a step.
      length: tokens of a row at one step.
      carry: steps that share a long row.
    """
    cached = functools.lru_cache(maxsize=1)(long_rows)

    def part(step: int) -> Batch:
        begin = step % carry * length
        whole = cached(step - step % carry)
        return {name: value[:, begin : begin + length] for name, value in whole.items()}

    return part
