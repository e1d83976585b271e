"""Structured State Spaces (S4): the measurements.

Gu, Goel, Re: Efficiently Modeling Long Sequences with Structured State Spaces. ICLR 2022, arXiv
2111.00396.
"""

from tilescan.experiments.harness.cells import Cell, Paper
from tilescan.experiments.measurements import generation as s4_generation
from tilescan.experiments.papers.s4 import claims as s4_claims
from tilescan.experiments.papers.s4 import kernels as s4_kernels
from tilescan.experiments.papers.s4 import tables as s4_tables
from tilescan.experiments.papers.s4 import training as s4_training

# Sections of the config that train on a task: sequential MNIST, and tasks of the Long Range Arena.
TASKS = ("digits", "listops", "image", "pathfinder")
# Which of a section's keys are the task's options.
OPTIONS = ("examples", "segments", "max_depth", "max_args", "min_length", "max_length")
# What an ablation's initialisation is called: mixer, initial A.
INITS = {
    "hippo": ("s4", "legs"),
    "random_nplr": ("s4", "random"),
    "lin": ("s4d", "lin"),
    "random_diagonal": ("s4d", "random"),
}


def cells(config) -> list[Cell]:
    """All measurements of the config."""
    return [
        *exactness_cells(config),
        *cost_cells(config),
        *generation_cells(config),
        *(cell for name in TASKS if config[name].models for cell in task_cells(config, name)),
        *init_cells(config),
    ]


def exactness_cells(config) -> list[Cell]:
    """Kernels against powers of the HiPPO matrix, convolution against recurrence."""
    c = config.exactness
    base = {k: c[k] for k in ("channels", "state_dim", "batch")}
    return [
        Cell(
            f"exactness-L{length}",
            s4_kernels.exactness,
            {"kind": "exactness", "length": length, **base},
            seconds=4 + length / 600,
        )
        for length in c.lengths
    ]


def cost_cells(config) -> list[Cell]:
    """Table 2: time and memory of a kernel against the state dim and the length."""
    c = config.cost
    made = []
    for N in c.state_dims:
        for length in c.lengths:
            settings = {
                "kind": "cost",
                "state_dim": N,
                "length": length,
                "channels": c.channels,
                "repeats": c.repeats,
                "ways": list(c.ways),
            }
            seconds = 6 + N * length / 1e6
            cell_id = f"cost-N{N}-L{length}"
            made.append(Cell(cell_id, s4_kernels.cost, settings, seconds=seconds))
    return made


def generation_cells(config) -> list[Cell]:
    """Table 8: time of a generated token against the context."""
    c = config.generation
    models = {
        model: {
            **s4_training.model_keys(model, c),
            "model.vocab_size": c.vocab_size,
            "model.max_len": max(c.contexts) + c.tokens,
        }
        for model in ("s4", "attention")
    }
    base = {"models": models, **{k: c[k] for k in ("batch", "tokens", "repeats")}}
    return [
        Cell(
            f"generation-T{context}",
            s4_generation.decode,
            {"kind": "generation", "context": context, **base},
            seconds=8 + context / 400,
        )
        for context in c.contexts
    ]


def task_cells(config, name: str) -> list[Cell]:
    """S4 and a Transformer of about as many parameters on one task."""
    c = config[name]
    made = []
    for model in c.models:
        rate = c.attention_learning_rate if model == "attention" else c.learning_rate
        settings = {
            "kind": "task",
            "name": name,
            "model": model,
            **_data(c),
            "train": {
                **s4_training.model_keys(model, c),
                **s4_training.optimizer_keys(model, c, rate),
                **_training(c),
            },
        }
        for seed in c.seeds:
            cell_id = f"{name}-{model}-seed{seed}"
            made.append(Cell(cell_id, s4_training.run, settings, seed=seed, seconds=c.seconds))
    return made


def init_cells(config) -> list[Cell]:
    """Figure 3: how A starts, and whether it is trained."""
    c = config.inits
    made = []
    for init in c.inits:
        model, A = INITS[init]
        for frozen in c.frozen:
            settings = {
                "kind": "init",
                "init": init,
                "frozen": frozen,
                **_data(c),
                "train": {
                    **s4_training.model_keys(model, c, A),
                    **s4_training.optimizer_keys(model, c, c.learning_rate, frozen),
                    **_training(c),
                },
            }
            for seed in c.seeds:
                cell_id = f"init-{init}-{'frozen' if frozen else 'trained'}-seed{seed}"
                made.append(Cell(cell_id, s4_training.run, settings, seed=seed, seconds=c.seconds))
    return made


def _data(section) -> dict:
    """What a cell's data are; options are lists, as records give them back."""
    options = {k: section[k] for k in OPTIONS if k in section}
    return {
        "task": section.task,
        "options": {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()},
        "pool": section.pool,
        "train_examples": section.train_examples or None,
        "validation_batches": section.validation_batches,
        "test_batches": section.test_batches,
    }


def _training(section) -> dict:
    steps = section.steps
    return {
        "data.batch_size": section.batch_size,
        "train.steps": steps,
        "train.log_every": max(1, steps // 50),
        "train.eval_every": max(1, steps // section.evaluations),
    }


PAPER = Paper(
    name="s4",
    title="Efficiently modeling long sequences with structured state spaces (arXiv 2111.00396)",
    summary="A linear state space that starts from HiPPO is a long convolution in training and a "
    "recurrence in generation. It learns from long sequences what Transformers of its size do not.",
    cells=cells,
    tables=s4_tables.tables,
    claims=s4_claims.claims,
    figures=s4_tables.figures,
    family="state space models",
)
