"""The scaling law with learning-rate annealing: whole loss curves from their learning rates.

    L(s) = L0 + A S1(s)^-alpha - C S2(s)

after s updates with the rates eta_1, ..., eta_s, where

    S1(s) = sum_{i <= s} eta_i                                        forward area
    S2(s) = sum_{i <= s} m_i,  m_i = decay m_{i-1} + (eta_{i-1} - eta_i),  m_1 = 0    annealing area

(Tissue, Wang and Wang 2024, arXiv 2408.11029). A rate that falls lowers the loss with a delay of
1 / (1 - decay) updates, one that rises again raises it. The warm-up counts as if it had the rate
after it: it adds to S1 and nothing to S2.

    law = fit([constant, cosine])                     # two finished runs: `Curve`s
    losses = predict(law, rates(other, steps))        # of any schedule, after each update

The law is one of sane schedules below the edge of stability: it knows no divergence. By it a higher
peak is always better, and updates at rate 0 go on lowering the loss until S2 has caught up.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
import scipy.optimize
from jaxtyping import Float, Integer

from tilescan.ops import linear_recurrence

DECAYS = (0.99, 0.995, 0.999, 0.9995)  # tried by `fit`
DECAY = 0.999  # the paper's, kept unless another one is clearly better
CLEARLY = 0.9  # of the objective
DELTA = 1e-3  # where Huber's loss of log residuals turns from squares to absolute values
_ALPHAS = np.linspace(0.05, 2.0, 40)  # from which fits start


class Curve(NamedTuple):
    """The losses of a run, and the learning rates that they came from.

    Attributes:
      rates: of every update, [S].
      steps: after how many updates, 1 to S, the losses were measured, [N], rising.
      losses: [N], above 0.
      warmup: updates until the peak.
      name: of the run.
    """

    rates: Float[np.ndarray, " S"]
    steps: Integer[np.ndarray, " N"]
    losses: Float[np.ndarray, " N"]
    warmup: int = 0
    name: str = ""


class Law(NamedTuple):
    """The law's parameters, all at least 0, and the decay of its annealing area.

    Without an annealing term C is 0; `by_steps` counts updates instead of S1, a power law in steps.
    """

    L0: float
    A: float
    C: float
    alpha: float
    decay: float = DECAY
    by_steps: bool = False


def areas(
    rates: Float[np.ndarray, " S"], decay: float = DECAY, warmup: int = 0
) -> tuple[Float[np.ndarray, " S"], Float[np.ndarray, " S"]]:
    """Returns S1 and S2 after each update, in float64.

    Args:
      rates: of every update.
      decay: lambda of the annealing momentum m, in [0, 1].
      warmup: of so many first updates the rate counts as that of the one after them.

    Raises:
      ValueError: no rates, negative ones or ones that are not finite; a decay outside [0, 1]; a
        warm-up of all updates.
    """
    rates = np.array(rates, np.float64)
    if rates.ndim != 1 or not len(rates) or not np.all(rates >= 0) or not np.all(rates < np.inf):
        raise ValueError(f"rates must be [S] numbers of at least 0, got {rates!r}")
    if not 0 <= decay <= 1:
        raise ValueError(f"decay={decay} must lie in [0, 1]")
    if not 0 <= warmup < len(rates):
        raise ValueError(f"warmup={warmup} must be at least 0 and below {len(rates)}, the updates")
    rates[:warmup] = rates[warmup]
    drops = -np.diff(rates, prepend=rates[0])
    with jax.enable_x64(True):
        momentum, _ = linear_recurrence(np.float64(decay), drops[None])
    return np.cumsum(rates), np.cumsum(np.asarray(momentum)[0])


def predict(law: Law, rates: Float[np.ndarray, " S"], warmup: int = 0) -> Float[np.ndarray, " S"]:
    """Returns the law's losses after each update of a schedule. Raises ValueError: see `areas`."""
    S1, S2 = _coordinates(law.decay, rates, warmup, law.by_steps)
    return _losses(np.array(law[:4]), S1, S2)


def errors(law: Law, curve: Curve) -> Float[np.ndarray, " M"]:
    """Returns (predicted - measured) / measured of each loss of a curve after its warm-up."""
    steps, losses = (x[curve.steps > curve.warmup] for x in (curve.steps, curve.losses))
    return predict(law, curve.rates, curve.warmup)[steps - 1] / losses - 1


def fit(
    curves: Sequence[Curve],
    decays: Sequence[float] = DECAYS,
    *,
    annealing: bool = True,
    by_steps: bool = False,
) -> Law:
    """Fits the law to loss curves: Huber's loss of log residuals, from the end of warm-up on.

    For each alpha of a grid the best L0, A and C of a non-negative least squares begin, whatever
    the unit of the learning rate is; L-BFGS-B with exact gradients and Nelder-Mead end.

    Args:
      curves: at least one, with five losses after its warm-up or more in all.
      decays: those to try. Of several, DECAY stays unless another one's objective is clearly lower.
      annealing: False leaves the term of S2 out, C = 0.
      by_steps: count updates instead of the forward area.

    Raises:
      ValueError: too few losses, steps that are not those of the rates, losses that are not above
        0; see also `areas`.
    """
    _check(curves)
    found = {d: _fit(_joined(curves, d, by_steps), annealing) for d in decays if annealing}
    if not annealing:
        found = {DECAY: _fit(_joined(curves, DECAY, by_steps), annealing)}
    best = min(found, key=lambda d: found[d][1])
    if DECAY in found and found[best][1] > CLEARLY * found[DECAY][1]:
        best = DECAY
    return Law(*map(float, found[best][0]), float(best), by_steps)


