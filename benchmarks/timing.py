"""Times several functions in turn, so that what else the machine does hits all alike."""

import statistics
import time
from collections.abc import Callable


def interleaved(
    functions: dict[str, Callable[[], float | None]], *, repeats: int, seconds: float
) -> dict[str, list[float]]:
    """Seconds of each run of each function: all once, then all again, each behind an untimed run.

    Args:
      functions: each blocks until its work is done; one that returns a number has timed itself.
        All have run at least once before.
      repeats: at most this many rounds, and at least 3.
      seconds: no new round begins after so long.
    """
    times = {name: [] for name in functions}
    begin = time.perf_counter()
    for r in range(max(repeats, 3)):
        if r >= 3 and time.perf_counter() - begin > seconds:
            break
        for name, function in functions.items():
            function()  # what the one before left to be freed, gigabytes perhaps, is not its time
            start = time.perf_counter()
            own = function()
            times[name].append(time.perf_counter() - start if own is None else own)
    return times


def summary(times: list[float]) -> dict:
    """Median, least and number of runs, in milliseconds."""
    return {
        "median_ms": round(statistics.median(times) * 1e3, 3),
        "best_ms": round(min(times) * 1e3, 3),
        "runs": len(times),
    }
