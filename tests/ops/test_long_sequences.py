"""Sequences that offsets of 32 bits cannot reach are refused by all ops along time, in words."""

import jax
import jax.numpy as jnp
import pytest

from tilescan import ops

T = 2**20  # 2^31 elements in 2^11 features
OPS = {
    "linear_recurrence": lambda f: (ops.linear_recurrence, f(), f()),
    "selective_scan": lambda f: (
        ops.selective_scan, f(), f(), f(shape=(f.E, 2)), f(2), f(2),
    ),
    "ssd": lambda f: (ops.ssd, f(f.E // 32, 32), f(f.E // 32), f(shape=(f.E // 32,)), *f.two(1, 8)),
    "gated_linear_attention": lambda f: (
        ops.gated_linear_attention, f(2, 8), f(2, 8), f(2, f.E // 2),
    ),
    "delta_rule": lambda f: (ops.delta_rule, f(2, 8), f(2, 8), f(2, f.E // 2), f(2)),
    "gated_delta_rule": lambda f: (
        ops.gated_delta_rule, f(f.E // 8, 8), f(1, 8), f(1, 8), *f.two(f.E // 8),
    ),
    "short_convolution": lambda f: (ops.short_convolution, f(), f(shape=(4, f.E))),
    "long_convolution": lambda f: (ops.long_convolution, f(), f(shape=(1, f.E))),
}  # fmt: skip


class Arrays:
    """Shapes [1, T, ...] of bfloat16, of E features where none are named."""

    def __init__(self, E):
        self.E = E

    def __call__(self, *features, shape=None):
        shape = (1, T, *(features or (self.E,))) if shape is None else shape
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    def two(self, *features):
        return self(*features), self(*features)


@pytest.mark.parametrize("op", OPS)
def test_offsets_past_32_bits_are_refused(op):
    function, *arrays = OPS[op](Arrays(2048))
    with pytest.raises(ValueError, match=r"2147483648 elements in a sequence.*final_state"):
        jax.eval_shape(function, *arrays)


@pytest.mark.parametrize("op", OPS)
def test_half_as_many_are_taken(op):
    function, *arrays = OPS[op](Arrays(1024))
    y, _ = jax.eval_shape(function, *arrays)
    assert y.shape[:2] == (1, T) and y.size == 2**30


def test_a_long_kernel_counts_too():
    """The convolution computes what inputs add after the last step."""
    u = jax.ShapeDtypeStruct((1, T, 1024), jnp.bfloat16)
    kernel = jax.ShapeDtypeStruct((T + 1, 1024), jnp.bfloat16)
    with pytest.raises(ValueError, match="outputs .* elements in a sequence"):
        jax.eval_shape(ops.long_convolution, u, kernel)
