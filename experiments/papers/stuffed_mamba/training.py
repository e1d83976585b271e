"""Small Mamba-2 models for "Stuffed Mamba", shared by its cells, and the rows that they read."""

import functools
import pathlib
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from tilescan.data.batches import Batch, BatchDataset
from tilescan.data.tasks import recall_stream
from tilescan.data.windows import Rows, document_windows
from tilescan.experiments.harness.shared_models import Trained
from tilescan.experiments.harness.workspace import Workspace
from tilescan.training import config as config_lib
from tilescan.training.carried_state import in_parts, train_carried
from tilescan.training.train import train

STREAM, TEXT = "stream", "text"


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
    long_rows = lambda step: rows("train", size, carry * length, (c.seed, step + 1))
    known = {"data": settings["data"], **settings["rows"], "carry": carry, "seed": c.seed}
    dataset = BatchDataset(in_parts(long_rows, length, carry), None, known, c.model["vocab_size"])
    if carry == 1:
        train(config, folder, datasets={"train": dataset})
    else:
        train_carried(config, folder, dataset, carry)


def make_rows(kind: str, options: Mapping[str, Any]) -> Rows:
    """Returns the rows of a kind, STREAM or TEXT, made once for the same options.

    Raises:
      ValueError: another kind.
    """
    if kind not in _ROWS:
        raise ValueError(f"kind={kind!r} must be {STREAM!r} or {TEXT!r}")
    return _ROWS[kind](**options)


def _stream_rows(**options: Any) -> Rows:
    """Returns rows of `data.tasks.recall_stream`: in training, lags are as long as the row is."""

    def rows(split: str, count: int, length: int, key: tuple[int, ...]) -> Batch:
        task = recall_stream.recall_stream(length, **options)
        return task.rows(split, count, key, hard=split != "train")

    return rows


_ROWS = {STREAM: _stream_rows, TEXT: functools.lru_cache(maxsize=4)(document_windows)}
