"""Ring Self-Attention of "Sequence Parallelism" (Li et al., arXiv 2105.13120).

Two rings: keys travel around and give each device complete rows of scores, the softmax is taken,
then values travel around. Rows are as long as the sequence, so memory is T times that of all
devices; the ring with an online softmax (`ring_attention`) needs no row. The scale is D**-0.5, not
the reference code's root of the hidden size.

Dimensions: B batch, T query time, S key time of one device, H heads, G key-value heads, R = H / G,
D head dim, P value dim, or devices along the axis.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tilescan.ops import masks
from tilescan.ops.attention_operands import backward_operands, forward_operands
from tilescan.ops.mask_placed import Range
from tilescan.ops.reverse_mode import written_vjp
from tilescan.ops.sequence_parallel import layouts, shard_attention
from tilescan.ops.sequence_parallel.ring_attention import Ring

REDUCTIONS = ("reduce_scatter", "all_reduce")


def ring_self_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S G D"],
    v: Float[Array, "B S G P"],
    *,
    mask: masks.Mask = masks.Full(),  # noqa: B008 (frozen)
    bias: None = None,
    scale: float | None = None,
    logit_cap: None = None,
    return_lse: bool = False,
    implementation: str | None = None,
    axis_name: str = "sequence",
    balance: shard_attention.Balances = "contiguous",
    reduction: str = "reduce_scatter",
) -> Float[Array, "B T H P"] | tuple[Float[Array, "B T H P"], Float[Array, "B T H"]]:
    """Computes `ops.attention` of a sequence sharded over a mesh axis, inside `jax.shard_map`.

    Arguments, results and errors are those of `ring_attention`, but for:

    Args:
      bias, logit_cap: None.
      implementation: "xla" or None, which is the same.
      reduction: how the gradients of keys and values reach their device: "reduce_scatter", or the
        paper's "all_reduce", of which a device keeps its shard, with twice the traffic.
    """
    if isinstance(balance, tuple):
        raise ValueError(
            "ring_self_attention takes queries and keys in one order, not those of a chunk; "
            "attention_sequence_parallel='ring' takes both"
        )
    shard_attention.check(q, k, v, mask, bias, jax.lax.axis_size(axis_name), balance)
    if bias is not None or logit_cap is not None:
        raise ValueError(
            "ring_self_attention takes no bias and no logit_cap; "
            "attention_sequence_parallel='ring' does"
        )
    if implementation == "pallas":
        raise ValueError(
            "ring_self_attention has no Pallas kernel; attention_sequence_parallel='ring' has"
        )
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r} must be one of {', '.join(REDUCTIONS)}")
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    o, lse = _attend(q, k, v, mask, _Options(scale, axis_name, balance, reduction))
    return (o, lse) if return_lse else o


@dataclasses.dataclass(frozen=True)
class _Options:
    scale: float
    axis_name: str
    balance: str
    reduction: str

    def round_trip(self, visit, carry, rotating, S: int):
        """Folds visit(carry, first column of rotating's owner, rotating) over all owners."""
        ring = Ring.whole(self.axis_name)
        here = ring.index()

        def step(state, r):
            carry, rotating = state
            next_arrays = ring.send(rotating)
            return (visit(carry, (here - r) % ring.size * S, rotating), next_arrays), None

        last = ring.size - 1
        (carry, rotating), _ = jax.lax.scan(step, (carry, rotating), jnp.arange(last))
        return visit(carry, (here - last) % ring.size * S, rotating)

    def reduce(self, x):
        """Returns this device's shard of the sum of x [B, S of all devices, ...]."""
        if self.reduction == "reduce_scatter":
            return jax.lax.psum_scatter(x, self.axis_name, scatter_dimension=1, tiled=True)
        P = jax.lax.axis_size(self.axis_name)
        total, n = jax.lax.psum(x, self.axis_name), x.shape[1] // P
        return jax.lax.dynamic_slice_in_dim(total, jax.lax.axis_index(self.axis_name) * n, n, 1)


@functools.partial(written_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, mask, options):
    o, lse, _ = _forward(q, k, v, mask, options)
    return o, lse


def _attend_fwd(q, k, v, mask, options):
    o, lse, p = _forward(q, k, v, mask, options)
    return (o, lse), (q, k, v, mask, o, lse, p)


def _forward(q, k, v, mask, options):
    B, T, H, D = q.shape
    S, G, P = v.shape[1:]
    n = jax.lax.axis_size(options.axis_name)
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    # The first ring: rows of scores.
    k, v = forward_operands(k, v, mask)
    grouped = q.reshape(B, T, G, H // G, D).astype(dtype) * options.scale

    def scores(rows, column, k):
        s = jnp.einsum("btgrd,bsgd->bgrts", grouped, k.astype(dtype))
        return jax.lax.dynamic_update_slice_in_dim(rows, s, column, axis=4)

    rows = jnp.zeros((B, G, H // G, T, S * n), dtype)
    rows = options.round_trip(scores, rows, k, S)
    # Softmax of whole rows.
    visible = _visible(mask, T, S, options)[:, None, None]
    rows = jnp.where(visible, rows, -jnp.inf)
    lse = jax.nn.logsumexp(rows, axis=-1)
    p = jnp.exp(rows - jnp.where(jnp.isneginf(lse), 0.0, lse)[..., None])
    p = jnp.where(visible, p, 0.0)  # also of a row that sees NaN

    # The second ring: values.
    def weigh(o, column, v):
        weights = jax.lax.dynamic_slice_in_dim(p, column, S, axis=4)
        return o + jnp.einsum("bgrts,bsgp->btgrp", weights, v.astype(dtype))

    o = options.round_trip(weigh, jnp.zeros((B, T, G, H // G, P), dtype), v, S)
    return o.reshape(B, T, H, P).astype(q.dtype), _heads_last(lse), p


def _attend_bwd(options, residuals, cotangents):
    q, k, v, mask, o, lse, p = residuals
    q, k, v, o, lse, do, dlse = backward_operands(q, k, v, o, lse, *cotangents, mask)
    B, T, H, D = q.shape
    S, G, _ = v.shape[1:]
    grouped = lambda x: x.reshape(B, T, G, H // G, *x.shape[3:] or (1,)).astype(p.dtype)
    delta = jnp.sum(grouped(o) * grouped(do), -1) - grouped(dlse)[..., 0]
    delta = delta.transpose(0, 2, 3, 1)[..., None]
    # Weights of rows that are not finite are NaN, but for the hidden ones.
    undefined = jnp.isnan(grouped(lse)).transpose(0, 2, 3, 1, 4)
    p = jnp.where(undefined & (p != 0), jnp.nan, p)
    # dV = P^T dO; dS = P (dO V^T - delta), by a ring of values; dQ = dS K, by one of keys;
    # dK = dS^T Q
    dv = options.reduce(jnp.einsum("bgrts,btgrp->bsgp", p, grouped(do)))

    def slopes(ds, column, v):
        weights = jax.lax.dynamic_slice_in_dim(p, column, S, axis=4)
        dp = jnp.einsum("btgrp,bsgp->bgrts", grouped(do), v.astype(p.dtype))
        return jax.lax.dynamic_update_slice_in_dim(ds, weights * (dp - delta), column, axis=4)

    ds = options.round_trip(slopes, jnp.zeros_like(p), v, S)

    def queries(dq, column, k):
        columns = jax.lax.dynamic_slice_in_dim(ds, column, S, axis=4)
        return dq + jnp.einsum("bgrts,bsgd->btgrd", columns, k.astype(p.dtype))

    dq = options.round_trip(queries, jnp.zeros(grouped(q).shape, p.dtype), k, S)
    dk = options.reduce(jnp.einsum("bgrts,btgrd->bsgd", ds, grouped(q)))
    dq = (dq * options.scale).reshape(q.shape).astype(q.dtype)
    return dq, (dk * options.scale).astype(k.dtype), dv.astype(v.dtype), None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _visible(mask, T: int, S: int, options):
    """Returns bool [B or 1, T, S of all devices], in their order: what these queries see."""
    P = jax.lax.axis_size(options.axis_name)
    q_ids, kv_ids = shard_attention.segment_ids(mask, T, S)
    if q_ids is not None:
        kv_ids = jax.lax.all_gather(kv_ids, options.axis_name, axis=1, tiled=True)
        pair = q_ids[:, :, None], kv_ids[:, None]
    else:
        pair = ()
    where = lambda device: jnp.concatenate(
        [_positions(s) for s in layouts.ranges(device, P, T, options.balance)]
    )
    rows = where(jax.lax.axis_index(options.axis_name))
    columns = jnp.asarray(layouts.order(S * P, P, options.balance))
    seen = mask.visible(rows[None, :, None], columns[None, None], *pair)
    return jnp.broadcast_to(seen, (seen.shape[0] if seen.ndim == 3 else 1, T, S * P))


def _positions(where: Range):
    return where.start + where.stride * jnp.arange(where.length)


def _heads_last(x):
    """Returns [B, G, R, T] as [B, T, H]."""
    B, G, R, T = x.shape
    return x.transpose(0, 3, 1, 2).reshape(B, T, G * R)
