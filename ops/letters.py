"""Arrays whose dimensions are named by letters, and how they lie on the axes of a mesh."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec


def of_rank(letters: str | tuple[str, ...], rank: int) -> str:
    """Returns the letters of an argument that has this rank."""
    if isinstance(letters, str):
        return letters
    return next((choice for choice in letters if len(choice) == rank), letters[0])


def spec_of(letters: str, shape: Sequence[int], axes: Mapping) -> PartitionSpec:
    """Returns the spec of an array.

    Args:
      letters: of its dimensions, the first ones at least.
      shape: their sizes. Those of length 1 stay whole: they are broadcast.
      axes: {letter: axis or axes of a mesh, or nothing}; what has no axis stays whole.
    """
    pairs = zip(letters, shape, strict=False)
    return PartitionSpec(*(axes.get(letter) or None if n > 1 else None for letter, n in pairs))


def repeats(heads: int, groups: int, parts: int) -> int:
    """Returns the least number of times that groups are repeated for `parts` devices to share them.

    Args:
      heads: a multiple of groups, which parts divides.
      groups: of heads.
      parts: devices.

    Returns:
      A divisor of heads / groups; 1 where none does it.
    """
    each = max(1, heads // groups)
    return next((r for r in range(1, each + 1) if each % r == 0 and groups * r % parts == 0), 1)


def repeated(x: jax.Array, axis: int, times: int) -> jax.Array:
    """Returns x with every entry along an axis so many times in a row."""
    if times == 1:
        return x
    shape = (*x.shape[: axis + 1], times, *x.shape[axis + 1 :])
    wide = jnp.broadcast_to(jnp.expand_dims(x, axis + 1), shape)
    return wide.reshape(*x.shape[:axis], x.shape[axis] * times, *x.shape[axis + 1 :])
