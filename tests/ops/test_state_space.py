"""State spaces in chunks against their recurrences, one float64 step after the other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tilescan.ops import reference, s4
from tilescan.ops.state_space import (
    dense_kernel,
    diagonal_state_space,
    dplr_kernel,
    dplr_state_space,
)

H, N = 3, 4
RNG = np.random.default_rng(0)
LOG_DT = np.log([0.003, 0.02, 0.1])
LAMBDA, P, B, _ = (np.broadcast_to(x, (H, N)) for x in s4.hippo_legs_nplr(2 * N)[:3] + (0j,))
C = RNG.standard_normal((H, N)) + 1j * RNG.standard_normal((H, N))
SYSTEMS = {
    "zoh": (LOG_DT, LAMBDA, B, C),
    "bilinear": (LOG_DT, LAMBDA, B, C),
    "dplr": (LOG_DT, LAMBDA, P, B, C),
}
SEGMENTS = np.repeat([[3, 4, 4, 1, 7, 2]], [5, 16, 1, 30, 2, 6], axis=1)
# At most two of them in any 32 steps, one from the 32nd step on.
LONG_SEGMENTS = np.repeat([[3, 4, 1]], [20, 12, 28], axis=1)


def op(kind):
    if kind == "dplr":
        return dplr_state_space
    return functools.partial(diagonal_state_space, discretization=kind)


@functools.partial(jax.jit, static_argnames=("kind", "chunk"))
def run(kind, u, x, system, segment_ids=None, chunk=None):
    return op(kind)(u, *system, initial_state=x, segment_ids=segment_ids, chunk=chunk)


def single(tree):
    narrow = lambda x: np.asarray(x, np.complex64 if np.iscomplexobj(x) else np.float32)
    return jax.tree.map(narrow, tree)


def recurrence(kind, u, x, starts):
    """y [B, T, H] and the last state [B, H, N], complex128, by the dense system of each channel."""
    system = SYSTEMS[kind]
    if kind == "dplr":
        A = np.stack([np.diag(np.concatenate([LAMBDA[h], LAMBDA[h].conj()])) for h in range(H)])
        p = np.concatenate([P, P.conj()], 1)
        A = A - p[:, :, None] * p[:, None].conj()
        dt, eye = np.exp(LOG_DT)[:, None, None], np.eye(2 * N)
        b = np.concatenate([B, B.conj()], 1)[..., None]
        A, b = (
            np.linalg.solve(eye - dt / 2 * A, eye + dt / 2 * A),
            np.linalg.solve(eye - dt / 2 * A, dt * b)[..., 0],
        )
    else:
        z = np.exp(LOG_DT)[:, None] * LAMBDA
        decay = np.exp(z) if kind == "zoh" else (1 + z / 2) / (1 - z / 2)
        b = B * ((decay - 1) / LAMBDA if kind == "zoh" else np.exp(LOG_DT)[:, None] / (1 - z / 2))
        A = np.stack([np.diag(np.concatenate([a, a.conj()])) for a in decay])
        b = np.concatenate([b, b.conj()], 1)
    c = np.concatenate([system[-1], system[-1].conj()], 1)
    x, ys = np.concatenate([x, x.conj()], -1), []
    for t in range(u.shape[1]):
        x = np.where(starts[:, t, None, None], 0, x)
        x = np.einsum("hij,bhj->bhi", A, x) + b * u[:, t, :, None]
        ys.append(np.einsum("hi,bhi->bh", c, x).real)
    return np.stack(ys, 1), x[..., :N]


def inputs(T):
    rng = np.random.default_rng(T)
    x = rng.standard_normal((2, H, N)) + 1j * rng.standard_normal((2, H, N))
    return rng.standard_normal((2, T, H)), x


def split(x):
    return np.concatenate([x.real, x.imag], -1)


def close(actual, expected, tolerance=2e-5):
    np.testing.assert_allclose(actual, expected, atol=tolerance * np.abs(expected).max())


slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "kind,T,chunk",
    [
        slow("zoh", 1, None),
        ("dplr", 1, None),
        ("bilinear", 2, 2),
        slow("dplr", 60, None),
        slow("zoh", 60, 1),
        slow("zoh", 64, 16),
        slow("dplr", 100, 8),
        slow("bilinear", 1, None),
        slow("zoh", 2, 2),
        slow("dplr", 2, 2),
        slow("zoh", 60, None),
        slow("bilinear", 60, None),
        slow("bilinear", 60, 1),
        slow("dplr", 60, 1),
        slow("bilinear", 64, 16),
        slow("dplr", 64, 16),
        slow("zoh", 100, 8),
        slow("bilinear", 100, 8),
    ],
)
def test_chunks_equal_the_recurrence(kind, T, chunk):
    u, x = inputs(T)
    y, last = run(kind, *single((u, split(x), SYSTEMS[kind])), chunk=chunk)
    expected, state = recurrence(kind, u, x, np.zeros(u.shape[:2], bool))
    close(y, expected)
    close(last, split(state))


@pytest.mark.parametrize(
    "kind,chunk,before",
    [
        slow("zoh", None, None),
        slow("zoh", 4, 9),
        ("dplr", None, 3),
        ("dplr", None, 9),
        slow("zoh", None, 3),
        slow("zoh", None, 9),
        slow("dplr", None, None),
        slow("dplr", 4, 9),
        slow("bilinear", None, None),
        slow("bilinear", None, 3),
        slow("bilinear", None, 9),
        slow("bilinear", 4, 9),
    ],
)
@pytest.mark.parametrize("segments", [SEGMENTS, LONG_SEGMENTS], ids=["short", "long"])
def test_segments_start_from_nothing(kind, segments, chunk, before):
    """Segments begin within chunks, at their borders, and several in one chunk."""
    ids = np.concatenate([segments, segments[:, ::-1]])
    u, x = inputs(ids.shape[1])
    first = ids[:, :1] if before is None else np.full((2, 1), before)
    padded = np.concatenate([first, ids], 1)
    expected, state = recurrence(kind, u, x, padded[:, 1:] != padded[:, :-1])
    y, last = run(
        kind,
        *single((u, split(x), SYSTEMS[kind])),
        segment_ids=ids if before is None else padded,
        chunk=chunk,
    )
    close(y, expected)
    close(last, split(state))


def test_a_step_at_a_segment_start_forgets_the_state():
    u, x = inputs(1)
    ids = np.array([[3, 4], [5, 5]])
    y, last = run("dplr", *single((u, split(x), SYSTEMS["dplr"])), segment_ids=ids)
    expected, state = recurrence("dplr", u, x, np.array([[True], [False]]))
    close(y, expected)
    close(last, split(state))


@pytest.mark.parametrize("segments", [slow(None), SEGMENTS], ids=["whole", "segments"])
def test_channels_share_a_system(segments):
    """[B, T, H, R] is R recurrences."""
    rng = np.random.default_rng(1)
    u = rng.standard_normal((2, 60, H, 2))
    x = rng.standard_normal((2, H, 2, N)) + 1j * rng.standard_normal((2, H, 2, N))
    starts = np.zeros((2, 60), bool)
    if segments is not None:
        segments = np.repeat(segments, 2, axis=0)
        starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    out = run("zoh", *single((u, split(x), SYSTEMS["zoh"])), segment_ids=segments)
    y, last = map(np.asarray, out)
    for r in range(2):
        expected, state = recurrence("zoh", u[..., r], x[:, :, r], starts)
        close(y[..., r], expected)
        close(last[:, :, r], split(state))


def by_steps(kind, u, x, system, segment_ids):
    """The recurrence in JAX, to be differentiated; segment_ids [B, 1 + T]."""
    starts = segment_ids[:, 1:] != segment_ids[:, :-1]
    if kind == "dplr":
        step = lambda x, u: s4.s4_dplr_step(x, u, *system)
    else:
        log_dt, A, B, C = system
        Abar, Bbar = s4.s4d_discretize(log_dt, A, B, kind)
        step = lambda x, u: s4.s4d_step(x, u, Abar, Bbar, C)
    x = jax.lax.complex(x[..., :N], x[..., N:])
    xs = jnp.moveaxis(u, 1, 0), jnp.moveaxis(starts, 1, 0)
    last, y = jax.lax.scan(lambda x, t: step(jnp.where(t[1][:, None, None], 0, x), t[0]), x, xs)
    return jnp.moveaxis(y, 0, 1), jnp.concatenate([last.real, last.imag], -1)


@functools.partial(jax.jit, static_argnums=(0, 1))
def gradients(f, kind, u, x, system, segment_ids):
    (y, last), pull = jax.vjp(lambda *a: f(kind, *a, segment_ids), u, x, system)
    wave = lambda a: jnp.cos(jnp.arange(a.size, dtype=a.dtype)).reshape(a.shape)
    return pull((wave(y), wave(last)))


def in_chunks_of_16(kind, u, x, system, segment_ids):
    return op(kind)(u, *system, initial_state=x, segment_ids=segment_ids, chunk=16)


@pytest.mark.parametrize(
    ("kind", "segments"),
    [
        slow("zoh", None, id="zoh, whole"),
        slow("dplr", None, id="dplr, whole"),
        slow("zoh", LONG_SEGMENTS, id="zoh, long segments"),
        slow("zoh", SEGMENTS, id="zoh, short segments"),
        pytest.param("dplr", SEGMENTS, id="dplr, short segments"),
        pytest.param("dplr", LONG_SEGMENTS, id="dplr, long segments"),
    ],
)
def test_gradients(kind, segments):
    """By autodiff of the chunks and of the recurrence, in float64."""
    ids = None if segments is None else np.concatenate([segments, segments[:, ::-1]])
    u, x = inputs(SEGMENTS.shape[1])
    with jax.enable_x64(True):
        arguments = jax.tree.map(jnp.asarray, (u, split(x), SYSTEMS[kind]))
        actual = gradients(in_chunks_of_16, kind, *arguments, ids)
        ids = np.ones(u.shape[:2], int) if ids is None else ids
        expected = gradients(by_steps, kind, *arguments, np.concatenate([ids[:, :1], ids], 1))
        jax.tree.map(lambda x, y: close(x, y, 1e-10), actual, expected)


dplr_kernels = jax.jit(
    lambda system, length: (dplr_kernel(*system, length), s4.s4_dplr_kernel(*system, length)),
    static_argnums=1,
)
dplr_kernel_alone = jax.jit(lambda system, length: dplr_kernel(*system, length), static_argnums=1)


@pytest.mark.parametrize("length", [*map(slow, (1, 2, 3, 31, 64)), 100])
def test_dplr_kernel_by_powers_equals_that_by_cauchy_products(length):
    system = SYSTEMS["dplr"]
    with jax.enable_x64(True):
        actual, expected = dplr_kernels(jax.tree.map(jnp.asarray, system), length)
        close(actual, expected, 1e-9)
    close(dplr_kernel_alone(single(system), length), expected)


@functools.partial(jax.jit, static_argnums=(0, 2))
def kernel_and_gradients(kernel, system, length):
    weight = np.cos(np.arange(length * H)).reshape(length, H)
    found = kernel(*system, length)
    return found, jax.vjp(lambda system: kernel(*system, length), system)[1](weight)


def test_dense_kernel_equals_powers_and_their_gradients():
    """Of a matrix that needs other pivots than its diagonal, in which modes grow."""
    rng = np.random.default_rng(3)
    A = 4 * rng.standard_normal((5, 5))
    A[0, 0] = 2 / np.exp(LOG_DT[1])  # the first pivot of the second channel is 0
    shared = LOG_DT, A, rng.standard_normal(5), rng.standard_normal((H, 5))
    by_powers = lambda log_dt, A, B, C, length: reference.state_space_kernel_by_powers(
        log_dt, A[0], B[0], C, length
    )
    with jax.enable_x64(True):
        system = tuple(map(jnp.asarray, (LOG_DT, A[None], shared[2][None], shared[3])))
        actual = kernel_and_gradients(dense_kernel, system, 19)
        expected = kernel_and_gradients(by_powers, system, 19)
        jax.tree.map(lambda x, y: close(x, y, 1e-9), actual, expected)
        close(actual[0], reference.state_space_kernel(*shared, 19), 1e-9)


@pytest.mark.parametrize(
    "error,message,change",
    [
        (ValueError, r"A must be .* of \(3, 5, 5\)", dict(A=np.ones((2, 5, 5), np.float32))),
        (ValueError, "B must be", dict(B=np.ones((3, 4), np.float32))),
        (TypeError, "C must be floating", dict(C=np.ones((3, 5), np.int32))),
        (ValueError, "length must be a positive integer", dict(length=0)),
    ],
)  # fmt: skip
def test_errors_of_the_dense_kernel(error, message, change):
    good = dict(A=jnp.ones((1, 5, 5)), B=jnp.ones((1, 5)), C=jnp.ones((3, 5)), length=4)
    with pytest.raises(error, match=message):
        dense_kernel(jnp.zeros(3), **good | change)


@pytest.mark.parametrize(
    "error,message,change",
    [
        (ValueError, "chunk must be a power of 2, got 24", dict(chunk=24)),
        (ValueError, r"u must be \[B, T, H\].*log_dt's H = 3",
         dict(u=np.zeros((2, 5, 4), np.float32))),
        (TypeError, "u must be floating", dict(u=np.zeros((2, 5, 3), np.int32))),
        (ValueError, r"initial_state must be \[B, H, S\] = \(2, 3, 8\)",
         dict(initial_state=np.zeros((2, 3, 4), np.float32))),
        (ValueError, "discretization must be", dict(discretization="euler")),
        (ValueError, "segment_ids must be", dict(segment_ids=np.zeros((2, 3), np.int32))),
    ],
)  # fmt: skip
def test_errors_name_the_argument(error, message, change):
    arguments = dict(zip(("log_dt", "A", "B", "C"), single(SYSTEMS["zoh"]), strict=True))
    arguments |= dict(u=jnp.zeros((2, 5, 3))) | change
    with pytest.raises(error, match=message):
        jax.eval_shape(lambda: diagonal_state_space(**arguments))
