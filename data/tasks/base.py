"""What a task is: rows sampled from a generator, or a standard set with splits of its own.

A sampled task makes rows from a random generator. Which split a row belongs to is decided by a hash
of the row itself, so that no row of one split occurs in another whatever the seeds are. A fixed
task has its examples and its splits. Batches of both are what `training.steps` takes: tokens [B, T]
(or [B, T, F], real numbers); targets and weights [B, T] (language models) or labels and weights [B]
(classifiers); segment_ids [B, T] where rows have padding.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tilescan.data.batches import Batch, BatchDataset, check_sizes, host_rows
from tilescan.data.packing import epoch_order

SPLITS = ("train", "validation", "test")
# Of ten hash values, the first is validation's and the second test's.
_HELD_OUT = {"validation": 0, "test": 1}


def _config_keys(task: "Task | FixedTask", n_features: int | None = None) -> dict[str, Any]:
    """Returns what a training configuration must say for a task."""
    keys = {
        "data.seq_len": task.seq_len,
        "model.vocab_size": task.vocab_size,
        "model.max_len": task.seq_len,
    }
    if n_features is not None:
        keys["model.input_features"] = n_features
    if task.n_classes is not None:
        keys |= {"task": "classification", "classifier.n_classes": task.n_classes}
    return keys


def _fingerprint(task: "Task | FixedTask", batch_size: int) -> dict[str, Any]:
    """Returns what the batches of all splits depend on."""
    return {
        "task": task.name,
        "options": dict(task.options),
        "seq_len": task.seq_len,
        "batch_size": batch_size,
    }


@dataclasses.dataclass(frozen=True)
class Task:
    """How to sample rows of a task.

    Attributes:
      name: its name in the registry.
      sample: `sample(rng, rows, hard) -> Batch` of that many rows: tokens [B, T], and targets and
        weights [B, T] (language models) or labels [B] (classifiers); `hard` asks for what is
        evaluated, e.g. the greatest length, or the answer alone.
      seq_len: T.
      vocab_size: number of tokens.
      n_classes: number of labels, None for a language model's task.
      options: what `get` was asked for: a run is not continued with other ones.
    """

    name: str
    sample: Callable[[np.random.Generator, int, bool], Batch]
    seq_len: int
    vocab_size: int
    n_classes: int | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def config_keys(self) -> dict[str, Any]:
        """What a training configuration must say for this task."""
        return _config_keys(self)

    def rows(
        self, split: str, count: int, key: tuple[int, ...], hard: bool, distinct: bool = False
    ) -> Batch:
        """Returns `count` rows of a split; the same for the same key.

        Raises:
          ValueError: an unknown split, or a task too small to have so many (if `distinct`:
            different) rows of this split.
        """
        if split not in SPLITS:
            raise ValueError(f"split={split!r} is unknown; it can be {', '.join(SPLITS)}")
        rng = np.random.default_rng(key)
        parts, seen, have = [], np.zeros(0, np.uint64), 0
        for _ in range(100):
            # More rows than needed, of which those that fall into the split are kept.
            sampled = self.sample(rng, 2 * count if split == "train" else 12 * count, hard)
            hashes = row_hashes(sampled)
            keep = np.flatnonzero(_split_of(hashes) == SPLITS.index(split))
            if distinct:
                _, first = np.unique(hashes[keep], return_index=True)
                keep = keep[np.sort(first)]
                keep = keep[~np.isin(hashes[keep], seen)]
            keep = keep[: count - have]
            seen = np.concatenate([seen, hashes[keep]])
            parts.append({name: value[keep] for name, value in sampled.items()})
            have += len(keep)
            if have == count:
                return {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
        raise ValueError(
            f"task {self.name!r} has too few different rows for split {split!r}; make it longer"
        )

    def datasets(
        self,
        *,
        batch_size: int,
        seed: int,
        eval_batches: int = 8,
        train_examples: int | None = None,
        shard_index: int = 0,
        shard_count: int = 1,
    ) -> dict[str, BatchDataset]:
        """Returns {"train", "validation", "test"} for `training.train`: the first never ends.

        Validation and test do not depend on the seed, so that seeds compare.

        Args:
          batch_size: B of all hosts together; each gets its rows of it.
          seed: of the training rows.
          eval_batches: batches of validation and of test.
          train_examples: so many different rows, again and again in another order, instead of new
            rows at every step; the rows of validation and test are different ones then, too.
        """
        check_sizes(self.seq_len, batch_size, seed, shard_index, shard_count, None)

        # Training: new rows at every step, or the same ones in another order each epoch.
        fingerprint = _fingerprint(self, batch_size)
        distinct = train_examples is not None
        mine = np.asarray(host_rows(0, batch_size, shard_index, shard_count))

        def fresh(step: int) -> Batch:
            rows = self.rows("train", batch_size, (seed, step + 1), hard=False)
            return {name: value[mine] for name, value in rows.items()}

        if distinct:
            finite = self.rows("train", train_examples, (seed, 0), hard=False, distinct=True)
            make = _epochs(finite, batch_size, seed, shard_index, shard_count)
        else:
            make = fresh
        known = {**fingerprint, "seed": seed, "train_examples": train_examples}
        datasets = {"train": BatchDataset(make, None, known, self.vocab_size)}

        # Validation and test: rows by a key of their own.
        for split, number in _HELD_OUT.items():
            key = (number, 0x5EED)
            rows = self.rows(split, batch_size * eval_batches, key, hard=True, distinct=distinct)
            once = _once(rows, batch_size, shard_index, shard_count)
            known = {**fingerprint, "split": split}
            datasets[split] = BatchDataset(once, eval_batches, known, self.vocab_size)
        return datasets


@dataclasses.dataclass(frozen=True)
class FixedTask:
    """A task whose examples are given, as those of a standard set of images.

    Attributes:
      name: its name in the registry.
      load: () -> {split: {name: [N, ...]}}, arrays as compact as they are kept (bytes, say), with
        "labels" [N].
      present: such arrays of B examples -> Batch.
      seq_len: T.
      vocab_size: number of tokens; 256 where the inputs are real numbers, for want of another.
      n_classes: number of labels.
      n_features: F of real-valued tokens [B, T, F]; None: integers.
      options: as of `Task`.
    """

    name: str
    load: Callable[[], Mapping[str, Batch]]
    present: Callable[[Batch], Batch]
    seq_len: int
    vocab_size: int
    n_classes: int
    n_features: int | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def config_keys(self) -> dict[str, Any]:
        """What a training configuration must say for this task."""
        return _config_keys(self, self.n_features)

    def datasets(
        self,
        *,
        batch_size: int,
        seed: int,
        eval_batches: int = 0,
        train_examples: int | None = None,
        shard_index: int = 0,
        shard_count: int = 1,
    ) -> dict[str, BatchDataset]:
        """Returns {"train", "validation", "test"} for `training.train`: the first never ends.

        Training repeats its examples in another order each epoch. Validation and test pass once, in
        their own order; rows that fill up the last batch have weight 0.

        Args:
          batch_size: B of all hosts together; each gets its rows of it.
          seed: of the order of the training examples.
          eval_batches: at most so many batches of validation and of test; 0: all.
          train_examples: train on the first so many only.

        Raises:
          data.sources.SourceError: the files are missing; with the command that fetches them.
        """
        check_sizes(self.seq_len, batch_size, seed, shard_index, shard_count, None)
        parts = dict(self.load())
        parts["train"] = {k: v[:train_examples] for k, v in parts["train"].items()}
        fingerprint = _fingerprint(self, batch_size)
        datasets = {}
        for split, arrays in parts.items():
            count = len(arrays["labels"])
            if split == "train":
                make = _epochs(arrays, batch_size, seed, shard_index, shard_count)
                steps, known = None, {"seed": seed, "train_examples": count}
            else:
                make = _once(arrays, batch_size, shard_index, shard_count)
                steps, known = -(-count // batch_size), {"split": split}
                steps = min(steps, eval_batches) if eval_batches else steps
            shown = lambda step, make=make: self._shown(make(step))
            vocab_size = self.vocab_size if self.n_features is None else None
            datasets[split] = BatchDataset(shown, steps, {**fingerprint, **known}, vocab_size)
        return datasets

    def _shown(self, batch: Batch) -> Batch:
        kept = batch.pop("weights", None)
        shown = self.present(batch)
        return shown if kept is None else {**shown, "weights": kept}


def _epochs(
    arrays: Batch, batch_size: int, seed: int, index: int, hosts: int
) -> Callable[[int], Batch]:
    """Returns step -> rows: all of them in an order of its own in each epoch, without end."""
    count = len(next(iter(arrays.values())))
    orders: dict[int, np.ndarray] = {}

    def order(epoch: int) -> np.ndarray:
        if epoch not in orders:
            while len(orders) > 1:  # a batch may reach into the next epoch, not further back
                orders.pop(min(orders))
            orders[epoch] = epoch_order(count, True, seed, 3, epoch)
        return orders[epoch]

    def make(step: int) -> Batch:
        rows = host_rows(step, batch_size, index, hosts)
        chosen = np.asarray([order(row // count)[row % count] for row in rows])
        return {name: value[chosen] for name, value in arrays.items()}

    return make


def _once(arrays: Batch, batch_size: int, index: int, hosts: int) -> Callable[[int], Batch]:
    """Returns step -> rows in order; those beyond the last weigh nothing."""
    count = len(next(iter(arrays.values())))

    def make(step: int) -> Batch:
        rows = np.asarray(host_rows(step, batch_size, index, hosts))
        batch = {name: value[np.minimum(rows, count - 1)] for name, value in arrays.items()}
        if "weights" not in batch:
            batch["weights"] = (rows < count).astype(np.float32)
        return batch

    return make


def row_hashes(batch: Batch) -> np.ndarray:
    """Returns uint64 [B]: a hash of each row's tokens and targets."""
    parts = []
    for name in ("tokens", "targets"):
        if name in batch:
            values = batch[name].reshape(len(batch[name]), -1)
            if np.issubdtype(values.dtype, np.floating):
                values = np.ascontiguousarray(values, np.float32).view(np.uint32)
            parts.append(values.astype(np.uint64))
    values = np.concatenate(parts, axis=1)
    # Odd multipliers, one a column, then a mix of high and low bits (as in splitmix64).
    columns = np.random.default_rng(0x7A5C).integers(0, 2**63, values.shape[1], dtype=np.uint64)
    h = np.sum((values + np.uint64(1)) * (2 * columns + np.uint64(1)), axis=1, dtype=np.uint64)
    h = (h ^ (h >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9)
    return h ^ (h >> np.uint64(29))


def _split_of(hashes: np.ndarray) -> np.ndarray:
    """Returns the index in SPLITS of each row."""
    tenth = (hashes % np.uint64(10)).astype(int)
    return np.where(tenth == 0, 1, np.where(tenth == 1, 2, 0))


def language_rows(rows: np.ndarray, answers: np.ndarray) -> Batch:
    """Splits rows of T + 1 tokens into tokens and targets; those with `answers` true count.

    Args:
      rows: [B, 1+T] integers.
      answers: [B, 1+T], whether a token is to be predicted.
    """
    return {
        "tokens": rows[:, :-1].astype(np.int32),
        "targets": rows[:, 1:].astype(np.int32),
        "weights": answers[:, 1:].astype(np.float32),
    }


def padded_rows(rows: Sequence[np.ndarray] | np.ndarray, length: int, pad: int) -> Batch:
    """Truncates or pads rows: tokens and segment_ids (1, padding 0), int32 [B, length].

    Args:
      rows: B arrays of tokens, of any lengths.
      length: T.
      pad: the token that fills up.
    """
    lengths = np.asarray([min(len(row), length) for row in rows])
    inside = np.arange(length) < lengths[:, None]
    tokens = np.full(inside.shape, pad, np.int32)
    tokens[inside] = np.concatenate([row[:length] for row in rows])
    return {"tokens": tokens, "segment_ids": inside.astype(np.int32)}
