"""Ids of tokens: which of them a vocabulary has."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int32, Integer, Num

from tilescan.ops.arrays import AnyArray


def check_ids(name: str, ids: Any) -> None:
    """Checks that ids are an array of integers.

    Raises:
      TypeError: they are not; its text has the argument's name.
    """
    dtype = getattr(ids, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.integer):
        given = type(ids).__name__ if dtype is None else dtype
        raise TypeError(f"{name} must be an array of integers, ids of tokens; got {given}")


def bounded_ids(ids: Integer[AnyArray, "*B"], size: int, outside: int) -> Int32[Array, "*B"]:
    """Returns ids as int32, with `outside` in place of those not in [0, size).

    Ids of any integer dtype are compared before they are narrowed, and int8 or uint8 ones are
    widened first, as `size` may exceed their range.
    """
    ids = jnp.asarray(ids)
    if jnp.iinfo(ids.dtype).bits < 32:
        ids = ids.astype(jnp.int32)
    inside = (ids >= 0) & (ids < size)
    return jnp.where(inside, ids.astype(jnp.int32), jnp.int32(outside))


def counted_ids(
    ids: Integer[AnyArray, "*B"], weights: Num[AnyArray, "*B"], size: int
) -> Int32[Array, "*B"]:
    """Returns int32 targets: 0 where the weight is 0, -1 where one with weight is not a token.

    So a target without weight is never looked at, and `log_probabilities_of` gives NaN for one
    that has weight and is outside [0, size).
    """
    return jnp.where(weights != 0, bounded_ids(ids, size, -1), 0)
