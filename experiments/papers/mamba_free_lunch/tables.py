"""Tables, claims and figures of "Can Mamba Always Enjoy the Free Lunch?".

The paper's own experiments are curves; no cell values are published, so columns are measured ones
beside the formulas of its theorems.
"""

import math
import statistics

import numpy as np

from tilescan.experiments.harness.claims import Claim, judge
from tilescan.experiments.harness.figures import line_chart
from tilescan.experiments.harness.records import Records
from tilescan.experiments.harness.statistics import Spread, spread
from tilescan.experiments.harness.tables import MEASURED, STATIC, Column, Table, format_value
from tilescan.experiments.measurements.training import examples_to
from tilescan.experiments.papers.mamba_free_lunch import copy_theory

SOLVED = 0.9  # share of whole strings right
FEWER = 3.0  # times fewer examples
PARITY = 0.02  # of the share of whole answers right
FIT = 0.99  # smallest R^2 of a law

Figures = dict[str, str]


def tables(records: Records) -> list[Table]:
    """Copying, dynamic programming, and the two theory tables."""
    made = [_copy_table(records), _dp_table(records), _score_table(records), _recall_table(records)]
    return [table for table in made if table.rows]


def _copies(records: Records, model: str, n_max: int) -> list:
    return list(records.select(kind="copy", model=model, n_max=n_max))


def _exact(found: list) -> Spread | None:
    return spread(100 * record.result["test_exact"] for record in found)


def _examples(found: list) -> str | float | None:
    """Mean examples to SOLVED, or the budget with ">" if some seed never got there."""
    needed = [examples_to(record.result, SOLVED) for record in found]
    if not needed:
        return None
    if None in needed:
        reached = sum(n is not None for n in needed)
        budget = found[0].result["examples"][-1]
        return f"> {budget:,} ({reached} of {len(needed)} seeds reached it)"
    return statistics.fmean(needed)


def _models(records: Records, kind: str) -> list[str]:
    """Transformer first, then by state."""
    found = {r.settings["model"]: r.settings["state_numbers"] for r in records.select(kind=kind)}
    return sorted(found, key=lambda name: (found[name] is not None, found[name] or 0, name))


def _copy_table(records: Records) -> Table:
    found = records.select(kind="copy")
    lengths = found.values("n_max")
    rows = []
    for model in _models(records, "copy"):
        first = next(iter(found.select(model=model)))
        row = [model, first.settings["state_numbers"], first.result["params"]]
        for n_max in lengths:
            runs = _copies(records, model, n_max)
            row += [_exact(runs), _examples(runs)]
        rows.append(row)
    columns = [
        Column("model"),
        Column("numbers in the state", STATIC),
        Column("parameters", STATIC),
    ]
    for n in lengths:
        columns.append(Column(f"strings of {n} copied", MEASURED, "%"))
        columns.append(Column(f"examples to {SOLVED:.0%}, up to {n}", MEASURED))
    return Table(
        "copy",
        "Copying: whole strings right, and examples needed",
        columns,
        rows,
        note="Random strings over 26 letters of uniform length up to the number given, "
        "<BOS> string <COPY> string <EOS>, loss on the copy, new examples at every step; tested on "
        "strings of the greatest length. A string counts when every letter of it is right. "
        "Attention keeps all tokens, so its state has no fixed size.",
    )


def _dp_table(records: Records) -> Table:
    found = records.select(kind="dp")
    models = _models(records, "dp")
    rows = []
    for task in found.values("label"):
        runs = [found.select(label=task, model=model) for model in models]
        rows.append([task, *(_exact(list(r)) for r in runs)])
    return Table(
        "dynamic-programming",
        "Dynamic programming with and without the steps written out: whole answers right",
        [Column("task"), *(Column(model, MEASURED, "%") for model in models)],
        rows,
        note="With steps, all of them and the answer must be right; direct, the answer alone.",
    )


def _score_table(records: Records) -> Table:
    found = list(records.select(kind="score"))
    lengths = sorted({n for r in found for n in r.result["lengths"]})
    found.sort(key=lambda r: (r.settings["mechanism"], r.settings.get("decay") or 0))
    rows = []
    for length in lengths:
        row = [str(length)]
        for record in found:
            scores = dict(zip(record.result["lengths"], record.result["scores"], strict=True))
            row += [scores.get(length), _formula(record.settings, length)]
        rows.append(row)
    columns = [Column("distance")]
    for record in found:
        name = _mechanism(record.settings)
        columns += [Column(name, MEASURED, digits=4), Column(f"{name}, formula", STATIC, digits=4)]
    return Table(
        "score",
        "Theorems 1 and 2: the smallest score that copies from a distance",
        columns,
        rows,
        note="Found by bisection on what the ops put out. Formulas: log(L (2 / tolerance - 1)) for "
        "attention, (1 - tolerance) decay^-L for a state. – : beyond what float32 holds.",
    )


