"""Operands of attention's passes, prepared so that a mask hides even values that are not finite.

A weight of 0 times NaN is NaN, and so is a sum that holds it: NaN in a value that the mask hides
from a query would reach the query's output through the product of weights and values. Instead of
looking inside each tile, what is not finite is moved, once per call and in linear time, to where
a tile's mask is applied in any case:

- forward, a key or value that is not finite becomes a key of NaN with a value of 0: scores of NaN,
  which the mask replaces where it hides and which make NaN of the rows that see them;
- backward, arrays become finite, and a row that is not (its output, query or cotangent) gets a
  log-sum-exp of NaN: differences of scores and it, which the mask replaces where it hides.

Dimensions: B batch, T query time, S key time, H heads, G key-value heads, D head dim, P value dim.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from tilescan.ops import masks

# Position of the first query: static, or an int32 scalar that may be traced.
Offset = int | np.integer | Int32[Array, ""]
# Added to the logits, broadcastable to [B, H, T, S].
Bias = (
    Float[Array, "#B #H #T #S"]
    | Float[Array, "#H #T #S"]
    | Float[Array, "#T #S"]
    | Float[Array, "#S"]
    | Float[Array, ""]
)


def forward_operands(
    k: Float[Array, "B S G D"],
    v: Float[Array, "B S G P"],
    mask: masks.Mask,
    bias: Float[Array, "..."] | None = None,
) -> tuple[Float[Array, "B S G D"], Float[Array, "B S G P"]]:
    """Returns k and v for a forward pass; themselves where nothing is hidden."""
    if not hides(mask, bias):
        return k, v
    usable = (_finite(k) & _finite(v))[..., None]
    return jnp.where(usable, k, jnp.nan), jnp.where(usable, v, 0.0)


def backward_operands(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S G D"],
    v: Float[Array, "B S G P"],
    o: Float[Array, "B T H P"],
    lse: Float[Array, "B T H"],
    do: Float[Array, "B T H P"],
    dlse: Float[Array, "B T H"],
    mask: masks.Mask,
    bias: Float[Array, "..."] | None = None,
) -> tuple[
    Float[Array, "B T H D"],
    Float[Array, "B S G D"],
    Float[Array, "B S G P"],
    Float[Array, "B T H P"],
    Float[Array, "B T H"],
    Float[Array, "B T H P"],
    Float[Array, "B T H"],
]:
    """Returns (q, k, v, o, lse, do, dlse) for a backward pass.

    o, lse and their cotangents are those of the forward pass. A row whose lse is -inf,
    which sees no key, keeps it, and has no gradient whatever its cotangents are.
    """
    if not hides(mask, bias):
        return q, k, v, o, lse, do, dlse
    empty = jnp.isneginf(lse)
    usable = _finite(q) & _finite(o) & _finite(do) & jnp.isfinite(lse) & jnp.isfinite(dlse)
    q, o, do = (jnp.where(usable[..., None], x, 0.0) for x in (q, o, do))
    k, v = (jnp.where(_finite(x)[..., None], x, 0.0) for x in (k, v))
    lse = jnp.where(usable | empty, lse, jnp.nan)
    return q, k, v, o, lse, do, jnp.where(usable, dlse, 0.0)


def hides(mask: masks.Mask, bias: Float[Array, "..."] | None = None) -> bool:
    """Returns whether a mask, or a bias of -inf, may hide a key from a query."""
    return bias is not None or not isinstance(mask, masks.Full)


def _finite(x):
    return jnp.all(jnp.isfinite(x), axis=-1)
