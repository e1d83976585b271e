"""Memory is the compiler's; the largest size that fits is found by few compilations."""

import jax
import jax.numpy as jnp
import pytest

from tilescan.experiments.measurements.compiled import compiled, largest_within, memory


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("budget", [0, 5, 17, 1000, 123_456])
def test_the_largest_that_fits_is_found_in_few_calls(power, budget):
    asked = []

    def need(n):
        asked.append(n)
        return 3 * n**power + 1

    n, known = largest_within(need, budget, start=4)
    assert n == max((n for n in range(42_000) if 3 * n**power + 1 <= budget), default=0)
    assert list(known) == asked and len(set(asked)) == len(asked) <= 20
    assert all(known[m] == 3 * m**power + 1 for m in known)
    about, _ = largest_within(need, budget, start=4, tolerance=0.02)
    assert 0.97 * n - 1 <= about <= n


@pytest.mark.parametrize("start", [10, 990, 5000])
def test_sizes_are_multiples_of_the_step(start):
    need = lambda n: 40 + 3.0 * n + 1e-4 * n * n
    length, known = largest_within(need, 3100.0, start, 10)
    assert need(length) <= 3100.0 < need(length + 10)
    assert start in known and all(n % 10 == 0 for n in known)
    assert largest_within(lambda n: 1e9, 3100.0, 640, 10)[0] == 0


def test_memory_is_the_compilers():
    def wide(x):
        return jnp.sum(jnp.cumsum(x[:, None] * x[None], axis=0) ** 2)

    shape = jax.ShapeDtypeStruct((256,), jnp.float32)
    found = memory(compiled(jax.grad(wide), shape))
    assert found["arguments"] == found["results"] == 1024
    assert 256 * 256 * 4 <= found["temporary"] < 16 * 256 * 256 * 4
    assert found["total"] == 2048 + found["temporary"]
