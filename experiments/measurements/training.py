"""Cells that train: whole runs of `training.train` on text or on an exact task, small enough."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from tilescan.data import tasks
from tilescan.experiments.harness.shared_models import train_as_set
from tilescan.experiments.harness.workspace import Workspace
from tilescan.experiments.measurements.attention import STANDARD, TILED
from tilescan.models import LanguageModel
from tilescan.models.language_model import count_params
from tilescan.training import config as config_lib
from tilescan.training import inputs
from tilescan.training.train import train
from tilescan.training.trained import abstract_tokens

# Standard attention is the definition, by the whole matrix of scores; tiled is the op's default.
_ATTENTION = {STANDARD: {"model.attention_implementation": "reference"}, TILED: {}}
# A cell is the unit that is resumed: no checkpoints inside, and no other noise.
_QUIET = {
    "train.checkpoint_every": 0,
    "train.progress": False,
    "train.tensorboard": False,
}


def training_config(keys: Mapping[str, Any], seed: int) -> ConfigDict:
    """Returns the default training config with some keys set, e.g. {"data.seq_len": 64}.

    Raises:
      KeyError, TypeError: an unknown key, or a value of another type.
    """
    config = config_lib.default_config()
    config.update_from_flattened_dict({**_QUIET, **keys, "seed": seed})
    return config


def measure_text(settings: Mapping[str, Any], seed: int, workspace: Workspace) -> dict[str, Any]:
    """Trains on text as `settings["train"]` says and returns what was seen.

    Settings: "train", keys of the training config; "attention", STANDARD or TILED (the default),
    in which alone two programs of the same keys differ.

    Returns:
      {"train_loss": [every logged step], "steps": [their numbers], and the last test metrics
      "test_loss", "test_perplexity", "test_accuracy", "test_weight"}.

    Raises:
      ValueError: an unknown attention.
    """
    kind = settings.get("attention", TILED)
    if kind not in _ATTENTION:
        raise ValueError(f"attention={kind!r} is unknown; it must be {STANDARD!r} or {TILED!r}")
    keys = {**settings["train"], **_ATTENTION[kind]}
    final = train(training_config(keys, seed), workspace.folder)
    rows = metrics(workspace.folder, "train")
    tested = {f"test_{k}": final[f"test/{k}"] for k in ("loss", "perplexity", "accuracy", "weight")}
    return {"steps": [r["step"] for r in rows], "train_loss": [r["loss"] for r in rows], **tested}


def measure_task(settings: Mapping[str, Any], seed: int, workspace: Workspace) -> dict[str, Any]:
    """Trains on a task and returns what was seen.

    Settings: "task", a name of `data.tasks`; "options" of it; "train", keys of the training config;
    "train_examples", how many different rows to train on again and again (default: new ones at
    every step).

    Returns:
      {"examples": [trained on before each validation], "validation_exact", "validation_accuracy":
      [at these], "test_exact", "test_accuracy", "test_loss", "train_loss" (the last logged),
      "params"}. "exact" is the share of rows whose every answer token is right, as greedy decoding
      would write them.
    """
    task = tasks.get(settings["task"], **settings.get("options", {}))
    config = training_config({**task.config_keys, **settings["train"]}, seed)
    final = train_as_set(settings, config, workspace.folder)
    rows = metrics(workspace.folder, "validation")
    return {
        "examples": [row["step"] * config.data.batch_size for row in rows],
        **{f"validation_{k}": [row[k] for row in rows] for k in ("exact", "accuracy")},
        **{f"test_{k}": final[f"test/{k}"] for k in ("exact", "accuracy", "loss")},
        "train_loss": final["train/loss"],
        "params": parameters(config),
    }


def metrics(folder: pathlib.Path, split: str) -> list[dict[str, Any]]:
    """Returns the rows of a training run's metrics that are of one split, in order."""
    rows = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if row["split"] == split]


def parameters(config: ConfigDict) -> int:
    """Returns how many parameters the model has that a training config describes."""
    c = config_lib.settings(config)
    init = inputs.make_model(c).init
    return count_params(jax.eval_shape(init, jax.random.key(0), abstract_tokens(c)))


def state_size(keys: Mapping[str, Any]) -> int:
    """Returns how many numbers the state of one sequence has, all layers, without attention.

    Args:
      keys: of the training config, the model's among them.
    """
    c = config_lib.settings(training_config({"model.vocab_size": 2, **keys}, 0))
    state = jax.eval_shape(lambda: LanguageModel(c.model_config(2)).init_state(1, 1))
    floats = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return sum(int(np.prod(leaf.shape)) for leaf in floats)


def examples_to(result: Mapping[str, Any], share: float, metric: str = "exact") -> int | None:
    """Returns the examples seen when validation first reached a share of right answers, or None."""
    seen = zip(result["examples"], result[f"validation_{metric}"], strict=True)
    return next((examples for examples, value in seen if value >= share), None)
