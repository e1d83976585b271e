"""What records of readings say of state collapse, of its heads and of recall.

A record is of a model that was read `times` its "train_length", in buckets of "width" positions;
its result has "loss" by bucket, "first_token", "untrained" and "state_variance" by head, as
`papers.stuffed_mamba.cells.read` makes them.
"""

import itertools
import math
from collections.abc import Callable

import numpy as np

from tilescan.experiments.harness.records import Record, Records
from tilescan.experiments.harness.statistics import Spread, spread
from tilescan.experiments.measurements import state_collapse
from tilescan.experiments.measurements.state_collapse import COLLAPSE, NONE

Losses = dict[str, float]  # {"within", "beyond": the mean loss before T and before 4 T}
RECALLED = 0.95  # share of right answers that counts as recalled, as in the paper


def before_of(record: Record) -> float:
    """Returns the mean loss in the second half of the training length."""
    within = record.settings["train_length"] // record.settings["width"]
    return float(np.mean(record.result["loss"][within // 2 : within]))


def beyond_of(record: Record, length: int | None = None) -> float:
    """Returns the mean loss beyond a training length, by default the record's own.

    Buckets count as far as a model with this training length is read: of any model the same ones.
    """
    s = record.settings
    within = (length or s["train_length"]) // s["width"]
    return float(np.mean(record.result["loss"][within : s["times"] * within]))


def rise_of(record: Record) -> float:
    """Returns `beyond_of` over `before_of`.

    Means over buckets: of many with few tokens each the greatest one is the noisiest. The first
    half of the training length is left out: with little to recall its loss is nearly 0.
    """
    return beyond_of(record) / before_of(record)


def over_control(readings: Records) -> Callable[[Record], float]:
    """Returns the function of a record: its loss beyond its training length over the control's.

    The control has the same size and seed, and is trained at the longest of the lengths; it is read
    in the same buckets. NaN where it is missing.
    """
    longest = max(readings.values("train_length"), default=0)
    controls = {
        (r.settings["state_elements"], r.seed): r for r in readings.select(train_length=longest)
    }

    def of(record: Record) -> float:
        control = controls.get((record.settings["state_elements"], record.seed))
        same = record.settings["train_length"]
        return beyond_of(record) / beyond_of(control, same) if control else math.nan

    return of


def kept_of(record: Record) -> float:
    """Returns the share of the first token that the tenth of the heads that keeps most keeps."""
    return state_collapse.kept_by_top(record.result["first_token"][0])


def untrained_of(record: Record) -> float:
    """Returns the same of the model before its training, on the same rows."""
    return state_collapse.kept_by_top(record.result["untrained"])


def growth_of(record: Record) -> float:
    """Returns how much the variance of the 95% head's states grows beyond the training length."""
    return state_collapse.growth_of_outliers(record.result["state_variance"])


def recall_length(record: Record) -> int:
    """Returns the longest prompt that, as all shorter ones, has RECALLED of its answers right."""
    longest = 0
    for length, share in sorted((int(n), share) for n, share in record.result.items()):
        if share < RECALLED:
            break
        longest = length
    return longest


def safe_length(readings: list[Record], over: Callable[[Record], float]) -> float:
    """Returns the least length from which on no reading collapses; the longest by its own rise.

    A reading collapses where its loss rises COLLAPSE times and is as many times the control's.

    Args:
      readings: of one model, a record for each training length.
      over: see `over_control`.
    """
    ranked = sorted(readings, key=lambda r: -r.settings["train_length"])
    times = [rise_of(ranked[0]), *(min(rise_of(r), over(r)) for r in ranked[1:])]
    pairs = zip(ranked, times, strict=True)
    safe = itertools.takewhile(lambda pair: pair[1] < COLLAPSE, pairs)
    return min((r.settings["train_length"] for r, _ in safe), default=math.inf)


def recall_lengths(answers: Records) -> dict[int, list[int]]:
    """Returns {state elements: the longest `recall_length` over training lengths, of each seed}."""
    best: dict[int, dict[int, int]] = {}
    for r in answers:
        seeds = best.setdefault(r.settings["state_elements"], {})
        seeds[r.seed] = max(seeds.get(r.seed, 0), recall_length(r))
    return {n: [seeds[seed] for seed in sorted(seeds)] for n, seeds in sorted(best.items())}


def mitigations(records: Records) -> dict[str, dict[int, Losses]]:
    """Returns {mitigation: {seed: losses}}, those by training last."""
    found: dict[str, dict[int, Losses]] = {}
    for record in records.select(measure="mitigate"):
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
