"""Cells whose result is a whole loss curve, and laws that are fitted to some and predict others."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tilescan.data import sources
from tilescan.experiments.harness.records import Record, Records
from tilescan.experiments.harness.workspace import Workspace
from tilescan.experiments.measurements.training import metrics, parameters, training_config
from tilescan.training.annealing_law import Curve, Law, errors, fit, predict
from tilescan.training.loss_curves import parse_table
from tilescan.training.schedules import ScheduleConfig, first_peak, rates
from tilescan.training.train import train

# Laws that are compared, and the options of their fits.
ANNEALING, AREA, STEPS = "annealing", "area", "steps"
LAWS: dict[str, dict[str, bool]] = {
    ANNEALING: {},
    AREA: {"annealing": False},
    STEPS: {"annealing": False, "by_steps": True},
}
_POINTS = 60  # of a curve that a record of published ones keeps


def measure_loss_curve(
    settings: Mapping[str, Any], seed: int, workspace: Workspace
) -> dict[str, Any]:
    """Trains on text as `settings["train"]` says and returns its validation losses.

    Returns:
      {"steps": updates made, "losses": validation's then, "params"}.
    """
    config = training_config(settings["train"], seed)
    train(config, workspace.folder)
    rows = [row for row in metrics(workspace.folder, "validation") if row["step"]]
    return {
        "steps": [row["step"] for row in rows],
        "losses": [row["loss"] for row in rows],
        "params": parameters(config),
    }


def curve_of(record: Record) -> Curve:
    """Returns the curve of a record of `measure_loss_curve`."""
    train, fields = record.settings["train"], dataclasses.fields(ScheduleConfig)
    given = {field.name: train.get(f"optimizer.{field.name}", field.default) for field in fields}
    schedule = ScheduleConfig(**given | {"milestones": tuple(given["milestones"])})
    steps, losses = (np.array(record.result[name]) for name in ("steps", "losses"))
    count = train["train.steps"]
    warmup = first_peak(schedule, count)
    return Curve(rates(schedule, count), steps, losses, warmup, record.settings["schedule"])


class Fitted(NamedTuple):
    """Runs of one seed under several schedules, and the laws that some of them give.

    Attributes:
      curves: {schedule: its curve}.
      laws: {law: its fit}.
      seen: the schedules that were fitted to.
    """

    curves: dict[str, Curve]
    laws: dict[str, Law]
    seen: tuple[str, ...]

    def error(self, law: str, *schedules: str) -> float:
        """Returns the mean over schedules of a law's mean absolute relative error."""
        found = [mean_error(self.laws[law], self.curves[name]) for name in schedules]
        return statistics.fmean(found)

    def r_squared(self) -> float:
        """Returns the share of the variance of the fitted curves that the law explains."""
        return r_squared(self.laws[ANNEALING], [self.curves[name] for name in self.seen])


def fitted(records: Records) -> dict[int, Fitted]:
    """Returns {seed: laws fitted to records of `measure_loss_curve`}, of seeds that have them.

    Settings: "schedule", a name; "fitted", the names of those to fit to; "decay".
    """
    found = {}
    for seed in sorted({record.seed for record in records}):
        runs = [record for record in records if record.seed == seed]
        curves, settings = {r.settings["schedule"]: curve_of(r) for r in runs}, runs[0].settings
        seen = tuple(settings["fitted"])
        if set(seen) <= set(curves):
            laws = fit_laws([curves[name] for name in seen], settings["decay"])
            found[seed] = Fitted(curves, laws, seen)
    return found


def published_curves(size: int) -> dict[str, Curve]:
    """Reads {name: curve} of a model's size, in millions of parameters, from source "loss_curves".

    Raises:
      ValueError: another size.
      SourceError: the source's file is not there; says how to add it.
    """
    prefix = f"{size}/"
    names = {d.id.removeprefix(prefix): d.text for d in sources.load("loss_curves")}
    found = {name: parse_table(text, name) for name, text in names.items() if "/" not in name}
    if not found:
        raise ValueError(f"size={size}: the source loss_curves has no such curves")
    return found


def fit_published(settings: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Fits laws to two published curves of a size and predicts the others.

    Settings: "size", "fitted" (names of curves), "decay" of the annealing area.

    Returns:
      {"laws": {law: {"L0", "A", "C", "alpha"}}, "r2": of the fit of ANNEALING, "errors": {law:
      {curve: mean absolute relative error}} of the others, "curves": {name: {"steps", "losses",
      "law"}}, thinned}.
    """
    curves = published_curves(settings["size"])
    seen = [curves[name] for name in settings["fitted"]]
    unseen = {name: curve for name, curve in curves.items() if name not in settings["fitted"]}
    laws = fit_laws(seen, settings["decay"])
    return {
        "laws": {
            name: {key: getattr(law, key) for key in law._fields[:4]} for name, law in laws.items()
        },
        "r2": r_squared(laws[ANNEALING], seen),
        "errors": {
            name: {curve: mean_error(law, found) for curve, found in unseen.items()}
            for name, law in laws.items()
        },
        "curves": {name: thinned(laws[ANNEALING], curve) for name, curve in curves.items()},
    }


def fit_laws(seen: Sequence[Curve], decay: float) -> dict[str, Law]:
    """Returns {law: the fit of it} of LAWS, with one decay of the annealing area."""
    return {name: fit(seen, (decay,), **options) for name, options in LAWS.items()}


def mean_error(law: Law, curve: Curve) -> float:
    """Returns the mean absolute relative error of a law on a curve, after its warm-up."""
    return float(np.abs(errors(law, curve)).mean())


def r_squared(law: Law, curves: Sequence[Curve]) -> float:
    """Returns the share of the losses' variance that a law explains, of all curves together."""
    losses = [curve.losses[curve.steps > curve.warmup] for curve in curves]
    residuals = [loss * errors(law, curve) for loss, curve in zip(losses, curves, strict=True)]
    return float(1 - np.var(np.concatenate(residuals)) / np.var(np.concatenate(losses)))


def thinned(law: Law, curve: Curve) -> dict[str, list[float]]:
    """Returns some points of a curve after its warm-up, and what the law says there."""
    kept = np.flatnonzero(curve.steps > curve.warmup)
    kept = kept[np.unique(np.linspace(0, len(kept) - 1, _POINTS).astype(int))]
    found = predict(law, curve.rates, curve.warmup)[curve.steps[kept] - 1]
    return {
        "steps": curve.steps[kept].tolist(),
        "losses": curve.losses[kept].tolist(),
        "law": found.tolist(),
    }
