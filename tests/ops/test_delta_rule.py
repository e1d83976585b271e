"""The delta rules against their steps in float64: values, gradients, identities, errors."""

import functools
import importlib

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tilescan.ops import reference
from tilescan.ops.delta_rule import delta_rule, gated_delta_rule

module = importlib.import_module("tilescan.ops.delta_rule")  # `ops.delta_rule` is the function

TOLERANCE = 5e-6  # of the largest entry
NAMES = ("q", "k", "v", "beta", "log_decay", "initial_state")


def inputs(B, T, H, G, D, P, strength=-1.0, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    f = lambda *s: rng.standard_normal(s)
    k = f(B, T, G, D)
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    arrays = f(B, T, H, D), k, f(B, T, G, P)
    rest = 1 / (1 + np.exp(-f(B, T, H))), -np.exp(f(B, T, H) + strength), f(B, H, D, P)
    return [jnp.asarray(a, dtype) for a in arrays] + [jnp.asarray(a, jnp.float32) for a in rest]


def op(q, k, v, beta, log_decay, S, **options):
    return gated_delta_rule(q, k, v, beta, log_decay, initial_state=S, **options)


def by_steps(q, k, v, beta, log_decay, S, starts=None):
    return reference.linear_attention(q, k, v, log_decay, beta, state=S, starts=starts)


@functools.cache
def gradients(f):
    """Compiled once for all tests that give the same shapes."""

    def loss(*arrays):
        o, S = f(*arrays)
        rng = np.random.default_rng(7)
        w_o, w_S = (jnp.asarray(rng.integers(-3, 4, x.shape), x.dtype) for x in (o, S))
        return (o * w_o).sum().astype(S.dtype) + (S * w_S).sum(), (o, S)

    return jax.jit(jax.grad(loss, range(6), has_aux=True))


def results(f, arrays):
    grads, (o, S) = gradients(f)(*arrays)
    return dict(o=o, S=S, **{f"d{n}": g for n, g in zip(NAMES, grads, strict=True)})


def expected(arrays, starts=None):
    with jax.enable_x64(True):
        exact = [jnp.asarray(np.asarray(a, np.float64)) for a in arrays]
        steps = by_steps if starts is None else functools.partial(by_steps, starts=starts)
        out = results(steps, exact)
        return {n: np.asarray(a) for n, a in out.items()}


def assert_close(got, want, tolerance=TOLERANCE):
    for name, y in want.items():
        error = np.max(np.abs(np.asarray(got[name], np.float64) - y))
        bound = tolerance * max(np.max(np.abs(y)), 1e-6)
        assert error <= bound, f"{name}: error {error:.2e} above {bound:.2e}"


@hypothesis.settings(max_examples=3, phases=[hypothesis.Phase.generate])
@hypothesis.given(
    T=st.sampled_from([1, 2, 63, 100]),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    sizes=st.sampled_from([(8, 24), (20, 12)]),
)
def test_matches_the_steps(T, heads, sizes):
    arrays = inputs(2, T, *heads, *sizes)
    assert_close(results(functools.partial(op, chunk=32), arrays), expected(arrays))


def test_the_plain_rule_is_the_gated_one_without_decay():
    q, k, v, beta, a, S = inputs(1, 70, 4, 2, 8, 8)
    o, final = delta_rule(q, k, v, beta, initial_state=S)
    with jax.enable_x64(True):
        exact = [jnp.asarray(np.asarray(x, np.float64)) for x in (q, k, v, beta, 0 * a, S)]
        want = [np.asarray(x) for x in by_steps(*exact)]
    np.testing.assert_allclose(o, want[0], atol=TOLERANCE * np.abs(want[0]).max())
    np.testing.assert_allclose(final, want[1], atol=TOLERANCE * np.abs(want[1]).max())


def test_a_key_reads_what_it_wrote_last():
    """With beta = 1 and unit keys the state maps a key to its last value exactly."""
    q, k, v, beta, _, S = inputs(1, 50, 1, 1, 8, 8)
    o, _ = delta_rule(k, k, v, jnp.ones_like(beta), scale=1.0, initial_state=S)
    np.testing.assert_allclose(o, v, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
def test_triangular_systems_are_solved_to_the_last_digits(transposed):
    """Also those of one key again and again, whose Neumann series loses all digits."""
    rng = np.random.default_rng(0)
    A = np.tril(np.stack([np.ones((48, 48)), rng.random((48, 48))]), -1)
    x = rng.standard_normal((2, 48, 5))
    got = module._solve(jnp.asarray(A, jnp.float32), jnp.asarray(x, jnp.float32), transposed)
    system = np.eye(48) + (A.swapaxes(1, 2) if transposed else A)
    residual = np.abs(system @ np.asarray(got, np.float64) - x).max()
    assert residual <= 1e-6 * np.abs(got).max() * 48


def test_bfloat16_keeps_its_state_in_float32():
    arrays = inputs(1, 100, 4, 2, 16, 16, dtype="bfloat16")
    got, want = results(op, arrays), expected(arrays)
    assert got["o"].dtype == jnp.bfloat16 and got["S"].dtype == jnp.float32
    assert_close(got, want, 2e-2)
    assert np.max(np.abs(got["S"] - want["S"])) <= TOLERANCE * np.max(np.abs(want["S"]))


@pytest.mark.parametrize("strength", [-20.0, 3.0, 30.0])
def test_extreme_decays_stay_exact(strength):
    arrays = inputs(1, 80, 2, 2, 8, 8, strength)
    assert_close(results(op, arrays), expected(arrays))


@pytest.mark.slow
def test_decays_of_all_sizes_together_stay_exact():
    """Log-decays from -1e-6 to -1e4 next to each other, over several chunks."""
    arrays = inputs(1, 150, 2, 1, 8, 8)
    rng = np.random.default_rng(5)
    arrays[4] = jnp.asarray(-(10 ** rng.uniform(-6, 4, arrays[4].shape)), jnp.float32)
    got = results(op, arrays)
    assert all(np.isfinite(x).all() for x in got.values())
    assert_close(got, expected(arrays))


def test_packed_segments_equal_separate_sequences():
    arrays = inputs(1, 90, 2, 1, 8, 8)
    ids = np.repeat([[3, 4, 9]], [20, 44, 26], axis=1)
    starts = np.pad(np.diff(ids) != 0, ((0, 0), (1, 0)))
    got = results(functools.partial(op, segment_ids=jnp.asarray(ids)), arrays)
    assert_close(got, expected(arrays, starts))


def test_the_first_id_of_one_more_tells_whether_the_state_goes_on():
    arrays = inputs(2, 40, 2, 1, 8, 8)
    ids = jnp.asarray([[1] * 21 + [2] * 20, [7] + [1] * 40])
    got = results(functools.partial(op, segment_ids=ids), arrays)
    assert_close(got, expected(arrays, np.diff(ids) != 0))
    assert np.any(got["dinitial_state"][0]) and not np.any(got["dinitial_state"][1])
    q, k, v, beta, _, S = arrays
    plain = functools.partial(delta_rule, q, k, v, beta)
    o, _ = plain(initial_state=S, segment_ids=ids)
    np.testing.assert_array_equal(o[1], plain(initial_state=S.at[1].set(0.0))[0][1])


@pytest.mark.slow
def test_a_split_sequence_equals_the_whole():
    arrays = inputs(2, 100, 2, 2, 8, 8)
    whole = op(*arrays)
    for split in (1, 37, 64, 99):
        first, state = op(*(a[:, :split] for a in arrays[:5]), arrays[5])
        second, state = op(*(a[:, split:] for a in arrays[:5]), state)
        for x, y in zip((jnp.concatenate([first, second], 1), state), whole, strict=True):
            np.testing.assert_allclose(x, y, atol=TOLERANCE * np.abs(y).max())


def test_no_step_sees_the_future():
    arrays = inputs(1, 40, 2, 1, 8, 8)
    grads = jax.grad(lambda *a: (op(*a)[0][:, 21] ** 2).sum(), range(5))(*arrays)
    assert not any(np.any(g[:, 22:]) for g in grads)
    assert all(np.any(g[:, 21]) for g in grads)


@pytest.mark.slow
def test_runs_are_bitwise_equal_and_memory_is_linear():
    arrays = inputs(1, 100, 2, 2, 16, 16)
    for x, y in zip(op(*arrays), op(*arrays), strict=True):
        np.testing.assert_array_equal(x, y)

    def temporary(T):
        arrays = inputs(1, T, 2, 2, 32, 32)
        f = jax.jit(jax.grad(lambda *a: op(*a)[0].sum(), range(6)))
        return f.lower(*arrays).compile().memory_analysis().temp_size_in_bytes

    small, large = temporary(2048), temporary(8192)
    assert large < 4.5 * small
    assert large < 8192 * 2 * 32 * 32 * 4  # less than one state a step


def test_errors_name_the_argument():
    q, k, v, beta, a, S = inputs(1, 8, 4, 2, 8, 8)
    cases = [
        (ValueError, "implementation", dict(implementation="pallas")),
        (ValueError, "beta", dict(beta=beta[:, :4])),
        (ValueError, "log_decay", dict(log_decay=a[..., None])),
        (ValueError, "initial_state", dict(initial_state=S[:, :2])),
        (ValueError, "chunk", dict(chunk=10)),
        (ValueError, "heads", dict(q=q[:, :, :3])),
    ]
    for error, word, change in cases:
        given = {"q": q, "k": k, "v": v, "beta": beta, "log_decay": a, **change}
        with pytest.raises(error, match=word):
            gated_delta_rule(**given)
