"""The measurements: theorems on constructed weights, copying, and dynamic programming."""

from typing import Any

from ml_collections import ConfigDict

from tilescan.configs.common import flat
from tilescan.experiments.harness.cells import Cell, sweep
from tilescan.experiments.measurements import copying
from tilescan.experiments.measurements.training import measure_task, state_size

TRANSFORMER = "Transformer (rotary)"


def cells(config: ConfigDict) -> list[Cell]:
    """Returns all measurements of the config, cheap ones first."""
    theorems = theory_cells(config.score, config.recall)
    copies = [*copy_cells(config.short_copy), *copy_cells(config.copy)]
    return [*theorems, *copies, *dp_cells(config.dp)]


def theory_cells(score: ConfigDict, recall: ConfigDict) -> list[Cell]:
    """Returns theorems 1 to 3 on constructed queries, keys and values."""
    base = {"kind": "score", "lengths": tuple(score.lengths), "tolerance": score.tolerance}
    attention, state = ({**base, "mechanism": m} for m in (copying.ATTENTION, copying.STATE))
    return [
        Cell("score-attention", copying.required_score, attention, seconds=5),
        *sweep(
            "score-decay{decay:g}", copying.required_score, state, decay=score.decays, seconds=5
        ),
        Cell("recall", copying.recall, {"kind": "recall", **recall.to_dict()}, seconds=5),
    ]


def copy_cells(c: ConfigDict) -> list[Cell]:
    """Returns a Transformer and Mambas of several state sizes that learn to copy."""
    models = {
        TRANSFORMER: transformer(c),
        **{f"Mamba, N={n}": mamba(c, "mamba", n) for n in c.mamba_state_dims},
        **{f"Mamba-2, N={n}": mamba(c, "mamba2", n, width) for n, width in c.mamba2_sizes},
    }

    def settings(n_max: int, model: str) -> dict[str, Any]:
        options = {"max_length": n_max}
        return {
            "kind": "copy",
            "task": "copy",
            "options": options,
            **trained(models[model], c.train),
        }

    def name(n_max: int, model: str, seed: int) -> str:
        label = model.replace(" ", "").replace(",", "-").replace("(", "-").replace(")", "")
        return f"copy{n_max}-{label}-seed{seed}"

    axes = {"n_max": c.n_max, "model": tuple(models)}
    return sweep(name, measure_task, settings, seeds=c.seeds, seconds=40, **axes)


def dp_cells(c: ConfigDict) -> list[Cell]:
    """Returns a longest increasing subsequence, arithmetic, and a problem whose steps are local."""
    N, terms = c.mamba2_state_dim, c.local_length
    models = {TRANSFORMER: transformer(c), f"Mamba-2, N={N}": mamba(c, "mamba2", N)}
    # Title, options, and whether a step needs only the last few ones.
    problems = {
        "lis": (f"LIS of {c.lis_length}", {"length": c.lis_length}, False),
        "arithmetic": (f"arithmetic, {c.operators} operators", {"operators": c.operators}, False),
        "lagged_fibonacci": (f"lagged Fibonacci mod 11, {terms} terms", {"length": terms}, True),
    }

    def settings(task: str, steps_written: bool, model: str) -> dict[str, Any]:
        title, options, local = problems[task]
        return {
            "kind": "dp",
            "label": f"{title}, {'with steps' if steps_written else 'direct'}",
            "local": local,
            "options": {**options, "steps": steps_written},
            **trained(models[model], c.train[task]),
        }

    def name(task: str, steps_written: bool, model: str, seed: int) -> str:
        short = model.split()[0].rstrip(",")
        return f"{task}-{'steps' if steps_written else 'direct'}-{short}-seed{seed}"

    axes = {"steps_written": c.steps_written, "model": tuple(models)}
    return [
        cell
        for task in c.problems
        for cell in sweep(
            name,
            measure_task,
            settings,
            seeds=c.seeds if problems[task][2] else (*c.seeds, *c.more_seeds),
            seconds=30,
            task=(task,),
            **axes,
        )
    ]


def transformer(section: ConfigDict) -> dict[str, Any]:
    """Returns the training keys of a Transformer with rotary positions."""
    sizes = {f"model.{name}": section[name] for name in ("repeats", "d_model", "n_heads")}
    return {"model.pattern": ("attention", "mlp"), **sizes}


def mamba(section: ConfigDict, kind: str, state_dim: int, width: int = 0) -> dict[str, Any]:
    """Returns the keys of a Mamba with about as many parameters: two layers for one of attention.

    A Mamba layer has about 6 E^2 parameters, attention with its MLP 12 E^2; E is `width`, if given.
    """
    width = width or section.d_model
    keys = {
        "model.pattern": (kind,),
        "model.repeats": 2 * section.repeats,
        "model.d_model": width,
        f"model.mixers.{kind}.state_dim": state_dim,
    }
    heads = {"model.mixers.mamba2.head_dim": 2 * width // section.mamba2_heads}
    return keys | heads if kind == "mamba2" else keys


def trained(keys: dict[str, Any], training: ConfigDict) -> dict[str, Any]:
    """Returns the settings of a model's training, and the size of the state of all its layers.

    The size is None for attention, whose cache grows.
    """
    mixer = keys["model.pattern"][0]
    size = None if mixer == "attention" else state_size(keys)
    return {"state_numbers": size, "train": {**keys, **flat(training[mixer])}}
