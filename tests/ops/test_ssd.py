"""Mamba-2's scan against its steps in float64: values, gradients, identities, errors."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tilescan.ops import reference
from tilescan.ops.ssd import ssd

TOLERANCE = 5e-6  # of the largest entry
NAMES = ("x", "dt", "A", "B", "C", "D", "dt_bias", "initial_state")


def inputs(batch, T, H, G, P, N, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    f = lambda *s: jnp.asarray(rng.standard_normal(s), jnp.float32)
    x, B, C = (f(batch, T, *s).astype(dtype) for s in ((H, P), (G, N), (G, N)))
    A = -jnp.exp(f(H))
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


@functools.cache
def gradients(f):
    """Compiled once for all tests that give the same shapes."""

    def loss(*args):
        y, h = f(*args)
        rng = np.random.default_rng(7)
        w_y, w_h = (jnp.asarray(rng.integers(-3, 4, a.shape), a.dtype) for a in (y, h))
        return (y * w_y).sum().astype(h.dtype) + (h * w_h).sum(), (y, h)

    return jax.jit(jax.grad(loss, range(len(NAMES)), has_aux=True))


def results(f, arrays):
    grads, (y, h) = gradients(f)(*(arrays[name] for name in NAMES))
    return dict(y=y, h=h, **{f"d{name}": g for name, g in zip(NAMES, grads, strict=True)})


def expected(arrays):
    with jax.enable_x64(True):
        exact = {n: jnp.asarray(np.asarray(a, np.float64)) for n, a in arrays.items()}
        return {n: np.asarray(a) for n, a in results(by_steps, exact).items()}


def assert_close(got, want, tolerance=TOLERANCE):
    for name, y in want.items():
        error = np.max(np.abs(np.asarray(got[name], np.float64) - y))
        bound = tolerance * max(np.max(np.abs(y)), 1e-6)
        assert error <= bound, f"{name}: error {error:.2e} above {bound:.2e}"


@hypothesis.settings(max_examples=4, phases=[hypothesis.Phase.generate])
@hypothesis.given(
    T=st.sampled_from([1, 2, 63, 100]),
    heads=st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    sizes=st.sampled_from([(8, 24), (20, 12)]),
)
def test_matches_the_steps(T, heads, sizes):
    arrays = inputs(2, T, *heads, *sizes)
    assert_close(results(functools.partial(op, chunk=32), arrays), expected(arrays))


def test_bfloat16_keeps_its_state_in_float32():
    arrays = inputs(1, 100, 4, 2, 16, 16, "bfloat16")
    got = results(op, arrays)
    assert got["y"].dtype == jnp.bfloat16 and got["h"].dtype == jnp.float32
    want = expected(arrays)
    assert_close(got, want, 2e-2)
    assert_close(got, {"h": want["h"]}, 2**-8)
    assert_close(got, {"dinitial_state": want["dinitial_state"]})


@pytest.mark.parametrize("size", [0.0, 1e-7, 1e3, 1e6])
def test_extreme_steps_stay_exact(size):
    """dt A from nothing to -1e6: nothing overflows, and no gradient is lost."""
    arrays = inputs(1, 70, 2, 1, 8, 8)
    arrays["dt"] = size * jnp.abs(arrays["dt"]) + 30.0 * (size > 1)
    got, want = results(op, arrays), expected(arrays)
    assert all(np.isfinite(a).all() for a in got.values())
    assert_close(got, want)


def test_steps_of_all_sizes_together_stay_exact():
    """dt from 1e-6 to 1e3 next to each other, and log-decays from there to -1e4."""
    arrays = inputs(1, 150, 2, 1, 8, 8)
    rng = np.random.default_rng(5)
    sizes = 10 ** rng.uniform(-6, 3, arrays["dt"].shape)
    arrays["dt"] = jnp.asarray(np.where(rng.random(sizes.shape) < 0.3, -sizes, sizes), jnp.float32)
    arrays["A"] = jnp.asarray([-10.0, -0.1])
    got, want = results(op, arrays), expected(arrays)
    assert all(np.isfinite(a).all() for a in got.values())
    # Log-decays' gradients are rounded by what is largest in a chunk; A's multiplies them by dt.
    assert_close(got, {"dA": want.pop("dA")}, 3e-4)
    assert_close(got, want, 3e-5)


def test_packed_segments_equal_separate_sequences():
    arrays = inputs(1, 80, 2, 1, 8, 8)
    del arrays["initial_state"]
    ids = jnp.asarray([[1] * 30 + [2] * 50])
    y, h = op(**arrays, initial_state=None, segment_ids=ids)
    time = lambda s: {n: a[:, s] if a.ndim > 2 else a for n, a in arrays.items()}
    first, _ = op(**time(slice(0, 30)), initial_state=None)
    second, last = op(**time(slice(30, None)), initial_state=None)
    np.testing.assert_allclose(y, jnp.concatenate([first, second], 1), atol=1e-5)
    np.testing.assert_allclose(h, last, atol=1e-5)


def test_the_first_id_of_one_more_tells_whether_the_state_goes_on():
    """Segments split at any step, each part with the id before it, equal the whole."""
    arrays = inputs(2, 40, 2, 1, 8, 8)
    state = arrays.pop("initial_state")
    ids = jnp.asarray([[1] * 21 + [2] * 20, [7] + [1] * 40])
    y, h = op(**arrays, initial_state=state, segment_ids=ids)
    fresh = op(**arrays, initial_state=jnp.zeros_like(state), segment_ids=ids[:, 1:])
    np.testing.assert_array_equal(y[1], fresh[0][1])
    parts = []
    for s in (slice(0, 20), slice(20, 40)):
        part = {n: a[:, s] if a.ndim > 2 else a for n, a in arrays.items()}
        out, state = op(**part, initial_state=state, segment_ids=ids[:, s.start : s.stop + 1])
        parts.append(out)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), y, atol=3e-6 * np.abs(y).max())
    np.testing.assert_allclose(state, h, atol=3e-6 * np.abs(h).max())


def test_a_split_sequence_equals_the_whole():
    arrays = inputs(2, 100, 2, 1, 8, 8)
    state = arrays.pop("initial_state")
    y, h = op(**arrays, initial_state=state)
    parts = []
    for s in (slice(0, 1), slice(1, 65), slice(65, 100)):
        part = {n: a[:, s] if a.ndim > 2 else a for n, a in arrays.items()}
        out, state = op(**part, initial_state=state)
        parts.append(out)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), y, atol=3e-6 * np.abs(y).max())
    np.testing.assert_allclose(state, h, atol=3e-6 * np.abs(h).max())


def test_no_step_sees_the_future():
    arrays = inputs(1, 40, 2, 1, 8, 8)

    def loss(x, dt, B, C):
        return (op(**{**arrays, "x": x, "dt": dt, "B": B, "C": C})[0][:, 21] ** 2).sum()

    grads = jax.grad(loss, range(4))(*(arrays[n] for n in ("x", "dt", "B", "C")))
    assert not any(np.any(g[:, 22:]) for g in grads)
    assert all(np.any(g[:, 21]) for g in grads)


def test_the_options_are_what_they_say():
    arrays = inputs(1, 20, 2, 1, 8, 8)
    x, dt, A, B, C, D, bias, _ = (arrays[n] for n in NAMES)
    plain = ssd(x, jax.nn.softplus(dt + bias[None, None]), A, B, C)
    inside = ssd(x, dt, A, B, C, D=D, dt_bias=bias, dt_softplus=True)
    np.testing.assert_allclose(plain[0] + D[None, None, :, None] * x, inside[0], atol=1e-5)
    np.testing.assert_allclose(plain[1], inside[1], atol=1e-6)
    decayed = ssd(x, jnp.exp(dt), A, B, C)[1]
    state, step = jnp.zeros((1, 2, 8, 8)), jnp.exp(dt)
    want = reference.linear_attention(
        jnp.repeat(C, 2, axis=2), B, x * step[..., None], step * A[None, None], state=state
    )[1]
    np.testing.assert_allclose(decayed, jnp.swapaxes(want, 2, 3), atol=1e-5)


def test_memory_is_linear_in_time():
    def temporary(T):
        arrays = inputs(1, T, 2, 1, 32, 32)
        f = jax.jit(jax.grad(lambda a: op(**a)[0].sum()))
        return f.lower(arrays).compile().memory_analysis().temp_size_in_bytes

    small, large = temporary(2048), temporary(8192)
    assert large < 4.5 * small
    assert large < 8192 * 2 * 32 * 32 * 4  # less than one state a step


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
