"""The few statistics that tables and claims need."""

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float


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


def scaled(value: Spread | None, unit: float) -> Spread | None:
    """Returns mean and standard deviation times `unit`, e.g. 100 for percent."""
    if value is None:
        return None
    return Spread(unit * value.mean, None if value.std is None else unit * value.std, value.count)


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    """Returns numerator / denominator, None when one is missing or the denominator is 0."""
    if not isinstance(numerator, int | float) or not isinstance(denominator, int | float):
        return None
    return numerator / denominator if denominator else None


def over(numerators: Mapping[Any, float], denominators: Mapping[Any, float]) -> dict[Any, float]:
    """Returns {key: ratio} of the keys of both."""
    found = {key: ratio(value, denominators.get(key)) for key, value in numerators.items()}
    return {key: value for key, value in found.items() if value is not None}


def log_slope(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Returns the least-squares slope of log y over log x, None for fewer than two points."""
    if len(x) < 2:
        return None
    x, y = [math.log(v) for v in x], [math.log(v) for v in y]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    top = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return top / sum((a - mean_x) ** 2 for a in x)


def line_fit(
    x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]
) -> tuple[float, float, float, float]:
    """Returns (slope, both ends of its 95% interval, R^2) of the least-squares line.

    Raises:
      ValueError: fewer than three points, or all at one x.
    """
    import scipy.stats  # which takes half a second to load

    x, y = np.asarray(x, float), np.asarray(y, float)
    if len(x) < 3 or np.ptp(x) == 0:
        raise ValueError(f"a line needs three points at different x, got x={x}")
    line = scipy.stats.linregress(x, y)
    student = round(float(scipy.stats.t.ppf(0.975, len(x) - 2)), 2)  # as tables print it
    margin = line.stderr * student
    r2 = float(line.rvalue**2) if np.ptp(y) else 1.0
    return float(line.slope), float(line.slope - margin), float(line.slope + margin), r2


def exponential_fit(
    x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]
) -> tuple[float, float, float]:
    """Returns (scale, base, R^2) of the best scale * (base^x - 1), the base above 1.

    The base is searched on a fine grid; the scale is then a least-squares one.

    Raises:
      ValueError: fewer than three points, or an x that is not positive.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    if len(x) < 3 or x.min() <= 0:
        raise ValueError(f"the fit needs three points at x above 0, got x={x}")
    rates = np.geomspace(1e-3, 10, 4001) / x.max()
    grown = np.expm1(rates[:, None] * x)
    scales = grown @ y / np.sum(grown**2, axis=1)
    losses = np.sum((y - scales[:, None] * grown) ** 2, axis=1)
    best = np.argmin(losses)
    total = np.sum((y - y.mean()) ** 2)
    r2 = float(1 - losses[best] / total) if total else 1.0
    return float(scales[best]), float(np.exp(rates[best])), r2
