"""Trainings of S4 and of Transformers on sequences to classify, small enough for a cell."""

import dataclasses
import json
import statistics
from collections.abc import Mapping
from typing import Any

import numpy as np

from tilescan.data import tasks
from tilescan.data.batches import Batch
from tilescan.experiments.harness.workspace import Workspace
from tilescan.experiments.measurements.training import parameters, training_config
from tilescan.training.train import train

MODELS = ("s4", "s4d", "attention")
# S4's own rate of what its state space is made of, but C and D; these are not decayed.
SSM_RATE = 1e-3
_STATE_MATRICES = {
    "s4": r"(log_A_real|A_imag|/[PB]_(real|imag))$",
    "s4d": r"(log_A_real|A_imag)$",
}
# Kept as a mean of so many logged batches, the last ones.
_LAST_ROWS = 10


def model_keys(model: str, section, init: str | None = None) -> dict[str, Any]:
    """Training keys of a model of `section.layers` layers: S4's mixers alone, or attention and MLP.

    Args:
      model: one of MODELS.
      section: of the config; S4's width is d_model, the Transformer's attention_d_model with MLPs
        of attention_mlp_dim, so that their parameters are about as many.
      init: of A ("legs", "lin", "random"); None: the mixer's own.

    Raises:
      ValueError: an unknown model.
    """
    if model not in MODELS:
        raise ValueError(f"model={model!r} is unknown; known: {', '.join(MODELS)}")
    keys = {"model.repeats": section.layers, "model.norm": "layernorm"}
    if model == "attention":
        return keys | {
            "model.pattern": ("attention", "mlp"),
            "model.d_model": section.attention_d_model,
            "model.n_heads": section.n_heads,
            "model.mlp": "gelu",
            "model.mlp_dim": section.attention_mlp_dim,
            "model.position": "rope",
            "model.causal": section.get("causal", False),
        }
    keys |= {
        "model.pattern": (model,),
        "model.d_model": section.d_model,
        "model.position": "none",
        f"model.mixers.{model}.state_dim": section.state_dim,
        f"model.mixers.{model}.bidirectional": section.get("bidirectional", False),
    }
    return keys if init is None else keys | {f"model.mixers.{model}.init_A": init}


def optimizer_keys(model: str, section, rate: float, frozen: bool = False) -> dict[str, Any]:
    """Keys of AdamW; with S4's groups: state spaces at a rate of at most SSM_RATE, not decayed.

    Args:
      model: one of MODELS; groups of what it does not have would be refused.
      section: of the config.
      rate: of all other parameters.
      frozen: A, B and P stay what they were at the start.
    """
    slow = min(1.0, SSM_RATE / rate)
    groups = [(r"(^|/)(scale|bias|D)$", 1.0)]
    if model != "attention":
        groups += [(_STATE_MATRICES[model], 0.0 if frozen else slow), (r"log_dt$", slow)]
    return {
        "optimizer.learning_rate": rate,
        "optimizer.weight_decay": section.weight_decay,
        "optimizer.warmup_steps": section.steps // 10,
        "optimizer.b2": 0.999,
        "optimizer.groups": tuple(
            {"pattern": pattern, "lr_multiplier": factor, "weight_decay": 0.0}
            for pattern, factor in groups
        ),
    }


def run(settings: Mapping[str, Any], seed: int, workspace: Workspace) -> dict:
    """Trains a classifier and returns what was seen.

    Settings: "task" and "options", of `data.tasks`; "pool", images are shown as means of so many by
    so many pixels; "train", keys of the training config; "validation_batches" and "test_batches"
    (0: all), "train_examples" (None: all).

    Returns:
      {"params", "examples" (trained on), "test_accuracy", "test_examples", "validation_examples",
      "validation_accuracy": [at the start ... at the end], "train_accuracy", "train_loss": of the
      batches logged last}.
    """
    task = tasks.get(settings["task"], **settings["options"])
    if settings.get("pool", 1) > 1:
        task = pooled(task, settings["pool"])
    config = training_config(
        {**task.config_keys, **settings["train"], "train.eval_batches": 0}, seed
    )
    common = dict(batch_size=config.data.batch_size, seed=seed)
    common["train_examples"] = settings.get("train_examples")
    datasets = task.datasets(eval_batches=settings["validation_batches"], **common)
    datasets["test"] = task.datasets(eval_batches=settings["test_batches"], **common)["test"]
    final = train(config, workspace.folder, datasets=datasets)
    rows = [
        json.loads(line) for line in (workspace.folder / "metrics.jsonl").read_text().splitlines()
    ]
    validation = [row for row in rows if row["split"] == "validation"]
    last = [row for row in rows if row["split"] == "train"][-_LAST_ROWS:]
    return {
        "params": parameters(config),
        "examples": config.train.steps * config.data.batch_size,
        "validation_accuracy": [row["accuracy"] for row in validation],
        "validation_examples": round(validation[-1]["weight"]),
        "test_accuracy": final["test/accuracy"],
        "test_examples": round(final["test/weight"]),
        **{f"train_{k}": statistics.fmean(row[k] for row in last) for k in ("accuracy", "loss")},
    }


def pooled(task: tasks.FixedTask, by: int) -> tasks.FixedTask:
    """A task of grey images with pixels averaged `by` x `by`, values 0..1, in rows.

    Raises:
      ValueError: the images' sides are no multiples of `by`.
    """
    side = round(task.seq_len**0.5)
    if side % by:
        raise ValueError(f"pool={by} must divide the images' side, {side}")

    def present(arrays: Batch) -> Batch:
        images = arrays["images"].astype(np.float32) / 255
        images = images.reshape(-1, side // by, by, side // by, by).mean((2, 4))
        tokens = images.reshape(len(images), -1, 1)
        return {"tokens": tokens, "labels": arrays["labels"].astype(np.int32)}

    options = {**task.options, "pool": by}
    length = (side // by) ** 2
    return dataclasses.replace(task, present=present, seq_len=length, n_features=1, options=options)
