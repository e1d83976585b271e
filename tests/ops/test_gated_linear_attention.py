"""Gated linear attention against its steps in float64: values, gradients, identities, errors."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tilescan.ops import reference
from tilescan.ops.gated_linear_attention import gated_linear_attention

# Largest accepted errors, relative to the largest entry of the reference.
TOLERANCE = {"float32": 2e-6, "bfloat16": 2e-2}
NAMES = ("o", "final_state", "dq", "dk", "dv", "dlog_decay", "dinitial_state")


def inputs(B, T, H, G, D, P, decay, dtype="float32", strength=0.0, seed=0):
    """q, k, v, log_decay or None, initial_state; decays of about exp(-exp(strength))."""
    rng = np.random.default_rng(seed)
    q, k, v = (
        jnp.asarray(rng.standard_normal(s), dtype)
        for s in ((B, T, H, D), (B, T, G, D), (B, T, G, P))
    )
    shape = {"none": None, "scalar": (B, T, H), "vector": (B, T, H, D)}[decay]
    if shape is not None:
        shape = jnp.asarray(-np.exp(rng.standard_normal(shape) + strength), jnp.float32)
    return q, k, v, shape, jnp.asarray(rng.standard_normal((B, H, D, P)), jnp.float32)


# Split sequences and bfloat16 try scalars in every run.
DECAYS = [pytest.param("scalar", marks=pytest.mark.slow), "vector"]


@functools.cache
def gradients(op, present):
    """Compiled once for all tests that give the same shapes."""

    def loss(*given):
        full = [None] * 5
        for i, a in zip(present, given, strict=True):
            full[i] = a
        o, S = op(*full)
        rng = np.random.default_rng(7)
        w_o, w_S = (jnp.asarray(rng.integers(-3, 4, x.shape), x.dtype) for x in (o, S))
        return (o * w_o).sum().astype(S.dtype) + (S * w_S).sum(), (o, S)

    return jax.jit(jax.grad(loss, range(len(present)), has_aux=True))


def results(op, arrays):
    """o, final_state and the gradients of a random function of both."""
    present = tuple(i for i, a in enumerate(arrays) if a is not None)
    grads, (o, S) = gradients(op, present)(*(arrays[i] for i in present))
    full = [None] * 5
    for i, g in zip(present, grads, strict=True):
        full[i] = g
    return o, S, *full


def by_steps(q, k, v, log_decay, S, starts=None):
    return reference.linear_attention(q, k, v, log_decay, state=S, starts=starts)


def expected(arrays, starts=None):
    with jax.enable_x64(True):
        exact = [a if a is None else jnp.asarray(np.asarray(a, np.float64)) for a in arrays]
        steps = by_steps if starts is None else functools.partial(by_steps, starts=starts)
        return [None if x is None else np.asarray(x) for x in results(steps, exact)]


def assert_close(got, want, dtype="float32", factor=1):
    for name, x, y in zip(NAMES, got, want, strict=True):
        assert (x is None) == (y is None), name
        if y is not None:
            error = np.max(np.abs(np.asarray(x, np.float64) - y))
            bound = factor * TOLERANCE[dtype] * max(np.max(np.abs(y)), 1e-6)
            assert error <= bound, f"{name}: error {error:.2e} above {bound:.2e}"


def op(q, k, v, log_decay, S, **options):
    return gated_linear_attention(q, k, v, log_decay, initial_state=S, **options)


@hypothesis.settings(max_examples=5, phases=[hypothesis.Phase.generate])
@hypothesis.given(
    T=st.sampled_from([1, 2, 15, 63, 100]),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    decay=st.sampled_from(["none", "scalar", "vector"]),
    strength=st.sampled_from([-3.0, 0.0, 4.0]),
    sizes=st.sampled_from([(8, 24), (20, 12)]),
)
def test_matches_the_steps(T, heads, decay, strength, sizes):
    arrays = inputs(2, T, *heads, *sizes, decay, strength=strength)
    assert_close(results(functools.partial(op, chunk=32), arrays), expected(arrays))


@pytest.mark.parametrize("decay", ["none", "scalar", "vector"])
def test_bfloat16_keeps_its_state_in_float32(decay):
    arrays = inputs(1, 100, 4, 2, 16, 16, decay, "bfloat16", -2.0)
    got, want = results(op, arrays), expected(arrays)
    assert [x.dtype for x in got[:2]] == [jnp.bfloat16, jnp.float32]
    assert_close(got, want, "bfloat16")
    # Of the inputs in bfloat16, the state comes as exact as in float32.
    want = want[1]
    assert np.max(np.abs(got[1] - want)) <= 2e-6 * np.max(np.abs(want))


@pytest.mark.parametrize("decay", DECAYS)
def test_packed_segments_equal_separate_sequences(decay):
    arrays = inputs(1, 90, 2, 2, 8, 8, decay, strength=-3.0)
    ids = np.repeat([[3, 4, 3, 9]], [20, 1, 43, 26], axis=1)
    starts = np.pad(np.diff(ids) != 0, ((0, 0), (1, 0)))
    got = results(functools.partial(op, segment_ids=jnp.asarray(ids)), arrays)
    assert_close(got, expected(arrays, starts))
    splits, state = [0, 20, 21, 64, 90], arrays[4]
    for a, b in zip(splits[:-1], splits[1:], strict=True):
        o, S = op(*(x[:, a:b] for x in arrays[:4]), state)
        np.testing.assert_allclose(got[0][:, a:b], o, atol=2e-6 * np.abs(o).max())
        state = jnp.zeros_like(state)
    np.testing.assert_allclose(got[1], S, atol=2e-6 * np.abs(S).max())


def test_segments_reset_what_does_not_decay():
    q, k, v, _, S = inputs(1, 40, 2, 1, 8, 8, "none")
    ids = jnp.asarray([[0] * 33 + [1] * 7])
    o, final = op(q, k, v, None, S, segment_ids=ids)
    want = op(q[:, 33:], k[:, 33:], v[:, 33:], None, None)
    np.testing.assert_allclose(o[:, 33:], want[0], atol=1e-5)
    np.testing.assert_allclose(final, want[1], atol=1e-5)


@pytest.mark.parametrize("decay", ["none", "vector"])
def test_the_first_id_of_one_more_tells_whether_the_state_goes_on(decay):
    arrays = inputs(2, 40, 2, 1, 8, 8, decay, strength=-3.0)
    ids = jnp.asarray([[1] * 21 + [2] * 20, [7] + [1] * 40])
    starts = np.diff(ids) != 0
    got = results(functools.partial(op, segment_ids=ids), arrays)
    assert_close(got, expected(arrays, starts))
    assert np.any(got[6][0]) and not np.any(got[6][1])


@pytest.mark.parametrize("decay", ["none", "scalar", "vector"])
def test_a_split_sequence_equals_the_whole(decay):
    arrays = inputs(2, 100, 2, 2, 8, 8, decay, strength=-2.0)
    whole = op(*arrays)
    for split in (1, 64, 99):
        part = lambda s: [a if a is None else a[:, s] for a in arrays[:4]]
        first, state = op(*part(slice(0, split)), arrays[4])
        second, state = op(*part(slice(split, None)), state)
        got = jnp.concatenate([first, second], 1), state
        for x, y in zip(got, whole, strict=True):
            np.testing.assert_allclose(x, y, atol=3e-6 * np.abs(y).max())


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("strength", [-20.0, 3.0, 30.0])
def test_extreme_decays_stay_exact(decay, strength):
    """From almost none, over e^-20 a step, to decays that float32 has only as 0."""
    arrays = inputs(1, 80, 2, 2, 8, 8, decay, strength=strength)
    assert_close(results(op, arrays), expected(arrays))


@pytest.mark.parametrize("decay", DECAYS)
def test_decays_of_all_sizes_together_stay_exact(decay):
    """Log-decays from -1e-6 to -1e4 next to each other, over several chunks."""
    q, k, v, a, S = inputs(1, 150, 2, 1, 8, 8, decay)
    a = jnp.asarray(-(10 ** np.random.default_rng(5).uniform(-6, 4, a.shape)), jnp.float32)
    arrays = q, k, v, a, S
    got = results(op, arrays)
    assert all(np.isfinite(x).all() for x in got)
    assert_close(got, expected(arrays))


@pytest.mark.parametrize("decay", DECAYS)
def test_weak_decays_are_exact_among_strong_ones(decay):
    """Sums of logarithms that reach thousands must not cost the digits of small ones."""
    q, k, v, a, S = inputs(1, 64, 1, 1, 8, 8, decay, strength=-2.0)
    a = a.at[:, ::2].set(-75.0).at[:, 40:].multiply(1.0).at[:, 48::2].set(-0.01)
    arrays = q, k, v, a, S
    assert_close(results(op, arrays), expected(arrays))


@pytest.mark.parametrize("decay", DECAYS)
def test_minus_infinity_forgets_with_finite_gradients(decay):
    q, k, v, a, S = inputs(1, 50, 2, 2, 8, 8, decay, strength=-2.0)
    a = a.at[:, 17].set(-jnp.inf)
    got = results(op, (q, k, v, a, S))
    assert all(np.isfinite(x).all() for x in got)
    assert not np.any(got[5][:, 17])
    late = op(*(x[:, 17:] for x in (q, k, v, a)), jnp.zeros_like(S))
    np.testing.assert_allclose(got[1], late[1], atol=1e-5)


@pytest.mark.parametrize("decay", DECAYS)
def test_no_step_sees_the_future(decay):
    arrays = inputs(1, 40, 2, 1, 8, 8, decay)
    t = 21

    def loss(*arrays):
        return (op(*arrays)[0][:, t] ** 2).sum()

    dq, dk, dv, da, _ = jax.grad(loss, range(5))(*arrays)
    for g in (dq, dk, dv, da):
        assert not np.any(g[:, t + 1 :])
    assert np.all(np.any(dk[:, : t + 1] != 0, axis=(0, 2, 3))[-5:])


@pytest.mark.slow
def test_runs_are_bitwise_equal_and_chunks_agree():
    arrays = inputs(2, 100, 2, 2, 16, 16, "vector", strength=-1.0)
    runs = [results(functools.partial(op, chunk=c), arrays) for c in (64, 64, 16, 128)]
    for x, y in zip(runs[0], runs[1], strict=True):
        np.testing.assert_array_equal(x, y)
    for other in runs[2:]:
        assert_close(other, [np.asarray(x, np.float64) for x in runs[0]], factor=2)


@pytest.mark.slow
@pytest.mark.parametrize("decay", ["scalar", "vector"])
def test_memory_is_linear_in_time(decay):
    def temporary(T):
        arrays = inputs(1, T, 2, 2, 32, 32, decay)
        f = jax.jit(jax.grad(lambda *a: op(*a)[0].sum(), range(5)))
        return f.lower(*arrays).compile().memory_analysis().temp_size_in_bytes

    small, large = temporary(2048), temporary(8192)
    assert large < 4.5 * small
    assert large < 8192 * 2 * 32 * 32 * 4  # less than one state a step


@pytest.mark.slow
def test_works_in_float64_and_under_vmap():
    with jax.enable_x64(True):
        arrays = [
            jnp.asarray(np.asarray(a, np.float64)) for a in inputs(2, 50, 2, 2, 8, 8, "vector")
        ]
        got, want = results(op, arrays), expected(arrays)
        for x, y in zip(got, want, strict=True):
            assert x.dtype == jnp.float64
            np.testing.assert_allclose(x, y, atol=1e-12 * np.abs(y).max())
    arrays = inputs(3, 50, 2, 2, 8, 8, "vector")
    o, S = jax.vmap(lambda *a: op(*(x[None] for x in a)))(*arrays)
    want = op(*arrays)
    np.testing.assert_allclose(o[:, 0], want[0], atol=1e-5)
    np.testing.assert_allclose(S[:, 0], want[1], atol=1e-5)


def test_errors_name_the_argument():
    q, k, v, a, S = inputs(1, 8, 4, 2, 8, 8, "scalar")
    cases = [
        (ValueError, "implementation", dict(implementation="pallas")),
        (ValueError, "log_decay", dict(log_decay=a[:, :4])),
        (ValueError, "initial_state", dict(initial_state=S[:, :2])),
        (ValueError, "chunk", dict(chunk=10)),
        (ValueError, "no empty axis but B", dict(q=q[:, :0], k=k[:, :0], v=v[:, :0])),
        (ValueError, "segment_ids", dict(segment_ids=jnp.zeros((1, 10), int))),
        (TypeError, "segment_ids", dict(segment_ids=jnp.zeros((1, 8)))),
        (ValueError, "heads", dict(q=q[:, :, :3])),
        (ValueError, "agree", dict(k=k[:, :4])),
        (TypeError, "dtype", dict(k=k.astype(jnp.bfloat16))),
        (TypeError, "log_decay", dict(log_decay=jnp.zeros((1, 8, 4), int))),
    ]
    for error, word, change in cases:
        with pytest.raises(error, match=word):
            gated_linear_attention(**{"q": q, "k": k, "v": v, **change})
