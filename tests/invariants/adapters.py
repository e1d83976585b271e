"""Ops as mixers: the least around `ops.attention` that has a state."""

import jax
import jax.numpy as jnp
from suite import Mixer

from tilescan.ops import masks
from tilescan.ops.attention import attention


def attention_op(
    name: str, mask: masks.Mask, heads: int = 4, kv_heads: int = 2, head_dim: int = 8, **settings
) -> Mixer:
    """q, k, v by one matrix each, and `ops.attention` over a cache of keys and values.

    The state is (k, v, segment ids, number of tokens so far), of fixed size: the queries stand at
    a traced offset, and causality hides the slots that are still empty.
    """
    width = Mixer.width

    def init(key):
        shapes = dict(q=heads, k=kv_heads, v=kv_heads)
        keys = jax.random.split(key, len(shapes))
        return {
            n: jax.random.normal(k, (width, h, head_dim)) * width**-0.5
            for k, (n, h) in zip(keys, shapes.items(), strict=True)
        }

    def init_state(batch, max_len, dtype):
        cache = jnp.zeros((batch, max_len, kv_heads, head_dim), dtype)
        return cache, cache, jnp.zeros((batch, max_len), jnp.int32), jnp.int32(0)

    def apply(params, x, *, state, positions, segment_ids):
        q, k, v = (jnp.einsum("bte,ehd->bthd", x, params[n].astype(x.dtype)) for n in "qkv")
        ids, kv_ids, offset = segment_ids, segment_ids, 0
        if state is not None:
            put = lambda a, new: jax.lax.dynamic_update_slice_in_dim(a, new, state[-1], axis=1)
            new_ids = jnp.ones(x.shape[:2], jnp.int32) if ids is None else ids
            k, v, kv_ids = map(put, state[:3], (k, v, jnp.asarray(new_ids)))
            offset, state = state[-1], (k, v, kv_ids, state[-1] + x.shape[1])
        packed = mask if ids is None else mask & masks.Segments(ids, kv_ids)
        o = attention(q, k, v, mask=packed, q_offset=offset)
        return o.reshape(x.shape), state

    return Mixer(name, apply, init_state, init, **settings)