def _mechanism(settings) -> str:
    if settings["mechanism"] == copy_theory.ATTENTION:
        return "attention"
    return f"state, decay {settings['decay']:g}"


def _formula(settings, length: int) -> float:
    tolerance = settings["tolerance"]
    if settings["mechanism"] == copy_theory.ATTENTION:
        return math.log(length * (2 / tolerance - 1))
    return (1 - tolerance) * settings["decay"] ** -length


def _recall_table(records: Records) -> Table:
    record = records.one(kind="recall")
    names = (copy_theory.ATTENTION, copy_theory.STATE)
    rows = []
    if record:
        columns = [record.result[name] for name in ("items", *names)]
        rows = [[str(n), 100 * a, 100 * s] for n, a, s in zip(*columns, strict=True)]
    size = record.settings["state_dim"] if record else 0
    return Table(
        "recall",
        f"Theorem 3: items recalled from a state with room for {size} orthogonal keys",
        [
            Column("items stored"),
            Column("attention", MEASURED, "%"),
            Column("state without decay", MEASURED, "%"),
        ],
        rows,
        note="Keys are orthonormal while there are no more items than dimensions, then random.",
    )


def claims(records: Records) -> list[Claim]:
    """What the paper says of copying, of dynamic programming, and of its two laws."""
    return [
        _fewer_examples(records),
        _state_limits(records),
        _state_helps(records),
        _local_parity(records),
        _longer_steps(records),
        *_laws(records),
        judge(
            "70M parameters",
            "A Transformer of 70M parameters copies up to 40 tokens where Mamba fails (figure 2).",
            "whole strings of 40 right, at 70M parameters",
            None,
            "not run",
            needs="accelerator",
        ),
    ]


def _fewer_examples(records: Records) -> Claim:
    found = records.select(kind="copy")
    attention = [m for m in _models(records, "copy") if m.startswith("Transformer")]
    holds, evidence = None, ""
    solved = [
        n
        for n in found.values("n_max")
        for model in attention
        if (mean := _exact(_copies(records, model, n))) and mean.mean >= 100 * SOLVED
    ]
    others = [m for m in _models(records, "copy") if m not in attention]
    if solved and others:
        longest = max(solved)
        ours = [examples_to(r.result, SOLVED) for r in _copies(records, attention[0], longest)]
        slow = max((n for n in ours if n), default=None)
        ratios = {}
        for model in others:
            theirs = _copies(records, model, longest)
            # A model that never got there needs more than its budget.
            needed = [examples_to(r.result, SOLVED) or r.result["examples"][-1] for r in theirs]
            if needed and slow:
                ratios[model] = min(needed) / slow
        holds = bool(ratios) and min(ratios.values()) >= FEWER
        listed = ", ".join(f"{model} {value:.1f}" for model, value in ratios.items())
        evidence = f"times the Transformer's slowest seed, at {longest} tokens, at least: {listed}"
    elif others and attention:
        holds, evidence = False, "the Transformer solved no length within its budget"
    return judge(
        "attention copies with fewer examples",
        "A Transformer learns to copy from fewer examples than Mamba.",
        f"at the longest strings that the Transformer solves ({SOLVED:.0%} right), the fastest "
        f"seed of every Mamba needs at least {FEWER:g} times the examples of its slowest seed",
        holds,
        evidence,
    )


def _by_state(records: Records) -> list[str]:
    return [m for m in _models(records, "copy") if m.startswith("Mamba-2")]


def _state_limits(records: Records) -> Claim:
    models, lengths = _by_state(records), records.select(kind="copy").values("n_max")
    holds, evidence = None, ""
    if models and len(lengths) > 1:
        exact = [_exact(_copies(records, models[0], n)) for n in lengths]
        if all(exact):
            drop, margin = _difference(exact[0], exact[-1])
            holds = drop > 2 * margin and drop > 0
            parts = zip(lengths, exact, strict=True)
            evidence = ", ".join(f"{format_value(e)}% at {n}" for n, e in parts)
            evidence = f"{models[0]}: {evidence}"
    return judge(
        "a fixed state limits the length",
        "At a fixed state size Mamba copies less the longer the strings are.",
        "whole strings right fall from the shortest to the longest setting by more than twice the "
        "larger standard deviation over seeds, with the smallest state",
        holds,
        evidence,
    )


