"""Tables and figures.

The paper's own experiments are curves; no cell values are published, so columns are measured ones
beside the formulas of its theorems.
"""

import math
import statistics
from collections.abc import Mapping
from typing import Any

import numpy as np

from tilescan.experiments.harness.figures import line_chart
from tilescan.experiments.harness.groups import Group, by
from tilescan.experiments.harness.records import Record, Records
from tilescan.experiments.harness.statistics import Spread
from tilescan.experiments.harness.tables import MEASURED, STATIC, Column, Table, columns, table
from tilescan.experiments.measurements import copying
from tilescan.experiments.measurements.learning_curves import needed

SOLVED = 0.9  # share of whole strings right


def tables(records: Records) -> list[Table]:
    """Returns copying, dynamic programming, and the two tables of theorems."""
    copies, dp, scores, recalls = map(records.kind, ("copy", "dp", "score", "recall"))
    return [_copy(copies), _dynamic_programming(dp), _score(scores), *map(_recall, recalls)]


def models(records: Records) -> list[str]:
    """Returns the models of some records: the Transformer first, then by state."""
    sizes = {r.settings["model"]: r.settings["state_numbers"] for r in records}
    return sorted(sizes, key=lambda name: (sizes[name] is not None, sizes[name] or 0, name))


def exact(group: Group) -> Spread | None:
    """Returns the share of whole answers right in percent, over seeds."""
    return group.mean_std("test_exact", 100)


def _copy(copies: Records) -> Table:
    shown = [
        Column("model", of=lambda g: g.key),
        Column("numbers in the state", STATIC, of=lambda g: g.first.settings["state_numbers"]),
        Column("parameters", STATIC, of=lambda g: g.first.result["params"]),
    ]
    for n in copies.values("n_max"):
        copied = lambda g, n=n: exact(g.select(n_max=n))
        reached = lambda g, n=n: _examples(g.select(n_max=n))
        shown.append(Column(f"strings of {n} copied", MEASURED, "%", of=copied))
        shown.append(Column(f"examples to {SOLVED:.0%}, up to {n}", MEASURED, of=reached))
    return table(
        "copy",
        "Copying: whole strings right, and examples needed",
        by(copies, "model", order=(models(copies),)),
        shown,
        "Random strings over 26 letters of uniform length up to the number given, "
        "<BOS> string <COPY> string <EOS>, loss on the copy, new examples at every step; tested on "
        "strings of the greatest length. A string counts when every letter of it is right. "
        "Attention keeps all tokens, so its state has no fixed size. Budgets and rates are each "
        "model's own. The paper has the first Mamba, here it is Mamba-2 where not said.",
    )


def _examples(group: Group) -> str | float | None:
    """Returns the mean examples to SOLVED, or the budget with ">" if a seed never got there."""
    examples = needed(group.records, SOLVED)
    if None not in examples:
        return statistics.fmean(examples) if examples else None
    reached = sum(n is not None for n in examples)
    budget = group.first.result["examples"][-1]
    return f"> {budget:,} ({reached} of {len(examples)} seeds reached it)"


def _dynamic_programming(dp: Records) -> Table:
    of_models = {m: lambda g, m=m: exact(g.select(model=m)) for m in models(dp)}
    direct = len(dp.values("steps_written")) > 1
    both = "with and without" if direct else "with"
    return table(
        "dynamic-programming",
        f"Dynamic programming {both} the steps written out: whole answers right",
        by(dp, "label"),
        [Column("task", of=lambda g: g.key), *columns(MEASURED, of_models, "%")],
        f"All steps and the answer must be right{'; direct, the answer alone' * direct}. The rate "
        "is the model's of copying (the paper's a sweep each). At scale cpu the LIS first had "
        "1,500 steps and three seeds, by which the Transformer did not solve it; 3,000 steps, then "
        "two seeds more, were decided on after these.",
    )


def _score(found: Records) -> Table:
    ranked = sorted(found, key=lambda r: (r.settings["mechanism"], r.settings.get("decay") or 0))
    shown = [Column("distance", of=str)]
    for record in ranked:
        name = mechanism(record.settings)
        scores = dict(zip(record.result["lengths"], record.result["scores"], strict=True))
        formula = lambda length, s=record.settings: _formula(s, length)
        shown.append(Column(name, MEASURED, digits=4, of=scores.get))
        shown.append(Column(f"{name}, formula", STATIC, digits=4, of=formula))
    return table(
        "score",
        "Theorems 1 and 2: the smallest score that copies from a distance",
        sorted({n for r in ranked for n in r.result["lengths"]}),
        shown,
        "Found by bisection on what the ops put out. Formulas: log(L (2 / tolerance - 1)) for "
        "attention, (1 - tolerance) decay^-L for a state. – : beyond what float32 holds.",
    )


def mechanism(settings: Mapping[str, Any]) -> str:
    """Returns what copies in a cell of theorems 1 and 2."""
    if settings["mechanism"] == copying.ATTENTION:
        return "attention"
    return f"state, decay {settings['decay']:g}"


def _formula(settings: Mapping[str, Any], length: int) -> float:
    tolerance = settings["tolerance"]
    if settings["mechanism"] == copying.ATTENTION:
        return math.log(length * (2 / tolerance - 1))
    return (1 - tolerance) * settings["decay"] ** -length


def _recall(record: Record) -> Table:
    values = (record.result[name] for name in ("items", copying.ATTENTION, copying.STATE))
    return table(
        "recall",
        f"Theorem 3: items recalled from a state with room for {record.settings['state_dim']} "
        "orthogonal keys",
        zip(*values, strict=True),
        [
            Column("items stored", of=lambda row: str(row[0])),
            Column("attention", MEASURED, "%", of=lambda row: 100 * row[1]),
            Column("state without decay", MEASURED, "%", of=lambda row: 100 * row[2]),
        ],
        "Keys are orthonormal while there are no more items than dimensions, then random.",
    )


def figures(records: Records) -> dict[str, str]:
    """Returns learning curves of copying, and the required score against distance."""
    curves = {}
    for copies in by(records.kind("copy"), "n_max"):
        lines = curves[f"strings up to {copies.key}"] = {}
        for g in by(copies.records, "model", order=(models(records.kind("copy")),)):
            right = 100 * np.mean([r.result["validation_exact"] for r in g.records], axis=0)
            lines[g.key] = (g.first.result["examples"], list(right))
    scores = {
        mechanism(r.settings): (r.result["lengths"], r.result["scores"])
        for r in records.kind("score")
    }
    labels = dict(
        x_label="distance (tokens)", y_label="smallest score that copies", log_x=True, log_y=True
    )
    return {
        "copy": line_chart(curves, x_label="examples seen", y_label="whole strings right (%)"),
        "score": line_chart({"": scores}, **labels),
    }
