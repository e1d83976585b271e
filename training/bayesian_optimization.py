"""Bayesian optimization of one number: a Gaussian process and a lower confidence bound.

    search = Search(low=1e-4, high=1.0, seed=0)
    for _ in range(10):
        rate = search.ask()
        search.tell(rate, loss_of(rate))
    search.best

The number is searched on a logarithmic scale. The process has a Matern-5/2 kernel and noise; its
length and noise are those of the highest marginal likelihood on a grid, for normalized values
(Rasmussen and Williams 2006, algorithm 2.1, equations 4.17 and 5.8).
"""

import itertools
import math

import numpy as np
import scipy.linalg
from jaxtyping import Float

LENGTHS = np.geomspace(0.05, 2.0, 12)  # of the kernel, in widths of the interval
NOISES = (1e-6, 1e-4, 1e-2, 1e-1)  # variances, of values with variance 1
KAPPA = 1000.0  # of the lower confidence bound: almost only where least is known
_GRID = 501  # points that are asked from
_FAILED = 1e6  # stands for a loss that is not finite


def matern52(x: Float[np.ndarray, " N"], y: Float[np.ndarray, " M"], length: float):
    """Returns the Matern-5/2 kernel, [N, M], of amplitude 1."""
    r = math.sqrt(5) * np.abs(x[:, None] - y[None, :]) / length
    return (1 + r + r * r / 3) * np.exp(-r)


def posterior(
    x: Float[np.ndarray, " N"],
    y: Float[np.ndarray, " N"],
    at: Float[np.ndarray, " M"],
    length: float,
    noise: float,
) -> tuple[Float[np.ndarray, " M"], Float[np.ndarray, " M"], float]:
    """Returns mean and standard deviation at points, and the log marginal likelihood of y.

    The process has mean 0 and variance 1; `noise` is the variance of what is added to it in y.
    """
    kernel = matern52(x, x, length) + noise * np.eye(len(x))
    factor = scipy.linalg.cholesky(kernel, lower=True)
    weights = scipy.linalg.cho_solve((factor, True), y)
    across = matern52(x, at, length)
    solved = scipy.linalg.solve_triangular(factor, across, lower=True)
    deviation = np.sqrt(np.maximum(1 - np.sum(solved**2, 0), 0.0))
    evidence = -y @ weights / 2 - np.log(np.diag(factor)).sum() - len(y) / 2 * math.log(2 * math.pi)
    return across.T @ weights, deviation, float(evidence)


class Search:
    """Asks for numbers in an interval, and is told a loss of each.

    Args:
      low, high: of the interval, 0 < low < high.
      seed: of the first number, which is random.
      kappa: deviations below the mean at which the bound lies.

    Attributes:
      asked: the numbers that were told, and losses: of each.

    Raises:
      ValueError: another interval.
    """

    def __init__(self, low: float, high: float, seed: int = 0, kappa: float = KAPPA):
        if not 0 < low < high < np.inf:
            raise ValueError(f"low={low} and high={high} must be 0 < low < high")
        self._bounds = low, high
        self._low, self._high = math.log(low), math.log(high)
        self._rng = np.random.default_rng(seed)
        self._kappa = kappa
        self.asked: list[float] = []
        self.losses: list[float] = []

    def ask(self) -> float:
        """Returns the number whose lower confidence bound is lowest, one not asked for before."""
        grid = np.linspace(0, 1, _GRID)
        if not self.asked:
            return self._number(self._rng.uniform())
        x = (np.log(self.asked) - self._low) / (self._high - self._low)
        y = np.array(self.losses)
        failed = y >= _FAILED
        if failed.any() and not failed.all():  # worse than all others, but no cliff for the process
            y[failed] = y[~failed].max() + max(np.ptp(y[~failed]), 1e-3)
        y = (y - y.mean()) / (y.std() or 1.0)
        settings = itertools.product(LENGTHS, NOISES)
        found = [posterior(x, y, grid, length, noise) for length, noise in settings]
        mean, deviation, _ = max(found, key=lambda result: result[2])
        bound = mean - self._kappa * deviation
        for index in np.argsort(bound):
            if np.abs(grid[index] - x).min() > 1e-6:
                return self._number(grid[index])
        raise AssertionError("the grid has more points than are asked for")

    def tell(self, number: float, loss: float) -> None:
        """Adds the loss of a number; one that is not finite counts as worse than all others."""
        self.asked.append(float(number))
        self.losses.append(float(loss) if np.isfinite(loss) else _FAILED)

    @property
    def best(self) -> float:
        """The number whose loss was lowest."""
        return self.asked[int(np.argmin(self.losses))]

    def _number(self, share: float) -> float:
        number = math.exp(self._low + share * (self._high - self._low))
        return min(max(number, self._bounds[0]), self._bounds[1])
