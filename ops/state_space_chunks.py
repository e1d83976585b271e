"""One linear system per head over time in chunks of C steps, the basis of `ops.state_space`.

With x the state before a chunk, and tables that all chunks of a system share,

    y_i = sum_(j <= i) K_(i-j) u_j + C Abar^(i+1) x
    x' = Abar^C x + sum_j Abar^(C-1-j) Bbar u_j

`within_chunks` computes the sums, which depend on no state, `chunk_states` scans x from chunk to
chunk, and `outputs` adds C Abar^(i+1) x. Where devices shard time, each calls `chunk_states` twice:
from zeros, for what its steps add to the state, and from the state that enters it.

In packed sequences a chunk has runs of steps of one segment. Only its first run sees x, only the
last one enters x', and both of their sums are products of the whole kernel with inputs that are 0
elsewhere. Where a chunk has other runs between them, sums are computed lag by lag.

Dimensions: B batch, T time, H systems, R channels of a system, S state dim in real values,
N = S / 2, C chunk, n chunks.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float, Inexact

from tilescan.ops import diagonal_scan
from tilescan.ops.arrays import AnyArray
from tilescan.ops.attention_xla import varying
from tilescan.ops.recurrence_arguments import SegmentIds
from tilescan.ops.short_convolution import short_convolution

__all__ = [
    "Chunks",
    "Tables",
    "batch_first",
    "chunk_states",
    "chunked_state_space",
    "outputs",
    "repeated_squares",
    "system_matmul",
    "systems_first",
    "transition_power",
    "within_chunks",
]

_HIGHEST = jax.lax.Precision.HIGHEST
# Inputs, and a state of real and then imaginary parts.
Inputs = Float[AnyArray, "B T H"] | Float[AnyArray, "B T H R"]
State = Float[AnyArray, "B H S"] | Float[AnyArray, "B H R S"]


class Tables(NamedTuple):
    """Coefficients of a chunk of C steps in each of H systems."""

    kernel: Array  # K_l [H, C]
    input_to_state: Array  # Abar^(C-1-j) Bbar, of u_j in the state after the chunk [H, C, S]
    state_to_output: Array  # C Abar^(i+1), of the state before the chunk in y_i [H, S, C]
    squares: list[Array]  # Abar^(2^k), k = 0 ... log2 C: [H, N] complex, or [H, S, S] real


class Chunks(NamedTuple):
    """What inputs contribute, whatever the state before their chunk is."""

    local_outputs: Array  # sum_(j <= i) K_(i-j) u_j [H, B, R, n, C]
    local_states: Array  # sum_j Abar^(C-1-j) Bbar u_j [H, B, R, n, S]
    remainder: Array | None  # the same of a last chunk that is not full [H, B, R, S]
    sees_state: Array | None  # 1 where y_i sees the state before its chunk [B, n, C]; None: all
    keeps_state: Array | None  # 1 where that state enters the one after it [n, B]; None: all


def chunked_state_space(
    u: Inputs, tables: Tables, initial_state: State | None, segment_ids: SegmentIds | None
) -> tuple[Inputs, State]:
    """Computes y, like u, and the state after the last step.

    Args:
      u: floating inputs.
      tables: of u's H systems.
      initial_state: like the last state; zeros when None.
      segment_ids: as of `ops.state_space`.

    Raises:
      ValueError: an initial_state of another shape.
      TypeError: an initial_state that is not floating.
    """
    chunks = within_chunks(u, tables, segment_ids)
    # Inside shard_map a carry must vary over the devices that its inputs vary over.
    x = varying(systems_first(initial_state, u, chunks), chunks)
    before, last = chunk_states(chunks, tables, u.shape[1], x)
    return outputs(chunks, tables, before, u), batch_first(last, u)


def within_chunks(u: Inputs, tables: Tables, segment_ids: SegmentIds | None) -> Chunks:
    """Computes the sums within chunks, sum_(j <= i) K_(i-j) u_j and sum_j Abar^(C-1-j) Bbar u_j.

    With segment_ids a sum is over the steps of y_i's own segment, or of the chunk's last one.
    """
    # Chunks of inputs [H, B, R, n, C].
    dtype = jnp.promote_types(u.dtype, tables.kernel.dtype)
    (B, T, H), C = u.shape[:3], tables.input_to_state.shape[1]
    R, n = u.shape[3] if u.ndim == 4 else 1, -(-T // C)
    u = u.reshape(B, T, H * R).astype(dtype)
    U = _to_chunks(u, H, R, n, C)
    sees_state = keeps_state = None
    if segment_ids is None:
        local_outputs, local_states = _local_products(U, tables)
    else:
        # Steps of the first segment of their chunk, and of the last.
        runs, sees_state = _segments(segment_ids, n, C, (B, T), dtype)
        keeps_state = sees_state[..., -1].T
        head, tail = runs == runs[..., :1], runs == runs[..., -1:]
        in_tail = tail.astype(dtype)[None, :, None]

        # No chunk with more than two segments: products with the whole kernel.
        def two_segments(u, U, tables):
            first = system_matmul(U * head.astype(dtype)[None, :, None], _toeplitz(tables.kernel))
            last, local_states = _local_products(U * in_tail, tables)
            return jnp.where(tail[None, :, None], last, _unfused(first)), local_states

        def many_segments(u, U, tables):
            local_outputs = _to_chunks(_lag_by_lag(u, tables.kernel, R, runs), H, R, n, C)
            return local_outputs, system_matmul(U * in_tail, tables.input_to_state)

        few, branches = jnp.all(head | tail), map(jax.checkpoint, (two_segments, many_segments))
        local_outputs, local_states = jax.lax.cond(
            few, *branches, u, U, tables._replace(squares=[])
        )
        U = U * in_tail
    # The state after T steps has no transition over the padding after the last one.
    r = T % C
    remainder = system_matmul(U[..., -1, :r], tables.input_to_state[:, C - r :]) if r else None
    return Chunks(local_outputs, local_states, remainder, sees_state, keeps_state)


def chunk_states(
    chunks: Chunks, tables: Tables, T: int, x: Float[Array, "H B R S"]
) -> tuple[Float[Array, "H B R n S"], Float[Array, "H B R S"]]:
    """Returns the states before each chunk and after T steps, x' = Abar^C x + the chunk's sum."""
    r = T % tables.input_to_state.shape[1]

    def step(x, now):
        local_state, keep = now
        return _apply_power(tables.squares[-1:], 1, x, keep) + local_state, x

    local_states = _unfused(jnp.moveaxis(chunks.local_states, 3, 0))
    last, before = jax.lax.scan(step, x, (local_states, chunks.keeps_state))
    if r:
        keep = None if chunks.keeps_state is None else chunks.keeps_state[-1]
        last = _apply_power(tables.squares, r, before[-1], keep) + chunks.remainder
    return _unfused(jnp.moveaxis(before, 0, 3)), last


def outputs(chunks: Chunks, tables: Tables, before: Float[Array, "H B R n S"], u: Inputs) -> Inputs:
    """Returns y_i = sum_(j <= i) K_(i-j) u_j + C Abar^(i+1) x for x before each chunk."""
    y = system_matmul(before, tables.state_to_output)
    if chunks.sees_state is not None:
        y = y * chunks.sees_state[None, :, None]
    return _from_chunks(y + chunks.local_outputs, u.shape[1]).reshape(u.shape).astype(u.dtype)


def systems_first(
    initial_state: Array | None, u: Inputs, chunks: Chunks
) -> Float[Array, "H B R S"]:
    """Returns initial_state as [H, B, R, S], zeros when None.

    Raises:
      ValueError: another shape than [B, H, S] or [B, H, R S], as u has it.
      TypeError: a state that is not floating.
    """
    H, B, R, _, S = chunks.local_states.shape
    shape, dtype = (B, *u.shape[2:], S), chunks.local_states.dtype
    return checked_state(initial_state, shape, dtype).reshape(B, H, R, S).swapaxes(0, 1)


def batch_first(x: Float[Array, "H B R S"], u: Inputs) -> State:
    """Returns [H, B, R, S] as a state [B, H, S] or [B, H, R, S], as u has R."""
    return x.swapaxes(0, 1).reshape(u.shape[0], *u.shape[2:], x.shape[-1])


def checked_state(
    state: Array | None, shape: tuple[int, ...], dtype: jax.typing.DTypeLike
) -> State:
    """Returns the state in `dtype`, zeros when None.

    Raises:
      ValueError: another shape.
      TypeError: a state that is not floating.
    """
    if state is None:
        return jnp.zeros(shape, dtype)
    if state.shape != shape:
        letters = "B, H, S" if len(shape) == 3 else "B, H, R, S"
        raise ValueError(f"initial_state must be [{letters}] = {shape}, got shape {state.shape}")
    if not jnp.issubdtype(state.dtype, jnp.floating):
        raise TypeError(f"initial_state must be floating, got {state.dtype}")
    return state.astype(dtype)


def repeated_squares(A: Float[Array, "H S S"], count: int) -> list[Float[Array, "H S S"]]:
    """Returns A^1, A^2, A^4 ... A^c of the least power of two c >= count."""
    squares = [A]
    for _ in range((count - 1).bit_length()):
        squares.append(system_matmul(squares[-1], squares[-1]))
    return squares


def transition_power(
    squares: list[Complex[Array, "H N"]] | list[Float[Array, "H S S"]], steps: int
) -> Complex[Array, "H N"] | Float[Array, "H S S"]:
    """Returns A^steps from A^(2^k), by further squares where there are too few."""
    product = jnp.multiply if jnp.iscomplexobj(squares[0]) else system_matmul
    A, found = squares[-1], None
    for k in range(steps.bit_length()):
        A = squares[k] if k < len(squares) else product(A, A)
        if steps >> k & 1:
            found = A if found is None else product(found, A)
    return found


def system_matmul(
    x: Inexact[Array, "H *B K"], table: Inexact[Array, "H K M"]
) -> Inexact[Array, "H *B M"]:
    """Returns the product of every system's rows with its matrix."""
    rows = x.reshape(x.shape[0], -1, x.shape[-1])
    rows = jnp.einsum("hmk,hkl->hml", rows, table, precision=_HIGHEST)
    return rows.reshape(*x.shape[:-1], table.shape[-1])


