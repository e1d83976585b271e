"""Learning-rate schedules: named, pure functions of the update's number.

    config = ScheduleConfig(schedule="wsd", learning_rate=1e-3, decay_steps=200, decay_shape="sqrt")
    rate = make_schedule(config, steps=1000)
    rate(10)                          # of update 10, as a run has it: traced or not
    rates(config, steps=1000)         # of updates 0 to 999, float64 [1000]

Every schedule is a peak times a linear warm-up times a shape:

    rate(t) = learning_rate * min(1, (t + 1) / (w + 1)) * shape(t)        w = warmup_steps

The warm-up is never 0, and 1 from t = w on. In a run of S updates that ends in the fraction f =
`final_fraction`, with u(a, b) = (t - a) / (b - a) clipped to [0, 1] and E = `end_step` (S unless it
is set), the shapes are

    constant        1
    linear          1 - (1 - f) u(w, E)
    cosine          f + (1 - f) (1 + cos(pi u(w, E))) / 2
    cosine_cycles   cosine again and again: cycle i lasts cycle_steps * cycle_growth^i updates
                    and starts from cycle_peak^i
    cyclical        triangles: f to 1 in half of cycle_steps, and back; cycle_peak^i as above
    wsd             1, then from 1 to f over the last decay_steps, by decay_shape
    multi_step      milestone_factor^(number of milestones up to t)
    inverse_sqrt    sqrt(max(w, 1) / max(t, w, 1))
    rewarmed        cosine to f until rewarm_start, linear to rewarm_fraction within rewarm_steps,
                    cosine to f until E
    infinite        from 1 to constant_fraction within cooldown_steps, by cooldown_shape; constant;
                    from there to f over the last decay_steps, exponential unless decay_shape says
    file:PATH       the numbers of a file, one a line for each update, instead of warm-up and shape

Sources: Loshchilov and Hutter 2017 (cosine, and with restarts); Smith 2017 (cyclical); Hu et al.
2024, MiniCPM (wsd); Haegele et al. 2024 (its 1 - sqrt); Vaswani et al. 2017, section 5.3
(inverse_sqrt); Gupta et al. 2023 and Ibrahim et al. 2024 (rewarmed, infinite).
"""

import math
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Float

from tilescan.training.config_errors import ConfigError
from tilescan.training.schedule_config import FILE, ScheduleConfig, check_phases, warmup_steps

__all__ = [
    "ScheduleConfig",
    "first_peak",
    "make_schedule",
    "rates",
    "read_schedule",
    "warmup_steps",
]


def make_schedule(config: ScheduleConfig, steps: int) -> Callable[[Any], jax.Array]:
    """Returns `rate(t)`, the learning rate of update t in [0, steps), float32.

    Raises:
        ConfigError: phases that do not fit into the steps, or a file that does not; says what does.
    """
    at = _rate_at(config, steps)
    return lambda t: jnp.asarray(at(jnp.asarray(t, jnp.float32)))


def rates(config: ScheduleConfig, steps: int) -> Float[np.ndarray, " steps"]:
    """Returns the learning rates of all updates of a run, in float64.

    Raises:
        ConfigError: as `make_schedule`.
    """
    return np.broadcast_to(_rate_at(config, steps)(np.arange(steps, dtype=np.float64)), steps)


def first_peak(config: ScheduleConfig, steps: int) -> int:
    """Returns the updates before the peak: the warm-up, of cycles and files up to the highest rate.

    Raises:
        ConfigError: as `make_schedule`.
    """
    if config.schedule == "cyclical" or config.schedule.startswith(FILE):
        return int(np.argmax(rates(config, steps)))
    return warmup_steps(config, steps)


def read_schedule(path: str | os.PathLike, steps: int) -> Float[np.ndarray, " steps"]:
    """Reads a file of numbers, one a line, for the first `steps` updates; "#" begins a comment.

    Raises:
        ConfigError: no such file, a line that is no number of at least 0, or fewer of them.
    """
    try:
        lines = epath.Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        why = error.strerror or error
        raise ConfigError(f"optimizer.schedule: {path} cannot be read: {why}") from error
    numbers = []
    for count, line in enumerate(lines, 1):
        try:
            if text := line.partition("#")[0].strip():
                numbers.append(float(text))
        except ValueError:
            numbers.append(math.nan)
        if numbers and not 0 <= numbers[-1] < math.inf:
            raise ConfigError(
                f"optimizer.schedule: line {count} of {path} is {line!r}; it must be a factor of "
                "optimizer.learning_rate, a number of at least 0"
            )
    if len(numbers) < steps:
        raise ConfigError(
            f"optimizer.schedule: {path} has numbers for {len(numbers)} updates, and train.steps = "
            f"{steps}: train for {len(numbers)}, or make a longer file"
        )
    return np.asarray(numbers[:steps])


