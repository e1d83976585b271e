"""Small Mamba-2 models for "Stuffed Mamba", shared by its cells, and the rows that they read."""

import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from tilescan.data import sources, splits, tokenizers
from tilescan.data.batches import Batch, BatchDataset
from tilescan.data.tasks import recall_stream
from tilescan.experiments.harness.shared_models import Trained
from tilescan.experiments.harness.workspace import Workspace
from tilescan.training import config as config_lib
from tilescan.training.carried_state import train_carried
from tilescan.training.train import train

STREAM, TEXT = "stream", "text"
# rows(split, count, length, key) -> tokens, targets and weights [count, length]
Rows = Callable[[str, int, int, tuple[int, ...]], Batch]


def trained(workspace: Workspace, settings: Mapping[str, Any], seed: int) -> Trained:
    """Returns a model, trained by the first cell that asks for it.

    Settings: "data", STREAM or TEXT; "rows", options of it; "carry": so many rows of data.seq_len
    tokens follow one another, and the state goes on over their borders (the gradient does not);
    "train", keys of the training config, model.vocab_size among them.
    """
    return workspace.trained(settings, seed, functools.partial(_train, settings))


def _train(settings: Mapping[str, Any], config: ConfigDict, folder: pathlib.Path) -> None:
    rows, carry = make_rows(settings["data"], settings["rows"]), settings["carry"]
    c = config_lib.settings(config)
    length, size = c.data.seq_len, c.data.batch_size

    @functools.lru_cache(maxsize=1)
    def long_rows(step: int) -> Batch:
        return rows("train", size, carry * length, (c.seed, step + 1))

    def make(step: int) -> Batch:
        part = step % carry
        cut = slice(part * length, (part + 1) * length)
        return {name: value[:, cut] for name, value in long_rows(step - part).items()}

    known = {"data": settings["data"], **settings["rows"], "carry": carry, "seed": c.seed}
    dataset = BatchDataset(make, None, known, c.model["vocab_size"])
    if carry == 1:
        train(config, folder, datasets={"train": dataset})
    else:
        train_carried(config, folder, dataset, carry)


def make_rows(kind: str, options: Mapping[str, Any]) -> Rows:
    """Returns the rows of a kind, STREAM or TEXT, made once for the same options.

    Raises:
      ValueError: another kind.
    """
    if kind not in (STREAM, TEXT):
        raise ValueError(f"kind={kind!r} must be {STREAM!r} or {TEXT!r}")
    return _make_rows(kind, tuple(sorted(options.items())))


@functools.lru_cache(maxsize=4)
def _make_rows(kind: str, options: tuple[tuple[str, Any], ...]) -> Rows:
    return (_stream_rows if kind == STREAM else _text_rows)(**dict(options))


def _stream_rows(**options: Any) -> Rows:
    """Rows of `data.tasks.recall_stream`, the splits told apart by the rows themselves."""

    def rows(split: str, count: int, length: int, key: tuple[int, ...]) -> Batch:
        return recall_stream.recall_stream(length, **options).rows(split, count, key, hard=True)

    return rows


def _text_rows(source: str, least: int) -> Rows:
    """Windows of a source's documents of more than `least` bytes, split by document."""
    tokenizer, parts = tokenizers.get_tokenizer("byte"), {}
    for split, documents in splits.split_documents(sources.load(source)).items():
        encoded = [tokenizer.encode(document.text) for document in documents]
        parts[split] = [text for text in encoded if len(text) > least]

    def rows(split: str, count: int, length: int, key: tuple[int, ...]) -> Batch:
        rng = np.random.default_rng(key)
        long = [text for text in parts[split] if len(text) > length]
        if not long:
            raise ValueError(f"{source!r} has no document of more than {length} bytes in {split!r}")
        # By the number of windows: each window is as likely as any other.
        shares = np.asarray([len(text) - length for text in long], float)
        windows = []
        for index in rng.choice(len(long), count, p=shares / shares.sum()):
            start = rng.integers(0, len(long[index]) - length)
            windows.append(long[index][start : start + length + 1])
        windows = np.stack(windows).astype(np.int32)
        weights = np.ones((count, length), np.float32)
        return {"tokens": windows[:, :-1], "targets": windows[:, 1:], "weights": weights}

    return rows
