"""The recurrences of `ops` over time that is sharded over devices, inside `jax.shard_map`.

Every device holds a shard of T steps, in order along the mesh axis `axis_name`, and calls the op on
it from a state of zeros. The final states of the shards are scanned from device to device
(`ops.sequence_parallel.affine_scan`); the state that enters a device is then added to its outputs.
Where the outputs are linear in the state (`ssd`, `gated_linear_attention`, the delta rule) that
takes one product, for which only the cumulative decays are needed, so that the scan may run
concurrently with the local work; elsewhere the device calls the op again from the state that
enters.

Arguments and results are those of the op of the same name, with these differences:

  - T is a device's own number of steps, the same on all devices;
  - initial_state and final_state are those of the whole sequence, the same on all devices;
  - segment_ids are [B, T]. A device receives the id before its first step from its neighbour;
    the segment that initial_state belongs to is `segment_before` [B], by default that of the first
    step;
  - axis_name names the mesh axis, and kind the schedule (`SCAN_KINDS`).

Dimensions are those of `ops`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact, Integer

from tilescan.ops import diagonal_scan
from tilescan.ops.attention_xla import varying
from tilescan.ops.delta_rule import delta_rule as _delta_rule
from tilescan.ops.delta_rule import gated_delta_rule as _gated_delta_rule
from tilescan.ops.gated_linear_attention import gated_linear_attention as _gated_linear_attention
from tilescan.ops.linear_recurrence import linear_recurrence as _linear_recurrence
from tilescan.ops.recurrence_arguments import (
    check_floating,
    check_heads,
    forget_at_starts,
    state_dtype,
)
from tilescan.ops.selective_scan import selective_scan as _selective_scan
from tilescan.ops.sequence_parallel.affine_scan import affine_scan, factor_scan, matrix_scan
from tilescan.ops.ssd import ssd as _ssd

__all__ = [
    "delta_rule",
    "gated_delta_rule",
    "gated_linear_attention",
    "linear_recurrence",
    "selective_scan",
    "ssd",
    "with_neighbour",
]


def with_neighbour(
    segment_ids: Integer[Array, "B T"] | None,
    segment_before: Integer[Array, " B"] | None = None,
    axis_name: str = "sequence",
    *,
    reverse: bool = False,
) -> Integer[Array, "B T+1"] | None:
    """Returns ids [B, 1 + T], after the one of the step before; or before the next's if reverse.

    Args:
      segment_ids: of this device's steps, or None, which stays.
      segment_before: [B], of the state that enters the whole sequence; that of the first step when
        None.
      axis_name: of the mesh, in the order of time.
      reverse: whether time goes from the last device to the first.

    Raises:
      ValueError: ids of another rank.
    """
    if segment_ids is None:
        return None
    if segment_ids.ndim != 2:
        raise ValueError(
            f"segment_ids must be a device's own [B, T], got shape {segment_ids.shape}; the "
            "segment of initial_state is segment_before [B]"
        )
    P, p = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
    edge = segment_ids[:, -1:] if reverse else segment_ids[:, :1]
    if segment_before is not None:
        edge = segment_before[:, None].astype(segment_ids.dtype)
    if P > 1:
        pairs = [(i + 1, i) if reverse else (i, i + 1) for i in range(P - 1)]
        near = segment_ids[:, :1] if reverse else segment_ids[:, -1:]
        near = jax.lax.ppermute(near, axis_name, pairs)
        edge = jnp.where(p == (P - 1 if reverse else 0), edge, near)
    both = [segment_ids, edge] if reverse else [edge, segment_ids]
    return jnp.concatenate(both, axis=1)


def ssd(
    x: Float[Array, "B T H P"],
    dt: Float[Array, "B T H"],
    A: Float[Array, " H"],
    B: Float[Array, "B T G N"],
    C: Float[Array, "B T G N"],
    *,
    D: Float[Array, " H"] | None = None,
    dt_bias: Float[Array, " H"] | None = None,
    dt_softplus: bool = False,
    initial_state: Float[Array, "B H P N"] | None = None,
    segment_ids: Integer[Array, "B T"] | None = None,
    segment_before: Integer[Array, " B"] | None = None,
    chunk: int | None = None,
    implementation: str | None = None,
    axis_name: str = "sequence",
    kind: str = "all_scan",
) -> tuple[Float[Array, "B T H P"], Float[Array, "B H P N"]]:
    """Computes `ops.ssd`: y of this device, and the last state on every device.

    With b_t the cumulative decay, y_t = (y_t from zeros) + b_t S_in C_t.
    """
    # From a state of zeros.
    dtype = state_dtype(x)
    dt = _steps(dt, dt_bias, dt_softplus, dtype)
    ids = with_neighbour(segment_ids, segment_before, axis_name)
    if x.ndim != 4 or B.ndim != 4:
        _ssd(x, dt, A, B, C)  # raises in the op's own words
    (batch, T, H, P), (G, N) = x.shape, B.shape[2:]
    zeros = _zeros((batch, H, P, N), dtype, axis_name, x, dt, A, B, C, ids)
    y, state = _ssd(
        x, dt, A, B, C, D=D, initial_state=zeros, segment_ids=ids, chunk=chunk,
        implementation=implementation,
    )  # fmt: skip

    # The state that enters.
    log_decay = forget_at_starts(dt * A.astype(dtype)[None, None], ids)
    total = jnp.sum(log_decay, 1)[..., None, None]
    S_in, final = affine_scan(total, state, axis_name, kind=kind, initial_state=initial_state)

    @jax.checkpoint
    def entered(C, log_decay, S_in):
        """Returns b_t S_in C_t, [B, T, H, P]."""
        decay = jnp.exp(jnp.cumsum(log_decay, 1))[..., None]
        S_in = S_in.reshape(batch, G, H // G, P, N)
        y = jnp.einsum("btgn,bgrpn->btgrp", C.astype(dtype), S_in)
        return y.reshape(batch, T, H, P) * decay

    return (y.astype(dtype) + entered(C, log_decay, S_in)).astype(x.dtype), final


def gated_linear_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T G D"],
    v: Float[Array, "B T G P"],
    log_decay: Float[Array, "B T H"] | Float[Array, "B T H D"] | None = None,
    *,
    scale: float | None = None,
    initial_state: Float[Array, "B H D P"] | None = None,
    segment_ids: Integer[Array, "B T"] | None = None,
    segment_before: Integer[Array, " B"] | None = None,
    chunk: int | None = None,
    implementation: str | None = None,
    axis_name: str = "sequence",
    kind: str = "all_scan",
) -> tuple[Float[Array, "B T H P"], Float[Array, "B H D P"]]:
    """Computes `ops.gated_linear_attention`: o of this device, and the last state on every device.

    With b_t the cumulative decay, o_t = (o_t from zeros) + scale S_in^T (b_t q_t).
    """
    # From a state of zeros.
    B, T, H, D, P = check_heads(q, k, v)
    dtype, scale = state_dtype(q), D**-0.5 if scale is None else scale
    ids = with_neighbour(segment_ids, segment_before, axis_name)
    zeros = _zeros((B, H, D, P), dtype, axis_name, q, k, v, log_decay, ids)
    o, state = _gated_linear_attention(
        q, k, v, log_decay, scale=scale, initial_state=zeros, segment_ids=ids, chunk=chunk,
        implementation=implementation,
    )  # fmt: skip

    # The state that enters.
    if log_decay is None:
        log_decay = jnp.zeros((B, T, 1, 1), dtype)
    log_decay = log_decay.astype(dtype).reshape(*log_decay.shape[:3], *log_decay.shape[3:] or (1,))
    log_decay = forget_at_starts(log_decay, ids)
    total = jnp.sum(log_decay, 1)[..., None]
    S_in, final = affine_scan(total, state, axis_name, kind=kind, initial_state=initial_state)

    @jax.checkpoint
    def entered(q, log_decay, S_in):
        """Returns scale S_in^T (b_t q_t), [B, T, H, P]."""
        q = q.astype(dtype) * jnp.exp(jnp.cumsum(log_decay, 1)) * scale
        return jnp.einsum("bthd,bhdp->bthp", q, S_in)

    return (o.astype(dtype) + entered(q, log_decay, S_in)).astype(q.dtype), final


def delta_rule(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T G D"],
    v: Float[Array, "B T G P"],
    beta: Float[Array, "B T H"],
    **options: Any,
) -> tuple[Float[Array, "B T H P"], Float[Array, "B H D P"]]:
    """Computes `ops.delta_rule`, which is `gated_delta_rule` without decay."""
    return _delta(_delta_rule, q, k, v, (beta,), **options)


def gated_delta_rule(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T G D"],
    v: Float[Array, "B T G P"],
    beta: Float[Array, "B T H"],
    log_decay: Float[Array, "B T H"],
    **options: Any,
) -> tuple[Float[Array, "B T H P"], Float[Array, "B H D P"]]:
    """Computes `ops.gated_delta_rule`: o of this device, and the last state on every device.

    A step multiplies the state by a matrix, and a shard of time by their product M [D, D]. M is the
    final state of the same rule from the identity where all values are 0. So the op is called once,
    with D more value columns, whose outputs times S_in are the contribution of S_in.

    **options: as of `ops.gated_delta_rule`, with the differences above.
    """
    return _delta(_gated_delta_rule, q, k, v, (beta, log_decay), **options)


def _delta(
    op,
    q,
    k,
    v,
    gates,
    *,
    scale=None,
    initial_state=None,
    segment_ids=None,
    segment_before=None,
    chunk=None,
    implementation=None,
    axis_name="sequence",
    kind="all_scan",
):
    B, T, H, D, P = check_heads(q, k, v)
    dtype, out_dtype = state_dtype(q), q.dtype
    ids = with_neighbour(segment_ids, segment_before, axis_name)
    # In the state's dtype, so that the output is rounded once.
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    both = jnp.concatenate([v, jnp.zeros((*v.shape[:3], D), dtype)], -1)
    start = _zeros((B, H, D, P), dtype, axis_name, q, k, v, gates, ids)
    eye = jnp.broadcast_to(jnp.eye(D, dtype=dtype), (B, H, D, D))
    start = jnp.concatenate([start, varying(eye, start)], -1)
    o, state = op(
        q, k, both, *gates, scale=scale, initial_state=start, segment_ids=ids, chunk=chunk,
        implementation=implementation,
    )  # fmt: skip

    # o = (o from zeros) + (o from the identity) S_in.
    S_in, final = matrix_scan(
        state[..., P:], state[..., :P], axis_name, kind=kind, initial_state=initial_state
    )
    o = o[..., :P] + jnp.einsum("bthd,bhdp->bthp", o[..., P:], S_in)
    return o.astype(out_dtype), final


def selective_scan(
    x: Float[Array, "B T E"],
    dt: Float[Array, "B T E"],
    A: Float[Array, "E N"],
    B: Float[Array, "B T N"] | Float[Array, "B T G N"],
    C: Float[Array, "B T N"] | Float[Array, "B T G N"],
    *,
    D: Float[Array, " E"] | None = None,
    z: Float[Array, "B T E"] | None = None,
    dt_bias: Float[Array, " E"] | None = None,
    dt_softplus: bool = False,
    initial_state: Float[Array, "B E N"] | None = None,
    segment_ids: Integer[Array, "B T"] | None = None,
    segment_before: Integer[Array, " B"] | None = None,
    implementation: str | None = None,
    axis_name: str = "sequence",
    kind: str = "all_scan",
) -> tuple[Float[Array, "B T E"], Float[Array, "B E N"]]:
    """Computes `ops.selective_scan`: y of this device, and the last state on every device.

    Outputs read every state of every channel, so a product with S_in would cost as much as a scan:
    the device scans twice, from zeros for its final state, and from the state that enters.
    """
    dtype = state_dtype(x)
    dt = _steps(dt, dt_bias, dt_softplus, dtype)
    ids = with_neighbour(segment_ids, segment_before, axis_name)
    scan = functools.partial(_selective_scan, x, dt, A, B)
    scan = functools.partial(scan, segment_ids=ids, implementation=implementation)
    _, state = scan(C)
    # The state that enters; the total decay [B, E, N] forgets if a segment starts.
    total = jnp.sum(dt, 1)[..., None] * A.astype(dtype)[None]
    if ids is not None:
        starts = jnp.any(ids[:, 1:] != ids[:, :-1], 1)
        total = jnp.where(starts[:, None, None], -jnp.inf, total)
    S_in, final = affine_scan(total, state, axis_name, kind=kind, initial_state=initial_state)
    y, _ = scan(C, D=D, z=z, initial_state=S_in)
    return y, final


def linear_recurrence(
    a: Inexact[Array, "..."],
    b: Inexact[Array, "B T *D"],
    *,
    initial_state: Inexact[Array, "B *D"] | None = None,
    segment_ids: Integer[Array, "B T"] | None = None,
    segment_before: Integer[Array, " B"] | None = None,
    reverse: bool = False,
    implementation: str | None = None,
    axis_name: str = "sequence",
    kind: str = "all_scan",
) -> tuple[Inexact[Array, "B T *D"], Inexact[Array, "B *D"]]:
    """Computes `ops.linear_recurrence`: h of this device, and the last state on every device.

    If reverse, time goes from the last device to the first: initial_state is after the last
    device's last step, and segment_before is its segment. Devices scan twice, as in
    `selective_scan`.
    """
    # From a state of zeros.
    ids = with_neighbour(segment_ids, segment_before, axis_name, reverse=reverse)
    scan = functools.partial(
        _linear_recurrence, a, b, segment_ids=ids, reverse=reverse,
        implementation=implementation,
    )  # fmt: skip
    _, state = scan()
    T = b.shape[1]
    decay = a.reshape(1, 1, *a.shape) if a.ndim == b.ndim - 2 else a
    decay = decay.astype(state.dtype if jnp.iscomplexobj(decay) else state_dtype(decay))

    # The state that enters. The total decay is a power of a constant one, else a product.
    decay = decay[:, 0] ** T if decay.shape[1] == 1 else jnp.prod(decay, 1)
    if ids is not None:
        starts = jnp.any(diagonal_scan.resets(ids, b.shape[0], T, reverse), 1)
        decay = jnp.where(starts.reshape(len(starts), *(1,) * (decay.ndim - 1)), 0, decay)
    split = max(range(state.ndim), key=lambda axis: state.shape[axis])
    S_in, final = factor_scan(
        decay, state, axis_name, kind=kind, split=split, initial_state=initial_state,
        reverse=reverse,
    )  # fmt: skip
    return scan(initial_state=S_in)[0], final


def _steps(dt, dt_bias, dt_softplus, dtype):
    check_floating(dt=dt, dt_bias=dt_bias)
    dt = dt.astype(dtype)
    if dt_bias is not None:
        dt = dt + dt_bias.astype(dtype)[None, None]
    return jax.nn.softplus(dt) if dt_softplus else dt


def _zeros(shape, dtype, axis_name, *like):
    """Returns the state before a shard, varying over devices like what is computed from it."""
    like = [jnp.asarray(x) for x in jax.tree.leaves(like)]
    return varying(jnp.zeros(shape, dtype), (like, jax.lax.axis_index(axis_name)))
