"""Obvious definitions of the ops, to test the fast ones against; they also run in float64.

Letters: B batch, T query time, S key time, H heads, G key-value heads, D head dim, P value dim.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from ops import masks


def attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S G D"],
    v: Float[Array, "B S G P"],
    *,
    mask=None,
    bias=None,
    scale=None,
    logit_cap=None,
    q_offset=None,
    return_lse=False,
):
    """Softmax attention by the whole [B, H, T, S] matrix of logits: quadratic memory, no tiles.

    Takes what `ops.attention` takes and returns the same, computed in the inputs' own precision
    (float32 at least). Rows that see no key give zeros, and lse = -inf.
    """
    B, T, H, D = q.shape
    S, G = k.shape[1], k.shape[2]
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    k, v = (jnp.repeat(x, H // G, axis=2) for x in (k, v))
    logits = jnp.einsum("bthd,bshd->bhts", q, k, precision="highest")
    logits = logits * (D**-0.5 if scale is None else scale)
    if logit_cap is not None:
        logits = logit_cap * jnp.tanh(logits / logit_cap)
    if bias is not None:
        bias = bias.reshape((1,) * (4 - bias.ndim) + bias.shape)
        logits = logits + bias.astype(dtype)
    if mask is not None:
        visible = masks.as_array(mask, T, S, q_offset)
        visible = visible.reshape((-1, 1, T, S))
        logits = jnp.where(visible, logits, -jnp.inf)
    # A row without keys has no maximum: 0 stands in, so that neither it nor its gradient is NaN.
    peak = jnp.max(logits, axis=-1, keepdims=True)
    peak = jnp.where(jnp.isneginf(peak), 0.0, peak)
    weights = jnp.exp(logits - peak)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    empty = total == 0
    total = jnp.where(empty, 1.0, total)
    o = jnp.einsum("bhts,bshp->bthp", weights / total, v, precision="highest")
    if not return_lse:
        return o
    lse = jnp.where(empty, -jnp.inf, peak + jnp.log(total))
    return o, jnp.moveaxis(lse[..., 0], 1, 2)
