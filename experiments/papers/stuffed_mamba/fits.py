"""The two fits of "Stuffed Mamba": a straight line, and an exponential through the origin."""

import numpy as np
from jaxtyping import Float

# 97.5% points of Student's distribution with 1, 2, ... degrees of freedom; 1.96 + 2.5 / n beyond.
_STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)


def line_fit(
    x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]
) -> tuple[float, float, float, float]:
    """(slope, both ends of its 95% interval, R^2) of the least-squares line.

    Raises:
      ValueError: fewer than three points, or all at one x.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    if len(x) < 3 or np.ptp(x) == 0:
        raise ValueError(f"a line needs three points at different x, got x={x}")
    slope, offset = np.polyfit(x, y, 1)
    rest = y - slope * x - offset
    free = len(x) - 2
    error = np.sqrt(np.sum(rest**2) / free / np.sum((x - x.mean()) ** 2))
    student = _STUDENT[free - 1] if free <= len(_STUDENT) else 1.96 + 2.5 / free
    return slope, slope - student * error, slope + student * error, _r2(y, rest)


def exponential_fit(
    x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]
) -> tuple[float, float, float]:
    """(scale, base, R^2) of the best scale * (base^x - 1), the base from a fine grid above 1.

    Raises:
      ValueError: fewer than three points, or an x that is not positive.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    if len(x) < 3 or x.min() <= 0:
        raise ValueError(f"the fit needs three points at x above 0, got x={x}")
    best = None
    for rate in np.geomspace(1e-3, 10, 4001) / x.max():
        grown = np.expm1(rate * x)
        scale = np.dot(grown, y) / np.dot(grown, grown)
        loss = np.sum((y - scale * grown) ** 2)
        if best is None or loss < best[0]:
            best = (loss, scale, rate)
    _, scale, rate = best
    return float(scale), float(np.exp(rate)), _r2(y, y - scale * np.expm1(rate * x))


def _r2(y, rest) -> float:
    total = np.sum((y - y.mean()) ** 2)
    return float(1 - np.sum(rest**2) / total) if total else 1.0
