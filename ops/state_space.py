"""Linear time-invariant state spaces over any length, with states and segments, in chunks.

A convolution by FFT is the fastest method for a whole sequence, but it has no segments, and every
output has rounding errors of the whole. Here a sequence is split into chunks of C steps. With x the
state before a chunk,

    y_i = sum_(j <= i) K_(i-j) u_j + C Abar^(i+1) x
    x'  = Abar^C x + sum_j Abar^(C-1-j) Bbar u_j

are matrix products with tables that all chunks share (state passing, arXiv 2212.14052, section
4.2). Powers of Abar come by repeated squaring, so a chunk of one step is the recurrence, and all
chunk sizes agree to rounding. In packed sequences no state and no sum
crosses the boundary of a segment.

Complex states come in conjugate pairs, of which half is stored (`ops.s4`): N half of the state
dim, and S = 2N real values.

Dimensions: B batch, T time, H systems, R channels of a system, N half of the state dim, S = 2N,
C chunk, n chunks.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float, Integer

from tilescan.ops import diagonal_scan, s4
from tilescan.ops.arrays import AnyArray
from tilescan.ops.explicit_axes import partitioned_by_dimensions
from tilescan.ops.recurrence_arguments import SegmentIds
from tilescan.ops.sizes import check_sizes
from tilescan.ops.state_space_chunks import (
    Tables,
    checked_state,
    chunked_state_space,
    repeated_squares,
    system_matmul,
)

__all__ = [
    "dense_kernel",
    "diagonal_state_space",
    "diagonal_tables",
    "dplr_kernel",
    "dplr_state_space",
    "dplr_tables",
]

# Steps of a chunk; in packed ones every step may be a lag.
CHUNK, PACKED_CHUNK = 64, 32
_HIGHEST = jax.lax.Precision.HIGHEST


@partitioned_by_dimensions(
    ("BTH", "BH"),
    u="BTH",
    log_dt="H",
    A="HN",
    B="HN",
    C="HN",
    initial_state="BH",
    segment_ids="BT",
)
def diagonal_state_space(
    u: Float[AnyArray, "B T H"] | Float[AnyArray, "B T H R"],
    log_dt: Float[AnyArray, " H"],
    A: Complex[AnyArray, "#H N"],
    B: Complex[AnyArray, "#H N"],
    C: Complex[AnyArray, "#H N"],
    *,
    discretization: str = "zoh",
    initial_state: Float[AnyArray, "B H S"] | Float[AnyArray, "B H R S"] | None = None,
    segment_ids: SegmentIds | None = None,
    chunk: int | None = None,
) -> tuple[
    Float[Array, "B T H"] | Float[Array, "B T H R"],
    Float[Array, "B H S"] | Float[Array, "B H R S"],
]:
    """Computes S4D (arXiv 2206.11893): x_t = Abar x_(t-1) + Bbar u_t and y_t = 2 Re(C x_t).

    Args:
      u: inputs [B, T, H], or [B, T, H, R] for R channels by each of the systems.
      log_dt, A, B, C, discretization: as of `s4.s4d_kernel`.
      initial_state: real parts and then imaginary parts of x before the first step, [B, H, S] or
        [B, H, R, S]; zeros when None.
      segment_ids: integers [B, T], or [B, 1 + T] with the segment of initial_state first. Where
        neighbours differ a segment starts, and the state before it counts as 0. By [B, T] ids the
        first step goes on with initial_state's segment.
      chunk: C, a power of 2; by default 64, or 32 with segment_ids.

    Returns:
      y in u's shape and dtype, and the state after the last step, float32 (float64 for float64).

    Raises:
      ValueError: shapes, discretization or chunk that do not fit.
      TypeError: dtypes that do not fit.
    """
    tables = diagonal_tables(u, log_dt, A, B, C, discretization, segment_ids, chunk)
    return chunked_state_space(u, tables, initial_state, segment_ids)


def diagonal_tables(
    u: Float[AnyArray, "B T H"] | Float[AnyArray, "B T H R"],
    log_dt: Float[AnyArray, " H"],
    A: Complex[AnyArray, "#H N"],
    B: Complex[AnyArray, "#H N"],
    C: Complex[AnyArray, "#H N"],
    discretization: str,
    segment_ids: Integer[AnyArray, "B _"] | None,
    chunk: int | None,
) -> Tables:
    """Returns the tables of `diagonal_state_space`, which has these arguments.

    With Abar^l by doubling: K_l = 2 Re(C Bbar Abar^l), Abar^(C-1-j) Bbar, and C Abar^(i+1).
    """
    chunk = _checked_chunk(u, log_dt, chunk, segment_ids)
    Abar, Bbar = s4.s4d_discretize(log_dt, A, B, discretization)
    Abar, Bbar, C = jnp.broadcast_arrays(Abar, Bbar, C)
    powers, squares = jnp.ones((*Abar.shape, 1), Abar.dtype), [Abar]
    while powers.shape[-1] < chunk:
        powers = jnp.concatenate([powers, powers * squares[-1][..., None]], -1)
        squares.append(squares[-1] * squares[-1])
    kernel = 2 * jnp.einsum("hn,hnl->hl", C * Bbar, powers, precision=_HIGHEST).real
    input_to_state = _real_and_imaginary(powers[..., ::-1] * Bbar[..., None], axis=1)
    state_to_output = _real_and_imaginary(2 * (powers * (C * Abar)[..., None]).conj(), axis=1)
    return Tables(kernel, input_to_state.swapaxes(1, 2), state_to_output, squares)


@partitioned_by_dimensions(
    ("BTH", "BH"),
    u="BTH",
    log_dt="H",
    Lambda="HN",
    P="HN",
    B="HN",
    C="HN",
    initial_state="BH",
    segment_ids="BT",
)
def dplr_state_space(
    u: Float[AnyArray, "B T H"],
    log_dt: Float[AnyArray, " H"],
    Lambda: Complex[AnyArray, "#H N"],
    P: Complex[AnyArray, "#H N"],
    B: Complex[AnyArray, "#H N"],
    C: Complex[AnyArray, "#H N"],
    *,
    initial_state: Float[AnyArray, "B H S"] | None = None,
    segment_ids: SegmentIds | None = None,
    chunk: int | None = None,
) -> tuple[Float[Array, "B T H"], Float[Array, "B H S"]]:
    """Computes S4 (arXiv 2111.00396): the bilinear recurrence of A = Lambda - P P*.

    y_t = 2 Re(C x_t); arguments, results and errors as of `diagonal_state_space`, without channels
    R. The transition from chunk to chunk is a dense real matrix, whose powers cost
    O(H S^3 log C). A single step is O(S), by Woodbury.
    """
    if u.ndim == 3 and u.shape[1] == 1:
        _checked_chunk(u, log_dt, chunk, segment_ids)
        return _dplr_step(u, (log_dt, Lambda, P, B, C), initial_state, segment_ids)
    tables = dplr_tables(u, log_dt, Lambda, P, B, C, segment_ids, chunk)
    return chunked_state_space(u, tables, initial_state, segment_ids)


def dplr_tables(
    u: Float[AnyArray, "B T H"],
    log_dt: Float[AnyArray, " H"],
    Lambda: Complex[AnyArray, "#H N"],
    P: Complex[AnyArray, "#H N"],
    B: Complex[AnyArray, "#H N"],
    C: Complex[AnyArray, "#H N"],
    segment_ids: Integer[AnyArray, "B _"] | None,
    chunk: int | None,
) -> Tables:
    """Returns the tables of `dplr_state_space`, which has these arguments.

    Over real and imaginary parts, with columns Abar^j Bbar and rows C Abar^(i+1) by doubling.
    """
    if u.ndim != 3:
        raise ValueError(f"u must be [B, T, H], got shape {u.shape}")
    chunk = _checked_chunk(u, log_dt, chunk, segment_ids)
    A, b, c = _dplr_real(log_dt, Lambda, P, B, C)
    squares = repeated_squares(A, chunk)
    columns = _orbit(b, [A.swapaxes(1, 2) for A in squares], chunk)
    rows = _orbit(system_matmul(c[:, None], A)[:, 0], squares, chunk)
    kernel = jnp.einsum("hs,hls->hl", c, columns, precision=_HIGHEST)
    return Tables(kernel, columns[:, ::-1], rows.swapaxes(1, 2), squares)


@partitioned_by_dimensions("LH", log_dt="H", Lambda="HN", P="HN", B="HN", C="HN")
def dplr_kernel(
    log_dt: Float[AnyArray, " H"],
    Lambda: Complex[AnyArray, "#H N"],
    P: Complex[AnyArray, "#H N"],
    B: Complex[AnyArray, "#H N"],
    C: Complex[AnyArray, "#H N"],
    length: int,
) -> Float[Array, "{length} H"]:
    """Computes the kernel of `s4.s4_dplr_kernel` by powers: K_(i + r j) = (c A^i) (A^(r j) b).

    With c A^i for i < r, about the root of L, and as many A^(r j) b it takes O(H S^3 log L) real
    FLOPs, fewer than the truncation of C that Cauchy products need.
    """
    return _kernel(*_dplr_real(log_dt, Lambda, P, B, C), length)


@partitioned_by_dimensions("LH", log_dt="H", A="HSS", B="HS", C="HS")
def dense_kernel(
    log_dt: Float[AnyArray, " H"],
    A: Float[AnyArray, "#H S S"],
    B: Float[AnyArray, "#H S"],
    C: Float[AnyArray, "#H S"],
    length: int,
) -> Float[Array, "{length} H"]:
    """Computes K_l = C Abar^l Bbar of any real A, bilinear, by powers as `dplr_kernel` does.

    Args:
      log_dt: log of each channel's step [H].
      A: [H, S, S] or [1, S, S], real. Its modes may grow: no more is certain of them.
      B, C: [H, S] or [1, S].
      length: L.

    Returns:
      [L, H], in O(H S^3 log L) FLOPs.

    Raises:
      ValueError: shapes or a length that do not fit.
      TypeError: dtypes that do not fit.
    """
    H, S = log_dt.shape[0], A.shape[-1]
    for name, x, shape in (("A", A, (S, S)), ("B", B, (S,)), ("C", C, (S,))):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{name} must be floating, got {x.dtype}")
        if x.shape not in ((H, *shape), (1, *shape)):
            raise ValueError(
                f"{name} must be [H, ...] or [1, ...] of {(H, *shape)}, got shape {x.shape}"
            )
    half, eye = jnp.exp(log_dt)[:, None, None] / 2, jnp.eye(S, dtype=A.dtype)[None]
    right = jnp.broadcast_to(2 * half * B[..., None], (H, S, 1))
    solved = _solve(eye - half * A, jnp.concatenate([eye + half * A, right], 2))
    return _kernel(solved[..., :-1], solved[..., -1], jnp.broadcast_to(C, (H, S)), length)


def _dplr_step(u, system, initial_state, segment_ids):
    dtype = jnp.promote_types(u.dtype, system[0].dtype)
    B, _, H = u.shape
    N = system[1].shape[1]
    x = checked_state(initial_state, (B, H, 2 * N), dtype)
    if segment_ids is not None:
        start = diagonal_scan.resets(segment_ids, B, 1)
        x = jnp.where(start[..., None], 0, x)
    x, y = s4.s4_dplr_step(jax.lax.complex(x[..., :N], x[..., N:]), u[:, 0].astype(dtype), *system)
    return y[:, None].astype(u.dtype), _real_and_imaginary(x, axis=2)


def _dplr_real(log_dt, Lambda, P, B, C):
    """Returns Abar [H, S, S], Bbar [H, S] and C [H, S] over real and imaginary parts of x.

    There A is D - 2 p p^T with D = diag(Lambda), and Abar = 2 (1 - dt/2 A)^-1 - 1. With
    G = (1 - dt/2 D)^-1 the inverse is G - dt (G p) (G^T p)^T / (1 + dt p^T G p).
    """
    shape = (log_dt.shape[0], Lambda.shape[1])
    s4.s4d_discretize(log_dt, Lambda, P)  # raises for what does not fit
    s4.s4d_discretize(log_dt, B, C)
    P, B, C = (jnp.broadcast_to(x, shape) for x in (P, B, C))
    dt = jnp.exp(log_dt)[:, None]
    g = 1 / (1 - dt / 2 * Lambda)
    Gp, pG = _real_and_imaginary(g * P, axis=1), _real_and_imaginary(g.conj() * P, axis=1)
    low_rank = dt / (1 + dt * ((P * P.conj()).real * g.real).sum(-1, keepdims=True)) * Gp
    diagonal = lambda x: x[..., None] * jnp.eye(shape[1], dtype=x.dtype)[None]
    re, im = diagonal(g.real), diagonal(g.imag)
    G = jnp.block([[re, -im], [im, re]])
    inverse = G - low_rank[..., None] * pG[:, None]
    b = _real_and_imaginary(B, axis=1)
    b = dt * (_real_and_imaginary(g * B, axis=1) - low_rank * (pG * b).sum(-1, keepdims=True))
    eye = jnp.eye(2 * shape[1], dtype=inverse.dtype)[None]
    return 2 * inverse - eye, b, _real_and_imaginary(2 * C.conj(), axis=1)


def _solve(M, right):
    """Returns M^-1 right, [H, S, R].

    Not by LAPACK: of matrices so small, its threads take a hundred times as long where other
    processes hold the cores.
    """
    inverse = jax.vmap(_inverse)(jax.lax.stop_gradient(M))
    return jax.lax.custom_linear_solve(
        lambda x: system_matmul(M, x),
        right,
        solve=lambda _, b: system_matmul(inverse, b),
        transpose_solve=lambda _, b: system_matmul(inverse.swapaxes(1, 2), b),
    )


def _inverse(M):
    """Returns M^-1 by Gauss and Jordan, with the largest pivot of each column."""
    S = M.shape[0]
    rows = jnp.arange(S)

    def eliminate(k, both):
        pivot = jnp.argmax(jnp.where(rows < k, -1, jnp.abs(both[:, k])))
        both = both[jnp.where(rows == k, pivot, jnp.where(rows == pivot, k, rows))]
        row = both[k] / both[k, k]
        return jnp.where((rows == k)[:, None], row[None], both - both[:, k, None] * row[None])

    both = jnp.concatenate([M, jnp.eye(S, dtype=M.dtype)], 1)
    return jax.lax.fori_loop(0, S, eliminate, both)[:, S:]


def _kernel(A, b, c, length):
    """Returns K_(i + r j) = (c A^i) (A^(r j) b), [length, H], of a discrete system."""
    if not isinstance(length, (int, np.integer)) or length < 1:
        raise ValueError(f"length must be a positive integer, got {length!r}")
    r = 2 ** ((int(length) - 1).bit_length() // 2)
    columns = -(-length // r)
    squares = repeated_squares(A, r)
    rows = _orbit(c, squares, r)
    squares = [A.swapaxes(1, 2) for A in repeated_squares(squares[-1], columns)]
    columns = _orbit(b, squares, columns)
    kernel = jnp.einsum("his,hjs->jih", rows, columns, precision=_HIGHEST)
    return kernel.reshape(-1, A.shape[0])[:length]


def _orbit(x, squares, count):
    """Returns x, x A, ... x A^(count-1), [H, count, S], by doubling."""
    x = x[:, None]
    for A in squares:
        if x.shape[1] >= count:
            break
        x = jnp.concatenate([x, system_matmul(x, A)], 1)
    return x[:, :count]


def _real_and_imaginary(x, axis):
    return jnp.concatenate([x.real, x.imag], axis)


def _checked_chunk(u, log_dt, chunk, segment_ids):
    if not jnp.issubdtype(u.dtype, jnp.floating):
        raise TypeError(f"u must be floating, got {u.dtype}")
    if u.ndim not in (3, 4) or u.shape[2] != log_dt.shape[0]:
        raise ValueError(
            f"u must be [B, T, H] or [B, T, H, R] with log_dt's H = {log_dt.shape[0]}, "
            f"got shape {u.shape}"
        )
    check_sizes(u=(u, "B, T, H" if u.ndim == 3 else "B, T, H, R"))
    if chunk is None:
        chunk = CHUNK if segment_ids is None else PACKED_CHUNK
    if not isinstance(chunk, int) or chunk < 1 or chunk & (chunk - 1):
        raise ValueError(f"chunk must be a power of 2, got {chunk!r}")
    return min(chunk, 2 ** (u.shape[1] - 1).bit_length())
