"""Where a loss will be: an exponential fitted to the first steps at a constant learning rate.

    forecast(losses, at=1000)        # of losses at steps 0, 1, ..., 99

y(t) = a exp(b t) + c with b < 0 is fitted after outliers of the first half were left out and the
rest was smoothed by a quadratic spline (Jin et al. 2021, AutoLRS, arXiv 2105.10762, section 4 and
its code). Not as there: outliers are those far from a running median and not from a parabola, which
a fast fall is far from as well; and the spline follows losses as closely as their noise lets it.
"""

import warnings

import numpy as np
import scipy.interpolate
import scipy.ndimage
import scipy.optimize
from jaxtyping import Float

ROUNDS = 10  # of leaving outliers out
SHARE = 0.03  # of the losses that are left, each round


def forecast(
    losses: Float[np.ndarray, " N"], at: float, *, rounds: int = ROUNDS, most: int | None = None
) -> float:
    """Returns the loss that an exponential through smoothed losses has at step `at`.

    Args:
      losses: at steps 0, 1, ..., N - 1, finite.
      at: a step, in the unit of those.
      rounds: of leaving out outliers; 0 leaves none out. Validation losses need one.
      most: at most so many outliers a round; None: SHARE of those that are left.

    Raises:
      ValueError: fewer than four losses, or one that is not finite.
    """
    losses = np.asarray(losses, np.float64)
    if losses.ndim != 1 or len(losses) < 4 or not np.all(np.isfinite(losses)):
        raise ValueError(f"losses must be four or more finite numbers, got {losses!r}")
    a, b, c = exponential(*smoothed(losses, rounds, most))
    return float(a * np.exp(b * at) + c)


def smoothed(
    losses: Float[np.ndarray, " N"], rounds: int = ROUNDS, most: int | None = None
) -> tuple[Float[np.ndarray, " M"], Float[np.ndarray, " M"]]:
    """Returns steps and losses by a quadratic spline, without outliers of the first half.

    The losses far from a spline through all are outliers: at the beginning they are steps whose
    gradients were unlucky, at the end they are what is to be forecast.
    """
    count = len(losses)
    steps, kept = np.arange(count, dtype=np.float64), np.ones(count, bool)
    for _ in range(rounds):
        out = int(SHARE * kept.sum()) if most is None else most
        if out < 1 or kept.sum() - out < 4:
            break
        median = scipy.ndimage.median_filter(losses[kept], max(3, count // 10), mode="reflect")
        residuals = np.zeros(count)
        residuals[kept] = np.abs(losses[kept] - median)
        residuals[count // 2 :] = 0.0
        worst = np.argsort(residuals)[-out:]
        kept[worst[residuals[worst] > 0]] = False

    # Noise by third differences, which a smooth curve hardly has: of 1 sigma they have sqrt(20).
    thirds = np.diff(losses[kept], 3)
    noise = 1.4826 * np.median(np.abs(thirds)) / np.sqrt(20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of splines that reach a noise of almost 0 only nearly
        spline = scipy.interpolate.UnivariateSpline(
            steps[kept], losses[kept], k=2, s=kept.sum() * noise**2
        )
    return steps[kept], spline(steps[kept])


def exponential(
    steps: Float[np.ndarray, " N"], losses: Float[np.ndarray, " N"]
) -> tuple[float, float, float]:
    """Returns (a, b, c) of the best a exp(b t) + c, with b < 0, by least squares.

    For each b the best a and c are linear; b = -exp(beta) is found by a bounded search over beta,
    from a decay within a step to one within a hundred times the losses' length, where a and c would
    grow without bound.
    """
    count = len(losses)

    def linear(beta: float) -> tuple[np.ndarray, float]:
        basis = np.stack([np.exp(-np.exp(beta) * steps), np.ones(count)], 1)
        found, *_ = np.linalg.lstsq(basis, losses, rcond=None)
        return found, float(np.sum((basis @ found - losses) ** 2))

    bounds = np.log(1 / (100 * count)), 0.0
    grid = np.linspace(*bounds, 60)
    best = int(np.argmin([linear(beta)[1] for beta in grid]))
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    beta = scipy.optimize.minimize_scalar(
        lambda beta: linear(beta)[1], bounds=(low, high), method="bounded", options={"xatol": 1e-10}
    ).x
    (a, c), _ = linear(beta)
    return float(a), float(-np.exp(beta)), float(c)
