"""Sizes of the tiles that attention in plain XLA takes, chosen for a CPU's caches.

Dimensions: T query time, S key time, H heads, I and J queries and keys of a tile.
"""

import functools
import pathlib

import jax
import numpy as np

from tilescan.ops import masks
from tilescan.ops.attention_operands import Offset

# Scores of a tile, in all heads (and sequences, where a batch is computed at once): 8 MiB where a
# core's cache holds one of 8 heads, half of it elsewhere. Measured on caches of 2 MiB and 512 KiB.
LARGE, SMALL = 2**21, 2**20
# Matrices of more scores take small tiles: memory counts more there.
LONG = 2**26
# Most tiles of a matrix that are examined one by one when tracing.
MAX_TILES = 2**17


def tile_sizes(
    T: int, S: int, H: int, mask: masks.Mask, q_offset: Offset, backward: bool
) -> tuple[int, int]:
    """Returns (queries, keys) of a tile: of the sizes that fit the caches, the cheapest for a mask.

    The cost, in scores, was fitted on two CPU cores: a tile costs 100,000 scores before its first,
    loading a key 64, and masking a third of the scores. Long masks take large tiles, narrow windows
    small ones, backward passes on small caches the smallest.
    """
    # Scores of a tile that a cache holds.
    static = not any(isinstance(x, jax.Array) for x in jax.tree.leaves((mask, q_offset)))
    if T * S > LONG:
        limit = SMALL
    elif _core_cache() >= 2**20:
        limit = LARGE
    else:
        limit = SMALL // 2 if backward else SMALL  # backward, twice as many matrices are alive

    # Candidates.
    sizes = [
        (I, J)
        for I in _sizes(T, 512)
        for J in _sizes(S, 4096)
        if (H * I * J <= limit or I * J <= 64 * 64)
        # A long and narrow tile costs more to fetch than it computes.
        and (J <= 2 * I or I == T)
    ]

    def cost(size):
        I, J = size
        scores = H * I * J
        if not static:
            live, partial = -(-T // I) * -(-S // J), 0
        else:
            kinds = masks.tile_kinds(mask, T, S, I, J, q_offset)
            live, partial = np.sum(kinds != masks.EMPTY), np.sum(kinds == masks.PARTIAL)
        return live * (100_000 + scores + 64 * H * J) + partial * scores / 3

    few = [(I, J) for I, J in sizes if (T // I) * (S // J) <= MAX_TILES]
    if masks.segments_of(mask) is not None:
        # Packed documents are known only when the program runs, and are often short.
        few = [(I, J) for I, J in few if max(I, J) <= 256] or few
    return (
        min(few, key=cost) if few else max(sizes, key=lambda size: (size[0] * size[1], min(size)))
    )


@functools.cache
def _core_cache() -> int:
    """Returns the bytes of a core's second-level cache as Linux reports them, or else 1 MiB."""
    try:
        size = pathlib.Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text()
        return 2**10 * int(size.strip().removesuffix("K"))
    except (OSError, ValueError):
        return 2**20


def _sizes(length, most):
    """Returns sizes of tiles to try: powers of two, and sizes that split the length equally."""
    sizes = set()
    size = 64
    while size <= most:
        equal = -(-length // -(-length // size))
        sizes |= {min(size, length), min(-(-equal // 16) * 16, length)}
        size *= 2
    return sorted(sizes)
