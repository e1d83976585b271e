"""A mask of a part of the score matrix: rows and columns that stand elsewhere, or apart.

A device of a split sequence holds some queries and, at a time, some keys. `Placed` asks the whole
sequence's mask about them; `place` does the same by moving q_offset wherever that is enough, which
kernels prefer.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from typing import NamedTuple

import jax
import numpy as np

from tilescan.ops import masks


class Stretch(NamedTuple):
    """Positions start, start + stride, ..., `length` of them, from row `row` of a device on.

    start may be traced.
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

    def segments(self):
        return self.mask.segments()

    def visible(self, q_index, k_index, q_segments=None, k_segments=None):
        return self.mask.visible(
            self.q_start + self.q_stride * q_index,
            self.k_start + self.k_stride * k_index,
            q_segments,
            k_segments,
        )

    def tile_summary(self, q_lo, q_hi, k_lo, k_hi, q_segments=None, k_segments=None):
        q_lo, q_hi = (self.q_start + self.q_stride * x for x in (q_lo, q_hi))
        k_lo, k_hi = (self.k_start + self.k_stride * x for x in (k_lo, k_hi))
        return self.mask.tile_summary(q_lo, q_hi, k_lo, k_hi, q_segments, k_segments)


def place(mask: masks.Mask, queries: Stretch, keys: Stretch) -> tuple[masks.Mask, int | jax.Array]:
    """(mask, q_offset) for these queries and keys, as `ops.attention` takes them.

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
    """Whether a mask holds a `Placed`, whose starts may be known only when the program runs."""
    return isinstance(mask, Placed) or any(map(is_placed, getattr(mask, "masks", ())))


def visible(mask: masks.Mask, queries: list[Stretch], keys: list[Stretch]):
    """Two of bool [queries, keys]: whether any of one may see any of another, whether all do.

    The former's False and the latter's True are certain. Segments, if any, are left out. Starts
    must be static.
    """
    rest, _ = masks.split_segments(mask)
    shape = len(queries), len(keys)
    if rest.segments() is not None:
        return np.ones(shape, bool), np.zeros(shape, bool)

    def ends(stretches):
        first = np.array([s.start for s in stretches], np.int64)
        return first, first + [s.stride * (s.length - 1) for s in stretches]

    (q_lo, q_hi), (k_lo, k_hi) = ends(queries), ends(keys)
    found = rest.tile_summary(q_lo[:, None], q_hi[:, None], k_lo[None], k_hi[None])
    return tuple(np.broadcast_to(x, shape) for x in found)


def with_segments(mask: masks.Mask, q_ids, kv_ids) -> masks.Mask:
    """`mask` with these ids in place of its Segments' own."""
    if isinstance(mask, masks.Segments):
        return masks.Segments(q_ids, kv_ids)
    if isinstance(mask, (masks.And, masks.Or)):
        operation = operator.and_ if isinstance(mask, masks.And) else operator.or_
        return functools.reduce(operation, (with_segments(m, q_ids, kv_ids) for m in mask.masks))
    return mask
