"""Tables and figures: what laws predict of published curves, and of runs of this code."""

from collections.abc import Callable

import numpy as np

from tilescan.experiments.harness.figures import line_chart
from tilescan.experiments.harness.groups import Group, by, first
from tilescan.experiments.harness.records import Records
from tilescan.experiments.harness.statistics import Spread, spread
from tilescan.experiments.harness.tables import MEASURED, STATIC, Column, Table, columns, table
from tilescan.experiments.measurements.loss_curves import (
    ANNEALING,
    AREA,
    STEPS,
    Fitted,
    fitted,
    thinned,
)

NAMES = {ANNEALING: "the law", AREA: "without annealing", STEPS: "power law in steps"}
SCHEDULES = {
    "cosine": "cosine",
    "constant": "constant",
    "wsd": "WSD, last fifth linear",
    "wsd_sqrt": "WSD, last tenth 1 - sqrt",
    "two_step": "two steps down",
    "rewarmed": "cosine, re-warmed",
    "hot": "cosine from ten times the peak",
    "idle": "linear to 0, then 0",
}
LIMITS = ("hot", "idle")  # schedules for which the law is known to fail
# Of the published curves.
DRAWN = ("cosine_24000", "constant_24000", "cosine_72000", "wsd_20000_24000", "wsdcon_3")
PARAMETERS = {"L0": "L0", "A": "A", "C": "C", "alpha": "alpha"}


def tables(records: Records) -> list[Table]:
    """Returns laws of published curves, their errors by curve, and those of own runs."""
    published, own = map(records.kind, ("published", "own"))
    mean = lambda law: lambda g: 100 * np.mean(list(g.first.result["errors"][law].values()))
    of = lambda name: lambda g: g.first.result["laws"][ANNEALING][name]
    size = Column("parameters", of=lambda g: f"{g.key}M")
    by_seed = fitted(own)
    of_law = lambda law: lambda g: _error(by_seed, law, g.key)
    return [
        table(
            "published-curves",
            "Published curves: laws fitted to a cosine and a constant rate, mean error on others",
            by(published, "size"),
            [
                size,
                *columns(MEASURED, {title: of(name) for name, title in PARAMETERS.items()}),
                Column("R^2 of the fit", MEASURED, digits=4, of=lambda g: g.first.result["r2"]),
                *columns(MEASURED, {NAMES[law]: mean(law) for law in NAMES}, "%", 2),
            ],
            first(
                published,
                "27 curves of language models trained elsewhere (24,000 or 72,000 steps, peak "
                "3e-4), fitted to {fitted[0]} and {fitted[1]}, lambda {decay}; seven others each. ",
            ),
        ),
        table(
            "published-errors",
            "Published curves: mean absolute error of the law on each",
            [(name, published) for name in _curves(published)],
            [
                Column("curve", of=lambda row: row[0]),
                *columns(
                    MEASURED,
                    {f"{n}M": _error_at(n) for n in published.values("size")},
                    "%",
                    2,
                ),
            ],
        ),
        table(
            "own-runs",
            "Runs of this code: mean absolute error of laws, fitted to two schedules of each seed",
            by(own, "schedule", order=(SCHEDULES,)),
            [
                Column("schedule", of=lambda g: SCHEDULES[g.key]),
                Column("use", STATIC, of=_use),
                Column("last loss", MEASURED, digits=4, of=_last),
                *columns(MEASURED, {NAMES[law]: of_law(law) for law in NAMES}, "%", 2),
                Column("seeds", MEASURED, of=len),
            ],
            first(
                own,
                "Byte-level language models, {train.steps} steps of {data.batch_size} rows of "
                "{data.seq_len} bytes, validation every {train.eval_every} steps, lambda {decay}. ",
            ),
        ),
    ]


def figures(records: Records) -> dict[str, str]:
    """Returns measured losses and the law's, of published curves and of one seed's runs."""
    published, own = map(records.kind, ("published", "own"))
    panels = {
        f"{group.key}M": _lines({name: group.first.result["curves"][name] for name in DRAWN})
        for group in by(published, "size")
    }
    caption = "Published losses, and the law's (dashed) by the first two of the curves."
    found = {"published-curves": _chart(panels, caption)} if panels else {}
    for seed, runs in list(fitted(own).items())[:1]:
        law, curves = runs.laws[ANNEALING], runs.curves
        made = {SCHEDULES[n]: thinned(law, curves[n]) for n in SCHEDULES if n in curves}
        halves = {
            "schedules": {n: x for n, x in made.items() if n not in _limits()},
            "where the law fails": {n: x for n, x in made.items() if n in _limits()},
        }
        panels = {title: _lines(curves) for title, curves in halves.items() if curves}
        caption = f"Validation losses of seed {seed}, and the law's (dashed) by the first two."
        found["own-runs"] = _chart(panels, caption)
    return found


def _limits() -> set[str]:
    return {SCHEDULES[name] for name in LIMITS}


def _lines(curves: dict[str, dict[str, list[float]]]) -> dict:
    """Measured and predicted lines of some curves, without their steep beginnings."""
    lines = {}
    for name, curve in curves.items():
        shown = [i for i, loss in enumerate(curve["losses"]) if loss <= 1.2 * min(curve["losses"])]
        steps = [curve["steps"][i] for i in shown]
        lines[name] = steps, [curve["losses"][i] for i in shown]
        lines[f"{name}, law"] = steps, [curve["law"][i] for i in shown]
    return lines


def _chart(panels: dict, caption: str) -> str:
    dashed = {name for lines in panels.values() for name in lines if name.endswith(", law")}
    options = dict(x_label="steps", y_label="validation loss", markers=False, share_y=False)
    return line_chart(panels, dashed=sorted(dashed), caption=caption, **options)


def _curves(published: Records) -> list[str]:
    names = {name for r in published for name in r.result["errors"][ANNEALING]}
    return sorted(names)


def _error_at(size: int) -> Callable[[tuple[str, Records]], float | None]:
    def error(row: tuple[str, Records]) -> float | None:
        record = next(iter(row[1].select(size=size)), None)
        return record and 100 * record.result["errors"][ANNEALING][row[0]]

    return error


def _error(by_seed: dict[int, Fitted], law: str, schedule: str) -> Spread | None:
    runs = [found for found in by_seed.values() if schedule in found.curves]
    return spread(100 * found.error(law, schedule) for found in runs)


def _last(group: Group) -> Spread | None:
    return spread(record.result["losses"][-1] for record in group.records)


def _use(group: Group) -> str:
    if group.key in group.first.settings["fitted"]:
        return "fitted"
    return "beyond the law" if group.key in LIMITS else "predicted"
