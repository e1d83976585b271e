"""The delta rules against their steps in float64: values, gradients, identities, errors."""

import functools
import importlib

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recurrence_checks
from recurrence_checks import assert_close, in_pieces, results

from tilescan.ops import reference
from tilescan.ops.delta_rule import delta_rule, gated_delta_rule

module = importlib.import_module("tilescan.ops.delta_rule")  # `ops.delta_rule` is the function

TOLERANCE = 5e-6  # of the largest entry
TIME = ("q", "k", "v", "beta", "log_decay")
# B, T, H, G, D, P of tests that need none of their own: several chunks, the last one incomplete.
SHAPE = 2, 150, 4, 2, 8, 12
# Of the gated rule, so that there is one program with segments, as the plain rule has none.
ONE_SEGMENT = dict(segment_ids=np.ones((2, 151), int))


def inputs(B, T, H, G, D, P, strength=-1.0, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    f = lambda *s: rng.standard_normal(s)
    k = f(B, T, G, D)
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    arrays = dict(q=f(B, T, H, D), k=k, v=f(B, T, G, P))
    rest = dict(
        beta=1 / (1 + np.exp(-f(B, T, H))),
        log_decay=-np.exp(f(B, T, H) + strength),
        initial_state=f(B, H, D, P),
    )
    arrays = {n: a.astype(jnp.dtype(dtype)) for n, a in arrays.items()}
    return arrays | {n: np.float32(a) for n, a in rest.items()}


def op(q, k, v, beta, log_decay, initial_state, **options):
    return gated_delta_rule(q, k, v, beta, log_decay, initial_state=initial_state, **options)


def plain(q, k, v, beta, log_decay, initial_state, **options):
    """The delta rule, whose log_decay is None."""
    assert log_decay is None
    return delta_rule(q, k, v, beta, initial_state=initial_state, **options)


slow = functools.partial(pytest.param, marks=pytest.mark.slow)
in_small_chunks = functools.partial(op, chunk=32)


def by_steps(q, k, v, beta, log_decay, initial_state, starts):
    return reference.linear_attention(q, k, v, log_decay, beta, state=initial_state, starts=starts)


def expected(arrays, starts=None):
    starts = np.zeros(arrays["q"].shape[:2], bool) if starts is None else starts
    return recurrence_checks.expected(by_steps, arrays, starts=starts)


@pytest.mark.parametrize("shape", [slow((2, 1, 3, 1, 20, 12)), slow((2, 63, 4, 2, 8, 24))])
def test_matches_the_steps(shape):
    arrays = inputs(*shape)
    assert_close(results(in_small_chunks, arrays), expected(arrays), TOLERANCE)


@pytest.mark.slow
@hypothesis.settings(max_examples=12, phases=[hypothesis.Phase.generate])
@hypothesis.given(
    T=st.sampled_from([1, 2, 63, 100]),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    sizes=st.sampled_from([(8, 24), (20, 12)]),
)
def test_any_problem_matches_the_steps(T, heads, sizes):
    arrays = inputs(2, T, *heads, *sizes)
    assert_close(results(in_small_chunks, arrays), expected(arrays), TOLERANCE)


@pytest.mark.slow
def test_the_plain_rule_is_the_gated_one_without_decay():
    arrays = inputs(*SHAPE)
    got = results(plain, arrays | dict(log_decay=None))
    want = expected(arrays | dict(log_decay=0 * np.asarray(arrays["log_decay"])))
    want.pop("dlog_decay")
    assert_close(got, want, TOLERANCE)


@pytest.mark.slow
def test_a_key_reads_what_it_wrote_last():
    """With beta = 1 and unit keys the state maps a key to its last value exactly."""
    arrays = inputs(*SHAPE) | dict(log_decay=None)
    k, v = (np.repeat(arrays[n], 2, axis=2) for n in "kv")
    arrays |= dict(q=k * np.float32(8**0.5), beta=np.ones_like(arrays["beta"]))
    np.testing.assert_allclose(results(plain, arrays)["y"], v, atol=1e-5)


solve = jax.jit(module._solve, static_argnums=2)


@pytest.mark.parametrize("transposed", [False, True])
def test_triangular_systems_are_solved_to_the_last_digits(transposed):
    """Also those of one key again and again, whose Neumann series loses all digits."""
    rng = np.random.default_rng(0)
    A = np.tril(np.stack([np.ones((48, 48)), rng.random((48, 48))]), -1)
    x = rng.standard_normal((2, 48, 5))
    got = solve(jnp.asarray(A, jnp.float32), jnp.asarray(x, jnp.float32), transposed)
    system = np.eye(48) + (A.swapaxes(1, 2) if transposed else A)
    residual = np.abs(system @ np.asarray(got, np.float64) - x).max()
    assert residual <= 1e-6 * np.abs(got).max() * 48


@pytest.mark.slow
def test_bfloat16_keeps_its_state_in_float32():
    arrays = inputs(*SHAPE, dtype="bfloat16")
    got, want = results(op, arrays), expected(arrays)
    assert got["y"].dtype == jnp.bfloat16 and got["h"].dtype == jnp.float32
    assert_close(got, want, 2e-2)
    assert_close(got, dict(h=want["h"]), TOLERANCE)


@pytest.mark.parametrize("strength", [-20.0, 3.0, 30.0])
def test_extreme_decays_stay_exact(strength):
    arrays = inputs(*SHAPE, strength)
    assert_close(results(op, arrays, **ONE_SEGMENT), expected(arrays), TOLERANCE)


def test_decays_of_all_sizes_together_stay_exact():
    """Log-decays from -1e-6 to -1e4 next to each other, over several chunks."""
    arrays = inputs(*SHAPE)
    sizes = np.random.default_rng(5).uniform(-6, 4, arrays["log_decay"].shape)
    arrays["log_decay"] = jnp.asarray(-(10**sizes), jnp.float32)
    got = results(op, arrays, **ONE_SEGMENT)
    assert all(np.isfinite(x).all() for x in got.values())
    assert_close(got, expected(arrays), TOLERANCE)


def test_packed_segments_equal_separate_sequences():
    arrays = inputs(*SHAPE)
    ids = np.repeat([[3, 4, 9], [1, 1, 2]], [20, 44, 86], axis=1)
    starts = np.pad(np.diff(ids) != 0, ((0, 0), (1, 0)))
    got = results(op, arrays, segment_ids=np.pad(ids, ((0, 0), (1, 0)), "edge"))
    assert_close(got, expected(arrays, starts), TOLERANCE)


def test_the_first_id_of_one_more_tells_whether_the_state_goes_on():
    arrays = inputs(*SHAPE)
    ids = np.repeat([[1, 1, 2], [7, 1, 1]], [1, 20, 130], axis=1)
    got = results(op, arrays, segment_ids=ids)
    assert_close(got, expected(arrays, np.diff(ids) != 0), TOLERANCE)
    assert np.any(got["dinitial_state"][0]) and not np.any(got["dinitial_state"][1])
    no_state = dict(initial_state=np.array(arrays["initial_state"]))
    no_state["initial_state"][1] = 0
    again = results(op, arrays | no_state, segment_ids=ids)
    np.testing.assert_array_equal(got["y"][1], again["y"][1])


def test_a_split_sequence_equals_the_whole():
    arrays = inputs(*SHAPE)
    whole = results(op, arrays, **ONE_SEGMENT)
    for split in (1, 37, 64, 149):
        parts = in_pieces(op, arrays, [0, split, 150], TIME, ONE_SEGMENT)
        assert_close(whole, parts, TOLERANCE)


def test_no_step_sees_the_future():
    got = results(op, inputs(*SHAPE), np.arange(150) == 101, **ONE_SEGMENT)
    for name in TIME:
        assert not np.any(got[f"d{name}"][:, 102:])
        assert np.any(got[f"d{name}"][:, 101])


@pytest.mark.slow
def test_runs_are_bitwise_equal_and_memory_is_linear():
    arrays = inputs(1, 100, 2, 2, 16, 16)
    for x, y in zip(op(**arrays), op(**arrays), strict=True):
        np.testing.assert_array_equal(x, y)

    def temporary(T):
        arrays = inputs(1, T, 2, 2, 32, 32)
        f = jax.jit(jax.grad(lambda a: op(**a)[0].sum()))
        return f.lower(arrays).compile().memory_analysis().temp_size_in_bytes

    small, large = temporary(2048), temporary(8192)
    assert large < 4.5 * small
    assert large < 8192 * 2 * 32 * 32 * 4  # less than one state a step


def test_errors_name_the_argument():
    q, k, v, beta, a, S = map(np.asarray, inputs(1, 8, 4, 2, 8, 8).values())
    cases = [
        (ValueError, "implementation", dict(implementation="pallas")),
        (ValueError, "beta", dict(beta=beta[:, :4])),
        (ValueError, "log_decay", dict(log_decay=a[..., None])),
        (ValueError, "initial_state", dict(initial_state=S[:, :2])),
        (ValueError, "chunk", dict(chunk=10)),
        (ValueError, "heads", dict(q=q[:, :, :3])),
        (ValueError, "scale must be finite", dict(scale=np.nan)),
        (TypeError, "scale must be a number", dict(scale="x")),
        (TypeError, "beta is of type list", dict(beta=[1.0])),
    ]
    for error, word, change in cases:
        given = {"q": q, "k": k, "v": v, "beta": beta, "log_decay": a, **change}
        with pytest.raises(error, match=word):
            gated_delta_rule(**given)
