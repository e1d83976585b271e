"""The few statistics that tables and claims need."""

import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence


@dataclasses.dataclass(frozen=True)
class Spread:
    """A number and its standard deviation over seeds or rounds (std is None for one of them).

    Attributes:
      mean: over seeds; of times, the ratio of two medians over rounds.
    """

    mean: float
    std: float | None
    count: int


def spread(values: Iterable[float]) -> Spread | None:
    """Returns mean ± sample standard deviation of the values, None when there are none."""
    values = [float(value) for value in values]
    if not values:
        return None
    std = statistics.stdev(values) if len(values) > 1 else None
    return Spread(statistics.fmean(values), std, len(values))


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    """Returns numerator / denominator, None when one is missing or the denominator is 0."""
    if not isinstance(numerator, int | float) or not isinstance(denominator, int | float):
        return None
    return numerator / denominator if denominator else None


def log_slope(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Returns the least-squares slope of log y over log x, None for fewer than two points."""
    if len(x) < 2:
        return None
    x, y = [math.log(v) for v in x], [math.log(v) for v in y]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    top = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return top / sum((a - mean_x) ** 2 for a in x)
