"""What tables and claims compute from Stuffed Mamba's records."""

from collections.abc import Callable
from typing import Any

from tilescan.experiments.harness.groups import Group, by
from tilescan.experiments.harness.records import Record, Records
from tilescan.experiments.harness.statistics import Spread, spread
from tilescan.experiments.measurements.collapse_readings import over_control, safe_length
from tilescan.experiments.papers.stuffed_mamba.cells import READ, RECALL
from tilescan.experiments.papers.stuffed_mamba.training import STREAM


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
