"""`ops.state_space` over time that is cut over devices, inside `jax.shard_map`.

A system that does not change takes the state over a device's stretch of T steps by Abar^T, unless a
segment starts there: the same on all devices and for all rows of the batch. So every device makes
it by itself, for a matrix in log2(T / C) products beyond those that its tables took, and devices
send states alone (`affine_scan.power_scan`).

Least work is to take the products of a stretch once, and to go from chunk to chunk twice: first for
what the stretch leaves in a state of zeros, then from the state that enters.

Arguments and results are those of the op of the same name, with the differences that
`ops.sequence_parallel.scans` names. Letters are those of `ops.state_space`.
"""

import jax
import jax.numpy as jnp

from tilescan.ops import state_space
from tilescan.ops import state_space_chunks as chunked
from tilescan.ops.attention_xla import varying
from tilescan.ops.sequence_parallel.affine_scan import power_scan
from tilescan.ops.sequence_parallel.scans import with_neighbour

__all__ = ["diagonal_state_space", "dplr_state_space"]


def diagonal_state_space(
    u,
    log_dt,
    A,
    B,
    C,
    *,
    discretization="zoh",
    initial_state=None,
    segment_ids=None,
    segment_before=None,
    chunk=None,
    axis_name="sequence",
    kind="all_scan",
):
    """`ops.diagonal_state_space`: y like u of this device, the last state on every device."""
    ids = with_neighbour(segment_ids, segment_before, axis_name)
    tables = state_space.diagonal_tables(u, log_dt, A, B, C, discretization, ids, chunk)
    return _run(u, tables, initial_state, ids, axis_name, kind)


def dplr_state_space(
    u,
    log_dt,
    Lambda,
    P,
    B,
    C,
    *,
    initial_state=None,
    segment_ids=None,
    segment_before=None,
    chunk=None,
    axis_name="sequence",
    kind="all_scan",
):
    """`ops.dplr_state_space`: y like u of this device, the last state on every device."""
    ids = with_neighbour(segment_ids, segment_before, axis_name)
    tables = state_space.dplr_tables(u, log_dt, Lambda, P, B, C, ids, chunk)
    return _run(u, tables, initial_state, ids, axis_name, kind)


def _run(u, tables, initial_state, segment_ids, axis_name, kind):
    T, chunks = u.shape[1], chunked.local(u, tables, segment_ids)
    H, B, R, _, S = chunks.added.shape
    initial = chunked.enter(initial_state, u, chunks)
    _, left = chunked.states(chunks, tables, T, varying(jnp.zeros_like(initial), chunks))
    transition = chunked.power(tables.squares, T)
    pairs = jnp.iscomplexobj(transition)

    def columns(x):
        """[H, B, R, S] as [H, S, B R], or as complex [H, N, B R]."""
        x = x.reshape(H, B * R, S).swapaxes(1, 2)
        return jax.lax.complex(x[:, : S // 2], x[:, S // 2 :]) if pairs else x

    def rows(x):
        x = jnp.concatenate([x.real, x.imag], 1) if pairs else x
        return x.swapaxes(1, 2).reshape(H, B, R, S)

    keep = jnp.ones((1, 1, 1), left.dtype)
    if chunks.keep is not None:
        # That of the last chunk says of all its steps whether the state still counts.
        keep = jnp.repeat(jnp.prod(chunks.keep, 0), R)[None, None]
    entering, final = power_scan(
        transition[..., None] if pairs else transition, keep, columns(left), axis_name,
        kind=kind, initial_state=columns(initial),
    )  # fmt: skip
    before, _ = chunked.states(chunks, tables, T, rows(entering))
    return chunked.outputs(chunks, tables, before, u), chunked.leave(rows(final), u)