def _local_products(U, tables):
    """Returns both sums within chunks of inputs U [H, B, R, n, C], by one product."""
    both = system_matmul(U, jnp.concatenate([_toeplitz(tables.kernel), tables.input_to_state], -1))
    return jnp.split(_unfused(both), [U.shape[-1]], -1)


def _apply_power(squares, steps, x, keep):
    """Returns Abar^steps x of states x [H, B, R, S], times keep [B] (None: 1)."""
    for k, A in enumerate(squares):
        if not steps >> k & 1:
            continue
        if jnp.iscomplexobj(A):
            re, im = jnp.split(x, 2, -1)
            a, b = A.real[:, None, None], A.imag[:, None, None]
            x = jnp.concatenate([a * re - b * im, a * im + b * re], -1)
        else:
            x = system_matmul(x, A.swapaxes(1, 2))
    return x if keep is None else x * keep[None, :, None, None]


def _toeplitz(kernel):
    """Returns [H, j, i] = kernel_(i - j), or 0: rows of the padded kernel, each shifted by one."""
    H, C = kernel.shape
    rows = jnp.broadcast_to(jnp.pad(kernel, ((0, 0), (0, C)))[:, None], (H, C, 2 * C))
    rows = rows.reshape(H, -1)[:, : C * (2 * C - 1)]
    return rows.reshape(H, C, 2 * C - 1)[..., :C]


