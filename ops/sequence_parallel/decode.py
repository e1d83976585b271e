"""Decoding with a key-value cache that is sharded along time (flash-decoding over devices).

Each device attends to the slots that it holds, and the results are merged by their log-sum-exp: a
step sends B T H (P + 1) values, however long the cache is.

Dimensions: B batch, T new tokens, S slots of one device, H heads, G key-value heads, D head dim,
P value dim.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, Shaped

from tilescan.ops import masks
from tilescan.ops.attention_operands import Bias
from tilescan.ops.decode_attention import decode_attention
from tilescan.ops.mask_placed import Placed


def sharded_decode_attention(
    q: Float[Array, "B T H D"],
    k_cache: Float[Array, "B S G D"],
    v_cache: Float[Array, "B S G P"],
    *,
    lengths: Integer[Array, " B"],
    mask: masks.Mask = masks.Causal(),  # noqa: B008 (frozen)
    bias: Bias | None = None,
    axis_name: str = "sequence",
    **options: Any,
) -> Float[Array, "B T H P"]:
    """Computes `ops.decode_attention` to a cache sharded over a mesh axis, inside `jax.shard_map`.

    Args:
      q: the newest queries, the same on all devices.
      k_cache, v_cache: this device's slots: the first device holds the first S.
      lengths: filled slots of each row, over all devices.
      mask: about positions of the whole sequence; its Segments hold the ids of the queries and of
        this device's slots.
      bias: of this device's slots.
      axis_name: the mesh axis.
      **options: of `ops.decode_attention`.

    Returns:
      o [B, T, H, P] in q's dtype, the same on all devices.
    """
    first = jax.lax.axis_index(axis_name) * k_cache.shape[1]
    o, lse = decode_attention(
        q, k_cache, v_cache, lengths=lengths - first, mask=Placed(mask, first, first), bias=bias,
        return_lse=True, **options,
    )  # fmt: skip
    peak = jax.lax.pmax(lse, axis_name)
    weight = jnp.exp(lse - jnp.where(jnp.isneginf(peak), 0.0, peak))[..., None]
    total = jax.lax.psum(weight, axis_name)
    o = jax.lax.psum(weight * o.astype(weight.dtype), axis_name)
    return (o / jnp.where(total == 0, 1.0, total)).astype(q.dtype)


def sharded_append(
    cache: Shaped[Array, "B S ..."],
    new: Shaped[Array, "B T ..."],
    lengths: Integer[Array, " B"],
    axis_name: str = "sequence",
) -> Shaped[Array, "B S ..."]:
    """Returns the cache with T new entries after the `lengths` filled slots, each on its device.

    Entries beyond the last device's slots are dropped.
    """
    (B, T), S = new.shape[:2], cache.shape[1]
    slots = lengths[:, None] + jnp.arange(T)[None] - jax.lax.axis_index(axis_name) * S
    slots = jnp.where(slots < 0, S, slots)  # negative ones would count from the end
    rows = jnp.arange(B)[:, None]
    return cache.at[rows, slots].set(new.astype(cache.dtype), mode="drop")
