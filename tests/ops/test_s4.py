"""S4's kernels against dense float64 powers, scipy's discretisations and their recurrences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal

from tilescan.ops import reference, s4
from tilescan.ops.long_convolution import long_convolution

LOG_DT = np.log([0.001, 0.02, 0.1])


def system(N=8, H=3, seed=0):
    """Lambda, P, B of LegS, and a random C, [H, N/2], complex128."""
    rng = np.random.default_rng(seed)
    Lambda, P, B, _ = s4.hippo_legs_nplr(N)
    C = rng.standard_normal((H, N // 2)) + 1j * rng.standard_normal((H, N // 2))
    return *(np.broadcast_to(x, C.shape) for x in (Lambda, P, B)), C


def dense(log_dt, Lambda, P, B, C, method):
    """Abar, Bbar and C of one channel over both halves, by scipy."""
    both = lambda x: np.concatenate([x, x.conj()])
    A = np.diag(both(Lambda)) - np.outer(both(P), both(P).conj())
    # A is similar to a real matrix: scipy takes real systems only.
    n = len(Lambda)
    eye = np.eye(n)
    V = np.block([[eye, eye], [1j * eye, -1j * eye]]) / np.sqrt(2)
    real = lambda x: np.real_if_close(x, tol=1e6)
    A, B, C = (real(x) for x in (V @ A @ V.conj().T, V @ both(B), both(C) @ V.conj().T))
    assert not any(np.iscomplexobj(x) for x in (A, B, C))
    zero = np.zeros((1, 1))
    Abar, Bbar, *_ = scipy.signal.cont2discrete(
        (A, B[:, None], C[None], zero), np.exp(log_dt), method=method
    )
    return Abar, Bbar[:, 0], C


def powers(log_dt, Lambda, P, B, C, length, method):
    """[length, H]: C Abar^l Bbar, one power at a time."""
    kernel = np.zeros((length, len(log_dt)))
    for h in range(len(log_dt)):
        Abar, x, row = dense(log_dt[h], Lambda[h], P[h], B[h], C[h], method)
        for l in range(length):
            kernel[l, h] = row @ x
            x = Abar @ x
    return kernel


def close(x, y, tolerance):
    np.testing.assert_allclose(x, y, atol=tolerance * np.abs(y).max())


def single(*arrays):
    return [np.asarray(x, np.complex64 if np.iscomplexobj(x) else np.float32) for x in arrays]


vandermonde = jax.jit(s4.s4d_kernel, static_argnums=(4, 5))
cauchy = jax.jit(s4.s4_dplr_kernel, static_argnums=5)
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


def test_hippo_has_the_papers_numbers():
    A, B = s4.hippo_legs(3)
    want = [[-1, 0, 0], [-1.7320508, -2, 0], [-2.2360680, -3.8729833, -3]]
    np.testing.assert_allclose(A, want, atol=1e-7)
    np.testing.assert_allclose(B, [1, 1.7320508, 2.2360680], atol=1e-7)
    Lambda, P, B, V = s4.hippo_legs_nplr(8)
    np.testing.assert_allclose(
        Lambda.imag, [0.42748871, 1.95779415, 5.35420852, 19.85741037], atol=1e-7
    )
    np.testing.assert_array_equal(Lambda.real, -0.5)
    V, P, Lambda = (np.concatenate([x, x.conj()], -1) for x in (V, P, Lambda))
    A, full_B = s4.hippo_legs(8)
    rebuilt = V @ (np.diag(Lambda) - np.outer(P, P.conj())) @ V.conj().T
    np.testing.assert_allclose(rebuilt, A, atol=1e-12)
    np.testing.assert_allclose(V @ np.concatenate([B, B.conj()]), full_B, atol=1e-12)


def test_initialisations():
    np.testing.assert_allclose(s4.s4d_init(6), [-0.5, -0.5 + 1j * np.pi, -0.5 + 2j * np.pi])
    inverse = s4.s4d_init(4, "inv")
    np.testing.assert_allclose(inverse.imag, [4 / np.pi * 3, 4 / np.pi * (4 / 3 - 1)])
    np.testing.assert_array_equal(s4.s4d_init(8, "legs"), s4.hippo_legs_nplr(8)[0])


@pytest.mark.parametrize(
    "length,discretization",
    [
        (100, "bilinear"),  # by "zoh": the long kernels below
        *(slow(n, "bilinear") for n in (1, 2, 3, 31, 64)),
        *(slow(n, "zoh") for n in (1, 2, 3, 31, 64, 100)),
    ],
)
def test_vandermonde_equals_powers(length, discretization):
    Lambda, P, B, C = system()
    want = powers(LOG_DT, Lambda, 0 * P, B, C, length, discretization)
    got = vandermonde(*single(LOG_DT, Lambda, B, C), length, discretization)
    assert got.dtype == jnp.float32 and got.shape == (length, 3)
    close(got, want, 3e-6)
    with jax.enable_x64(True):
        got = vandermonde(LOG_DT, Lambda, B, C, length, discretization)
        close(got, want, 1e-12)


@pytest.mark.parametrize("length", [*map(slow, (1, 2, 3, 31, 64)), 100])
def test_cauchy_equals_powers(length):
    Lambda, P, B, C = system()
    want = powers(LOG_DT, Lambda, P, B, C, length, "bilinear")
    with jax.enable_x64(True):
        got = cauchy(LOG_DT, Lambda, P, B, C, length)
        close(got, want, 1e-11)
    got = cauchy(*single(LOG_DT, Lambda, P, B, C), length)
    assert got.dtype == jnp.float32 and got.shape == (length, 3)
    close(got, want, 3e-4)


def test_cauchy_of_rank_zero_equals_vandermonde_also_in_pieces(monkeypatch):
    monkeypatch.setattr(s4, "_NODES", 7)
    log_dt, Lambda, P, B, C = single(LOG_DT, *system())
    # A new function, so that it is traced with these nodes.
    in_pieces = jax.jit(lambda *a: s4.s4_dplr_kernel(*a, 100))
    got = in_pieces(log_dt, Lambda, 0 * P, B, C)
    want = vandermonde(log_dt, Lambda, B, C, 100, "bilinear")
    close(got, want, 1e-4)


def test_one_pair_by_hand():
    one = np.ones((1, 1), np.complex64)
    kernel = vandermonde(np.log(np.float32([0.1])), -0.5 * one, one, one, 20)[:, 0]
    np.testing.assert_allclose(kernel[0], 0.195082, atol=1e-6)
    np.testing.assert_allclose(kernel[1:] / kernel[:-1], np.exp(-0.05), rtol=1e-5)


def naive_cauchy(log_dt, Lambda, P, B, C, length):
    """The paper's formula over the whole matrix [H, N, L] of full poles, odd lengths only."""
    both = lambda x: jnp.concatenate([x, x.conj()], -1)
    Lambda, P, B, C = map(both, (Lambda, P, B, C))
    omega = jnp.exp(-2j * jnp.pi * jnp.arange(length) / length)
    g = 2 * jnp.exp(-log_dt)[:, None] * ((1 - omega) / (1 + omega))[None]
    k = lambda v, w: ((v * w)[..., None] / (g[:, None] - Lambda[..., None])).sum(1)
    low_rank = k(C, P) * k(P.conj(), B) / (1 + k(P.conj(), P))
    return jnp.fft.ifft(2 / (1 + omega)[None] * (k(C, B) - low_rank)).real.T


