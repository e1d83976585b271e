"""Steps of any size against extended precision: Abar, Bbar and kernels, and their derivatives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tilescan.ops import s4
from tilescan.ops.state_space import diagonal_state_space

# Steps z = dt A, by their A: tiny, common, at and near the bilinear pole, and very large.
STEPS = (1e-12, 1e-9, 1e-6, 1e-4, 1e-3, 0.0625, 0.24, 0.26, 0.499, 0.501, 1.0, 1.9999, 2.0, 2.0001)
STEPS += (2.5, 3.9, 4.0, 4.1, 20.0, 90.0, 175.0, 192.0, 500.0, 1e4, 1e9)
POLES = (-0.5, -1.0, -64.0, -0.5 + 3j, -1e-4 + 1j, -0.5 - 100j, -2.0 + 1e-3j, -1e-3)


def grid(dtype):
    """log dt [H], A [H, 1], with |A| dt all of STEPS for each pole."""
    pairs = [(np.log(size / abs(A)), A) for A in POLES for size in STEPS]
    log_dt = np.asarray([pair[0] for pair in pairs], dtype)
    A = np.asarray([pair[1] for pair in pairs])
    return log_dt, A.astype(np.result_type(dtype, np.complex64))[:, None]


def exact(log_dt, A, discretization):
    """Abar and Bbar of B = 1, and d/d log dt and d/dA of both, in extended precision."""
    dt = np.exp(np.asarray(log_dt, np.longdouble))[:, None]
    A = np.asarray(A, np.clongdouble)
    z = dt * A
    if discretization == "bilinear":
        below = 1 - z / 2
        return (
            ((1 + z / 2) / below, dt / below),
            (z / below**2, dt / below**2),
            (dt / below**2, dt**2 / 2 / below**2),
        )
    # phi = (exp(z) - 1) / z and phi', by their series where the quotients cancel
    small = np.abs(z) < 1
    series, slope, term = np.zeros_like(z), np.zeros_like(z), np.ones_like(z)
    near = np.where(small, z, 0)
    for n in range(40):
        series = series + term / (n + 1)
        slope = slope + term / (n + 2)
        term = term * near / (n + 1)
    far = np.where(small, 1, z)
    phi = np.where(small, series, (np.exp(far) - 1) / far)
    dphi = np.where(small, slope, (np.exp(far) - (np.exp(far) - 1) / far) / far)
    return (
        (np.exp(z), dt * phi),
        (z * np.exp(z), dt * np.exp(z)),
        (dt * np.exp(z), dt**2 * dphi),
    )


@functools.partial(jax.jit, static_argnums=2)
def both_derivatives(log_dt, A, discretization):
    """Abar and Bbar of B = 1, and their derivatives, which are holomorphic in A."""
    step = lambda log_dt, A: s4.s4d_discretize(log_dt, A, jnp.ones_like(A), discretization)
    values, by_step = jax.jvp(lambda l: step(l, A), (log_dt,), (jnp.ones_like(log_dt),))
    by_pole = jax.jvp(lambda A: step(log_dt, A), (A,), (jnp.ones_like(A),))[1]
    return values, by_step, by_pole


def known_to(log_dt, A, discretization, dtype):
    """What rounding of log dt and of dt A leaves of a number, relative to it."""
    z = np.exp(np.asarray(log_dt, np.longdouble))[:, None] * np.asarray(A)
    phase = np.where(z.real > -50, np.abs(z), 0) if discretization == "zoh" else 0
    return np.finfo(dtype).eps * (1 + np.abs(log_dt)[:, None]) * (1 + phase)


@pytest.mark.parametrize(
    "discretization,dtype",
    [
        ("zoh", "float32"),
        ("zoh", "float64"),
        ("bilinear", "float32"),
        pytest.param("bilinear", "float64", marks=pytest.mark.slow),
    ],
)
def test_steps_of_any_size(dtype, discretization):
    """Values and derivatives are as near to the exact ones as the rounded inputs let them be."""
    log_dt, A = grid(dtype)
    with jax.enable_x64(dtype == "float64"):
        got = both_derivatives(jnp.asarray(log_dt), jnp.asarray(A), discretization)
    want = exact(log_dt, A, discretization)
    tolerance = 4 * known_to(log_dt, A, discretization, dtype)
    for which, ours, theirs in zip(("value", "d / d log dt", "d / dA"), got, want, strict=True):
        for name, x, y in zip(("Abar", "Bbar"), ours, theirs, strict=True):
            assert np.isfinite(x).all(), (which, name)
            # Abar adds something to 1; what has decayed to nothing is only known to be small.
            size = np.abs(y) + (1 if (which, name) == ("value", "Abar") else 1e-25)
            error = np.abs(np.asarray(x) - y) / size / tolerance
            worst = np.unravel_index(np.argmax(error), error.shape)
            assert error.max() < 1, (which, name, log_dt[worst[0]], A[worst], error.max())


BIG = [(350.0, -0.5), (403.0, -0.5), (3.0, -64.0), (4.0, -0.5), (3.9999, -0.5), (4.0001, -0.5)]
BIG += [(2.0, -1.0), (0.03125, -64.0), (1e-3, -0.5 + 40j), (2.0, -1.0 + 1e-4j), (1e6, -1e-3 + 5j)]


@functools.partial(jax.jit, static_argnums=(2, 3))
def kernel_and_recurrence(log_dt, A, length, discretization):
    """The kernel, its derivatives by log dt and A, the recurrence's, and the sum's gradients."""
    one = jnp.ones_like(A)
    kernel = lambda l, A: s4.s4d_kernel(l, A, one, one, length, discretization)
    value, by_step = jax.jvp(lambda l: kernel(l, A), (log_dt,), (jnp.ones_like(log_dt),))
    by_pole = jax.jvp(lambda A: kernel(log_dt, A), (A,), (one,))[1]
    impulse = jnp.zeros((1, length, len(log_dt)), log_dt.dtype).at[:, 0].set(1)
    y, _ = diagonal_state_space(impulse, log_dt, A, one, one, discretization=discretization)
    pulled = jax.grad(lambda l, A: kernel(l, A).sum(), (0, 1))(log_dt, A)
    return value, by_step, by_pole, y, pulled


@pytest.mark.parametrize(
    "discretization,dtype",
    [
        ("zoh", "float32"),
        pytest.param("bilinear", "float32", marks=pytest.mark.slow),
        pytest.param("zoh", "float64", marks=pytest.mark.slow),
        pytest.param("bilinear", "float64", marks=pytest.mark.slow),
    ],
)
def test_kernels_and_recurrences_of_large_steps(dtype, discretization):
    """K_l = 2 Re Bbar Abar^l and its derivatives, also where Abar is 0; the recurrence's answer."""
    length = 20
    log_dt = np.log(np.asarray([dt for dt, _ in BIG])).astype(dtype)
    A = np.asarray([A for _, A in BIG]).astype(np.result_type(dtype, np.complex64))[:, None]
    (Abar, Bbar), (A_step, B_step), (A_pole, B_pole) = exact(log_dt, A, discretization)
    l = np.arange(length).reshape(-1, 1, 1)
    power, before = Abar**l, np.where(l > 0, l * Abar ** np.maximum(l - 1, 0), 0)
    want = 2 * (Bbar * power)[..., 0]
    by_step = 2 * (B_step * power + Bbar * before * A_step)[..., 0]
    by_pole = 2 * (B_pole * power + Bbar * before * A_pole)[..., 0]

    with jax.enable_x64(dtype == "float64"):
        got, ours, poles, y, pulled = kernel_and_recurrence(log_dt, A, length, discretization)

    tolerance = 30 * known_to(log_dt, A, discretization, dtype)[:, 0]
    summed = by_step.sum(0, keepdims=True)
    for name, x, right, terms in (
        ("kernel", got, want, want),
        ("recurrence", y[0], want, want),
        ("d / d log dt", ours, by_step, by_step),
        ("d / dA", poles, by_pole, by_pole),
        ("gradient", pulled[0][None], summed, by_step),
    ):
        assert np.isfinite(x).all(), name
        size = np.maximum(np.abs(terms).sum(0), 1e-25)
        error = np.abs(np.asarray(x) - right.real) / size / tolerance
        assert error.max() < 1, (name, error.max(), BIG[np.argmax(error.max(0))])
    assert np.isfinite(pulled[1]).all()


def test_bilinear_near_its_pole_is_small_and_smooth():
    """Four hundred steps about dt A = -2: Abar passes 0 in a straight line."""
    log_dt = np.log(np.linspace(3.9999, 4.0001, 401, dtype=np.float32))
    A = np.full((401, 1), -0.5, np.complex64)
    Abar, Bbar = both_derivatives(log_dt, A, "bilinear")[0]
    assert np.abs(Abar).max() < 3e-5 and np.abs(np.diff(Abar[:, 0])).max() < 5e-7
    np.testing.assert_allclose(Bbar, 2.0, rtol=3e-5)
