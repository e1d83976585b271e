"""One linear system per head, over time in chunks of C steps: what `ops.state_space` runs on.

With x the state before a chunk, and tables that all chunks of a system share,

    y_i = sum_(j <= i) K_(i-j) u_j + out_i x        x' = Abar^C x + sum_j into_j u_j

`local` takes the products that know no state, `states` goes from chunk to chunk, `outputs` adds
what states give. Whoever cuts time over devices goes through `states` twice: for what a device's
stretch adds to the state, and from the state that enters.

In packed sequences a chunk has runs of steps of one segment. Only its first run sees x, only the
last one counts in x', and both of their sums are products with the whole kernel of inputs that are
0 elsewhere. Where a chunk has runs between them, sums are taken lag by lag.

Letters: B batch, T time, H systems, R channels of a system, S state dim in real numbers, N = S / 2,
C chunk, n chunks.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tilescan.ops import diagonal_scan
from tilescan.ops.attention_xla import varying
from tilescan.ops.short_convolution import short_convolution

__all__ = ["Chunks", "Tables", "local", "outputs", "power", "run", "squares_of", "states", "times"]

_HIGHEST = jax.lax.Precision.HIGHEST


class Tables(NamedTuple):
    """What a chunk of C steps does in each of H systems."""

    kernel: Array  # K_l [H, C]
    into: Array  # of u_j in the state after the chunk, Abar^(C-1-j) Bbar [H, C, S]
    out: Array  # of the state before the chunk in y_i, C Abar^(i+1) [H, S, C]
    squares: list  # Abar^(2^k), k = 0 ... log2 C: [H, N] complex, or [H, S, S] real


class Chunks(NamedTuple):
    """What inputs do from chunk to chunk, whatever the state before them is."""

    near: Array  # in the outputs of their own chunk [H, B, R, n, C]
    added: Array  # in the state after their chunk [H, B, R, n, S]
    rest: Array | None  # the same of a last chunk that is not full [H, B, R, S]
    seen: Array | None  # 1 where outputs see the state before their chunk [B, n, C]; None: all
    keep: Array | None  # 1 where that state counts in the one after the chunk [n, B]; None: all


def run(u, tables: Tables, initial_state, segment_ids):
    """(y like u, the last state [B, H, S] or [B, H, R, S]) of u [B, T, H] or [B, T, H, R].

    Args:
      u: floating inputs.
      tables: of u's H systems.
      initial_state: like the last state; zeros when None.
      segment_ids: [B, T] or [B, 1 + T], as of `ops.state_space`; or None.
    """
    chunks = local(u, tables, segment_ids)
    # Inside shard_map a carry must vary over the devices that its inputs vary over.
    x = varying(enter(initial_state, u, chunks), chunks)
    before, last = states(chunks, tables, u.shape[1], x)
    return outputs(chunks, tables, before, u), leave(last, u)


def local(u, tables: Tables, segment_ids) -> Chunks:
    """The products that know no state."""
    dtype = jnp.promote_types(u.dtype, tables.kernel.dtype)
    (B, T, H), C = u.shape[:3], tables.into.shape[1]
    R, n = u.shape[3] if u.ndim == 4 else 1, -(-T // C)
    u = u.reshape(B, T, H * R).astype(dtype)
    U = _cut(u, H, R, n, C)
    seen = keep = None
    if segment_ids is None:
        near, added = _near_and_added(U, tables)
    else:
        runs, seen = _segments(segment_ids, n, C, (B, T), dtype)
        keep = seen[..., -1].T
        head, tail = runs == runs[..., :1], runs == runs[..., -1:]
        left = tail.astype(dtype)[None, :, None]

        def ends(u, U, tables):
            first = times(U * head.astype(dtype)[None, :, None], _toeplitz(tables.kernel))
            last, added = _near_and_added(U * left, tables)
            return jnp.where(tail[None, :, None], last, _alone(first)), added

        def between(u, U, tables):
            near = _cut(_lag_by_lag(u, tables.kernel, R, runs), H, R, n, C)
            return near, times(U * left, tables.into)

        few, branches = jnp.all(head | tail), map(jax.checkpoint, (ends, between))
        near, added = jax.lax.cond(few, *branches, u, U, tables._replace(squares=[]))
        U = U * left
    # The padding behind the last step is no time that passes.
    r = T % C
    rest = times(U[..., -1, :r], tables.into[:, C - r :]) if r else None
    return Chunks(near, added, rest, seen, keep)


def states(chunks: Chunks, tables: Tables, T: int, x):
    """(the states before each chunk [H, B, R, n, S], after T steps [H, B, R, S]) from x like it."""
    r = T % tables.into.shape[1]

    def step(x, now):
        added, keep = now
        return _after(tables.squares[-1:], 1, x, keep) + added, x

    added = _alone(jnp.moveaxis(chunks.added, 3, 0))
    last, before = jax.lax.scan(step, x, (added, chunks.keep))
    if r:
        keep = None if chunks.keep is None else chunks.keep[-1]
        last = _after(tables.squares, r, before[-1], keep) + chunks.rest
    return _alone(jnp.moveaxis(before, 0, 3)), last


def outputs(chunks: Chunks, tables: Tables, before, u):
    """y like u, of the states before each chunk."""
    y = times(before, tables.out)
    if chunks.seen is not None:
        y = y * chunks.seen[None, :, None]
    return _joined(y + chunks.near, u.shape[1]).reshape(u.shape).astype(u.dtype)


def enter(initial_state, u, chunks: Chunks):
    """initial_state as [H, B, R, S].

    Raises:
      ValueError, TypeError: another shape than u's [B, H, S] or [B, H, R, S]; not floating.
    """
    H, B, R, _, S = chunks.added.shape
    shape, dtype = (B, *u.shape[2:], S), chunks.added.dtype
    return checked_state(initial_state, shape, dtype).reshape(B, H, R, S).swapaxes(0, 1)


def leave(x, u):
    """[H, B, R, S] as the state of u: [B, H, S] or [B, H, R, S]."""
    return x.swapaxes(0, 1).reshape(u.shape[0], *u.shape[2:], x.shape[-1])


def checked_state(
    state, shape: tuple[int, ...], dtype
) -> Float[Array, "B H S"] | Float[Array, "B H R S"]:
    """The state in `dtype`, zeros when None.

    Raises:
      ValueError, TypeError: another shape; not floating.
    """
    if state is None:
        return jnp.zeros(shape, dtype)
    if state.shape != shape:
        letters = "B, H, S" if len(shape) == 3 else "B, H, R, S"
        raise ValueError(f"initial_state must be [{letters}] = {shape}, got shape {state.shape}")
    if not jnp.issubdtype(state.dtype, jnp.floating):
        raise TypeError(f"initial_state must be floating, got {state.dtype}")
    return state.astype(dtype)


def squares_of(A, count: int) -> list:
    """A^1, A^2, A^4 ... A^c of the least power of two c >= count; matrices [H, S, S]."""
    squares = [A]
    for _ in range((count - 1).bit_length()):
        squares.append(times(squares[-1], squares[-1]))
    return squares


def power(squares: list, steps: int):
    """A^steps, from A^(2^k) by further squares: [H, N] complex, or [H, S, S] real."""
    product = jnp.multiply if jnp.iscomplexobj(squares[0]) else times
    A, found = squares[-1], None
    for k in range(steps.bit_length()):
        A = squares[k] if k < len(squares) else product(A, A)
        if steps >> k & 1:
            found = A if found is None else product(found, A)
    return found


def times(x, table):
    """x [H, ..., K] times [H, K, M], [H, ..., M]."""
    rows = x.reshape(x.shape[0], -1, x.shape[-1])
    rows = jnp.einsum("hmk,hkl->hml", rows, table, precision=_HIGHEST)
    return rows.reshape(*x.shape[:-1], table.shape[-1])


def _near_and_added(U, tables):
    both = times(U, jnp.concatenate([_toeplitz(tables.kernel), tables.into], -1))
    return jnp.split(_alone(both), [U.shape[-1]], -1)


def _after(squares, steps, x, keep):
    """Abar^steps x of states x [H, B, R, S], times keep [B] (None: 1)."""
    for k, A in enumerate(squares):
        if not steps >> k & 1:
            continue
        if jnp.iscomplexobj(A):
            re, im = jnp.split(x, 2, -1)
            a, b = A.real[:, None, None], A.imag[:, None, None]
            x = jnp.concatenate([a * re - b * im, a * im + b * re], -1)
        else:
            x = times(x, A.swapaxes(1, 2))
    return x if keep is None else x * keep[None, :, None, None]


def _toeplitz(kernel):
    """[H, j, i] = kernel_(i - j), or 0: rows of the padded kernel, each shifted by one."""
    H, C = kernel.shape
    rows = jnp.broadcast_to(jnp.pad(kernel, ((0, 0), (0, C)))[:, None], (H, C, 2 * C))
    rows = rows.reshape(H, -1)[:, : C * (2 * C - 1)]
    return rows.reshape(H, C, 2 * C - 1)[..., :C]


def _cut(u, H, R, n, C):
    """u [B, T, H R] as [H, B, R, n, C], padded with zeros."""
    B, T, _ = u.shape
    u = _alone(u.swapaxes(1, 2))
    u = _alone(jnp.pad(u, ((0, 0), (0, 0), (0, n * C - T))))
    u = _alone(u.reshape(B, H, R, n * C).swapaxes(0, 1))
    return u.reshape(H, B, R, n, C)


def _joined(y, T):
    """[H, B, R, n, C] as [B, T, H R]."""
    H, B, R, n, C = y.shape
    y = _alone(y.reshape(H, B, R, n * C)[..., :T])
    y = _alone(y.swapaxes(0, 1)).reshape(B, H * R, T)
    return _alone(y.swapaxes(1, 2))


def _alone(x):
    """x, not fused with what uses it: transposes are fast on CPUs only alone."""
    return jax.lax.optimization_barrier(x)


def _segments(segment_ids, n, C, shape, dtype):
    """Of each step [B, n, C]: the number of its segment; 1 where that began before the chunk."""
    (B, T), pad = shape, n * C - shape[1]
    starts = diagonal_scan.resets(segment_ids, B, T)
    runs = jnp.cumsum(starts, axis=1, dtype=jnp.int32)
    runs = jnp.pad(runs, ((0, 0), (0, pad)), mode="edge").reshape(B, n, C)
    before = jnp.pad(runs[:, :-1, -1], ((0, 0), (1, 0)))[..., None]
    return runs, (runs == before).astype(dtype)


def _lag_by_lag(u, kernel, R, runs):
    """The sums within chunks and segments: [B, T, H R] of u like it."""
    B, T, E = u.shape
    _, n, C = runs.shape
    u = jnp.pad(u, ((0, 0), (0, n * C - T), (0, 0))).reshape(B * n, C, E)
    weight = jnp.repeat(kernel, R, axis=0).T[::-1]
    y, _ = short_convolution(u, weight, segment_ids=runs.reshape(B * n, C))
    return y.reshape(B, n * C, E)[:, :T]