def test_cauchy_gradients_equal_those_of_the_naive_sum():
    with jax.enable_x64(True):
        arguments = tuple(map(jnp.asarray, (LOG_DT, *system())))
        wave = jnp.cos(jnp.arange(33.0 * 3)).reshape(33, 3)
        f = functools.partial(s4.s4_dplr_kernel, length=33, truncated=True)
        g = functools.partial(naive_cauchy, length=33)
        both = jax.jit(
            lambda *a: [
                jax.grad(lambda *a, f=f: (f(*a) * wave).sum(), range(5))(*a) for f in (f, g)
            ]
        )
        got, want = both(*arguments)
        for x, y in zip(got, want, strict=True):
            close(x, y, 1e-10)


@pytest.mark.parametrize("discretization", ["zoh", slow("bilinear")])
def test_vandermonde_gradients_equal_those_of_the_powers(discretization):
    with jax.enable_x64(True):
        log_dt, Lambda, _, B, C = map(jnp.asarray, (LOG_DT, *system()))
        wave = jnp.cos(jnp.arange(33.0 * 3)).reshape(33, 3)

        def naive(log_dt, A, B, C):
            z = jnp.exp(log_dt)[:, None] * A
            if discretization == "zoh":
                Abar, Bbar = jnp.exp(z), (jnp.exp(z) - 1) / A * B
            else:
                Abar, Bbar = (1 + z / 2) / (1 - z / 2), jnp.exp(log_dt)[:, None] * B / (1 - z / 2)
            table = Abar[None] ** jnp.arange(33).reshape(-1, 1, 1)
            return 2 * ((C * Bbar)[None] * table).sum(-1).real

        fast = functools.partial(s4.s4d_kernel, length=33, discretization=discretization)
        both = jax.jit(
            lambda *a: [
                jax.grad(lambda *a, f=f: (f(*a) * wave).sum(), range(4))(*a) for f in (fast, naive)
            ]
        )
        got, want = both(log_dt, Lambda, B, C)
        for x, y in zip(got, want, strict=True):
            close(x, y, 1e-10)


