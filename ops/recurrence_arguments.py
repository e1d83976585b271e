"""Checks that the recurrences and convolutions share; errors name the argument, None passes.

Dimensions: B batch, T time, H heads, G groups of heads, D key dim, P value dim.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from tilescan.ops.arrays import AnyArray
from tilescan.ops.chunked_scan import SUBCHUNK
from tilescan.ops.diagonal_scan import resets
from tilescan.ops.sizes import check_sizes

# One id for each step, or with the segment of the initial state as well.
SegmentIds = Integer[AnyArray, "B T"] | Integer[AnyArray, "B T+1"]
# What has a shape and a dtype.
Shaped = AnyArray | jax.ShapeDtypeStruct


def check_implementation(op: str, implementation: str | None) -> None:
    """Checks the implementation of an op that has "xla" alone.

    Raises:
      ValueError: an implementation other than "xla" and None.
    """
    if implementation not in ("xla", None):
        raise ValueError(
            f'{op} has implementation="xla" or None, which runs everywhere, '
            f"got implementation={implementation!r}"
        )


def check_floating(**arrays: Shaped | None) -> None:
    """Checks that arrays are floating.

    Raises:
      TypeError: one of them is not.
    """
    for name, x in arrays.items():
        if x is not None and not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{name} must be floating, got {x.dtype}")


def check_one_dtype(**arrays: Shaped) -> None:
    """Checks that arrays have one floating dtype.

    Raises:
      TypeError: dtypes that are not floating or differ.
    """
    check_floating(**arrays)
    dtypes = {name: x.dtype.name for name, x in arrays.items()}
    if len(set(dtypes.values())) > 1:
        raise TypeError(f"{', '.join(dtypes)} must have one dtype, got {dtypes}")


def check_shape(name: str, x: Shaped | None, letters: str, shape: tuple[int, ...]) -> None:
    """Checks the shape of an array, which is [`letters`] in the error.

    Raises:
      ValueError: another shape.
    """
    if x is not None and x.shape != shape:
        raise ValueError(f"{name} must be [{letters}] = {shape}, got shape {x.shape}")


def check_time(**arrays: Shaped) -> None:
    """Checks that 32-bit offsets reach every element of a sequence of arrays [B, T, ...].

    Raises:
      ValueError: a sequence of 2^31 elements or more.
    """
    for name, x in arrays.items():
        count = math.prod(x.shape[1:])
        if count >= 2**31:
            raise ValueError(
                f"{name} {x.shape} has {count} elements in a sequence, offsets of 32 bits reach "
                "2^31 - 1: split the sequence, and give final_state as the next's initial_state"
            )


def check_heads(q: Shaped, k: Shaped, v: Shaped) -> tuple[int, int, int, int, int]:
    """Checks queries [B, T, H, D], keys [B, T, G, D] and values [B, T, G, P].

    Returns:
      B, T, H, D and P.

    Raises:
      ValueError: shapes that don't fit, or are too large.
      TypeError: dtypes that are not floating or differ.
    """
    check_one_dtype(q=q, k=k, v=v)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} must be [B, T, heads, features], got shape {x.shape}")
    B, T, H, D = q.shape
    G, P = v.shape[2:]
    if k.shape != (B, T, G, D) or v.shape[:2] != (B, T):
        raise ValueError(
            "q [B, T, H, D], k [B, T, G, D] and v [B, T, G, P] must agree in B, T, G and D, "
            f"got {q.shape}, {k.shape} and {v.shape}"
        )
    check_sizes(q=(q, "B, T, H, D"), v=(v, "B, T, G, P"))
    check_groups("q's heads", H, "k's and v's", G)
    check_time(q=q, k=k, v=v)
    return B, T, H, D, P


def check_groups(heads: str, H: int, groups: str, G: int) -> None:
    """Checks that G groups divide H heads, whose names in the error are `groups` and `heads`.

    Raises:
      ValueError: they don't.
    """
    if H % G:
        raise ValueError(f"{heads} must be a multiple of {groups}, got {H} and {G}")


def check_chunk(chunk: Any) -> None:
    """Checks the steps of a chunk, a positive multiple of SUBCHUNK or None.

    Raises:
      ValueError: anything else.
    """
    if chunk is not None and (not isinstance(chunk, int) or chunk <= 0 or chunk % SUBCHUNK):
        raise ValueError(f"chunk must be a positive multiple of {SUBCHUNK}, got {chunk!r}")


def check_state(
    state: Shaped | None, shape: tuple[int, ...], letters: str, dtype: jax.typing.DTypeLike
) -> Float[Array, "..."]:
    """Returns the initial state in `dtype`, zeros for None.

    Raises:
      ValueError: another shape than `shape`, which is [`letters`] in the error.
      TypeError: a state that is not floating.
    """
    if state is None:
        return jnp.zeros(shape, dtype)
    check_shape("initial_state", state, letters, shape)
    check_floating(initial_state=state)
    return state.astype(dtype)


def state_dtype(x: Shaped) -> np.dtype:
    """Returns the dtype of states for inputs x: float32, or float64 for float64."""
    return jnp.promote_types(x.dtype, jnp.float32)


def forget_at_starts(
    log_decay: Float[Array, "B T ..."], segment_ids: SegmentIds | None
) -> Float[Array, "B T ..."]:
    """Returns log_decay with -inf where a segment starts, by ids as of `diagonal_scan.resets`."""
    if segment_ids is None:
        return log_decay
    starts = resets(segment_ids, *log_decay.shape[:2])
    starts = starts.reshape(*starts.shape, *(1,) * (log_decay.ndim - 2))
    return jnp.where(starts, -jnp.inf, log_decay)
