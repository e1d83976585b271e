"""Times several functions in turn, so that what else the machine does hits all alike."""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax


def interleaved(
    functions: Mapping[str, Callable[[], Any]],
    *,
    repeats: int,
    seconds: float = math.inf,
    calls: Mapping[str, int] | None = None,
) -> dict[str, list[float]]:
    """Returns seconds of a call of each function: all in a first round, then all again.

    Args:
      functions: what they return is waited for; one that returns a float has timed itself. All
        have run at least once before.
      repeats: number of rounds.
      seconds: after 3 rounds no new one begins that late.
      calls: {name: calls that are timed together}, 1 where it says nothing.
    """
    times = {name: [] for name in functions}
    begin = time.perf_counter()
    for r in range(repeats):
        if r >= 3 and time.perf_counter() - begin > seconds:
            break
        for name, function in functions.items():
            # What the one before left to be freed, gigabytes perhaps, is not this one's time.
            jax.block_until_ready(function())
            count = (calls or {}).get(name, 1)
            times[name].append(seconds_of(function, count) / count)
    return times


def seconds_of(function: Callable[[], Any], calls: int = 1) -> float:
    """Returns the seconds of so many calls, one after another, until the last result is there."""
    own, start = 0.0, time.perf_counter()
    for _ in range(calls):
        result = function()
        own += result if isinstance(result, float) else 0.0
    jax.block_until_ready(result)
    return own or time.perf_counter() - start


def summary(times: list[float]) -> dict[str, float]:
    """Returns median, least and number of runs, in milliseconds."""
    return {
        "median_ms": round(statistics.median(times) * 1e3, 3),
        "best_ms": round(min(times) * 1e3, 3),
        "runs": len(times),
    }