@functools.partial(jax.jit, static_argnums=0)
def by_steps_whole_and_split(low_rank, u, log_dt, Lambda, P, B, C):
    """y by steps, by one convolution, and by two with a state between them."""
    if low_rank:
        kernel = s4.s4_dplr_kernel(log_dt, Lambda, P, B, C, u.shape[1])
        step = lambda x, u: s4.s4_dplr_step(x, u, log_dt, Lambda, P, B, C)
    else:
        kernel = s4.s4d_kernel(log_dt, Lambda, B, C, u.shape[1])
        Abar, Bbar = s4.s4d_discretize(log_dt, Lambda, B)
        step = lambda x, u: s4.s4d_step(x, u, Abar, Bbar, C)
    state = jnp.zeros((2, 3, 8), jnp.complex64)
    _, stepped = jax.lax.scan(step, state, jnp.moveaxis(u, 1, 0))
    whole, _ = long_convolution(u, kernel)
    first, state = long_convolution(u[:, :20], kernel)
    second, _ = long_convolution(u[:, 20:], kernel, initial_state=state)
    return jnp.moveaxis(stepped, 0, 1), whole, jnp.concatenate([first, second], 1)


# Kernels are compared with powers here, and recurrences with chunks in test_state_space.py.
@pytest.mark.parametrize("low_rank", [slow(False), slow(True)])
def test_convolution_equals_recurrence(low_rank):
    """The kernel as one convolution, in pieces with state, and the system step by step."""
    u = jnp.asarray(np.random.default_rng(3).standard_normal((2, 50, 3)), jnp.float32)
    arrays = single(LOG_DT, *system(16))
    stepped, whole, split = by_steps_whole_and_split(low_rank, u, *arrays)
    close(whole, stepped, 1e-4 if low_rank else 1e-5)
    close(split, np.asarray(whole), 1e-5)


