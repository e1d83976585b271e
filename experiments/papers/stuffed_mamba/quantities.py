"""What tables and claims compute from Stuffed Mamba's records."""

from collections.abc import Callable
from typing import Any

from tilescan.experiments.harness.groups import Group, by
from tilescan.experiments.harness.records import Record, Records
from tilescan.experiments.harness.statistics import Spread, spread
from tilescan.experiments.measurements.collapse_readings import (
    over_control,
    recall_length,
    safe_length,
)
from tilescan.experiments.measurements.state_collapse import NONE
from tilescan.experiments.papers.stuffed_mamba.cells import MITIGATE, READ, RECALL
from tilescan.experiments.papers.stuffed_mamba.training import STREAM

Losses = dict[str, float]  # {"within", "beyond": the mean loss before T and before 4 T}


def read(records: Records, kind: str) -> Records:
    """Returns the readings of models whose state was not carried over rows."""
    return records.select(measure=READ, kind=kind, carry=1)


def recalls(records: Records) -> Records:
    """Returns the answers of models whose state was not carried over rows."""
    return records.select(measure=RECALL, carry=1)


def name_of(group: Group) -> str:
    """Returns a model in words."""
    (layers, width), dims = (group.first.settings[k] for k in ("size", "state_dim"))
    return f"{layers} layers, width {width}, N={dims}"


def mean_of(number: Callable[[Record], float], **settings: Any) -> Callable[[Group], Spread | None]:
    """Returns the function of a group: mean and std of a number of its records with settings."""
    return lambda group: spread(map(number, group.select(**settings).records))


def recall_lengths(answers: Records) -> dict[int, list[int]]:
    """Returns {state elements: the longest `recall_length` over training lengths, of each seed}."""
    best: dict[int, dict[int, int]] = {}
    for r in answers:
        seeds = best.setdefault(r.settings["state_elements"], {})
        seeds[r.seed] = max(seeds.get(r.seed, 0), recall_length(r))
    return {n: [seeds[seed] for seed in sorted(seeds)] for n, seeds in sorted(best.items())}


def safe_lengths(records: Records) -> dict[int, list[float]]:
    """Returns {state elements: the safe length of each seed that is complete}.

    Safe is the smallest training length from which on none collapses; inf: there is none.
    """
    readings, found = read(records, STREAM), {}
    lengths = readings.values("train_length")
    judged = over_control(readings)
    for group in by(readings, "state_elements"):
        seeds = sorted({record.seed for record in group.records})
        of_seeds = [[r for r in group.records if r.seed == seed] for seed in seeds]
        complete = [rs for rs in of_seeds if len(rs) == len(lengths)]
        found[group.key] = [safe_length(rs, judged) for rs in complete]
    return found


def mitigations(records: Records) -> dict[str, dict[int, Losses]]:
    """Returns {mitigation: {seed: losses}}, those by training last."""
    found: dict[str, dict[int, Losses]] = {}
    for record in records.select(measure=MITIGATE):
        for name, losses in record.result.items():
            found.setdefault(name, {})[record.seed] = losses
    return found


def excess_cuts(records: Records) -> dict[str, Spread]:
    """Returns {mitigation: share of the excess loss at four training lengths that it takes away}.

    The excess is a model's loss in the last half training length before 4 T, above its own before
    T; the share is of that of the model of the same seed without mitigation.
    """
    found = mitigations(records)
    plain, cuts = found.pop(NONE, {}), {}
    excess = lambda losses: losses["beyond"] - losses["within"]
    for name, of_seeds in found.items():
        known = [s for s in sorted(of_seeds) if s in plain and excess(plain[s]) > 0]
        cuts[name] = spread(1 - excess(of_seeds[s]) / excess(plain[s]) for s in known)
    return {name: cut for name, cut in cuts.items() if cut}
