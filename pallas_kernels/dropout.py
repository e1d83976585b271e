"""Which weights of attention are dropped: bits of a counter, the same for every tiling.

Whether a weight is kept is a hash of (seed, sequence of the batch, head, query, key) in 32-bit
integers that wrap around, so that any part of the matrix of weights, forward or backward, in XLA or
in a kernel, can be asked about alone, and nothing is stored. The hash is MurmurHash3's finalizer
(Austin Appleby, public domain), once for each index that a row has and once for the key.
"""

import dataclasses
import functools

import jax
from jax import lax

# 2^32 divided by the golden ratio, and the finalizer's two factors, as signed integers.
STEP, FIRST, SECOND = -1640531527, -2048144789, -1028477387


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("numbers",), meta_fields=("rate",)
)
@dataclasses.dataclass(frozen=True)
class Dropout:
    """Dropout of a share `rate` of the weights, 0 < rate < 1.

    numbers: int32 [3]: the seed, and the indices of the arrays' first sequence and first head.
    """

    numbers: jax.Array
    rate: float

    @property
    def scale(self) -> float:
        """What the weights that are kept are multiplied by."""
        return 1.0 / (1.0 - self.rate)


def mix(x):
    """An int32 whose every bit depends on every bit of x."""
    x = x ^ lax.shift_right_logical(x, x.dtype.type(16))
    x = x * FIRST
    x = x ^ lax.shift_right_logical(x, x.dtype.type(13))
    x = x * SECOND
    return x ^ lax.shift_right_logical(x, x.dtype.type(16))


def row_hash(numbers, batch, head, query):
    """int32 of the rows; `numbers` of `Dropout`, the other three int32 that broadcast."""
    row = mix(numbers[0] + STEP)
    row = mix(row + (numbers[1] + batch) * STEP)
    row = mix(row + (numbers[2] + head) * STEP)
    return mix(row + query * STEP)


def kept(row, key, rate: float):
    """Whether weights are kept, from `row_hash` and the int32 index of the key."""
    # Of the 2^32 signed integers, the least are dropped.
    return mix(row + key * STEP) >= round(rate * 2**32) - 2**31
