"""Cells that train: whole runs of `training.train` on text, an exact task, a classification."""

import functools
import json
import pathlib
import statistics
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from tilescan.data import tasks
from tilescan.data.tasks import images
from tilescan.experiments.harness.records import Record, Records
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
_LAST_ROWS = 10  # of a classifier's training, over which its accuracy and loss are means
# A cell is the unit that is resumed: no checkpoints inside, and no other noise. Its result depends
# on its settings: where they name no dtype of the computation, it is float32 on all devices.
_DEFAULTS = {
    "precision.compute_dtype": "float32",
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
    config.update_from_flattened_dict({**_DEFAULTS, **keys, "seed": seed})
    return config


def measure_text(settings: Mapping[str, Any], seed: int, workspace: Workspace) -> dict[str, Any]:
    """Trains on text as `settings["train"]` says and returns what was seen.

    Settings: "train", keys of the training config; "attention", STANDARD or TILED (the default),
    in which alone two programs of the same keys differ.

    Returns:
      {"train_loss": [every logged step], "steps": [which they are], "params", the last test metrics
      "test_loss", "test_perplexity", "test_accuracy", "test_weight", and, where there is
      validation, its last loss "validation_loss"}.

    Raises:
      ValueError: an unknown attention.
    """
    kind = settings.get("attention", TILED)
    if kind not in _ATTENTION:
        raise ValueError(f"attention={kind!r} is unknown; it must be {STANDARD!r} or {TILED!r}")
    keys = {**settings["train"], **_ATTENTION[kind]}
    config = training_config(keys, seed)
    final = train(config, workspace.folder)
    rows = metrics(workspace.folder, "train")
    tested = {f"test_{k}": final[f"test/{k}"] for k in ("loss", "perplexity", "accuracy", "weight")}
    if "validation/loss" in final:
        tested["validation_loss"] = final["validation/loss"]
    return {
        "steps": [r["step"] for r in rows],
        "train_loss": [r["loss"] for r in rows],
        "params": parameters(config),
        **tested,
    }


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


def measure_classification(settings: Mapping[str, Any], seed: int, workspace: Workspace) -> dict:
    """Trains a classifier and returns what was seen.

    Settings: "task" and "options", of `data.tasks`; "pool", images are shown as means of so many by
    so many pixels; "train", keys of the training config; "validation_batches" and "test_batches"
    (0: all), "train_examples" (None: all).

    Returns:
      {"params", "examples" (trained on), "test_accuracy", "test_examples", "validation_examples",
      "validation_accuracy": [at the start ... at the end], "train_accuracy", "train_loss": means of
      the batches logged last}.
    """
    task = tasks.get(settings["task"], **settings["options"])
    task = images.pooled(task, settings["pool"]) if settings["pool"] > 1 else task
    keys = {**task.config_keys, **settings["train"], "train.eval_batches": 0}
    config = training_config(keys, seed)

    # Validation and test may read different numbers of batches, of which `datasets` takes one.
    size, examples = config.data.batch_size, settings["train_examples"]
    shared = {"batch_size": size, "seed": seed, "train_examples": examples}
    datasets = task.datasets(eval_batches=settings["validation_batches"], **shared)
    datasets["test"] = task.datasets(eval_batches=settings["test_batches"], **shared)["test"]
    final = train(config, workspace.folder, datasets=datasets)
    validation = metrics(workspace.folder, "validation")
    last = metrics(workspace.folder, "train")[-_LAST_ROWS:]
    return {
        "params": parameters(config),
        "examples": config.train.steps * size,
        "validation_accuracy": [row["accuracy"] for row in validation],
        "validation_examples": round(validation[-1]["weight"]),
        "test_accuracy": final["test/accuracy"],
        "test_examples": round(final["test/weight"]),
        **{f"train_{k}": statistics.fmean(row[k] for row in last) for k in ("accuracy", "loss")},
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
    return _state_size(json.dumps({**keys}, sort_keys=True))


@functools.cache  # cells of many seeds and lengths have the same model
def _state_size(keys: str) -> int:
    c = config_lib.settings(training_config({"model.vocab_size": 2, **json.loads(keys)}, 0))
    state = jax.eval_shape(lambda: LanguageModel(c.model_config(2)).init_state(1, 1))
    floats = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return sum(int(np.prod(leaf.shape)) for leaf in floats)


def examples_to(result: Mapping[str, Any], share: float, metric: str = "exact") -> int | None:
    """Returns the examples seen when validation first reached a share of right answers, or None."""
    seen = zip(result["examples"], result[f"validation_{metric}"], strict=True)
    return next((examples for examples, value in seen if value >= share), None)


def attention_pairs(found: Records) -> list[tuple[Record, Record]]:
    """Returns the runs of each seed with standard and with tiled attention."""
    standard, tiled = ({r.seed: r for r in found.select(attention=kind)} for kind in _ATTENTION)
    return [(standard[seed], tiled[seed]) for seed in sorted(standard.keys() & tiled.keys())]


def curve_difference(pair: tuple[Record, Record]) -> float:
    """Returns the largest difference of a step's losses between two runs."""
    one, two = (record.result["train_loss"] for record in pair)
    return max(abs(a - b) for a, b in zip(one, two, strict=True))
