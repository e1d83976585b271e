"""Attention to keys and values gathered from all devices (LASP-2H, arXiv 2502.07563, section 3.4;
context parallelism of Llama 3, arXiv 2407.21783, section 3.3.2).

One message instead of a ring's many: suited to few keys (few key-value heads, short sequences),
since each device holds the keys of the whole sequence while it computes a layer. They are gathered
again for the backward pass, not kept.

Dimensions: B batch, T query time, S key time of one device, H heads, G key-value heads, D head dim,
P value dim, or devices along the axis.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tilescan.ops import masks
from tilescan.ops.mask_placed import Range
from tilescan.ops.reverse_mode import written_vjp
from tilescan.ops.sequence_parallel import layouts, shard_attention


def gather_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S G D"],
    v: Float[Array, "B S G P"],
    *,
    mask: masks.Mask = masks.Full(),  # noqa: B008 (frozen)
    bias: shard_attention.Bias | None = None,
    scale: float | None = None,
    logit_cap: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
    axis_name: str = "sequence",
    balance: shard_attention.Balances = "contiguous",
) -> Float[Array, "B T H P"] | tuple[Float[Array, "B T H P"], Float[Array, "B T H"]]:
    """Computes `ops.attention` of a sequence sharded over a mesh axis, inside `jax.shard_map`.

    Arguments, results and errors are those of `ring_attention`. Each device receives P - 1 times
    its own k and v, forward and backward, and sends as many gradients of keys back.
    """
    shard_attention.check(q, k, v, mask, bias, jax.lax.axis_size(axis_name), balance)
    options = _Options(
        shard_attention.options(q, scale, logit_cap, implementation), axis_name, balance
    )
    if bias is not None:
        bias = bias.reshape((1,) * (4 - bias.ndim) + bias.shape)
    o, lse = _attend(q, k, v, bias, mask, options)
    return (o, lse) if return_lse else o


@dataclasses.dataclass(frozen=True)
class _Options:
    attention: shard_attention.Options
    axis_name: str
    balance: layouts.Balance | tuple[layouts.Balance, layouts.Balance]

    def call(self, q, k, v, bias, mask):
        """Returns arguments of `shard_attention`'s passes: these queries, all keys in order."""
        T, S, P = q.shape[1], k.shape[1], jax.lax.axis_size(self.axis_name)
        of_queries, of_keys = layouts.of_queries_and_keys(self.balance)
        order = layouts.restore(S * P, P, of_keys)
        q_ids, kv_ids = shard_attention.segment_ids(mask, T, S)

        def all_of(x):
            if x is None:
                return None
            return _take(jax.lax.all_gather(x, self.axis_name, axis=1, tiled=True), order, 1)

        if bias is not None and bias.shape[3] > 1:
            bias = _take(bias, order, 3)
        queries = layouts.ranges(jax.lax.axis_index(self.axis_name), P, T, of_queries)
        keys = (Range(layouts.first(of_keys), 1, S * P),)
        ids = q_ids, all_of(kv_ids)
        return q, all_of(k), all_of(v), bias, mask, ids, queries, keys, self.attention

    def as_held(self, x, axis):
        """Returns x of all keys in order, in the order of the devices that hold them."""
        P, of_keys = jax.lax.axis_size(self.axis_name), layouts.of_queries_and_keys(self.balance)[1]
        return _take(x, np.argsort(layouts.restore(x.shape[axis], P, of_keys)), axis)

    def scatter(self, x):
        """Returns gradients of this device's keys, summed over the devices."""
        x = self.as_held(x, 1)
        return jax.lax.psum_scatter(x, self.axis_name, scatter_dimension=1, tiled=True)


@functools.partial(written_vjp, nondiff_argnums=(5,))
def _attend(q, k, v, bias, mask, options):
    o, lse = shard_attention.forward(*options.call(q, k, v, bias, mask))
    return o.astype(q.dtype), lse


def _attend_fwd(q, k, v, bias, mask, options):
    o, lse = _attend(q, k, v, bias, mask, options)
    return (o, lse), (q, k, v, bias, mask, o, lse)


def _attend_bwd(options, residuals, cotangents):
    q, k, v, bias, mask, o, lse = residuals
    call = options.call(q, k, v, bias, mask)
    dq, dk, dv, dbias = shard_attention.backward(*call, o, lse, *cotangents)
    dk, dv = options.scatter(dk), options.scatter(dv)
    if bias is not None:
        if bias.shape[3] > 1:
            dbias = options.as_held(dbias, 3)
        dbias = dbias.astype(bias.dtype)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), dbias, None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _take(x, order, axis):
    if np.array_equal(order, np.arange(len(order))):
        return x
    return jnp.take(x, order, axis=axis)
