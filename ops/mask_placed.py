"""The mask of a submatrix of the scores, whose rows and columns have a start and a stride.

A device of a sharded sequence holds some queries and, at a time, some keys. `Placed` evaluates the
whole sequence's mask for them; `place` expresses it by a q_offset where one is enough, which
kernels prefer.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Integer

from tilescan.ops import masks
from tilescan.ops.arrays import AnyArray
from tilescan.ops.mask_bands import Index, Visible
from tilescan.ops.mask_types import SegmentBounds, SegmentIds


class Range(NamedTuple):
    """Positions start, start + stride, ... of `length` tokens.

    Attributes:
      start, stride, length: of the positions; start may be traced.
      row: index of the first one among its device's tokens.
    """

    start: int | jax.Array
    stride: int
    length: int
    row: int = 0


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("mask", "q_start", "k_start"),
    meta_fields=("q_stride", "k_stride"),
)
@dataclasses.dataclass(frozen=True, eq=False)
class Placed(masks.Mask):
    """Row r sees column c iff query q_start + q_stride r sees key k_start + k_stride c in `mask`.

    Segment ids, if any, are those of the rows and columns.
    """

    mask: masks.Mask
    q_start: int | jax.Array
    k_start: int | jax.Array
    q_stride: int = 1
    k_stride: int = 1

    __hash__ = None

    def segments(self) -> masks.Segments | None:
        """Returns the Segments of the mask, if any."""
        return self.mask.segments()

    def visible(
        self,
        q_index: Index,
        k_index: Index,
        q_segments: SegmentIds = None,
        k_segments: SegmentIds = None,
    ) -> Visible:
        """Returns whether row r sees column c, as `Mask.visible`."""
        return self.mask.visible(
            self.q_start + self.q_stride * q_index,
            self.k_start + self.k_stride * k_index,
            q_segments,
            k_segments,
        )

    def tile_summary(
        self,
        q_lo: Index,
        q_hi: Index,
        k_lo: Index,
        k_hi: Index,
        q_segments: SegmentBounds = None,
        k_segments: SegmentBounds = None,
    ) -> tuple[Visible, Visible]:
        """Returns whether any, and whether all, pairs of a tile are visible."""
        q_lo, q_hi = (self.q_start + self.q_stride * x for x in (q_lo, q_hi))
        k_lo, k_hi = (self.k_start + self.k_stride * x for x in (k_lo, k_hi))
        return self.mask.tile_summary(q_lo, q_hi, k_lo, k_hi, q_segments, k_segments)


def place(mask: masks.Mask, queries: Range, keys: Range) -> tuple[masks.Mask, int | jax.Array]:
    """Returns (mask, q_offset) of these queries and keys, as `ops.attention` takes them.

    `mask` is the whole sequence's, but its Segments, if any, hold the ids of these rows.
    """
    rest, segments = masks.split_segments(mask)
    band = None if rest.segments() is not None else rest.band()
    distance = queries.start - keys.start
    if band is not None and band.prefix == 0 and band.limit is None:
        if band.left is None and band.right is None:
            return mask, 0
        if queries.stride == keys.stride == 1:
            return mask, distance
        if queries.stride == keys.stride and band.left is None:
            causal = masks.Causal() if segments is None else masks.Causal() & segments
            return causal, (distance + band.right) // keys.stride
    strides = queries.stride, keys.stride
    return Placed(mask, queries.start, keys.start, *strides), 0


def is_placed(mask: masks.Mask) -> bool:
    """Returns whether a mask has a `Placed` in it, whose starts may be traced."""
    return isinstance(mask, Placed) or any(map(is_placed, getattr(mask, "masks", ())))


def visible(
    mask: masks.Mask, queries: Sequence[Range], keys: Sequence[Range]
) -> tuple[Bool[np.ndarray, "queries keys"], Bool[np.ndarray, "queries keys"]]:
    """Returns whether any query of a range may see any key of another, and whether all see all.

    The former's False and the latter's True are certain. Segments, if any, are ignored. Starts must
    be static.
    """
    rest, _ = masks.split_segments(mask)
    shape = len(queries), len(keys)
    if rest.segments() is not None:
        return np.ones(shape, bool), np.zeros(shape, bool)

    def ends(ranges):
        first = np.array([r.start for r in ranges], np.int64)
        return first, first + [r.stride * (r.length - 1) for r in ranges]

    (q_lo, q_hi), (k_lo, k_hi) = ends(queries), ends(keys)
    found = rest.tile_summary(q_lo[:, None], q_hi[:, None], k_lo[None], k_hi[None])
    return tuple(np.broadcast_to(x, shape) for x in found)


def with_segments(
    mask: masks.Mask,
    q_ids: Integer[AnyArray, "B T"],
    kv_ids: Integer[AnyArray, "B S"],
) -> masks.Mask:
    """Returns `mask` with these ids in place of its Segments'."""
    if isinstance(mask, masks.Segments):
        return masks.Segments(q_ids, kv_ids)
    if isinstance(mask, (masks.And, masks.Or)):
        operation = operator.and_ if isinstance(mask, masks.And) else operator.or_
        return functools.reduce(operation, (with_segments(m, q_ids, kv_ids) for m in mask.masks))
    return mask
