"""Measurements that train on an exact task: runs of `training.train`, small enough for a cell."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tilescan.data import tasks
from tilescan.experiments.measurements.training import training_config
from tilescan.models import LanguageModel
from tilescan.models.language_model import count_params
from tilescan.training import config as config_lib
from tilescan.training import inputs
from tilescan.training.train import train


def run(settings: Mapping[str, Any], seed: int, folder: pathlib.Path) -> dict:
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
    batch_size = config.data.batch_size
    datasets = task.datasets(
        batch_size=batch_size,
        seed=seed,
        eval_batches=config.train.eval_batches,
        train_examples=settings.get("train_examples"),
    )
    final = train(config, folder, datasets=datasets)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["split"] == "validation"]
    return {
        "examples": [row["step"] * batch_size for row in rows],
        **{f"validation_{k}": [row[k] for row in rows] for k in ("exact", "accuracy")},
        **{f"test_{k}": final[f"test/{k}"] for k in ("exact", "accuracy", "loss")},
        "train_loss": final["train/loss"],
        "params": parameters(config),
    }


def parameters(config) -> int:
    """Number of parameters of the model that a training config describes."""
    c = config_lib.settings(config)
    model = inputs.make_model(c)
    features = c.model.get("input_features")
    shape = (1, 16) if features is None else (1, 16, features)
    dtype = jnp.int32 if features is None else jnp.float32
    tokens = jax.ShapeDtypeStruct(shape, dtype)
    return count_params(jax.eval_shape(model.init, jax.random.key(0), tokens))


def state_size(keys: Mapping[str, Any]) -> int:
    """Numbers in the state of one sequence, all layers, of a model without attention.

    Args:
      keys: of the training config, the model's among them.
    """
    c = config_lib.settings(training_config({"model.vocab_size": 2, **keys}, 0))
    state = jax.eval_shape(lambda: LanguageModel(c.model_config(2)).init_state(1, 1))
    floats = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return sum(int(np.prod(leaf.shape)) for leaf in floats)


def examples_to(result: Mapping[str, Any], share: float, metric: str = "exact") -> int | None:
    """Examples seen when validation first reached a share of right answers; None: never."""
    seen = zip(result["examples"], result[f"validation_{metric}"], strict=True)
    return next((examples for examples, value in seen if value >= share), None)
