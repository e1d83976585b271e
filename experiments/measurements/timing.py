"""Times functions against each other: interleaved, compile time separately, medians of rounds."""

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from tilescan.benchmarks.timing import interleaved, seconds_of
from tilescan.experiments.harness import load
from tilescan.experiments.harness.claims import Effect, Verdict, within
from tilescan.experiments.harness.groups import Group, by
from tilescan.experiments.harness.records import Record, Records
from tilescan.experiments.harness.statistics import Spread, spread
from tilescan.experiments.harness.tables import format_value
from tilescan.planning.compiled import memory

OUT_OF_MEMORY = "out of memory"


def compile_function(
    function: Callable[..., Any], *arguments: Any
) -> tuple[jax.stages.Compiled, dict[str, Any]]:
    """Returns the compiled function and what compiling it showed.

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
    functions: Mapping[str, Callable[..., Any]],
    arguments: tuple[Any, ...],
    *,
    repeats: int,
    least_ms: float = 20.0,
) -> dict[str, dict[str, Any]]:
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
      {name: {"median_ms", "samples_ms", "compile_s", "temp_bytes", "others"}}, the last one the
      share of the machine that other processes took meanwhile; a function that asks for more
      memory than there is has {"error": "out of memory"} instead.

    Raises:
      NotAlone: in a process that measures cells beside others; the run measures it after them.
    """
    load.check_alone()
    calls, inner, results = {}, {}, {}
    # Compile, warm and count the calls that fill a round.
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
    # All functions in turn, a round after another, on a machine that does nothing else.
    load.wait_for_quiet()
    meter = load.Meter()
    rounds = interleaved(calls, repeats=repeats, calls=inner)
    others = meter.share()
    for name, times in rounds.items():
        samples = [1000 * seconds for seconds in times]
        results[name] |= {"samples_ms": samples, "median_ms": statistics.median(samples)}
        results[name] |= {"others": others}
    return results


def speed_up(slow: Mapping[str, Any], fast: Mapping[str, Any]) -> Spread | None:
    """Returns the ratio of the medians of two results of one `compare`; None without both times.

    Its standard deviation is that of the rounds' own ratios.
    """
    rounds = spread(ratios_of_rounds(slow, fast))
    if rounds is None:
        return None
    return dataclasses.replace(rounds, mean=slow["median_ms"] / fast["median_ms"])


def ratios_of_rounds(slow: Mapping[str, Any], fast: Mapping[str, Any]) -> list[float]:
    """Returns the ratio of each round of two results of one `compare`; [] without both times."""
    if "median_ms" not in slow or "median_ms" not in fast:
        return []
    return [a / b for a, b in zip(slow["samples_ms"], fast["samples_ms"], strict=True)]


def measured(record: Record, name: str, field: str = "median_ms") -> float | None:
    """Returns the time (or another field) of one of a record's functions; None without one."""
    return record.result.get(name, {}).get(field)


def gain(record: Record, slow: str, fast: str) -> Spread | None:
    """Returns the `speed_up` of two results of one record, by their names."""
    return speed_up(record.result.get(slow, {}), record.result.get(fast, {}))


def effect(published: float | None, record: Record, slow: str, fast: str) -> Effect | None:
    """Returns a published speed-up beside those of a record's rounds; None without both."""
    rounds = ratios_of_rounds(record.result.get(slow, {}), record.result.get(fast, {}))
    return Effect(published, rounds) if published and rounds else None


def both_timed(records: Records, slow: str, fast: str) -> list[Group]:
    """Returns the records of the lengths at which two functions were timed, a group each."""
    return [g for g in by(records, "length") if gain(g.first, slow, fast)]


def gain_within(
    criterion: str,
    record: Record | None,
    pair: tuple[str, str],
    low: float,
    high: float = math.inf,
    *,
    published: float | None = None,
    digits: int = 3,
) -> Verdict:
    """Returns whether a record's speed-up lies within bounds, with its effect.

    Args:
      criterion: the predicate in words.
      record: of one length; None: it was not measured.
      pair: names of the slow and the fast function.
      low, high: bounds.
      published: speed-up.
      digits: significant ones of the evidence.
    """
    value = record and gain(record, *pair)
    return Verdict(
        criterion,
        within(value and value.mean, low, high),
        f"{format_value(value, digits)} at length {record.settings['length']}" if value else "",
        effect(published, record, *pair) if value else None,
    )
