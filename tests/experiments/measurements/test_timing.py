"""What a comparison of times calls, and what it says of a function without times."""

import jax
import jax.numpy as jnp

from tilescan.experiments.harness.claims import Effect
from tilescan.experiments.harness.records import Record, Records
from tilescan.experiments.measurements.timing import both_timed, compare, gain_within, speed_up


def test_each_function_is_called_once_untimed_before_its_times():
    """Else it would be timed while the memory of the one before is freed."""
    calls = []

    def named(name):
        def function(x):
            jax.debug.callback(lambda: calls.append(name), ordered=True)
            return x + 1

        return function

    functions = {name: named(name) for name in "ab"}
    found = compare(functions, (jnp.zeros(3),), repeats=3, least_ms=0.0)
    jax.effects_barrier()
    assert calls[4:] == list("aabb") * 3  # after compiling, warming and one call for their number
    assert all(len(result["samples_ms"]) == 3 for result in found.values())
    assert speed_up(found["a"], found["b"]).mean > 0
    assert speed_up(found["a"], {"error": "out of memory"}) is None


def timed(length, **samples):
    result = {n: {"median_ms": ms, "samples_ms": [ms, 2 * ms]} for n, ms in samples.items()}
    return Record("p", f"T{length}", "", {"length": length}, 0, result, 1.0, {})


def test_a_gain_is_judged_by_bounds_and_shown_beside_the_published_one():
    record = timed(64, slow=6.0, fast=2.0)
    found = gain_within("in words", record, ("slow", "fast"), 2.0, published=4.0)
    assert found == ("in words", True, "3.00 ± 0.00 at length 64", Effect(4.0, [3.0, 3.0]))
    assert gain_within("", record, ("slow", "fast"), 2.0, 2.5).holds is False
    assert gain_within("", record, ("slow", "fast"), 3.5).holds is False
    for missing in (None, timed(64, slow=6.0)):
        assert gain_within("", missing, ("slow", "fast"), 2.0, published=4.0)[1:] == (
            None,
            "",
            None,
        )


def test_only_lengths_at_which_both_were_timed_are_compared():
    records = Records([timed(256, fast=1.0), timed(128, slow=1.0, fast=1.0), timed(64, slow=1.0)])
    assert [group.key for group in both_timed(records, "slow", "fast")] == [128]