def bootstrap(
    curves: Sequence[Curve], law: Law, *, samples: int = 200, seed: int = 0, block: int = 10
) -> list[Law]:
    """Returns laws of resampled curves, whose quantiles are intervals of the law's parameters.

    Neighboring losses err alike, so blocks of them are drawn with replacement (Kuensch 1989), as if
    a curve's last were followed by its first. The decay stays the law's.

    Args:
      curves: those that the law was fitted to.
      law: as `fit` gave it.
      samples: laws.
      seed: of the blocks.
      block: losses in a row.
    """
    rng = np.random.default_rng(seed)
    parts = [_joined([curve], law.decay, law.by_steps) for curve in curves]
    start, laws = np.array(law[:4]), []
    for _ in range(samples):
        chosen = [_blocks(rng, len(part[0]), block) for part in parts]
        drawn = [[x[at] for x in part] for part, at in zip(parts, chosen, strict=True)]
        data = tuple(map(np.concatenate, zip(*drawn, strict=True)))
        values, _ = _minimum(start, data, law.C > 0)
        laws.append(Law(*map(float, values), law.decay, law.by_steps))
    return laws


def _blocks(rng: np.random.Generator, count: int, block: int) -> np.ndarray:
    """Returns `count` indices in blocks of neighbors."""
    starts = rng.integers(0, count, -(-count // block))
    return (starts[:, None] + np.arange(block)).ravel()[:count] % count


def _check(curves: Sequence[Curve]) -> None:
    """Raises ValueError for curves that cannot be fitted."""
    used = 0
    for curve in curves:
        name = curve.name or "a curve"
        steps, losses = np.asarray(curve.steps), np.asarray(curve.losses)
        if len(steps) != len(losses) or np.any(np.diff(steps) <= 0):
            raise ValueError(f"{name}: steps must rise, and be as many as losses ({len(losses)})")
        if len(steps) and not 1 <= steps[0] <= steps[-1] <= len(curve.rates):
            raise ValueError(
                f"{name}: steps run from {steps[0]} to {steps[-1]}; there are rates of updates 1 "
                f"to {len(curve.rates)}"
            )
        if not np.all(losses > 0) or not np.all(losses < np.inf):
            raise ValueError(f"{name}: losses must be above 0 and finite")
        used += int(np.sum(steps > curve.warmup))
    if used < 5:
        raise ValueError(f"the curves have {used} losses after their warm-up; a fit needs 5")


def _coordinates(decay, rates, warmup, by_steps):
    S1, S2 = areas(rates, decay, warmup)
    return (np.arange(1.0, len(S1) + 1) if by_steps else S1), S2


def _joined(curves: Sequence[Curve], decay: float, by_steps: bool):
    """S1, S2 and losses of all curves, after their warm-ups."""
    parts = []
    for curve in curves:
        S1, S2 = _coordinates(decay, curve.rates, curve.warmup, by_steps)
        kept = np.asarray(curve.steps) > curve.warmup
        at = np.asarray(curve.steps)[kept] - 1
        parts.append((S1[at], S2[at], np.asarray(curve.losses, np.float64)[kept]))
    return tuple(map(np.concatenate, zip(*parts, strict=True)))


def _losses(parameters, S1, S2):
    L0, A, C, alpha = parameters
    return L0 + A * S1**-alpha - C * S2


def _fit(data, annealing: bool):
    """Returns the best parameters and the objective, from the best start of a grid."""
    S1, S2, L = data
    starts = []
    for alpha in _ALPHAS:
        linear = np.stack([np.ones_like(L), S1**-alpha, -S2 * annealing], 1)
        (L0, A, C), residual = scipy.optimize.nnls(linear, L)
        starts.append((residual, (L0, A, C, alpha)))
    starts.sort(key=lambda start: start[0])
    found = [_minimum(np.array(start), data, annealing) for _, start in starts[:3]]
    best, _ = min(found, key=lambda result: result[1])
    return _minimum(best, data, annealing, polish=True)


def _minimum(start, data, annealing: bool, polish: bool = False):
    """Returns the parameters of a minimum near a start, and the objective there."""
    S1, S2, L = data
    S2, logs = S2 * annealing, np.log(L)
    scale = np.maximum(start, 1e-3)

    def objective(x):
        parameters = np.abs(x) * scale
        power = S1 ** -parameters[3]
        fitted = parameters[0] + parameters[1] * power - parameters[2] * S2
        if np.any(fitted <= 0):
            return np.inf, np.zeros(4)
        residual = logs - np.log(fitted)
        slope = np.clip(residual, -DELTA, DELTA)
        value = np.sum(slope * (residual - 0.5 * slope))  # Huber's
        by_loss = -slope / fitted
        by_alpha = -parameters[1] * power * np.log(S1)
        gradient = [by_loss.sum(), by_loss @ power, -by_loss @ S2, by_loss @ by_alpha]
        return value / DELTA**2, np.array(gradient) * scale / DELTA**2

    options = {"maxiter": 1000, "ftol": 1e-14, "gtol": 1e-9}
    end = scipy.optimize.minimize(
        objective,
        start / scale,
        jac=True,
        method="L-BFGS-B",
        bounds=[(0, None)] * 4,
        options=options,
    )
    if polish:
        options = {"maxiter": 2000, "xatol": 1e-8, "fatol": 1e-10}
        end = scipy.optimize.minimize(
            lambda x: objective(x)[0], end.x, method="Nelder-Mead", options=options
        )
    parameters = np.abs(end.x) * scale
    parameters[2] *= annealing
    return parameters, float(end.fun)
