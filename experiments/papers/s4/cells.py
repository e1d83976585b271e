"""S4's measurements: kernels, generation, sequences to classify, and what A starts from."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from tilescan.experiments.harness.cells import Cell, sweep
from tilescan.experiments.harness.records import plain
from tilescan.experiments.measurements import state_space_kernels as kernels
from tilescan.experiments.measurements.generation import decode
from tilescan.experiments.measurements.training import measure_classification
from tilescan.experiments.measurements.words import recorded
from tilescan.training.optimizers import state_space_groups

# Sections of the config that train on a task: sequential MNIST, and tasks of the Long Range Arena.
TASKS = ("digits", "listops", "image", "pathfinder")
# {initialization: (mixer, its options)}: one A for all channels in each of them.
INITS = {
    "hippo": ("s4", {"init_A": "legs"}),
    "random_nplr": ("s4", {"init_A": "random"}),
    "dense_hippo": ("s4", {"init_A": "legs", "dense": True}),
    "dense_random": ("s4", {"init_A": "random", "dense": True}),
    "random_diagonal": ("s4d", {"init_A": "random", "n_ssm": 1}),
}
MODELS = ("s4", "s4d", "attention")


def cells(config: ConfigDict) -> list[Cell]:
    """Returns all measurements of the config."""
    exactness, cost, generation = config.exactness, config.cost, config.generation
    language = {
        "model.vocab_size": generation.vocab_size,
        "model.max_len": max(generation.contexts) + generation.tokens,
    }
    models = {m: {**model_keys(m, generation), **language} for m in ("s4", "attention")}
    decoded = {"kind": "generation", "models": models}
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
            {**recorded(generation, "batch_size", "tokens", "rounds"), **decoded},
            seconds=lambda context: 8 + context / 400,
            context=generation.contexts,
        ),
        *(cell for name in TASKS for cell in task_cells(config[name], name)),
        *init_cells(config.inits),
    ]


def task_cells(section: ConfigDict, name: str) -> list[Cell]:
    """Returns S4 and a Transformer of about as many parameters on one task."""
    return sweep(
        "{name}-{model}-seed{seed}",
        measure_classification,
        lambda name, model: {"kind": "task", **classification(section, model)},
        seeds=section.seeds,
        seconds=section.seconds,
        name=(name,),
        model=section.models,
    )


def init_cells(section: ConfigDict) -> list[Cell]:
    """Returns what A starts from, and whether it is trained (figures 3 and 4a)."""
    state = lambda frozen: "frozen" if frozen else "trained"
    return sweep(
        lambda init, frozen, seed: f"init-{init}-{state(frozen)}-seed{seed}",
        measure_classification,
        lambda init, frozen: {"kind": "init", **classification(section, *INITS[init], frozen)},
        seeds=section.seeds,
        seconds=section.seconds,
        init=section.inits,
        frozen=section.frozen,
    )


def classification(
    section: ConfigDict, model: str, init: Mapping[str, Any] | None = None, frozen: bool = False
) -> dict[str, Any]:
    """Returns the settings of `measure_classification`; see `model_keys` and `optimizer_keys`."""
    return {
        **recorded(section, "task", "pool", "validation_batches", "test_batches"),
        "options": plain(section.options.to_dict()),
        "train_examples": section.train_examples or None,
        "train": {
            **model_keys(model, section, init),
            **optimizer_keys(model, section, frozen, dense="dense" in (init or {})),
            "data.batch_size": section.batch_size,
            "train.steps": section.steps,
            "train.log_every": max(1, section.steps // 50),
            "train.eval_every": max(1, section.steps // section.evaluations),
        },
    }


def model_keys(
    model: str, section: ConfigDict, init: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Returns the training keys of S4's mixers alone, or of attention and MLPs.

    Args:
      model: one of MODELS.
      section: of the config; S4's width is d_model, the Transformer's attention_d_model with MLPs
        of attention_mlp_dim, so that their parameters are about as many.
      init: options of S4's mixer that say what A starts from; none: its own.

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
    return keys | {f"model.mixers.{model}.{key}": value for key, value in (init or {}).items()}


def optimizer_keys(
    model: str, section: ConfigDict, frozen: bool = False, dense: bool = False
) -> dict[str, Any]:
    """Returns the keys of AdamW, with the state spaces' own rate; see `state_space_groups`.

    Args:
      model: one of MODELS; groups of parameters that it lacks would be refused.
      section: of the config.
      frozen: whether A, B and P stay what they were at the start.
      dense: whether S4's A is a dense matrix.
    """
    rate = section.attention_learning_rate if model == "attention" else section.learning_rate
    mixer = f"dense {model}" if dense else model
    slow = () if model == "attention" else state_space_groups(mixer, rate, frozen=frozen)
    fixed = {"pattern": r"(^|/)(scale|bias|D)$", "lr_multiplier": 1.0, "weight_decay": 0.0}
    return {
        "optimizer.learning_rate": rate,
        "optimizer.weight_decay": section.weight_decay,
        "optimizer.warmup_steps": section.steps // 10,
        "optimizer.b2": 0.999,
        "optimizer.groups": (fixed, *slow),
    }
