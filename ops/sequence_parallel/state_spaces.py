"""`ops.state_space` over time that is sharded over devices, inside `jax.shard_map`.

The transition of a time-invariant system over a device's T steps is Abar^T, unless a segment starts
there: the same on all devices and for all rows of the batch. So every device computes it by itself,
for a matrix in log2(T / C) products more than its tables need, and devices send states alone
(`affine_scan.power_scan`).

The products within chunks are computed once, and the states from chunk to chunk twice: first from
zeros, for the state after the shard, then from the state that enters.

Arguments and results are those of the op of the same name, with the differences that
`ops.sequence_parallel.scans` names. Dimensions are those of `ops.state_space`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float, Integer

from tilescan.ops import state_space
from tilescan.ops import state_space_chunks as chunked
from tilescan.ops.attention_xla import varying
from tilescan.ops.sequence_parallel.affine_scan import power_scan
from tilescan.ops.sequence_parallel.scans import with_neighbour

__all__ = ["diagonal_state_space", "dplr_state_space"]


def diagonal_state_space(
    u: chunked.Inputs,
    log_dt: Float[Array, " H"],
    A: Complex[Array, "#H N"],
    B: Complex[Array, "#H N"],
    C: Complex[Array, "#H N"],
    *,
    discretization: str = "zoh",
    initial_state: chunked.State | None = None,
    segment_ids: Integer[Array, "B T"] | None = None,
    segment_before: Integer[Array, " B"] | None = None,
    chunk: int | None = None,
    axis_name: str = "sequence",
    kind: str = "all_scan",
) -> tuple[chunked.Inputs, chunked.State]:
    """Computes `ops.diagonal_state_space`: y of this device, the last state on every device."""
    ids = with_neighbour(segment_ids, segment_before, axis_name)
    tables = state_space.diagonal_tables(u, log_dt, A, B, C, discretization, ids, chunk)
    return _sharded(u, tables, initial_state, ids, axis_name, kind)


def dplr_state_space(
    u: Float[Array, "B T H"],
    log_dt: Float[Array, " H"],
    Lambda: Complex[Array, "#H N"],
    P: Complex[Array, "#H N"],
    B: Complex[Array, "#H N"],
    C: Complex[Array, "#H N"],
    *,
    initial_state: Float[Array, "B H S"] | None = None,
    segment_ids: Integer[Array, "B T"] | None = None,
    segment_before: Integer[Array, " B"] | None = None,
    chunk: int | None = None,
    axis_name: str = "sequence",
    kind: str = "all_scan",
) -> tuple[Float[Array, "B T H"], Float[Array, "B H S"]]:
    """Computes `ops.dplr_state_space`: y of this device, the last state on every device."""
    ids = with_neighbour(segment_ids, segment_before, axis_name)
    tables = state_space.dplr_tables(u, log_dt, Lambda, P, B, C, ids, chunk)
    return _sharded(u, tables, initial_state, ids, axis_name, kind)


def _sharded(u, tables, initial_state, segment_ids, axis_name, kind):
    """Returns (y of this device, the last state), x' = Abar^T x + (x' from zeros) over a shard."""
    # The state after the shard, from zeros, and the transition over it.
    T, chunks = u.shape[1], chunked.within_chunks(u, tables, segment_ids)
    H, B, R, _, S = chunks.local_states.shape
    initial = chunked.systems_first(initial_state, u, chunks)
    _, state = chunked.chunk_states(chunks, tables, T, varying(jnp.zeros_like(initial), chunks))
    transition = chunked.transition_power(tables.squares, T)
    pairs = jnp.iscomplexobj(transition)

    def columns(x):
        """Returns [H, B, R, S] as [H, S, B R], or as complex [H, N, B R]."""
        x = x.reshape(H, B * R, S).swapaxes(1, 2)
        return jax.lax.complex(x[:, : S // 2], x[:, S // 2 :]) if pairs else x

    def rows(x):
        """Inverts `columns`."""
        x = jnp.concatenate([x.real, x.imag], 1) if pairs else x
        return x.swapaxes(1, 2).reshape(H, B, R, S)

    keep = jnp.ones((1, 1, 1), state.dtype)
    if chunks.keeps_state is not None:
        # The state survives a shard if it survives every chunk.
        keep = jnp.repeat(jnp.prod(chunks.keeps_state, 0), R)[None, None]
    entering, final = power_scan(
        transition[..., None] if pairs else transition, keep, columns(state), axis_name,
        kind=kind, initial_state=columns(initial),
    )  # fmt: skip
    # Chunks again, from the state that enters.
    before, _ = chunked.chunk_states(chunks, tables, T, rows(entering))
    return chunked.outputs(chunks, tables, before, u), chunked.batch_first(rows(final), u)
