"""What a comparison of times calls, and what it says of a function without times."""

import jax
import jax.numpy as jnp

from tilescan.experiments.measurements.timing import compare, speed_up


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
