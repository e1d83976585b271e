"""Exact tasks: examples made from a seed, as many as are asked for, held out by construction.

    from data import tasks
    task = tasks.get("copy", max_length=16)
    datasets = task.datasets(batch_size=64, seed=0, eval_batches=4)
    train(config, workdir, datasets=datasets)      # with config keys task.config_keys

A task draws rows from a random generator. Which split a row belongs to is decided by a hash of the
row itself, so that no row of one split occurs in another whatever the seeds are.
"""

import dataclasses
import difflib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

Batch = dict[str, np.ndarray]
SPLITS = ("train", "validation", "test")
# Of ten hash values, the first is validation's and the second test's.
_HELD_OUT = {"validation": 0, "test": 1}


@dataclasses.dataclass(frozen=True)
class Task:
    """How to draw rows of a task.

    Attributes:
      name: its name in the registry.
      draw: `draw(rng, rows, hard) -> Batch` of that many rows: tokens [B, T], and targets and
        weights [B, T] (language models) or labels [B] (classifiers); `hard` asks for what is
        evaluated, e.g. the greatest length.
      seq_len: T.
      vocab_size: number of tokens.
      n_classes: number of labels, None for a language model's task.
    """

    name: str
    draw: Callable[[np.random.Generator, int, bool], Batch]
    seq_len: int
    vocab_size: int
    n_classes: int | None = None

    @property
    def config_keys(self) -> dict[str, Any]:
        """What a training configuration must say for this task."""
        keys = {
            "data.seq_len": self.seq_len,
            "model.vocab_size": self.vocab_size,
            "model.max_len": self.seq_len,
        }
        if self.n_classes is None:
            return keys
        return keys | {"task": "classification", "classifier.n_classes": self.n_classes}

    def rows(self, split: str, count: int, key: tuple[int, ...], hard: bool) -> Batch:
        """`count` rows of a split; the same for the same key.

        Raises:
          ValueError: an unknown split, or a task too small to have rows of this split.
        """
        if split not in SPLITS:
            raise ValueError(f"split={split!r} is unknown; it can be {', '.join(SPLITS)}")
        rng = np.random.default_rng(key)
        parts, have = [], 0
        for _ in range(100):
            drawn = self.draw(rng, 2 * count if split == "train" else 12 * count, hard)
            keep = np.flatnonzero(_split_of(drawn) == SPLITS.index(split))[: count - have]
            parts.append({name: value[keep] for name, value in drawn.items()})
            have += len(keep)
            if have == count:
                return {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
        raise ValueError(
            f"task {self.name!r} has too few different rows for split {split!r}; make it longer"
        )

    def datasets(self, *, batch_size: int, seed: int, eval_batches: int = 8) -> dict[str, Any]:
        """{"train", "validation", "test"} for `training.train`: the first never ends.

        Validation and test do not depend on the seed, so that seeds compare.
        """
        held_out = {
            split: FixedBatches(self, split, batch_size, eval_batches) for split in _HELD_OUT
        }
        return {"train": TrainingRows(self, batch_size, seed), **held_out}


class TrainingRows:
    """Endless batches of new training rows; its state is how many were made."""

    def __init__(self, task: Task, batch_size: int, seed: int):
        self._task, self._batch_size, self._seed, self._made = task, batch_size, seed, 0

    def __iter__(self) -> "TrainingRows":
        return self

    def __next__(self) -> Batch:
        self._made += 1
        return self._task.rows("train", self._batch_size, (self._seed, self._made), hard=False)

    def get_state(self) -> dict[str, int]:
        return {"made": self._made}

    def set_state(self, state: Mapping[str, int]) -> None:
        self._made = state["made"]


class FixedBatches:
    """The same batches of a held-out split at every pass."""

    def __init__(self, task: Task, split: str, batch_size: int, batches: int):
        key = (_HELD_OUT[split], 0x5EED)
        self._batches = [
            task.rows(split, batch_size, (*key, number), hard=True) for number in range(batches)
        ]

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._batches)


def _split_of(batch: Batch) -> np.ndarray:
    """Index in SPLITS of each row, by a hash of its tokens and targets."""
    parts = [batch[name] for name in ("tokens", "targets") if name in batch]
    values = np.concatenate([p.reshape(len(p), -1) for p in parts], axis=1).astype(np.uint64)
    # Odd multipliers, one a column, then a mix of high and low bits (as in splitmix64).
    columns = np.random.default_rng(0x7A5C).integers(0, 2**63, values.shape[1], dtype=np.uint64)
    h = np.sum((values + np.uint64(1)) * (2 * columns + np.uint64(1)), axis=1, dtype=np.uint64)
    h = (h ^ (h >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9)
    tenth = ((h ^ (h >> np.uint64(29))) % np.uint64(10)).astype(int)
    return np.where(tenth == 0, 1, np.where(tenth == 1, 2, 0))


def language_rows(rows: np.ndarray, answers: np.ndarray) -> Batch:
    """Rows of T + 1 tokens as tokens and the next ones; those with `answers` true count.

    Args:
      rows: [B, 1+T] integers.
      answers: [B, 1+T], whether a token is to be predicted.
    """
    return {
        "tokens": rows[:, :-1].astype(np.int32),
        "targets": rows[:, 1:].astype(np.int32),
        "weights": answers[:, 1:].astype(np.float32),
    }


def get(name: str, **options: Any) -> Task:
    """A task by name.

    Raises:
      ValueError: an unknown name (the nearest is named), or options that make no task.
    """
    from data import algorithms

    registry: dict[str, Callable[..., Task]] = dict(algorithms.TASKS)
    if name not in registry:
        near = difflib.get_close_matches(name, registry, 1, 0.3)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"task={name!r} is unknown; {hint}known: {', '.join(registry)}")
    try:
        return registry[name](**options)
    except TypeError as error:
        raise ValueError(f"task {name!r}: {error}") from error
