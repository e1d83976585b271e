"""Attention masks as values: which keys a query sees, by element or by tile.

A mask is an immutable value that is composed with `&` and `|` and passed to an op:

    causal = Causal()
    local = Causal() & SlidingWindow(512)
    prefix_lm = Causal() | Prefix(100)
    packed = Causal() & Segments(segment_ids)

It is evaluated by element or by tile. By element: `mask(q_index, k_index)` is whether a query sees
a key, on NumPy or JAX integers; `mask.visible` is the same inside a kernel. By tile:
`mask.tile_summary` is whether any and whether all elements of tiles of the score matrix are
visible; `tile_kinds` computes it for all tiles at once. Kernels skip empty tiles and mask only
partial ones.

Indices of queries and keys are positions on one axis, that of the keys: row r of the queries
is at q_offset + r. By default q_offset = S - T: the last query is at the last key's position.

Masks are JAX pytrees. Only `Segments` holds arrays; all others are static and hashable.

Dimensions: B batch, T query time, S key time.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool

from tilescan.ops.arrays import AnyArray
from tilescan.ops.mask_bands import Index, array_module
from tilescan.ops.mask_tiles import (
    EMPTY,
    FULL,
    PARTIAL,
    live_tiles,
    picture,
    segment_bounds,
    tile_kinds,
)
from tilescan.ops.mask_types import (
    And,
    BlockSparse,
    Causal,
    Composed,
    Full,
    Lambda,
    Mask,
    Or,
    Prefix,
    Segments,
    SlidingWindow,
    check_int,
    flatten,
)

__all__ = [
    "EMPTY",
    "FULL",
    "PARTIAL",
    "And",
    "BlockSparse",
    "Causal",
    "Full",
    "Lambda",
    "Mask",
    "Or",
    "Prefix",
    "Segments",
    "SlidingWindow",
    "as_array",
    "butterfly",
    "live_tiles",
    "picture",
    "segment_bounds",
    "segments_of",
    "split_segments",
    "tile_kinds",
    "validate",
    "within_live_tiles",
]


def segments_of(mask: Mask) -> Segments | None:
    """Returns the Segments in a mask, if any; ValueError if there are two different ones."""
    return mask.segments()


def split_segments(mask: Mask) -> tuple[Mask, Segments | None]:
    """Splits `rest & segments` into rest, without Segments in it, and segments.

    If Segments are under an `|` there is no such split: the result is (mask, None), which
    `segments_of(mask)` distinguishes from a mask without Segments.
    """
    operands = flatten(And, mask)
    rest = [m for m in operands if not isinstance(m, Segments)]
    if len(rest) == len(operands) or any(m.segments() is not None for m in rest):
        return mask, None
    return functools.reduce(operator.and_, rest, Full()), mask.segments()


def within_live_tiles(
    mask: Mask, block_q: int, block_k: int, q_offset: Index | None = 0
) -> Mask | None:
    """Returns a mask that equals `mask` inside every PARTIAL tile, without BlockSparse, or None.

    Where tiles lie within the blocks of a layout, the layout is constant in each of them: in an
    `&` it is true in a live tile, and in an `|` it is false in a partial one. So kernels need no
    look-up. None where tiles straddle blocks or BlockSparse is nested deeper.
    """

    def aligned(m):
        on_grid = isinstance(q_offset, (int, np.integer)) and q_offset % block_q == 0
        return on_grid and m.block % block_q == 0 and m.block % block_k == 0

    def holds(m):
        return isinstance(m, BlockSparse) or (isinstance(m, Composed) and any(map(holds, m.masks)))

    if not holds(mask):
        return mask
    operands = mask.masks if isinstance(mask, Composed) else (mask,)
    rest = tuple(m for m in operands if not isinstance(m, BlockSparse))
    layouts = (m for m in operands if isinstance(m, BlockSparse))
    if any(map(holds, rest)) or not all(map(aligned, layouts)):
        return None
    if not rest:
        return Full()
    return rest[0] if len(rest) == 1 else type(mask)(rest)


def as_array(
    mask: Mask, T: int, S: int, q_offset: Index | None = None
) -> Bool[AnyArray, "{T} {S}"] | Bool[AnyArray, "B {T} {S}"]:
    """Returns the whole mask, [B, T, S] with Segments. For tests and pictures only."""
    offset = S - T if q_offset is None else q_offset
    xp = array_module(offset)
    rows, columns = xp.arange(T)[:, None] + offset, xp.arange(S)[None, :]
    if mask.segments() is not None:
        mask.segments().both(T, S)
    return mask(rows, columns, q_offset=offset)


def validate(mask: Any, B: int, T: int, S: int, q_offset: Any = None) -> None:
    """Checks that a mask fits B sequences of T queries and S keys.

    Raises:
      TypeError: not a mask, or segment ids that are not integers.
      ValueError: segment ids or a block layout of the wrong shape, two different Segments.
    """
    if not isinstance(mask, Mask):
        raise TypeError(
            f"mask is a {type(mask).__name__}; it must be a mask of ops.masks, such as Causal() or "
            "Causal() & SlidingWindow(512)"
        )
    if isinstance(mask, Composed):
        for part in mask.masks:
            validate(part, B, T, S, q_offset)
        mask.segments()
    elif isinstance(mask, Segments):
        _validate_segments(mask, B, T, S)
    elif isinstance(mask, BlockSparse):
        _validate_layout(mask, T, S, q_offset)


def _validate_segments(mask: Segments, B: int, T: int, S: int):
    q_ids, kv_ids = mask.q_ids, mask.kv_ids
    if kv_ids is None and T != S:
        raise ValueError(f"Segments: kv_ids is needed, since T={T} queries and S={S} keys differ")
    for name, ids, letter, length in (("q_ids", q_ids, "T", T), ("kv_ids", kv_ids, "S", S)):
        if ids is None and name == "kv_ids":
            continue
        if not hasattr(ids, "dtype") or not np.issubdtype(ids.dtype, np.integer):
            kind = getattr(ids, "dtype", type(ids).__name__)
            raise TypeError(f"Segments: {name} is {kind}; it must be an array of integers")
        if tuple(ids.shape) != (B, length):
            raise ValueError(
                f"Segments: {name} has shape {list(ids.shape)}; it must be [B, {letter}] "
                f"= [{B}, {length}]"
            )


def _validate_layout(mask: BlockSparse, T: int, S: int, q_offset):
    rows, columns = mask.layout.shape
    static = not isinstance(q_offset, jax.Array)
    first = (S - T if q_offset is None else int(q_offset)) if static else 0
    if first < 0:
        raise ValueError(
            f"BlockSparse: T={T} queries end with S={S} keys, so the first is at {first}, "
            "outside the layout; pass q_offset=0 or larger"
        )
    least_rows, right_columns = -(-(first + T) // mask.block), -(-S // mask.block)
    if rows < least_rows or columns != right_columns:
        raise ValueError(
            f"BlockSparse: layout has shape [{rows}, {columns}]; for T={T} queries from position "
            f"{first}, S={S} keys and block={mask.block} it must be [{least_rows}, {right_columns}]"
        )


def butterfly(
    n_blocks: int, n_factors: int | None = None, global_size: int = 0
) -> Bool[np.ndarray, "{n_blocks} {n_blocks}"]:
    """Returns the flat block butterfly layout of Pixelated Butterfly and FlashAttention.

    Block (i, j) is live iff i = j or i XOR j = 2^k for a k < n_factors, or either is among the
    first `global_size` blocks (Dao et al. 2022, arXiv 2205.14135, section 3.3; Chen et al. 2021,
    arXiv 2112.00029).

    Args:
      n_blocks: rows and columns of the layout.
      n_factors: number of butterfly factors; all, ceil(log2 n_blocks), if None.
      global_size: rows and columns at the beginning that are entirely live.

    Returns:
      bool [n_blocks, n_blocks] for `BlockSparse(layout, block)`.
    """
    check_int("butterfly", "n_blocks", n_blocks, 1)
    check_int("butterfly", "global_size", global_size, 0)
    if n_factors is None:
        n_factors = (n_blocks - 1).bit_length()
    check_int("butterfly", "n_factors", n_factors, 0)
    i, j = np.arange(n_blocks)[:, None], np.arange(n_blocks)[None, :]
    distance = i ^ j
    power_of_two = (distance & (distance - 1)) == 0  # also true of zero, the diagonal
    layout = power_of_two & (distance < 2**n_factors)
    return layout | (i < global_size) | (j < global_size)
