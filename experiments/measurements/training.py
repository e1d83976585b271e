"""Measurements that train on real text: whole runs of `training.train`, small enough for a cell."""

import contextlib
import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any
from unittest import mock

from tilescan.models import attention as attention_module
from tilescan.ops import reference
from tilescan.training import config as config_lib
from tilescan.training.train import train

STANDARD, TILED = "standard", "tiled"
# A cell is the unit that is resumed: no checkpoints inside, and no other noise.
_QUIET = {
    "train.checkpoint_every": 0,
    "train.progress": False,
    "train.tensorboard": False,
}


def training_config(keys: Mapping[str, Any], seed: int):
    """The default training config with some keys set, e.g. {"data.seq_len": 64}.

    Raises:
      KeyError, TypeError: an unknown key, or a value of another type.
    """
    config = config_lib.default_config()
    config.update_from_flattened_dict({**_QUIET, **keys, "seed": seed})
    return config


@contextlib.contextmanager
def attention_as(kind: str):
    """Inside, models attend by the whole matrix of scores (STANDARD) or in tiles (TILED).

    Nothing else of the program differs: the op is put in place of the other under the same name.
    """
    if kind not in (STANDARD, TILED):
        raise ValueError(f"attention={kind!r} is unknown; it must be {STANDARD!r} or {TILED!r}")
    if kind == TILED:
        yield
        return

    @functools.wraps(reference.attention)
    def dense(q, k, v, *, implementation=None, **options):
        return reference.attention(q, k, v, **options).astype(q.dtype)

    with mock.patch.object(attention_module, "attention", dense):
        yield


def run(settings: Mapping[str, Any], seed: int, folder: pathlib.Path) -> dict:
    """Trains as `settings["train"]` says and returns what was seen.

    Settings: "train", keys of the training config; "attention", STANDARD or TILED (the default).

    Returns:
      {"train_loss": [every logged step], "steps": [their numbers], and the last test metrics
      "test_loss", "test_perplexity", "test_accuracy", "test_weight"}.
    """
    with attention_as(settings.get("attention", TILED)):
        final = train(training_config(settings["train"], seed), folder)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["split"] == "train"]
    tested = {f"test_{k}": final[f"test/{k}"] for k in ("loss", "perplexity", "accuracy", "weight")}
    return {"steps": [r["step"] for r in rows], "train_loss": [r["loss"] for r in rows], **tested}