def _rate_at(config: ScheduleConfig, steps: int) -> Callable[[Any], Any]:
    """Returns the learning rate as a function of an array of updates, NumPy's or JAX's."""
    check_phases(config, steps)
    peak, w = config.learning_rate, warmup_steps(config, steps)
    if config.schedule.startswith(FILE):
        table = peak * read_schedule(config.schedule.removeprefix(FILE), steps)

        def from_file(t):
            xp = t.__array_namespace__()
            numbers = xp.asarray(table, dtype=t.dtype)
            return numbers[xp.clip(t, 0, steps - 1).astype(xp.int32)]

        return from_file
    shape = SHAPES[config.schedule]

    def rate(t):
        xp = t.__array_namespace__()
        return peak * xp.minimum(1.0, (t + 1) / (w + 1)) * shape(t, config, steps, w)

    return rate


def _progress(t, start, end):
    """How far t is from `start` to `end`, in [0, 1]."""
    return t.__array_namespace__().clip((t - start) / max(end - start, 1), 0.0, 1.0)


def _fall(u, shape: str, high, low, alpha: float = 1.0):
    """From `high` at u = 0 to `low` at u = 1."""
    xp = u.__array_namespace__()
    if shape == "linear":
        return high - (high - low) * u
    if shape == "exponential":
        return high * (low / high) ** u
    if shape == "cosine":
        return low + (high - low) * 0.5 * (1 + xp.cos(xp.pi * u))
    if shape == "sqrt":
        return low + (high - low) * (1 - xp.sqrt(u))
    h = lambda v: 1 / (1 + alpha * v) ** 0.5 - 1
    return high + (low - high) * h(u) / h(1.0)


def _constant(t, c, steps, w):
    return 1.0


def _linear(t, c, steps, w):
    return _fall(_progress(t, w, c.end_step or steps), "linear", 1.0, c.final_fraction)


def _cosine(t, c, steps, w):
    return _fall(_progress(t, w, c.end_step or steps), "cosine", 1.0, c.final_fraction)


def _cycle(t, c, steps, w, growth):
    """Returns which cycle t is in, and how far into it, in [0, 1)."""
    xp, n = t.__array_namespace__(), c.cycle_steps
    into = xp.maximum(t - w, 0.0)
    if growth == 1:
        # A rounded quotient may miss the integer by one; whole multiples of n are exact.
        index = xp.floor(into / n)
        index = index + (into - index * n >= n) - (into - index * n < 0)
        return index, (into - index * n) / n
    # Few cycles, whose first updates are known: cycle i starts after n (g^i - 1) / (g - 1).
    count = 2 + math.ceil(math.log1p(steps * (growth - 1) / n) / math.log(growth))
    starts = n * (growth ** np.arange(count, dtype=np.float64) - 1) / (growth - 1)
    first = xp.asarray(np.ceil(starts - 1e-9), dtype=t.dtype)
    index = xp.searchsorted(first, into, side="right") - 1
    lengths = xp.asarray(n * growth ** np.arange(count, dtype=np.float64), dtype=t.dtype)
    u = (into - xp.asarray(starts, dtype=t.dtype)[index]) / lengths[index]
    return index.astype(t.dtype), xp.clip(u, 0.0, 1.0)


def _cosine_cycles(t, c, steps, w):
    index, u = _cycle(t, c, steps, w, c.cycle_growth)
    return _fall(u, "cosine", _peak(index, c), c.final_fraction)


def _cyclical(t, c, steps, w):
    index, u = _cycle(t, c, steps, w, 1)
    up = 1 - abs(2 * u - 1)
    return c.final_fraction + (_peak(index, c) - c.final_fraction) * up


def _peak(index, c):
    return index.__array_namespace__().maximum(c.cycle_peak**index, c.final_fraction)


def _wsd(t, c, steps, w):
    return _fall(_progress(t, steps - c.decay_steps, steps), c.decay, 1.0, c.final_fraction)


def _multi_step(t, c, steps, w):
    passed = sum((t >= m).astype(t.dtype) for m in c.milestones)
    return c.milestone_factor**passed


def _inverse_sqrt(t, c, steps, w):
    xp = t.__array_namespace__()
    return xp.sqrt(max(w, 1) / xp.maximum(t, max(w, 1)))


def _rewarmed(t, c, steps, w):
    f, start, up = c.final_fraction, c.rewarm_start, c.rewarm_start + c.rewarm_steps
    before = _fall(_progress(t, w, start), "cosine", 1.0, f)
    rise = _fall(_progress(t, start, up), "linear", f, c.rewarm_fraction)
    after = _fall(_progress(t, up, c.end_step or steps), "cosine", c.rewarm_fraction, f)
    where = t.__array_namespace__().where
    return where(t < start, before, where(t < up, rise, after))


def _infinite(t, c, steps, w):
    into = _progress(t, w, w + c.cooldown_steps)
    cooled = _fall(into, c.cooldown_shape, 1.0, c.constant_fraction, c.cooldown_alpha)
    if not c.decay_steps:
        return cooled
    start = steps - c.decay_steps
    u = _progress(t, start, steps)
    annealed = _fall(u, c.decay, c.constant_fraction, c.final_fraction)
    return t.__array_namespace__().where(t < start, cooled, annealed)


SHAPES = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "cosine_cycles": _cosine_cycles,
    "cyclical": _cyclical,
    "wsd": _wsd,
    "multi_step": _multi_step,
    "inverse_sqrt": _inverse_sqrt,
    "rewarmed": _rewarmed,
    "infinite": _infinite,
}
