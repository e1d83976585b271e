"""Can Mamba Always Enjoy the "Free Lunch"?: the measurements.

Ren, Chen, Liu, Ji, Guo, Ding: Exploring the Limitations of Mamba in COPY and CoT Reasoning.
EMNLP 2025, arXiv 2410.03810.
"""

from tilescan.experiments.harness.cells import Cell, Paper
from tilescan.experiments.measurements import training as measurements
from tilescan.experiments.papers.mamba_free_lunch import copy_theory
from tilescan.experiments.papers.mamba_free_lunch import tables as mamba_free_lunch_tables

TRANSFORMER = "Transformer"


def cells(config) -> list[Cell]:
    """All measurements of the config, cheap ones first."""
    return [*theory_cells(config), *copy_cells(config), *dp_cells(config)]


def theory_cells(config) -> list[Cell]:
    """Theorems 1 to 3 on constructed queries, keys and values."""
    s, r = config.score, config.recall
    base = {"kind": "score", "lengths": tuple(s.lengths), "tolerance": s.tolerance}
    attention = {**base, "mechanism": copy_theory.ATTENTION}
    made = [Cell("score-attention", copy_theory.required_score, attention, seconds=5)]
    for decay in s.decays:
        settings = {**base, "mechanism": copy_theory.STATE, "decay": decay}
        made.append(Cell(f"score-decay{decay:g}", copy_theory.required_score, settings, seconds=5))
    keys = ("state_dim", "vocab", "items", "trials", "sharpness")
    recall = {"kind": "recall", **{k: r[k] for k in keys}}
    return [*made, Cell("recall", copy_theory.recall, recall, seconds=5)]


def copy_cells(config) -> list[Cell]:
    """A Transformer and Mambas of several state sizes learn to copy."""
    c = config.copy
    models = {
        f"{TRANSFORMER} (rotary)": transformer(c),
        **{f"Mamba, N={n}": mamba(c, "mamba", n) for n in c.mamba_state_dims},
        **{f"Mamba-2, N={n}": mamba(c, "mamba2", n) for n in c.mamba2_state_dims},
    }
    made = []
    for n_max in c.n_max:
        for name, keys in models.items():
            settings = {
                "kind": "copy",
                "model": name,
                "n_max": n_max,
                "task": "copy",
                "options": {"max_length": n_max},
                "state_numbers": state_numbers(keys),
                "train": {**keys, **_training(c), "train.eval_every": c.steps // c.evaluations},
            }
            label = name.replace(" ", "").replace(",", "-").replace("(", "-").replace(")", "")
            for seed in c.seeds:
                cell_id = f"copy{n_max}-{label}-seed{seed}"
                made.append(Cell(cell_id, measurements.measure_task, settings, seed, seconds=40))
    return made


def dp_cells(config) -> list[Cell]:
    """Longest increasing subsequence, arithmetic, and a problem whose steps are local."""
    c = config.dp
    models = {
        f"{TRANSFORMER} (rotary)": transformer(c),
        f"Mamba-2, N={c.mamba2_state_dim}": mamba(c, "mamba2", c.mamba2_state_dim),
    }
    # Title, options, and whether a step needs only the last few ones.
    problems = {
        "lis": (f"LIS of {c.lis_length}", {"length": c.lis_length}, False),
        "arithmetic": (f"arithmetic, {c.operators} operators", {"operators": c.operators}, False),
        "lagged_fibonacci": (
            f"lagged Fibonacci mod 11, {c.local_length} terms",
            {"length": c.local_length},
            True,
        ),
    }
    made = []
    for task in c.problems:
        title, options, local = problems[task]
        for way in c.ways:
            steps_written = way == "steps"
            for name, keys in models.items():
                settings = {
                    "kind": "dp",
                    "model": name,
                    "label": f"{title}, {'with steps' if steps_written else way}",
                    "local": local,
                    "steps_written": steps_written,
                    "task": task,
                    "options": {**options, "steps": steps_written},
                    "state_numbers": state_numbers(keys),
                    "train": {**keys, **_training(c), "train.eval_every": c.steps},
                }
                short = f"{task}-{way}-{name.split()[0]}"
                for seed in c.seeds:
                    cell_id = f"{short.rstrip(',')}-seed{seed}"
                    made.append(Cell(cell_id, measurements.measure_task, settings, seed, 30))
    return made


def transformer(section) -> dict:
    """Training keys of a Transformer with rotary positions."""
    return {
        "model.pattern": ("attention", "mlp"),
        "model.repeats": section.repeats,
        "model.d_model": section.d_model,
        "model.n_heads": section.n_heads,
    }


def mamba(section, kind: str, state_dim: int) -> dict:
    """Training keys of a Mamba with about as many parameters: two layers for each of attention's.

    A Mamba layer has about 6 E^2 parameters, attention with its MLP 12 E^2.
    """
    keys = {
        "model.pattern": (kind,),
        "model.repeats": 2 * section.repeats,
        "model.d_model": section.d_model,
        f"model.mixers.{kind}.state_dim": state_dim,
    }
    if kind == "mamba2":
        keys["model.mixers.mamba2.head_dim"] = section.mamba2_head_dim
    return keys


def state_numbers(keys) -> int | None:
    """Numbers in the recurrent state of all layers; None for attention, whose cache grows."""
    if "attention" in keys["model.pattern"]:
        return None
    return measurements.state_size(keys)


def _training(section) -> dict:
    return {
        "data.batch_size": section.batch_size,
        "train.steps": section.steps,
        "train.log_every": section.steps,
        "train.eval_batches": 4,
        "optimizer.learning_rate": section.learning_rate,
        "optimizer.warmup_steps": section.steps // 10,
    }


PAPER = Paper(
    name="mamba_free_lunch",
    title='Can Mamba always enjoy the "free lunch"? Limitations in copying and chains of thought '
    "(arXiv 2410.03810)",
    summary="A state of fixed size copies a string only if it has room for it, and learns to with "
    "more examples than attention; problems whose steps are local need no more than it has.",
    cells=cells,
    tables=mamba_free_lunch_tables.tables,
    claims=mamba_free_lunch_tables.claims,
    figures=mamba_free_lunch_tables.figures,
    family="state space models",
)
