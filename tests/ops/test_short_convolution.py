"""The short causal convolution against a float64 loop: any length, carried state, segments."""

import functools
import sys

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tilescan.ops.short_convolution import short_convolution

module = sys.modules["tilescan.ops.short_convolution"]  # `ops` has the function under this name


slow = functools.partial(pytest.param, marks=pytest.mark.slow)


def inputs(B, T, E, W, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    shapes = dict(x=(B, T, E), weight=(W, E), bias=(E,), initial_state=(B, W - 1, E))
    return {n: jnp.asarray(rng.standard_normal(s), dtype) for n, s in shapes.items()}


def reference(x, weight, bias, initial_state, ids=None, silu=False):
    """y and final_state, one output at a time, by the definition."""
    x, weight, bias, state = (np.asarray(a, np.float64) for a in (x, weight, bias, initial_state))
    (B, T, E), W = x.shape, len(weight)
    y, final = np.zeros((B, T, E)), np.zeros((B, W - 1, E))
    for b in range(B):
        seen = list(state[b])
        for t in range(T):
            if ids is not None and t > 0 and ids[b, t] != ids[b, t - 1]:
                seen = [np.zeros(E)] * (W - 1)
            seen.append(x[b, t])
            y[b, t] = bias + sum(w * v for w, v in zip(weight, seen[len(seen) - W :], strict=True))
        final[b] = np.reshape(seen[len(seen) - (W - 1) :], (W - 1, E))
    return (y / (1 + np.exp(-y)) if silu else y), final


@functools.partial(jax.jit, static_argnames="activation")
def run(arrays, segment_ids=None, activation=None):
    return short_convolution(**arrays, segment_ids=segment_ids, activation=activation)


def weighted(y, final):
    """A loss in which every output has its own, known cotangent."""
    wave = lambda a: jnp.cos(jnp.arange(a.size, dtype=jnp.float32)).reshape(a.shape)
    return (wave(y) * y).sum() + (wave(final) * final).sum()


def assert_equals_the_definition(B, T, W, silu, packed):
    arrays = inputs(B, T, 3, W)
    ids = np.random.default_rng(1).integers(0, 2, (B, T)) if packed else None
    got = run(arrays, ids, activation="silu" if silu else None)
    want = reference(**arrays, ids=ids, silu=silu)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


@pytest.mark.parametrize(
    "B,T,W,silu,packed",
    [
        (1, 1, 1, True, False),
        (2, 2, 4, False, True),
        (2, 63, 7, True, True),
        (1, 9, 2, False, False),
    ],
)
def test_equals_the_definition(B, T, W, silu, packed):
    assert_equals_the_definition(B, T, W, silu, packed)


@pytest.mark.slow
@hypothesis.settings(max_examples=20)
@hypothesis.given(
    B=st.integers(1, 2),
    T=st.sampled_from([1, 2, 3, 9, 63]),
    W=st.sampled_from([1, 2, 4, 7]),
    silu=st.booleans(),
    packed=st.booleans(),
)
def test_any_problem_equals_the_definition(B, T, W, silu, packed):
    assert_equals_the_definition(B, T, W, silu, packed)


@pytest.mark.parametrize("T, W", [(1, 4), (2, 7), (11, 4), slow(2, 4), slow(3, 4)])
def test_gradients_are_the_transposed_map(T, W):
    """The op is linear in each argument, so that <gradient, direction> = loss(direction)."""
    arrays = inputs(2, T, 3, W)
    ids = np.asarray([[0] * T, [0] * (T - T // 2) + [1] * (T // 2)])
    gradients = jax.jit(jax.grad(lambda arrays: weighted(*run(arrays, ids))))(arrays)
    gradients = {name: np.asarray(gradient) for name, gradient in gradients.items()}
    wave = lambda a: np.cos(np.arange(a.size)).reshape(a.shape)
    for name, gradient in gradients.items():
        for i in np.ndindex(gradient.shape):
            ends = []
            for step in (1.0, -1.0):
                moved = {n: np.array(a, np.float64) for n, a in arrays.items()}
                moved[name][i] += step
                y, final = reference(**moved, ids=ids)
                ends.append((wave(y) * y).sum() + (wave(final) * final).sum())
            assert abs(gradient[i] - (ends[0] - ends[1]) / 2) < 1e-4, (name, i)


@pytest.mark.parametrize(
    "T,packed",
    [(50, True), slow(50, False), slow(16, False), slow(1, False), slow(16, True), slow(1, True)],
)
def test_many_taps_in_blocks(T, packed, monkeypatch):
    """Of 16 steps, with windows that reach over blocks, segments and the initial state."""
    arrays = inputs(2, T, 3, 11)
    ids = np.random.default_rng(1).integers(0, 5, (2, T)) // 4 if packed else None
    value = lambda arrays: short_convolution(**arrays, segment_ids=ids, activation="silu")

    def both(arrays):
        return value(arrays), jax.grad(lambda arrays: weighted(*value(arrays)))(arrays)

    monkeypatch.setattr(module, "BLOCK", 48)
    got, gradients = jax.jit(both)(arrays)
    for x, y in zip(got, reference(**arrays, ids=ids, silu=True), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5)
    monkeypatch.setattr(module, "FEW_TAPS", 11)
    # A new function, so that it is traced with these taps.
    few = jax.jit(lambda arrays: both(arrays)[1])(arrays)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=5e-5), gradients, few)


@functools.partial(jax.jit, static_argnums=1)
def split(arrays, splits):
    """Values and gradients of a call for each chunk, with the state handed on."""

    def chunks(arrays):
        state, parts = arrays["initial_state"], []
        for x in jnp.split(arrays["x"], splits, axis=1):
            y, state = short_convolution(**arrays | dict(x=x, initial_state=state))
            parts.append(y)
        return jnp.concatenate(parts, axis=1), state

    return chunks(arrays), jax.grad(lambda arrays: weighted(*chunks(arrays)))(arrays)


@pytest.mark.parametrize("splits", [*map(slow, ((1,), (2, 3), (7,))), (1, 2, 3, 4)])
def test_split_equals_whole(splits):
    """Outputs, final state and all gradients, with chunks shorter than W - 1."""
    arrays = inputs(2, 9, 3, 5)
    got, got_gradients = split(arrays, splits)
    want, want_gradients = split(arrays, ())
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)
    close = functools.partial(np.testing.assert_allclose, atol=1e-5)
    jax.tree.map(close, got_gradients, want_gradients)


def test_packed_equals_separate_and_bounds_of_chunks_are_told():
    arrays = inputs(1, 9, 3, 4)
    y, final = run(arrays, np.asarray([[5] * 4 + [2] * 5]))
    x = np.asarray(arrays["x"])
    first, _ = run(arrays | dict(x=x[:, :4]))
    fresh = arrays | dict(x=x[:, 4:], initial_state=None)
    second, last = run(fresh)
    np.testing.assert_allclose(y, np.concatenate([first, second], 1), atol=1e-6)
    np.testing.assert_array_equal(final, last)
    # A segment that starts with the chunk, named by the id before it, sees no state.
    told = fresh | dict(initial_state=arrays["initial_state"])
    got, _ = run(told, np.asarray([[5] + [2] * 5]))
    np.testing.assert_allclose(got, second, atol=1e-6)


def test_the_future_has_no_gradient():
    arrays = inputs(1, 9, 2, 4)
    of_step = jax.jit(jax.jacrev(lambda x: run(arrays | dict(x=x))[0].sum((0, 2))))(arrays["x"])
    of_step = np.asarray(of_step)
    dependence = np.abs(of_step[:, 0]).sum(-1) > 0
    i, j = np.indices((9, 9))
    np.testing.assert_array_equal(dependence, (j <= i) & (i - j < 4))


def test_bfloat16_is_summed_in_float32_and_runs_repeat():
    arrays = inputs(2, 50, 8, 4, dtype="bfloat16")
    y, final = run(arrays, activation="silu")
    want, _ = reference(**arrays, silu=True)
    assert y.dtype == final.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float64), want, rtol=2**-8, atol=1e-6)
    np.testing.assert_array_equal(final, arrays["x"][:, -3:])
    np.testing.assert_array_equal(y, run(arrays, activation="silu")[0])


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(implementation="pallas"), ValueError, '"xla" or None'),
        (dict(activation="gelu"), ValueError, "silu"),
        (dict(weight=np.ones((4, 2), np.float32)), ValueError, "weight must be"),
        (dict(bias=np.ones(4, np.float32)), ValueError, "bias must be"),
        (dict(initial_state=np.ones((2, 4, 3), np.float32)), ValueError, "initial_state must be"),
        (dict(segment_ids=np.ones((2, 4), np.int32)), ValueError, "segment_ids must be"),
        (dict(segment_ids=np.ones((2, 9), np.float32)), TypeError, "segment_ids must be integers"),
        (dict(x=np.ones((2, 9, 3), np.int32)), TypeError, "x must be floating"),
        (dict(x=np.ones((2, 0, 3), np.float32)), ValueError, "x must be"),
    ],
)
def test_errors_name_the_argument(change, error, words):
    with pytest.raises(error, match=words):
        short_convolution(**inputs(2, 9, 3, 4) | change)
