"""Errors see a wrong op, in its output and in its gradients; the worst is kept by name."""

import jax.numpy as jnp
import numpy as np

from tilescan.experiments.measurements import exactness

ARRAYS = [jnp.asarray(np.random.default_rng(0).standard_normal((3, 4)), jnp.float32)] * 3


def test_errors_are_relative_to_the_largest_value():
    op = lambda a, b: a * b + 10.0
    want = exactness.values_and_gradients(op)(*ARRAYS)
    assert exactness.errors(want, want) == {"output": 0.0, "gradients": 0.0}
    shifted = exactness.values_and_gradients(lambda a, b: op(a, b) + 0.5)(*ARRAYS)
    found = exactness.errors(shifted, want)
    np.testing.assert_allclose(found["output"], 0.5 / float(jnp.max(jnp.abs(want[0]))), rtol=1e-5)
    assert found["gradients"] == 0.0
    doubled = exactness.values_and_gradients(lambda a, b: op(a, b) + a)(*ARRAYS)
    assert exactness.errors(doubled, want)["gradients"] > 0.1


def test_the_worst_error_is_kept_by_name():
    pairs = [("a", {"output": 1.0, "gradients": 2.0}), ("b", {"x": {"y": 0.5}}), ("a", {"z": 1.5})]
    assert exactness.worst(pairs) == {"a": 2.0, "b": 0.5}
    assert exactness.worst([]) == {}