def _state_helps(records: Records) -> Claim:
    models, lengths = _by_state(records), records.select(kind="copy").values("n_max")
    holds, evidence = None, ""
    if len(models) > 1 and lengths:
        exact = [_exact(_copies(records, m, lengths[-1])) for m in models]
        if all(exact):
            gain, margin = _difference(exact[-1], exact[0])
            holds = gain > 2 * margin and gain > 0
            parts = zip(models, exact, strict=True)
            evidence = ", ".join(f"{m} {format_value(e)}%" for m, e in parts)
            evidence = f"strings of {lengths[-1]}: {evidence}"
    return judge(
        "a larger state copies more",
        "A state that grows with the strings is enough (theorem 3).",
        "at the longest strings whole ones right rise from the smallest to the largest state by "
        "more than twice the larger standard deviation over seeds",
        holds,
        evidence,
    )


def _difference(high: Spread, low: Spread) -> tuple[float, float]:
    return high.mean - low.mean, max(high.std or 0.0, low.std or 0.0)


def _dp_exact(records: Records, model_start: str, **settings) -> Spread | None:
    found = [
        r
        for r in records.select(kind="dp", **settings)
        if r.settings["model"].startswith(model_start)
    ]
    return _exact(found)


def _local_parity(records: Records) -> Claim:
    ours = _dp_exact(records, "Transformer", local=True)
    theirs = _dp_exact(records, "Mamba", local=True)
    known = ours is not None and theirs is not None
    return judge(
        "local steps",
        "Where a step needs only the last few ones, a small Mamba is as good (theorem 5).",
        f"Mamba's whole answers right are at most {100 * PARITY:g} points below the Transformer's",
        theirs.mean >= ours.mean - 100 * PARITY if known else None,
        f"Mamba {format_value(theirs)}%, Transformer {format_value(ours)}%" if known else "",
    )


def _longer_steps(records: Records) -> Claim:
    ours = _dp_exact(records, "Transformer", local=False, steps_written=True)
    theirs = _dp_exact(records, "Mamba", local=False, steps_written=True)
    known = ours is not None and theirs is not None
    holds = None
    if known:
        gap, margin = _difference(ours, theirs)
        holds = gap > 0 and gap > 2 * margin
    return judge(
        "steps that look far back",
        "Written steps that need the whole input favour the Transformer.",
        "whole answers right with written steps: the Transformer's are above Mamba's by more than "
        "twice the larger standard deviation over seeds",
        holds,
        f"Transformer {format_value(ours)}%, Mamba {format_value(theirs)}%" if known else "",
    )


def _laws(records: Records) -> list[Claim]:
    made = []
    for record in records.select(kind="score"):
        lengths = np.array(record.result["lengths"], float)
        scores = np.array(record.result["scores"], float)
        attention = record.settings["mechanism"] == copy_theory.ATTENTION
        x, y = (np.log(lengths), scores) if attention else (lengths, np.log(scores))
        want = 1.0 if attention else -math.log(record.settings["decay"])
        slope, r2 = fit(x, y)
        made.append(
            judge(
                f"required score, {_mechanism(record.settings)}",
                "Attention's score grows as log L (theorem 2)."
                if attention
                else "A decaying state's score grows as (1/decay)^L (theorem 1).",
                f"straight line with R^2 >= {FIT} and the theorem's slope {want:.4g} within 1%",
                r2 >= FIT and abs(slope - want) <= 0.01 * want,
                f"slope {slope:.4g}, R^2 {r2:.5f}",
            )
        )
    return made


def fit(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """(slope, R^2) of the least-squares line."""
    slope, offset = np.polyfit(x, y, 1)
    residual = np.sum((y - slope * x - offset) ** 2)
    return float(slope), float(1 - residual / np.sum((y - np.mean(y)) ** 2))


def figures(records: Records) -> Figures:
    """Learning curves of copying, and the required score against distance."""
    made = {}
    panels: dict[str, dict] = {}
    for n_max in records.select(kind="copy").values("n_max"):
        lines = panels.setdefault(f"strings up to {n_max}", {})
        for model in _models(records, "copy"):
            found = _copies(records, model, n_max)
            if found:
                curves = np.array([r.result["validation_exact"] for r in found])
                lines[model] = (found[0].result["examples"], list(100 * curves.mean(axis=0)))
    if panels:
        made["copy-against-examples"] = line_chart(
            panels, x_label="examples", y_label="whole strings right (%)"
        )
    scores = {
        _mechanism(r.settings): (r.result["lengths"], r.result["scores"])
        for r in records.select(kind="score")
    }
    if scores:
        made["score-against-distance"] = line_chart(
            {"": scores}, x_label="distance (tokens)", y_label="score", log_x=True, log_y=True
        )
    return made
