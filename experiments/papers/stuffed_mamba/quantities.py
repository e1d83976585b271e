"""What tables and claims compute from Stuffed Mamba's records."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from tilescan.experiments.harness.groups import Group, by
from tilescan.experiments.harness.records import Record, Records
from tilescan.experiments.harness.statistics import Spread, spread
from tilescan.experiments.measurements.state_collapse import COLLAPSE, judge_collapse
from tilescan.experiments.papers.stuffed_mamba.cells import MITIGATE, READ, RECALL
from tilescan.experiments.papers.stuffed_mamba.training import STREAM

RECALLED = 0.95  # share of right answers that counts as recalled, as in the paper
# Mitigations by training, beside those of cells.
CARRIED, LONGER = "carried", "longer"
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


def within_of(record: Record) -> float:
    """Returns the greatest loss within the training length."""
    return max(record.result["loss"][: record.settings["train_length"] // record.result["width"]])


def ratio_of(record: Record) -> float:
    """Returns the greatest loss beyond the training length over that within."""
    loss, width = record.result["loss"], record.result["width"]
    return judge_collapse(loss, width, record.settings["train_length"]).ratio


def kept_of(record: Record) -> float:
    """Returns the greatest share of the first token that a head keeps over the training length."""
    return math.exp(max(record.result["first_token"][0]))


def growth_of(record: Record) -> float:
    """Returns how much a head's variance of states grows beyond the training length, at most."""
    values = np.maximum(np.asarray(record.result["state_variance"]), 1e-30)
    return float(np.max(values[-1] / values[0]))


def recall_length(record: Record) -> int:
    """Returns the longest prompt that, as all shorter ones, has RECALLED of its answers right."""
    longest = 0
    for length, share in sorted((int(n), share) for n, share in record.result.items()):
        if share < RECALLED:
            break
        longest = length
    return longest


def safe_lengths(records: Records) -> dict[int, list[float]]:
    """Returns {state elements: the safe length of each seed that is complete}.

    Safe is the smallest training length from which on none collapses; inf: there is none.
    """
    readings, found = read(records, STREAM), {}
    lengths = readings.values("train_length")
    for group in by(readings, "state_elements"):
        seeds = sorted({record.seed for record in group.records})
        of_seeds = [[r for r in group.records if r.seed == seed] for seed in seeds]
        found[group.key] = [_safe_length(rs) for rs in of_seeds if len(rs) == len(lengths)]
    return found


def _safe_length(readings: list[Record]) -> float:
    safe = math.inf
    for record in sorted(readings, key=lambda r: -r.settings["train_length"]):
        if ratio_of(record) >= COLLAPSE:
            break
        safe = record.settings["train_length"]
    return safe


def mitigations(records: Records) -> dict[str, list[Losses]]:
    """Returns {mitigation: losses of each seed}, those by training last."""
    mitigated = records.select(measure=MITIGATE)
    names = dict.fromkeys(name for record in mitigated for name in record.result)
    found = {n: [r.result[n] for r in mitigated if n in r.result] for n in names}
    found |= {n: [m for r in mitigated for m in _trained(records, r, n)] for n in (CARRIED, LONGER)}
    return {name: losses for name, losses in found.items() if losses}


def _trained(records: Records, mitigated: Record, name: str) -> list[Losses]:
    """Returns losses of the model that was trained otherwise than the one that was mitigated."""
    s, longer = mitigated.settings, name == LONGER
    length, same = s["train_length"], {k: s[k] for k in ("kind", "state_elements")}
    others = records.select(measure=READ, train_length=4 * length if longer else length, **same)
    made = []
    for record in others:
        if record.seed == mitigated.seed and (record.settings["carry"] == 1) == longer:
            # Buckets of half the row's own length: that which ends at each place.
            loss, width = record.result["loss"], record.result["width"]
            within, beyond = (loss[-(-place // width) - 1] for place in (length, 4 * length))
            made.append({"within": within, "beyond": beyond})
    return made


def excess_cuts(records: Records) -> dict[str, Spread]:
    """Returns {mitigation: share of the excess loss at four training lengths that it takes away}.

    The excess is a model's loss in the last half training length before 4 T, above its own before
    T; the share is of that of the model without mitigation.
    """
    found = mitigations(records)
    plain, cuts = found.pop("none", []), {}
    for name, losses in found.items():
        pairs = zip(losses, plain, strict=True) if len(losses) == len(plain) else ()
        cuts[name] = spread(
            1 - (m["beyond"] - m["within"]) / (base["beyond"] - base["within"])
            for m, base in pairs
            if base["beyond"] != base["within"]
        )
    return {name: cut for name, cut in cuts.items() if cut}