def test_dense_system_equals_scipys():
    arguments = (LOG_DT, *system())
    with jax.enable_x64(True):
        Abar, Bbar = map(np.asarray, jax.jit(s4.dplr_discretize)(*arguments[:-1]))
    C = arguments[-1]
    row = np.concatenate([C, C.conj()], -1)
    for h in range(3):
        want_A, want_B, want_C = dense(LOG_DT[h], *(x[h] for x in arguments[1:]), "bilinear")
        for l in (0, 1, 5):
            got = row[h] @ np.linalg.matrix_power(Abar[h], l) @ Bbar[h]
            np.testing.assert_allclose(got, want_C @ np.linalg.matrix_power(want_A, l) @ want_B)


def test_long_kernels_stay_accurate_and_small():
    """float32 at 16,384 steps and 64 states, without a table of [H, N, L]."""
    A = np.broadcast_to(s4.s4d_init(64), (2, 32))
    rng = np.random.default_rng(0)
    C = rng.standard_normal((2, 32)) + 1j * rng.standard_normal((2, 32))
    B = np.ones_like(A)
    log_dt = np.log([0.001, 0.1])
    length = 16384
    z = np.exp(log_dt)[:, None] * A
    weight = C * (np.exp(z) - 1) / A
    want = np.stack(
        [2 * (weight[h] * np.exp(z[h] * np.arange(length)[:, None])).sum(-1).real for h in (0, 1)],
        axis=-1,
    )
    arguments = single(log_dt, A, B, C)
    f = jax.jit(functools.partial(s4.s4d_kernel, length=length)).lower(*arguments).compile()
    close(f(*arguments), want, 2e-5)
    np.testing.assert_array_equal(f(*arguments), f(*arguments))
    memory = f.memory_analysis()
    assert memory.temp_size_in_bytes < 4 * 2 * 32 * length / 4


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda l, A, z: s4.s4d_kernel(l, A.real, A, A, 8), TypeError, "A must be complex"),
        (lambda l, A, z: s4.s4d_kernel(l, A, A[:, :3], A, 8), ValueError, "B must be"),
        (lambda l, A, z: s4.s4d_kernel(l, A, A, A, 0), ValueError, "length must be"),
        (lambda l, A, z: s4.s4d_kernel(l, A, A, A, 8, "euler"), ValueError, '"zoh" or "bilinear"'),
        (lambda l, A, z: s4.s4d_kernel(l[None], A, A, A, 8), ValueError, "log_dt must be"),
        (lambda l, A, z: s4.s4_dplr_kernel(l, A, z, A, A, 8), ValueError, "P must be"),
        (lambda l, A, z: s4.hippo_legs_nplr(7), ValueError, "N must be even"),
        (lambda l, A, z: s4.s4d_init(8, "random"), ValueError, "kind must be"),
    ],
)
def test_errors_name_the_argument(call, error, words):
    A = jnp.ones((3, 4), jnp.complex64)
    with pytest.raises(error, match=words):
        call(jnp.zeros(3), A, A[:, 0])


def test_the_references_are_scipys_impulse_response():
    A, B = s4.hippo_legs(6)
    rng = np.random.default_rng(0)
    C, dt, length = rng.normal(size=(2, 6)), np.array([0.02, 0.1]), 21
    want = np.empty((length, 2))
    for h in range(2):
        dense = (A, B[:, None], C[h : h + 1], np.zeros((1, 1)))
        Ab, Bb, *_ = scipy.signal.cont2discrete(dense, dt[h], method="bilinear")
        # Bilinear in SciPy moves a part of B into the output; the recurrence of the paper is
        # x_k = Ab x_(k-1) + Bb u_k.
        want[:, h] = [(C[h] @ np.linalg.matrix_power(Ab, l) @ Bb)[0] for l in range(length)]
    got = reference.state_space_kernel(np.log(dt), A, B, C, length)
    np.testing.assert_allclose(got, want, rtol=1e-10)
    single = [jnp.asarray(x, jnp.float32) for x in (np.log(dt), A, B, C)]
    got = jax.jit(reference.state_space_kernel_by_powers, static_argnums=4)(*single, length)
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())