def _to_chunks(u, H, R, n, C):
    """Returns u [B, T, H R] as [H, B, R, n, C], padded with zeros."""
    B, T, _ = u.shape
    u = _unfused(u.swapaxes(1, 2))
    u = _unfused(jnp.pad(u, ((0, 0), (0, 0), (0, n * C - T))))
    u = _unfused(u.reshape(B, H, R, n * C).swapaxes(0, 1))
    return u.reshape(H, B, R, n, C)


def _from_chunks(y, T):
    """Returns [H, B, R, n, C] as [B, T, H R]."""
    H, B, R, n, C = y.shape
    y = _unfused(y.reshape(H, B, R, n * C)[..., :T])
    y = _unfused(y.swapaxes(0, 1)).reshape(B, H * R, T)
    return _unfused(y.swapaxes(1, 2))


def _unfused(x):
    """Returns x, not fused with its users: on CPUs a transpose is slow inside another loop."""
    return jax.lax.optimization_barrier(x)


def _segments(segment_ids, n, C, shape, dtype):
    """Returns for each step [B, n, C] its segment's number, and 1 where that began earlier.

    Earlier than its chunk: such steps see the state before it.
    """
    (B, T), pad = shape, n * C - shape[1]
    starts = diagonal_scan.resets(segment_ids, B, T)
    runs = jnp.cumsum(starts, axis=1, dtype=jnp.int32)
    runs = jnp.pad(runs, ((0, 0), (0, pad)), mode="edge").reshape(B, n, C)
    before = jnp.pad(runs[:, :-1, -1], ((0, 0), (1, 0)))[..., None]
    return runs, (runs == before).astype(dtype)


def _lag_by_lag(u, kernel, R, runs):
    """Returns sum_j K_(i-j) u_j within chunks and segments: [B, T, H R] of u like it."""
    B, T, E = u.shape
    _, n, C = runs.shape
    u = jnp.pad(u, ((0, 0), (0, n * C - T), (0, 0))).reshape(B * n, C, E)
    weight = jnp.repeat(kernel, R, axis=0).T[::-1]
    y, _ = short_convolution(u, weight, segment_ids=runs.reshape(B * n, C))
    return y.reshape(B, n * C, E)[:, :T]
