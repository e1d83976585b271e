"""Mamba-2's scan against its steps in float64: values, gradients, identities, errors."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recurrence_checks import assert_close, expected, in_pieces, piece, results

from tilescan.ops import reference
from tilescan.ops.ssd import ssd

TOLERANCE = 5e-6  # of the largest entry
TIME = ("x", "dt", "B", "C")
NAMES = ("x", "dt", "A", "B", "C", "D", "dt_bias", "initial_state")
# B, T, H, G, P, N of tests that need none of their own: several chunks, the last one incomplete.
SHAPE = 2, 150, 4, 2, 8, 12


def inputs(batch, T, H, G, P, N, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    f = lambda *s: np.float32(rng.standard_normal(s))
    x, B, C = (f(batch, T, *s).astype(jnp.dtype(dtype)) for s in ((H, P), (G, N), (G, N)))
    A = -np.exp(f(H))
    return dict(
        x=x, dt=f(batch, T, H), A=A, B=B, C=C, D=f(H), dt_bias=f(H) - 1,
        initial_state=f(batch, H, P, N),
    )  # fmt: skip


def by_steps(x, dt, A, B, C, D, dt_bias, initial_state):
    """The recurrence as the paper writes it."""
    dt = jax.nn.softplus(dt + dt_bias[None, None])
    H = x.shape[2]
    B, C = (jnp.repeat(y, H // y.shape[2], axis=2) for y in (B, C))

    def step(h, inputs):
        x, dt, B, C = inputs
        h = jnp.exp(dt * A[None])[..., None, None] * h
        h = h + (dt[..., None] * x)[..., None] * B[:, :, None]
        return h, jnp.einsum("bhpn,bhn->bhp", h, C) + D[None, :, None] * x

    h, y = jax.lax.scan(step, initial_state, [jnp.moveaxis(a, 1, 0) for a in (x, dt, B, C)])
    return jnp.moveaxis(y, 0, 1), h


def op(x, dt, A, B, C, D, dt_bias, initial_state, **options):
    return ssd(
        x, dt, A, B, C, D=D, dt_bias=dt_bias, dt_softplus=True, initial_state=initial_state,
        **options,
    )  # fmt: skip


slow = functools.partial(pytest.param, marks=pytest.mark.slow)
in_small_chunks = functools.partial(op, chunk=32)
quadratic = functools.partial(op, implementation="quadratic")


# A single step and small chunks of the same scan: test_gated_linear_attention.py.
@pytest.mark.parametrize("shape", [slow((2, 1, 3, 1, 20, 12)), slow((2, 63, 4, 2, 8, 24))])
def test_matches_the_steps(shape):
    arrays = inputs(*shape)
    assert_close(results(in_small_chunks, arrays), expected(by_steps, arrays), TOLERANCE)


def test_the_quadratic_form_matches_the_steps():
    arrays = inputs(2, 30, 4, 2, 8, 12)
    assert_close(results(quadratic, arrays), expected(by_steps, arrays), 2 * TOLERANCE)


@pytest.mark.slow
def test_the_quadratic_form_forgets_where_segments_start():
    """The first segment goes on with the initial state, the others begin with none."""
    arrays, ids = inputs(2, 30, 4, 2, 8, 12), np.repeat(np.arange(3), [5, 10, 15])
    whole = quadratic(**arrays, segment_ids=np.stack([ids, ids]))
    parts = []
    for start, end in ((0, 5), (5, 15), (15, 30)):
        own = {n: x[:, start:end] if n in TIME else x for n, x in arrays.items()}
        parts.append(quadratic(**own | ({"initial_state": None} if start else {})))
    y = np.concatenate([y for y, _ in parts], axis=1)
    np.testing.assert_allclose(whole[0], y, atol=1e-4)
    np.testing.assert_allclose(whole[1], parts[-1][1], atol=1e-4)


@pytest.mark.slow
@hypothesis.settings(max_examples=12, phases=[hypothesis.Phase.generate])
@hypothesis.given(
    T=st.sampled_from([1, 2, 63, 100]),
    heads=st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    sizes=st.sampled_from([(8, 24), (20, 12)]),
)
def test_any_problem_matches_the_steps(T, heads, sizes):
    """Gradients of what all steps share are float32 sums of up to 200 of them."""
    arrays = inputs(2, T, *heads, *sizes)
    assert_close(results(in_small_chunks, arrays), expected(by_steps, arrays), 2 * TOLERANCE)


@pytest.mark.slow
def test_bfloat16_keeps_its_state_in_float32():
    arrays = inputs(*SHAPE, "bfloat16")
    got = results(op, arrays)
    assert got["y"].dtype == jnp.bfloat16 and got["h"].dtype == jnp.float32
    want = expected(by_steps, arrays)
    assert_close(got, want, 2e-2)
    assert_close(got, {"h": want["h"]}, 2**-8)
    assert_close(got, {"dinitial_state": want["dinitial_state"]}, TOLERANCE)


@pytest.mark.parametrize("size", [0.0, 1e-7, 1e3, 1e6])
def test_extreme_steps_stay_exact(size):
    """dt A from nothing to -1e6: nothing overflows, and no gradient is lost."""
    arrays = inputs(*SHAPE)
    arrays["dt"] = np.float32(size) * np.abs(arrays["dt"]) + np.float32(30 * (size > 1))
    got, want = results(op, arrays), expected(by_steps, arrays)
    assert all(np.isfinite(a).all() for a in got.values())
    assert_close(got, want, TOLERANCE)


def test_steps_of_all_sizes_together_stay_exact():
    """dt from 1e-6 to 1e3 next to each other, and log-decays from there to -1e4."""
    arrays = inputs(*SHAPE)
    rng = np.random.default_rng(5)
    sizes = 10 ** rng.uniform(-6, 3, arrays["dt"].shape)
    arrays["dt"] = jnp.asarray(np.where(rng.random(sizes.shape) < 0.3, -sizes, sizes), jnp.float32)
    arrays["A"] = jnp.asarray([-10.0, -0.1, -1.0, -0.01])
    got, want = results(op, arrays), expected(by_steps, arrays)
    assert all(np.isfinite(a).all() for a in got.values())
    # Log-decays' gradients are rounded by what is largest in a chunk; A's multiplies them by dt.
    assert_close(got, {"dA": want.pop("dA")}, 3e-4)
    assert_close(got, want, 3e-5)


# Steps of -1e9 before the softplus are 0.
idle = dict(dt=-1e9)


def test_the_first_id_of_one_more_tells_whether_the_state_goes_on():
    """And packed sequences equal separate ones: one goes on with the state, one starts anew."""
    arrays = inputs(*SHAPE)
    state = np.array(arrays["initial_state"])
    ids = np.repeat([[1, 1, 2], [7, 1, 1]], [1, 20, 130], axis=1)
    got = results(op, arrays, segment_ids=ids)
    zero = np.zeros_like(state)
    first = results(op, piece(arrays, 0, 20, TIME, state, **idle))
    second = results(op, piece(arrays, 20, 150, TIME, zero, **idle))
    alone = np.concatenate([first["y"][0, :20], second["y"][0, :130]])
    np.testing.assert_allclose(got["y"][0], alone, atol=1e-5)
    np.testing.assert_allclose(got["h"][0], second["h"][0], atol=1e-5)
    assert np.any(got["dinitial_state"][0]) and not np.any(got["dinitial_state"][1])
    fresh = results(op, arrays | dict(initial_state=zero))
    np.testing.assert_allclose(got["y"][1], fresh["y"][1], atol=1e-5)
    np.testing.assert_allclose(got["h"][1], fresh["h"][1], atol=1e-5)


def test_segments_may_be_split_anywhere():
    """Parts with the id before them equal the whole."""
    arrays = inputs(*SHAPE)
    ids = np.repeat([[1, 1, 2], [7, 1, 1]], [1, 20, 130], axis=1)
    whole = results(op, arrays, segment_ids=ids)
    first = results(op, piece(arrays, 0, 20, TIME, arrays["initial_state"], **idle),
                    segment_ids=np.pad(ids[:, :21], ((0, 0), (0, 130)), "edge"))  # fmt: skip
    second = results(op, piece(arrays, 20, 150, TIME, first["h"], **idle),
                     segment_ids=np.pad(ids[:, 20:], ((0, 0), (0, 20)), "edge"))  # fmt: skip
    y = np.concatenate([first["y"][:, :20], second["y"][:, :130]], 1)
    assert_close(whole, dict(y=y, h=np.asarray(second["h"])), 3e-6)


def test_a_split_sequence_equals_the_whole():
    arrays = inputs(*SHAPE)
    whole = results(op, arrays)
    assert_close(whole, in_pieces(op, arrays, [0, 1, 65, 150], TIME, **idle), 3e-6)


def test_no_step_sees_the_future():
    got = results(op, inputs(*SHAPE), np.arange(150) == 101)
    for name in TIME:
        assert not np.any(got[f"d{name}"][:, 102:])
        assert np.any(got[f"d{name}"][:, 101])


@jax.jit
def three_forms(x, dt, A, B, C, D, bias):
    """Of steps after and before the softplus, and of the exponential of steps."""
    plain = ssd(x, jax.nn.softplus(dt + bias[None, None]), A, B, C)
    inside = ssd(x, dt, A, B, C, D=D, dt_bias=bias, dt_softplus=True)
    step = jnp.exp(dt)
    want = reference.linear_attention(
        jnp.repeat(C, 2, axis=2), B, x * step[..., None], step * A[None, None],
        state=jnp.zeros((1, 2, 8, 8)),
    )  # fmt: skip
    return plain, inside, ssd(x, step, A, B, C)[1], jnp.swapaxes(want[1], 2, 3)


def test_the_options_are_what_they_say():
    arrays = inputs(1, 20, 2, 1, 8, 8)
    x, D = np.asarray(arrays["x"]), np.asarray(arrays["D"])
    plain, inside, decayed, want = three_forms(*(arrays[n] for n in NAMES[:-1]))
    np.testing.assert_allclose(plain[0] + D[:, None] * x, inside[0], atol=1e-5)
    np.testing.assert_allclose(plain[1], inside[1], atol=1e-6)
    np.testing.assert_allclose(decayed, want, atol=1e-5)


def test_memory_is_linear_in_time():
    def temporary(T):
        arrays = inputs(1, T, 2, 1, 32, 32)
        f = jax.jit(jax.grad(lambda a: op(**a)[0].sum()))
        return f.lower(arrays).compile().memory_analysis().temp_size_in_bytes

    # Less than one state a step, and an eighth of one number for each pair of steps.
    assert temporary(8192) < 8192 * 2 * 32 * 32 * 4 == 8192**2 * 2 * 4 / 8


def test_errors_name_the_argument():
    arrays = inputs(1, 8, 4, 2, 8, 8)
    given = {n: arrays[n] for n in ("x", "dt", "A", "B", "C")}
    cases = [
        (ValueError, "implementation", dict(implementation="pallas")),
        (ValueError, "dt must", dict(dt=arrays["dt"][:, :4])),
        (ValueError, "A must", dict(A=arrays["A"][:2])),
        (ValueError, "D must", dict(D=arrays["D"][:2])),
        (ValueError, "B and C", dict(B=arrays["B"][:, :4])),
        (ValueError, "groups", dict(x=arrays["x"][:, :, :3])),
        (ValueError, "initial_state", dict(initial_state=jnp.zeros((1, 4, 8, 9)))),
        (ValueError, "chunk", dict(chunk=0)),
        (TypeError, "dtype", dict(x=arrays["x"].astype(jnp.bfloat16))),
    ]
    for error, word, change in cases:
        with pytest.raises(error, match=word):
            ssd(**{**given, **change})
