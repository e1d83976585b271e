"""Times functions against each other: interleaved, compile time apart, medians of rounds."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from tilescan.experiments.harness.statistics import Spread, spread

OUT_OF_MEMORY = "out of memory"


def compile_function(function: Callable, *arguments: Any) -> tuple[Any, dict]:
    """The compiled function and what compiling it showed.

    Args:
      function: to be jitted.
      *arguments: arrays or `jax.ShapeDtypeStruct`s.

    Returns:
      (compiled, {"compile_s": seconds, "temp_bytes": bytes of temporaries by XLA's own buffer
      assignment, None on a backend that does not say}).
    """
    lowered = jax.jit(function).lower(*arguments)
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    return compiled, {
        "compile_s": seconds,
        "temp_bytes": None if memory is None else memory.temp_size_in_bytes,
    }


def compare(
    functions: Mapping[str, Callable],
    arguments: tuple,
    *,
    repeats: int,
    least_ms: float = 20.0,
) -> dict[str, dict]:
    """Times `functions` on the same arguments, one round after another.

    Rounds go through all functions in turn, so that a machine that slows down slows all of them.
    Short calls are repeated inside a round until they fill `least_ms`; one more before them is not
    timed.

    Args:
      functions: {name: function of the arguments}.
      arguments: device arrays.
      repeats: number of rounds.
      least_ms: shortest time that is measured at once.

    Returns:
      {name: {"median_ms", "samples_ms", "compile_s", "temp_bytes"}}; a function that asks for more
      memory than there is has {"error": "out of memory"} instead.
    """
    compiled, inner, results = {}, {}, {}
    for name, function in functions.items():
        try:
            compiled[name], results[name] = compile_function(function, *arguments)
            jax.block_until_ready(compiled[name](*arguments))  # the first call warms caches
            once = _seconds(compiled[name], arguments, 1)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            compiled.pop(name, None)
            results[name] = {"error": OUT_OF_MEMORY}
        else:
            inner[name] = max(1, min(1000, round(least_ms / 1000 / max(once, 1e-7))))
            results[name]["samples_ms"] = []
    for _ in range(repeats):
        for name, function in compiled.items():
            # What the function before left to be freed, gigabytes perhaps, is not this one's time.
            jax.block_until_ready(function(*arguments))
            seconds = _seconds(function, arguments, inner[name])
            results[name]["samples_ms"].append(1000 * seconds / inner[name])
    for name in compiled:
        results[name]["median_ms"] = statistics.median(results[name]["samples_ms"])
    return results


def speed_up(slow: Mapping, fast: Mapping) -> Spread | None:
    """Ratio of the medians of two results of one `compare`, None if one of them has no times.

    Its spread is the standard deviation of the rounds' own ratios.
    """
    if "median_ms" not in slow or "median_ms" not in fast:
        return None
    pairs = zip(slow["samples_ms"], fast["samples_ms"], strict=True)
    rounds = spread(a / b for a, b in pairs)
    return dataclasses.replace(rounds, mean=slow["median_ms"] / fast["median_ms"])


def _seconds(function: Callable, arguments: tuple, count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        result = function(*arguments)
    jax.block_until_ready(result)
    return time.perf_counter() - start
