"""What a mask says about whole tiles of the score matrix: empty, partial or full.

Kernels walk the live tiles only, and mask only the partial ones, so this table decides how much
work an attention pattern costs. Two forms of it:

- `tile_kinds`: the table itself, for any mask;
- `Band`: closed-form ranges for masks whose live keys per query are one range. A kernel computes
  them from its program id, so a million tokens need no table at all.

Letters: B batch, T query time, S key time.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

EMPTY, PARTIAL, FULL = 0, 1, 2


def array_module(*values):
    """`jnp` if any value is a JAX array (traced or not), else `np`."""
    return jnp if any(isinstance(v, jax.Array) for v in values) else np


def _least(a: int | None, b: int | None) -> int | None:
    """The smaller bound, where None is no bound."""
    return a if b is None else b if a is None else min(a, b)


def _greatest(a: int | None, b: int | None) -> int | None:
    """The larger bound, where None is no bound."""
    return None if a is None or b is None else max(a, b)


@dataclasses.dataclass(frozen=True)
class Band:
    """Query i sees key j iff  i-left <= j,  j <= i+right or j < prefix,  and  j < limit.

    `left`, `right` and `limit` may be None: no bound. Live keys of any run of queries then form one
    range, and so do live queries of any run of keys; everything below is exact.
    """

    left: int | None = None
    right: int | None = None
    prefix: int = 0
    limit: int | None = None

    def visible(self, q_index, k_index):
        parts = []
        if self.left is not None:
            parts.append(k_index >= q_index - self.left)
        if self.right is not None:
            near = k_index <= q_index + self.right
            parts.append(near | (k_index < self.prefix) if self.prefix > 0 else near)
        if self.limit is not None:
            parts.append(k_index < self.limit)
        return functools.reduce(operator.and_, parts) if parts else q_index == q_index

    def tile_summary(self, q_lo, q_hi, k_lo, k_hi):
        first, last = self._key_range(q_lo, q_hi)
        any_visible = (q_lo <= q_hi) & (k_lo <= k_hi)
        all_visible = any_visible
        if first is not None:
            any_visible = any_visible & (k_hi >= first)
            all_visible = all_visible & (k_lo >= q_hi - self.left)
        if last is not None:
            any_visible = any_visible & (k_lo <= last)
            if first is not None:
                any_visible = any_visible & (first <= last)
        if self.right is not None:
            all_visible = all_visible & ((k_hi <= q_lo + self.right) | (k_hi < self.prefix))
        if self.limit is not None:
            all_visible = all_visible & (k_hi < self.limit)
        return any_visible, all_visible

    def key_bounds(self, q_lo, q_hi, S: int):
        """First and last key, inclusive, that queries q_lo..q_hi see; last < first if none."""
        first, last = self._key_range(q_lo, q_hi)
        xp = array_module(q_lo, q_hi)
        first = xp.zeros_like(q_lo) if first is None else xp.maximum(first, 0)
        last = xp.minimum(xp.full_like(q_hi, S - 1), S - 1 if last is None else last)
        return first, last

    def query_bounds(self, k_lo, k_hi, q_first, q_last):
        """First and last query in [q_first, q_last] that sees any key in [k_lo, k_hi]."""
        xp = array_module(k_lo, k_hi, q_first, q_last)
        first, last = q_first, q_last
        if self.right is not None:
            near = xp.where(k_lo < self.prefix, first, k_lo - self.right)
            first = xp.maximum(first, near)
        if self.limit is not None:
            k_hi = xp.minimum(k_hi, self.limit - 1)
        if self.left is not None:
            last = xp.minimum(last, k_hi + self.left)
        none = k_hi < k_lo
        return xp.where(none, q_last + 1, first), xp.where(none, q_last, last)

    def _key_range(self, q_lo, q_hi):
        """Unclipped first and last live key; None where there is no bound."""
        first = None if self.left is None else q_lo - self.left
        last = None
        if self.right is not None:
            last = q_hi + self.right
            if self.prefix > 0:
                last = array_module(q_hi).maximum(last, self.prefix - 1)
        if self.limit is not None:
            end = self.limit - 1
            last = end if last is None else array_module(last).minimum(last, end)
        return first, last

    def __and__(self, other: Band) -> Band | None:
        left, limit = _least(self.left, other.left), _least(self.limit, other.limit)
        if self.right == other.right:
            return Band(left, self.right, min(self.prefix, other.prefix), limit)
        # The band with the nearer right edge must also have the shorter prefix: else the edge of
        # the intersection rises, stays and rises again.
        if other.right is None or (self.right is not None and self.right < other.right):
            near, far = self, other
        else:
            near, far = other, self
        if far.right is not None and near.prefix > far.prefix:
            return None
        return Band(left, near.right, near.prefix, limit)

    def __or__(self, other: Band) -> Band | None:
        if self.limit is None and other.limit is None and self.prefix == other.prefix == 0:
            # Both see the diagonal, so the union leaves no hole.
            left, right = _greatest(self.left, other.left), _greatest(self.right, other.right)
            return Band(left, right)
        for a, b in ((self, other), (other, self)):
            only_limit = b.left is None and b.right is None and b.limit is not None
            if only_limit and a.left is None and a.limit is None and a.right is not None:
                return Band(None, a.right, max(a.prefix, b.limit))  # causal | prefix
        return None


def _tile_bounds(length: int, block: int, offset):
    """Inclusive bounds of the tiles of an axis; the last tile ends with the last real element."""
    low = np.arange(0, length, block, dtype=np.int32)
    high = np.minimum(low + (block - 1), np.int32(length - 1))
    if array_module(offset) is jnp:
        return offset + jnp.asarray(low), offset + jnp.asarray(high)
    return np.int32(offset) + low, np.int32(offset) + high


def segment_bounds(ids, block: int):
    """Least and greatest segment id of each tile: ids [B, T] -> two arrays [B, ceil(T/block)]."""
    xp = array_module(ids)
    batch, length = ids.shape
    padding = -length % block
    tiles = xp.pad(ids, ((0, 0), (0, padding)), mode="edge").reshape(batch, -1, block)
    return tiles.min(axis=-1), tiles.max(axis=-1)


def _static(value) -> bool:
    return not isinstance(value, jax.core.Tracer)


def tile_kinds(mask, T: int, S: int, block_q: int, block_k: int, q_offset=None):
    """The kind of every tile of the T x S score matrix: EMPTY 0, PARTIAL 1 or FULL 2.

    Args:
      mask: any mask of `ops.masks`.
      T, S: number of queries and of keys.
      block_q, block_k: rows and columns of a tile; they need not divide T and S.
      q_offset: position of the first query among the keys, an int or an int32 scalar (traced or
        not); S - T if None.

    Returns:
      int8 [M, ceil(T/block_q), ceil(S/block_k)], with M = B if the mask holds Segments, else 1.
      A numpy array unless q_offset or the segment ids are traced. EMPTY and FULL are certain; a
      PARTIAL tile of a composed mask or of Segments may in truth be empty or full. The padding
      of a ragged last key tile has to be masked, so such a tile is never FULL.

    Raises:
      ValueError: a length or block that is not positive, or segment ids of the wrong length.
    """
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

    any_visible, all_visible = mask.tile_summary(q_lo, q_hi, k_lo, k_hi, q_segments, k_segments)
    unpadded = (k_hi < S - S % block_k) if S % block_k else True
    xp = array_module(any_visible, all_visible)
    return any_visible.astype(xp.int8) + (any_visible & all_visible & unpadded).astype(xp.int8)


def live_tiles(kinds) -> Any:
    """Number of tiles that have to be computed: the partial and the full ones."""
    return (kinds != EMPTY).sum()


def picture(mask, T: int, S: int, block_q: int, block_k: int, q_offset=None) -> np.ndarray:
    """A mask and its tiles as an image: int8 [T, S], 2*kind + visible (of batch row 0).

    0 is an empty tile; 2 and 3 the hidden and visible scores of a partial tile; 5 a full one.
    """
    kinds = np.asarray(tile_kinds(mask, T, S, block_q, block_k, q_offset))[0]
    spread = np.repeat(np.repeat(kinds, block_q, axis=0), block_k, axis=1)[:T, :S]
    offset = S - T if q_offset is None else int(q_offset)
    rows, columns = np.arange(T)[:, None] + offset, np.arange(S)[None, :]
    seen = np.asarray(mask(rows, columns, q_offset=offset))
    return (2 * spread + seen.reshape(-1, T, S)[0]).astype(np.int8)
