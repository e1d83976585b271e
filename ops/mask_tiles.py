"""Whether a mask leaves whole tiles of the score matrix empty, partial or full.

Kernels visit the live tiles only, and mask only the partial ones, so this table decides how much
work an attention pattern costs.

Dimensions: B batch, T query time, S key time.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int8, Integer

from tilescan.ops.arrays import AnyArray
from tilescan.ops.mask_bands import Index, array_module

EMPTY, PARTIAL, FULL = 0, 1, 2


def _tile_bounds(length: int, block: int, offset):
    """Returns inclusive bounds of an axis's tiles; the last ends with the last real element."""
    low = np.arange(0, length, block, dtype=np.int32)
    high = np.minimum(low + (block - 1), np.int32(length - 1))
    if array_module(offset) is jnp:
        return offset + jnp.asarray(low), offset + jnp.asarray(high)
    return np.int32(offset) + low, np.int32(offset) + high


def segment_bounds(
    ids: Integer[AnyArray, "B T"], block: int
) -> tuple[Integer[AnyArray, "B n"], Integer[AnyArray, "B n"]]:
    """Returns least and greatest segment id of each of n = ceil(T/block) tiles."""
    xp = array_module(ids)
    batch, length = ids.shape
    n = -(-length // block)
    tiles = xp.pad(ids, ((0, 0), (0, n * block - length)), mode="edge").reshape(batch, n, block)
    return tiles.min(axis=-1), tiles.max(axis=-1)


def _static(value) -> bool:
    return not isinstance(value, jax.core.Tracer)


def tile_kinds(
    mask: Any, T: int, S: int, block_q: int, block_k: int, q_offset: Index | None = None
) -> Int8[AnyArray, "M m n"]:
    """Returns the kind of every tile of the T x S score matrix: EMPTY 0, PARTIAL 1 or FULL 2.

    Args:
      mask: any mask of `ops.masks`.
      T, S: number of queries and of keys.
      block_q, block_k: rows and columns of a tile; they need not divide T and S.
      q_offset: position of the first query among the keys, an int or an int32 scalar (traced or
        not); S - T if None.

    Returns:
      int8 [M, ceil(T/block_q), ceil(S/block_k)], with M = B if the mask holds Segments, else 1.
      A NumPy array unless q_offset or the segment ids are traced. EMPTY and FULL are certain; a
      PARTIAL tile of a composed mask or of Segments may be empty or full. The padding of a
      ragged last key tile has to be masked, so such a tile is never FULL.

    Raises:
      ValueError: a length or block that is not positive, or segment ids of the wrong length.
    """
    # Bounds of the tiles, and of the segment ids in them.
    for name, value in (("T", T), ("S", S), ("block_q", block_q), ("block_k", block_k)):
        if value < 1:
            raise ValueError(f"tile_kinds: {name}={value} must be at least 1")
    if q_offset is None:
        q_offset = S - T
    elif _static(q_offset):
        q_offset = int(q_offset)
    q_lo, q_hi = _tile_bounds(T, block_q, q_offset)
    k_lo, k_hi = _tile_bounds(S, block_k, 0)
    q_lo, q_hi = (x[None, :, None] for x in (q_lo, q_hi))
    k_lo, k_hi = (x[None, None, :] for x in (k_lo, k_hi))

    q_segments = k_segments = None
    segments = mask.segments()
    if segments is not None:
        q_ids, k_ids = (np.asarray(x) if _static(x) else x for x in segments.both(T, S))
        q_segments = tuple(x[:, :, None] for x in segment_bounds(q_ids, block_q))
        k_segments = tuple(x[:, None, :] for x in segment_bounds(k_ids, block_k))

    # What the mask says of them.
    any_visible, all_visible = mask.tile_summary(q_lo, q_hi, k_lo, k_hi, q_segments, k_segments)
    unpadded = (k_hi < S - S % block_k) if S % block_k else True
    xp = array_module(any_visible, all_visible)
    return any_visible.astype(xp.int8) + (any_visible & all_visible & unpadded).astype(xp.int8)


def live_tiles(kinds: Int8[AnyArray, "*tiles"]) -> np.integer | Integer[Array, ""]:
    """Returns the number of tiles that have to be computed: the partial and the full ones."""
    return (kinds != EMPTY).sum()


def picture(
    mask: Any, T: int, S: int, block_q: int, block_k: int, q_offset: Index | None = None
) -> Int8[np.ndarray, "{T} {S}"]:
    """Returns a mask and its tiles as an image, 2*kind + visible (of batch row 0).

    0 is an empty tile; 2 and 3 the hidden and visible scores of a partial tile; 5 a full one.
    """
    kinds = np.asarray(tile_kinds(mask, T, S, block_q, block_k, q_offset))[0]
    repeated = np.repeat(np.repeat(kinds, block_q, axis=0), block_k, axis=1)[:T, :S]
    offset = S - T if q_offset is None else int(q_offset)
    rows, columns = np.arange(T)[:, None] + offset, np.arange(S)[None, :]
    seen = np.asarray(mask(rows, columns, q_offset=offset))
    return (2 * repeated + seen.reshape(-1, T, S)[0]).astype(np.int8)
