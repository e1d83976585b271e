"""S4's measurements: kernels, generation, sequences to classify, and what A starts from."""

import dataclasses
import statistics
from collections.abc import Mapping
from typing import Any

import numpy as np

from tilescan.data import tasks
from tilescan.data.batches import Batch
from tilescan.experiments.harness.cells import Cell, sweep
from tilescan.experiments.harness.records import plain
from tilescan.experiments.harness.workspace import Workspace
from tilescan.experiments.measurements.generation import decode
from tilescan.experiments.measurements.training import metrics, parameters, training_config
from tilescan.experiments.measurements.words import recorded
from tilescan.experiments.papers.s4 import kernels
from tilescan.training.train import train

# Sections of the config that train on a task: sequential MNIST, and tasks of the Long Range Arena.
TASKS = ("digits", "listops", "image", "pathfinder")
# {initialization: (mixer, initial A)}.
INITS = {
    "hippo": ("s4", "legs"),
    "random_nplr": ("s4", "random"),
    "lin": ("s4d", "lin"),
    "random_diagonal": ("s4d", "random"),
}
# S4's own rate for the parameters of its state space other than C and D; these are not decayed.
SSM_RATE = 1e-3
STATE_MATRICES = {
    "s4": r"(log_A_real|A_imag|/[PB]_(real|imag))$",
    "s4d": r"(log_A_real|A_imag)$",
}
MODELS = (*STATE_MATRICES, "attention")
# Training accuracy and loss are means of so many logged batches, the last ones.
_LAST_ROWS = 10


def cells(config) -> list[Cell]:
    """Returns all measurements of the config."""
    exactness, cost, generation = config.exactness, config.cost, config.generation
    language = {
        "model.vocab_size": generation.vocab_size,
        "model.max_len": max(generation.contexts) + generation.tokens,
    }
    models = {m: {**model_keys(m, generation), **language} for m in ("s4", "attention")}
    return [
        *sweep(
            "exactness-L{length}",
            kernels.exactness,
            recorded(exactness, "channels", "state_dim", "batch_size", kind="exactness"),
            seconds=lambda length: 4 + length / 600,
            length=exactness.seq_lens,
        ),
        *sweep(
            "cost-N{state_dim}-L{length}",
            kernels.cost,
            recorded(cost, "channels", "rounds", "strategies", kind="cost"),
            seconds=lambda state_dim, length: 6 + state_dim * length / 1e6,
            state_dim=cost.state_dims,
            length=cost.seq_lens,
        ),
        *sweep(
            "generation-T{context}",
            decode,
            recorded(
                generation, "batch_size", "tokens", "rounds", kind="generation", models=models
            ),
            seconds=lambda context: 8 + context / 400,
            context=generation.contexts,
        ),
        *(cell for name in TASKS for cell in task_cells(config[name], name)),
        *init_cells(config.inits),
    ]


def task_cells(section, name: str) -> list[Cell]:
    """Returns S4 and a Transformer of about as many parameters on one task."""
    return sweep(
        "{name}-{model}-seed{seed}",
        classify,
        lambda name, model: {"kind": "task", **classification(section, model)},
        seeds=section.seeds,
        seconds=section.seconds,
        name=(name,),
        model=section.models,
    )


def init_cells(section) -> list[Cell]:
    """Returns what A starts from, and whether it is trained (figure 3)."""
    state = lambda frozen: "frozen" if frozen else "trained"
    return sweep(
        lambda init, frozen, seed: f"init-{init}-{state(frozen)}-seed{seed}",
        classify,
        lambda init, frozen: {"kind": "init", **classification(section, *INITS[init], frozen)},
        seeds=section.seeds,
        seconds=section.seconds,
        init=section.inits,
        frozen=section.frozen,
    )


def classification(
    section, model: str, init: str | None = None, frozen: bool = False
) -> dict[str, Any]:
    """Returns the settings of `classify` for a model; see `model_keys` and `optimizer_keys`."""
    return {
        **recorded(section, "task", "pool", "validation_batches", "test_batches"),
        "options": plain(section.options.to_dict()),
        "train_examples": section.train_examples or None,
        "train": {
            **model_keys(model, section, init),
            **optimizer_keys(model, section, frozen),
            "data.batch_size": section.batch_size,
            "train.steps": section.steps,
            "train.log_every": max(1, section.steps // 50),
            "train.eval_every": max(1, section.steps // section.evaluations),
        },
    }


def model_keys(model: str, section, init: str | None = None) -> dict[str, Any]:
    """Returns the training keys of S4's mixers alone, or of attention and MLPs.

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
    keys = {"model.repeats": section.n_layers, "model.norm": "layernorm"}
    if model == "attention":
        return keys | {
            "model.pattern": ("attention", "mlp"),
            "model.d_model": section.attention_d_model,
            "model.n_heads": section.n_heads,
            "model.mlp": "gelu",
            "model.mlp_dim": section.attention_mlp_dim,
            "model.position": "rope",
            "model.causal": section.causal,
        }
    keys |= {
        "model.pattern": (model,),
        "model.d_model": section.d_model,
        "model.position": "none",
        f"model.mixers.{model}.state_dim": section.state_dim,
        f"model.mixers.{model}.bidirectional": section.bidirectional,
    }
    return keys if init is None else keys | {f"model.mixers.{model}.init_A": init}


def optimizer_keys(model: str, section, frozen: bool = False) -> dict[str, Any]:
    """Returns the keys of AdamW; state spaces train at a rate of at most SSM_RATE, undecayed.

    Args:
      model: one of MODELS; groups of parameters that it lacks would be refused.
      section: of the config.
      frozen: whether A, B and P stay what they were at the start.
    """
    rate = section.attention_learning_rate if model == "attention" else section.learning_rate
    slow = min(1.0, SSM_RATE / rate)
    groups = [(r"(^|/)(scale|bias|D)$", 1.0)]
    if model != "attention":
        groups += [(STATE_MATRICES[model], 0.0 if frozen else slow), (r"log_dt$", slow)]
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


def classify(settings: Mapping[str, Any], seed: int, workspace: Workspace) -> dict:
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
    if settings["pool"] > 1:
        task = pooled(task, settings["pool"])
    config = training_config(
        {**task.config_keys, **settings["train"], "train.eval_batches": 0}, seed
    )
    # Validation and test may read different numbers of batches, of which `datasets` takes one.
    shared = {
        "batch_size": config.data.batch_size,
        "seed": seed,
        "train_examples": settings["train_examples"],
    }
    datasets = task.datasets(eval_batches=settings["validation_batches"], **shared)
    datasets["test"] = task.datasets(eval_batches=settings["test_batches"], **shared)["test"]
    final = train(config, workspace.folder, datasets=datasets)
    validation = metrics(workspace.folder, "validation")
    last = metrics(workspace.folder, "train")[-_LAST_ROWS:]
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
    """Returns a task of gray images with pixels averaged `by` x `by`, values 0..1, in rows.

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
