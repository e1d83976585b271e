"""Which weights of attention are dropped: bits of a counter, the same for every tiling.

Whether a weight is kept is a hash of (seed, sequence of the batch, head, query, key) in 32-bit
integers that wrap around, so that any part of the matrix of weights, forward or backward, in XLA or
in a kernel, can be asked about alone, and nothing is stored. The hash is MurmurHash3's finalizer
(Austin Appleby, public domain), once for the seed and once for each index.

Dimensions: B batch, H heads.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

# 2^32 divided by the golden ratio, and the finalizer's two factors, as signed integers.
STEP, FIRST, SECOND = -1640531527, -2048144789, -1028477387


@functools.partial(jax.tree_util.register_dataclass, data_fields=("seeds",), meta_fields=("rate",))
@dataclasses.dataclass(frozen=True)
class Dropout:
    """Dropout of a share `rate` of the weights, 0 < rate < 1; seeds: of each sequence and head."""

    seeds: Int[Array, "B H"]
    rate: float

    @property
    def scale(self) -> float:
        """What the weights that are kept are multiplied by."""
        return 1.0 / (1.0 - self.rate)


def seeds(seed: Int[Array, ""], B: int, H: int) -> Int[Array, "B H"]:
    """Returns a seed for each sequence and head, from one; all int32."""
    batch = mix(mix(seed + STEP) + jnp.arange(B, dtype=jnp.int32) * STEP)
    return batch[:, None] + (jnp.arange(H, dtype=jnp.int32) * STEP)[None]


def mix(x: Int[Array, "*shape"]) -> Int[Array, "*shape"]:
    """Returns an int32 whose every bit depends on every bit of x."""
    x = x ^ lax.shift_right_logical(x, x.dtype.type(16))
    x = x * FIRST
    x = x ^ lax.shift_right_logical(x, x.dtype.type(13))
    x = x * SECOND
    return x ^ lax.shift_right_logical(x, x.dtype.type(16))


def row_hash(seed: Int[Array, "*#rows"], query: Int[Array, "*#rows"]) -> Int[Array, "*#rows"]:
    """Returns the int32 of rows, from those of `seeds` and the queries' indices."""
    return mix(mix(seed) + query * STEP)


def kept(
    row: Int[Array, "*#weights"], key: Int[Array, "*#weights"], rate: float
) -> Bool[Array, "*#weights"]:
    """Returns whether weights are kept, from `row_hash` and the int32 index of the key."""
    # Of the 2^32 signed integers, the least are dropped, but for the greatest.
    return mix(row + key * STEP) >= min(round(rate * 2**32), 2**32 - 1) - 2**31
