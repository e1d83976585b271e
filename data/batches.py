"""A data set that is a function from the step to its batch, and Grain's iterator over it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

import grain
import numpy as np

Batch = dict[str, np.ndarray]


class _Steps:
    """Random access source for Grain: item i is the batch of step i."""

    def __init__(self, make: Callable[[int], Batch], steps: int | None):
        self._make = make
        self._steps = sys.maxsize if steps is None else steps

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, step: int) -> Batch:
        return self._make(int(step))


class BatchDataset(grain.IterDataset):
    """Batches by step, with a fingerprint in the iterator's state.

    Attributes:
        steps: number of batches; None without end.
        fingerprint: name -> value of all that the batches depend on, the number of hosts excepted.
        vocab_size: V; every token and target is below it. None where tokens are real numbers.
    """

    def __init__(
        self,
        make: Callable[[int], Batch],
        steps: int | None,
        fingerprint: Mapping[str, Any],
        vocab_size: int | None = None,
    ):
        # Batches are slices of arrays in memory, far below a step's time: no reading threads.
        options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        self._by_step = grain.MapDataset.source(_Steps(make, steps)).to_iter_dataset(options)
        super().__init__(self._by_step)
        self.steps = steps
        self.fingerprint = dict(fingerprint)
        self.vocab_size = vocab_size
        self._make = make

    def batch(self, step: int) -> Batch:
        """Returns the batch of one step, without an iterator.

        Raises:
            IndexError: the data set does not have this step.
        """
        if step < 0 or (self.steps is not None and step >= self.steps):
            raise IndexError(f"step={step} is outside the data set's {self.steps} steps")
        return self._make(step)

    def __iter__(self) -> grain.DatasetIterator:
        return _BatchIterator(iter(self._by_step), self.fingerprint)


class _BatchIterator(grain.DatasetIterator):
    def __init__(self, inner: grain.DatasetIterator, fingerprint: dict[str, Any]):
        super().__init__(inner)
        self._inner = inner
        self._fingerprint = fingerprint

    def __next__(self) -> Batch:
        return next(self._inner)

    def get_state(self) -> dict[str, Any]:
        return {"data": dict(self._fingerprint), "position": self._inner.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on where a state was taken.

        Raises:
            ValueError: the state was taken from another data set; names what differs.
        """
        if not isinstance(state, Mapping) or not {"data", "position"} <= set(state):
            raise ValueError(f"not a state of this iterator (needs data and position): {state!r}")
        # As a checkpoint keeps them: tuples are lists there.
        saved, mine = (json.loads(json.dumps(x)) for x in (state["data"], self._fingerprint))
        for key in mine.keys() | saved.keys():
            if saved.get(key) != mine.get(key):
                raise ValueError(
                    f"the saved data state is of another data set: {key} was {saved.get(key)!r} "
                    f"and is {mine.get(key)!r}; resume with the data settings of the checkpoint"
                )
        self._inner.set_state(state["position"])


def check_sizes(
    seq_len: int,
    batch_size: int,
    seed: int,
    shard_index: int,
    shard_count: int,
    num_epochs: int | None,
) -> None:
    """Raises ValueError for settings of a data set that cannot be."""
    for name, value in (("seq_len", seq_len), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if seed < 0:
        raise ValueError(f"seed={seed} must be at least 0")
    if not 0 <= shard_index < shard_count:
        raise ValueError(
            f"shard_index={shard_index} must lie in 0..shard_count-1 with shard_count={shard_count}"
        )
    if batch_size % shard_count:
        raise ValueError(
            f"batch_size={batch_size} (of all hosts together) must be a multiple of "
            f"shard_count={shard_count}, e.g. {-(-batch_size // shard_count) * shard_count}"
        )
    if num_epochs is not None and num_epochs < 1:
        raise ValueError(f"num_epochs={num_epochs} must be at least 1, or None for no end")


def host_rows(step: int, batch_size: int, shard_index: int, shard_count: int) -> range:
    """Returns the global row numbers (over all steps) that this host has in this step."""
    local = batch_size // shard_count
    first = step * batch_size + shard_index * local
    return range(first, first + local)
