"""Arrays whose dimensions are named by letters, and how mesh axes shard them."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec


def of_rank(dimensions: str | tuple[str, ...], rank: int) -> str:
    """Returns which of an argument's alternative dimensions have this rank, or else the first."""
    if isinstance(dimensions, str):
        return dimensions
    return next((choice for choice in dimensions if len(choice) == rank), dimensions[0])


def spec_of(
    dimensions: str, shape: Sequence[int], axes: Mapping[str, str | tuple[str, ...] | None]
) -> PartitionSpec:
    """Returns the partition spec of an array.

    Args:
      dimensions: letters of its leading dimensions, at least.
      shape: their sizes. Those of length 1 are replicated: they are broadcast.
      axes: {letter: axis or axes of a mesh, or None}; a dimension without an axis is replicated.
    """
    pairs = zip(dimensions, shape, strict=False)
    return PartitionSpec(*(axes.get(letter) or None if n > 1 else None for letter, n in pairs))


def repeats(heads: int, groups: int, devices: int) -> int:
    """Returns how often groups are repeated, at least, for `devices` devices to share them equally.

    Args:
      heads: number of heads, a multiple of groups and of devices.
      groups: number of groups of heads.
      devices: number of devices.

    Returns:
      A divisor of heads / groups; 1 where no divisor makes the groups a multiple of devices.
    """
    each = max(1, heads // groups)
    return next((r for r in range(1, each + 1) if each % r == 0 and groups * r % devices == 0), 1)


def repeated(x: jax.Array, axis: int, times: int) -> jax.Array:
    """Returns x with every entry along an axis repeated, as `jnp.repeat` does by a gather."""
    if times == 1:
        return x
    shape = (*x.shape[: axis + 1], times, *x.shape[axis + 1 :])
    wide = jnp.broadcast_to(jnp.expand_dims(x, axis + 1), shape)
    return wide.reshape(*x.shape[:axis], x.shape[axis] * times, *x.shape[axis + 1 :])
