"""Ids of tokens: which of them a vocabulary has."""

import jax.numpy as jnp
from jaxtyping import Array, Int


def check_ids(name: str, ids: Array) -> None:
    """Raises TypeError, with the argument's name, unless ids are an array of integers."""
    dtype = getattr(ids, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.integer):
        given = type(ids).__name__ if dtype is None else dtype
        raise TypeError(f"{name} must be an array of integers, ids of tokens; got {given}")


def bounded_ids(ids: Int[Array, "*B"], size: int, outside: int) -> Int[Array, "*B"]:
    """Returns ids as int32, with `outside` for those that are not in [0, size).

    Any integer dtype is compared as what it is: none is narrowed first, and the result has room
    for `size`, which int8 or uint8 may not have.
    """
    ids = jnp.asarray(ids)
    if jnp.iinfo(ids.dtype).bits < 32:
        ids = ids.astype(jnp.int32)
    inside = (ids >= 0) & (ids < size)
    return jnp.where(inside, ids.astype(jnp.int32), jnp.int32(outside))


def counted_ids(ids: Int[Array, "*B"], weights: Array, size: int) -> Int[Array, "*B"]:
    """Returns int32 targets: 0 where the weight is 0, -1 where one with weight is no token.

    So a target without weight is never looked at, and `log_probabilities_of` gives NaN for one
    that has weight and is outside [0, size).
    """
    return jnp.where(weights != 0, bounded_ids(ids, size, -1), 0)
