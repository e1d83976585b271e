"""From a configuration to batches and a model: here alone training knows data/ and models/."""

from collections.abc import Iterable, Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils


def pad_rows(batch: dict[str, np.ndarray], rows: int) -> dict[str, np.ndarray]:
    """Adds rows that count nothing, so that the last, shorter batch has the shape of the others.

    A classification batch without weights gets them: 1 for its rows, 0 for those added.
    """
    have = len(batch["tokens"])
    if "weights" not in batch:
        batch = batch | {"weights": np.ones(have, np.float32)}
    if have == rows:
        return batch
    return {
        name: np.pad(value, [(0, rows - have)] + [(0, 0)] * (np.ndim(value) - 1))
        for name, value in batch.items()
    }


def eval_batches(dataset: Iterable, rows: int, limit: int) -> Iterator[dict[str, np.ndarray]]:
    """The batches of one evaluation, from the start: at most `limit`, or all if it is 0.

    With several processes, those whose data end sooner go on with rows that count nothing until the
    last is done: all must take part in every step.
    """
    iterator, count, last = iter(dataset), 0, None
    while not limit or count < limit:
        batch = next(iterator, None)
        if jax.process_count() > 1:
            if not multihost_utils.process_allgather(np.int32(batch is not None)).any():
                return
        elif batch is None:
            return
        if batch is None:
            batch = {name: value[:0] for name, value in last.items()}
        last, count = batch, count + 1
        yield pad_rows(batch, rows)
