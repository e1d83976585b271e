"""Times functions against each other: interleaved, compile time apart, medians of rounds."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from tilescan.benchmarks.timing import interleaved, seconds_of
from tilescan.experiments.harness.statistics import Spread, spread
from tilescan.planning.compiled import memory

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
    needs = memory(compiled)
    return compiled, {
        "compile_s": seconds,
        "temp_bytes": None if needs is None else needs.temporaries,
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
    calls, inner, results = {}, {}, {}
    for name, function in functions.items():
        try:
            compiled, results[name] = compile_function(function, *arguments)
            calls[name] = functools.partial(compiled, *arguments)
            jax.block_until_ready(calls[name]())  # the first call warms caches
            once = seconds_of(calls[name])
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            calls.pop(name, None)
            results[name] = {"error": OUT_OF_MEMORY}
        else:
            inner[name] = max(1, min(1000, round(least_ms / 1000 / max(once, 1e-7))))
    for name, times in interleaved(calls, repeats=repeats, calls=inner).items():
        samples = [1000 * seconds for seconds in times]
        results[name] |= {"samples_ms": samples, "median_ms": statistics.median(samples)}
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
