"""Gated linear attention against its steps in float64: values, gradients, identities, errors."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recurrence_checks
from recurrence_checks import assert_close, in_pieces, piece, results

from tilescan.ops import reference
from tilescan.ops.gated_linear_attention import gated_linear_attention

# Largest accepted errors, relative to the largest entry of the reference.
TOLERANCE, BFLOAT16_TOLERANCE = 2e-6, 2e-2
TIME = ("q", "k", "v", "log_decay")
# B, T, H, G, D, P of tests that need none of their own: several chunks, the last one incomplete.
SHAPE = 2, 150, 4, 2, 8, 12
# Of decays by vectors, so that there is one program with segments.
ONE_SEGMENT = dict(segment_ids=np.ones((2, 151), int))


def inputs(B, T, H, G, D, P, decay, dtype="float32", strength=0.0, seed=0):
    """q, k, v, log_decay or None, initial_state; decays of about exp(-exp(strength))."""
    rng = np.random.default_rng(seed)
    q, k, v = (
        rng.standard_normal(s).astype(jnp.dtype(dtype))
        for s in ((B, T, H, D), (B, T, G, D), (B, T, G, P))
    )
    shape = {"none": None, "scalar": (B, T, H), "vector": (B, T, H, D)}[decay]
    if shape is not None:
        shape = np.float32(-np.exp(rng.standard_normal(shape) + strength))
    state = np.float32(rng.standard_normal((B, H, D, P)))
    return dict(q=q, k=k, v=v, log_decay=shape, initial_state=state)


def op(q, k, v, log_decay, initial_state, **options):
    return gated_linear_attention(q, k, v, log_decay, initial_state=initial_state, **options)


in_small_chunks = functools.partial(op, chunk=32)


def by_steps(q, k, v, log_decay, initial_state, starts):
    return reference.linear_attention(q, k, v, log_decay, state=initial_state, starts=starts)


def expected(arrays, starts=None):
    starts = np.zeros(arrays["q"].shape[:2], bool) if starts is None else starts
    return recurrence_checks.expected(by_steps, arrays, starts=starts)


def log_decays(arrays, change):
    """The arrays with log-decays that `change` writes into."""
    a = np.array(arrays["log_decay"])
    change(a)
    return arrays | dict(log_decay=jnp.asarray(a))


slow = functools.partial(pytest.param, marks=pytest.mark.slow)
DECAYS = [slow("scalar"), "vector"]


@pytest.mark.parametrize(
    "op,shape,decay,strength",
    [
        (op, SHAPE, "scalar", -3.0),
        (op, (2, 1, 4, 2, 8, 24), "vector", 0.0),
        slow(in_small_chunks, (2, 63, 3, 1, 20, 12), "none", 0.0),
    ],
)
def test_matches_the_steps(op, shape, decay, strength):
    arrays = inputs(*shape, decay, strength=strength)
    assert_close(results(op, arrays), expected(arrays), TOLERANCE)


@pytest.mark.slow
@hypothesis.settings(max_examples=20, phases=[hypothesis.Phase.generate])
@hypothesis.given(
    T=st.sampled_from([1, 2, 15, 63, 100]),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    decay=st.sampled_from(["none", "scalar", "vector"]),
    strength=st.sampled_from([-3.0, 0.0, 4.0]),
    sizes=st.sampled_from([(8, 24), (20, 12)]),
)
def test_any_problem_matches_the_steps(T, heads, decay, strength, sizes):
    arrays = inputs(2, T, *heads, *sizes, decay, strength=strength)
    assert_close(results(in_small_chunks, arrays), expected(arrays), TOLERANCE)


@pytest.mark.parametrize("decay", [slow("none"), slow("scalar"), slow("vector")])
def test_bfloat16_keeps_its_state_in_float32(decay):
    arrays = inputs(*SHAPE, decay, "bfloat16", -2.0)
    got, want = results(op, arrays), expected(arrays)
    assert [got[name].dtype for name in "yh"] == [jnp.bfloat16, jnp.float32]
    assert_close(got, want, BFLOAT16_TOLERANCE)
    # Of the inputs in bfloat16, the state comes as exact as in float32.
    assert_close(got, dict(h=want["h"]), 2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("decay", ["scalar", "vector"])
def test_packed_segments_equal_separate_sequences(decay):
    arrays = inputs(*SHAPE, decay, strength=-3.0)
    bounds = [0, 20, 21, 64, 150]
    ids = np.repeat([[3, 4, 3, 9], [1, 2, 3, 4]], np.diff(bounds), axis=1)
    starts = np.pad(np.diff(ids) != 0, ((0, 0), (1, 0)))
    got = results(op, arrays, segment_ids=ids)
    assert_close(got, expected(arrays, starts), TOLERANCE)
    state = arrays["initial_state"]
    for a, b in zip(bounds[:-1], bounds[1:], strict=True):
        alone = results(op, piece(arrays, a, b, TIME, state))
        y = np.asarray(alone["y"])[:, : b - a]
        np.testing.assert_allclose(got["y"][:, a:b], y, atol=2e-6 * np.abs(y).max())
        state = jnp.zeros_like(state)
    np.testing.assert_allclose(got["h"], alone["h"], atol=2e-6 * np.abs(alone["h"]).max())


@pytest.mark.parametrize("decay", [slow("none"), "vector"])
def test_the_first_id_of_one_more_tells_whether_the_state_goes_on(decay):
    """Also that segments reset what does not decay."""
    arrays = inputs(*SHAPE, decay, strength=-3.0)
    ids = np.repeat([[1, 1, 1, 2], [7, 1, 1, 1]], [1, 20, 20, 110], axis=1)
    got = results(op, arrays, segment_ids=ids)
    assert_close(got, expected(arrays, np.diff(ids) != 0), TOLERANCE)
    assert np.any(got["dinitial_state"][0]) and not np.any(got["dinitial_state"][1])


@pytest.mark.parametrize("decay", [slow("none"), slow("scalar"), "vector"])
def test_a_split_sequence_equals_the_whole(decay):
    arrays = inputs(*SHAPE, decay, strength=-2.0)
    whole = results(op, arrays, **ONE_SEGMENT)
    for split in (1, 64, 149):
        parts = in_pieces(op, arrays, [0, split, 150], TIME, ONE_SEGMENT)
        assert_close(whole, parts, 3e-6)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("strength", [-20.0, 3.0, 30.0])
def test_extreme_decays_stay_exact(decay, strength):
    """From almost none, over e^-20 a step, to decays that float32 has only as 0."""
    arrays = inputs(*SHAPE, decay, strength=strength)
    assert_close(results(op, arrays, **ONE_SEGMENT), expected(arrays), TOLERANCE)


@pytest.mark.parametrize("decay", DECAYS)
def test_decays_of_all_sizes_together_stay_exact(decay):
    """Log-decays from -1e-6 to -1e4 next to each other, over several chunks."""
    sizes = np.random.default_rng(5).uniform(-6, 4, (*SHAPE[:3], SHAPE[4]))
    sizes = sizes if decay == "vector" else sizes[..., 0]
    arrays = inputs(*SHAPE, decay) | dict(log_decay=jnp.asarray(-(10**sizes), jnp.float32))
    got = results(op, arrays, **ONE_SEGMENT)
    assert all(np.isfinite(x).all() for x in got.values())
    assert_close(got, expected(arrays), TOLERANCE)


@pytest.mark.parametrize("decay", DECAYS)
def test_weak_decays_are_exact_among_strong_ones(decay):
    """Sums of logarithms that reach thousands must not cost the digits of small ones."""

    def change(a):
        a[:, ::2] = -75.0
        a[:, 48::2] = -0.01

    arrays = log_decays(inputs(*SHAPE, decay, strength=-2.0), change)
    assert_close(results(op, arrays, **ONE_SEGMENT), expected(arrays), TOLERANCE)


@pytest.mark.parametrize("decay", DECAYS)
def test_minus_infinity_forgets_with_finite_gradients(decay):
    def change(a):
        a[:, 17] = -np.inf

    arrays = log_decays(inputs(*SHAPE, decay, strength=-2.0), change)
    got = results(op, arrays, **ONE_SEGMENT)
    assert all(np.isfinite(x).all() for x in got.values())
    assert not np.any(got["dlog_decay"][:, 17])
    late = piece(arrays, 17, 150, TIME, np.zeros_like(arrays["initial_state"]))
    np.testing.assert_allclose(got["h"], results(op, late, **ONE_SEGMENT)["h"], atol=1e-5)


@pytest.mark.parametrize("decay", DECAYS)
def test_no_step_sees_the_future(decay):
    arrays, t = inputs(*SHAPE, decay), 101
    got = results(op, arrays, np.arange(150) == t, **ONE_SEGMENT)
    for name in TIME:
        assert not np.any(got[f"d{name}"][:, t + 1 :])
    assert np.all(np.any(got["dk"][:, : t + 1] != 0, axis=(0, 2, 3))[-5:])


@pytest.mark.slow
def test_runs_are_bitwise_equal_and_chunks_agree():
    arrays = inputs(2, 100, 2, 2, 16, 16, "vector", strength=-1.0)
    runs = [results(functools.partial(op, chunk=c), arrays) for c in (64, 64, 16, 128)]
    jax.tree.map(np.testing.assert_array_equal, runs[0], runs[1])
    for other in runs[2:]:
        assert_close(other, runs[0], 2 * TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("decay", ["scalar", "vector"])
def test_memory_is_linear_in_time(decay):
    def temporary(T):
        arrays = inputs(1, T, 2, 2, 32, 32, decay)
        f = jax.jit(jax.grad(lambda a: op(**a)[0].sum()))
        return f.lower(arrays).compile().memory_analysis().temp_size_in_bytes

    small, large = temporary(2048), temporary(8192)
    assert large < 4.5 * small
    assert large < 8192 * 2 * 32 * 32 * 4  # less than one state a step


@pytest.mark.slow
def test_works_in_float64_and_under_vmap():
    with jax.enable_x64(True):
        arrays = {
            n: np.asarray(a, np.float64) for n, a in inputs(2, 50, 2, 2, 8, 8, "vector").items()
        }
        got = results(op, arrays)
        assert all(x.dtype == jnp.float64 for x in got.values())
    assert_close(got, expected(arrays), 1e-12)
    arrays = inputs(3, 50, 2, 2, 8, 8, "vector")
    o, S = jax.vmap(lambda a: op(**{n: x[None] for n, x in a.items()}))(arrays)
    want = op(**arrays)
    np.testing.assert_allclose(o[:, 0], want[0], atol=1e-5)
    np.testing.assert_allclose(S[:, 0], want[1], atol=1e-5)


def test_errors_name_the_argument():
    q, k, v, a, S = map(np.asarray, inputs(1, 8, 4, 2, 8, 8, "scalar").values())
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
        (ValueError, "scale must be finite", dict(scale=float("inf"))),
        (TypeError, "k is of type list", dict(k=[[1.0]])),
    ]
    for error, word, change in cases:
        with pytest.raises(error, match=word):
            gated_linear_attention(**{"q": q, "k": k, "v": v, **change})
