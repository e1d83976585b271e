"""Operands of attention's passes, prepared so that a mask hides even values that are not finite.

A weight of 0 times NaN is NaN, and so is a sum that holds it: NaN in a value that the mask hides
from a query would reach the query's output through the product of weights and values. Instead of
looking at each weight, what is not finite is moved, in linear time, to where a tile's mask is
applied in any case. Kernels get whole operands, prepared once per call; `ops.attention_xla`
prepares each tile as it takes it, so that no copy of an operand exists:

- forward, a key or value that is not finite becomes a key of NaN with a value of 0: scores of NaN,
  which the mask replaces where it hides and which make NaN of the rows that see them;
- backward, arrays become finite, and a row that is not (its output, query or cotangent) gets a
  log-sum-exp of NaN: differences of scores and it, which the mask replaces where it hides.

Dimensions: B batch, T query time, S key time, H heads, G key-value heads, D head dim, P value dim.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

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
    return only_keys(finite(k) & finite(v), k, v) if hides(mask, bias) else (k, v)


def only_keys(
    usable: Bool[Array, "*S"], k: Float[Array, "*S D"], v: Float[Array, "*S P"]
) -> tuple[Float[Array, "*S D"], Float[Array, "*S P"]]:
    """Returns k and v with keys of NaN and values of 0 for those that are not usable."""
    return jnp.where(usable[..., None], k, jnp.nan), only(usable, v)


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
    usable, lse, dlse = usable_rows(q, o, lse, do, dlse)
    q, o, do = (only(usable, x) for x in (q, o, do))
    k, v = (only(finite(x), x) for x in (k, v))
    return q, k, v, o, lse, do, dlse


def usable_rows(
    q: Float[Array, "B T H D"],
    o: Float[Array, "B T H P"],
    lse: Float[Array, "B T H"],
    do: Float[Array, "B T H P"],
    dlse: Float[Array, "B T H"],
) -> tuple[Bool[Array, "B T H"], Float[Array, "B T H"], Float[Array, "B T H"]]:
    """Returns which rows are finite, and lse and dlse for a backward pass."""
    usable = finite(q) & finite(o) & finite(do) & jnp.isfinite(lse) & jnp.isfinite(dlse)
    lse = jnp.where(usable | jnp.isneginf(lse), lse, jnp.nan)
    return usable, lse, jnp.where(usable, dlse, 0.0)


def finite(x: Float[Array, "*S D"]) -> Bool[Array, "*S"]:
    """Returns whether vectors are finite."""
    return jnp.all(jnp.isfinite(x), axis=-1)


def only(usable: Bool[Array, "*S"], x: Float[Array, "*S D"]) -> Float[Array, "*S D"]:
    """Returns x with 0 for vectors that are not usable."""
    return jnp.where(usable[..., None], x, 0.0)


def hides(mask: masks.Mask, bias: Float[Array, "..."] | None = None) -> bool:
    """Returns whether a mask, or a bias of -inf, may hide a key from a query."""
    return bias is not None or not isinstance(mask, masks.Full)
