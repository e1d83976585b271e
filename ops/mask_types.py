"""The kinds of mask. Import them from `ops.masks`, which explains them.

Dimensions: B batch, T query time, S key time.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from typing import Any

import jax
import numpy as np
from jaxtyping import Integer

from tilescan.ops.arrays import AnyArray
from tilescan.ops.mask_bands import Band, Index, Visible, array_module

# Segment ids of queries or keys, and (least, greatest) of those of tiles; None without Segments.
SegmentIds = Index | None
SegmentBounds = tuple[Index, Index] | None


class Mask:
    """The base of all masks. A new mask defines `visible` and `tile_summary`, or just `band`."""

    __array_ufunc__ = None  # NumPy arrays must not apply `array & mask` to each element

    def __bool__(self) -> bool:
        """Refuses `a and b` and `not a`, which would drop a mask without a word.

        Raises:
          TypeError: always.
        """
        raise TypeError(
            f"{type(self).__name__} has no truth value; masks compose with & and |, not with "
            "`and`, `or` and `not`"
        )

    def __call__(self, q_index: Index, k_index: Index, *, q_offset: Index = 0) -> Visible:
        """Returns whether query i sees key j, elementwise with broadcasting.

        Args:
          q_index, k_index: integers or integer arrays, positions of queries and keys.
          q_offset: position of the first query; used to find a query's segment id.

        Returns:
          bool, of the broadcast shape; with Segments in the mask, [B, *that shape].
        """
        if array_module(q_index, k_index) is np:
            q_index, k_index = np.asarray(q_index), np.asarray(k_index)
        q_segments = k_segments = None
        segments = self.segments()
        if segments is not None:
            q_ids, k_ids = segments.q_ids, segments.q_ids
            if segments.kv_ids is not None:
                k_ids = segments.kv_ids
            xp = array_module(q_index, k_index, q_ids, k_ids, q_offset)
            rank = max(q_index.ndim, k_index.ndim)
            q_index, k_index = _with_rank(q_index, rank), _with_rank(k_index, rank)
            q_segments = xp.take(q_ids, q_index - q_offset, axis=1)
            k_segments = xp.take(k_ids, k_index, axis=1)
            q_index, k_index = q_index[None], k_index[None]
        seen = self.visible(q_index, k_index, q_segments, k_segments)
        shape = np.broadcast_shapes(np.shape(q_index), np.shape(k_index))
        if segments is not None:
            shape = np.broadcast_shapes(shape, np.shape(q_segments), np.shape(k_segments))
        return array_module(seen).broadcast_to(seen, shape)

    def visible(
        self,
        q_index: Index,
        k_index: Index,
        q_segments: SegmentIds = None,
        k_segments: SegmentIds = None,
    ) -> Visible:
        """Returns `mask(q_index, k_index)` without a gather, for kernels.

        q_segments and k_segments are the segment ids of these queries and keys, broadcastable
        against the indices, and needed only with Segments in the mask. The result has a shape that
        broadcasts to that of all arguments.
        """
        del q_segments, k_segments
        return self.band().visible(q_index, k_index)

    def tile_summary(
        self,
        q_lo: Index,
        q_hi: Index,
        k_lo: Index,
        k_hi: Index,
        q_segments: SegmentBounds = None,
        k_segments: SegmentBounds = None,
    ) -> tuple[Visible, Visible]:
        """Returns whether any, and whether all, pairs of a tile are visible.

        Args:
          q_lo, q_hi, k_lo, k_hi: inclusive bounds of tiles, broadcasting integers or arrays.
          q_segments, k_segments: pairs (least, greatest) of the tiles' segment ids, as
            `segment_bounds` gives them; needed only with Segments in the mask.

        Returns:
          (any_visible, all_visible), bool. Exact for all masks but Segments and those compositions
          which have no band; there a live tile is never reported empty, nor a partial one full.
        """
        del q_segments, k_segments
        return self.band().tile_summary(q_lo, q_hi, k_lo, k_hi)

    def band(self) -> Band | None:
        """Returns the mask as one range of keys per query, if it is one."""
        return None

    def key_bounds(self, q_lo: Index, q_hi: Index, S: Index) -> tuple[Index, Index] | None:
        """Returns first and last live key of queries q_lo..q_hi, inclusive; None if unknown.

        Only for masks whose live keys are one range (`band`), and then exact: all keys in it are
        seen by some query of the tile. last < first if there are none.
        """
        band = self.band()
        return None if band is None else band.key_bounds(q_lo, q_hi, S)

    def query_bounds(
        self, k_lo: Index, k_hi: Index, q_first: Index, q_last: Index
    ) -> tuple[Index, Index] | None:
        """Returns first and last of queries q_first..q_last that see a key in k_lo..k_hi."""
        band = self.band()
        return None if band is None else band.query_bounds(k_lo, k_hi, q_first, q_last)

    def segments(self) -> Segments | None:
        """Returns the Segments in this mask, if any; ValueError if there are two different ones."""
        return None

    def __and__(self, other):
        if not isinstance(other, Mask):
            return NotImplemented
        if isinstance(self, Full) or isinstance(other, Full):
            return other if isinstance(self, Full) else self
        return And(flatten(And, self) + flatten(And, other))

    def __or__(self, other):
        if not isinstance(other, Mask):
            return NotImplemented
        if isinstance(self, Full) or isinstance(other, Full):
            return Full()
        return Or(flatten(Or, self) + flatten(Or, other))


def flatten(kind: type[Composed], mask: Mask) -> tuple[Mask, ...]:
    """Returns the operands of a mask composed by `kind` (And or Or), or any other mask itself."""
    return mask.masks if isinstance(mask, kind) else (mask,)


def _with_rank(x, rank: int):
    return x.reshape((1,) * (rank - np.ndim(x)) + np.shape(x)) if np.ndim(x) < rank else x


def _fold(operation, values):
    """Combines arrays of different rank without implicit rank promotion."""
    rank = max(np.ndim(v) for v in values)
    return functools.reduce(operation, (_with_rank(v, rank) for v in values))


def check_int(where: str, name: str, value: Any, least: int, or_none: bool = False) -> None:
    """Checks an integer of at least `least`, or None where `or_none`.

    Raises:
      TypeError: not an integer.
      ValueError: an integer below `least`.
    """
    if value is None and or_none:
        return
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        also = " or None" if or_none else ""
        raise TypeError(f"{where}: {name}={value!r} must be an integer{also}")
    if value < least:
        also = ", or None for no bound" if or_none else ""
        raise ValueError(f"{where}: {name}={value} must be at least {least}{also}")


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Full(Mask):
    """Every query sees every key."""

    def band(self) -> Band:
        """Returns the mask as one range of keys per query."""
        return Band()


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Causal(Mask):
    """Query i sees the keys j <= i."""

    def band(self) -> Band:
        """Returns the mask as one range of keys per query."""
        return Band(right=0)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class SlidingWindow(Mask):
    """Query i sees the keys i-left <= j <= i+right; None is no bound on that side.

    A causal window of w keys, the query's own included, is SlidingWindow(w - 1).
    """

    left: int | None
    right: int | None = 0

    def __post_init__(self):
        check_int("SlidingWindow", "left", self.left, 0, or_none=True)
        check_int("SlidingWindow", "right", self.right, 0, or_none=True)

    def band(self) -> Band:
        """Returns the mask as one range of keys per query."""
        return Band(left=self.left, right=self.right)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Prefix(Mask):
    """Every query sees the keys j < n. A prefix language model is Causal() | Prefix(n)."""

    n: int

    def __post_init__(self):
        check_int("Prefix", "n", self.n, 0)

    def band(self) -> Band:
        """Returns the mask as one range of keys per query."""
        return Band(limit=self.n)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Lambda(Mask):
    """Causal, and only the first `sinks` keys and the latest `window` keys (own one included)."""

    sinks: int
    window: int

    def __post_init__(self):
        check_int("Lambda", "sinks", self.sinks, 0)
        check_int("Lambda", "window", self.window, 1)

    def visible(
        self,
        q_index: Index,
        k_index: Index,
        q_segments: SegmentIds = None,
        k_segments: SegmentIds = None,
    ) -> Visible:
        """Returns whether query i sees key j, as `Mask.visible`."""
        near_or_sink = (k_index > q_index - self.window) | (k_index < self.sinks)
        return (k_index <= q_index) & near_or_sink

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
        near = k_hi > q_lo - self.window
        any_visible = (k_lo <= q_hi) & (near | (k_lo < self.sinks))
        # Of the keys after the sinks, the first is the farthest from the last query.
        first = array_module(k_lo).maximum(k_lo, self.sinks)
        all_visible = (k_hi <= q_lo) & ((k_hi < self.sinks) | (first > q_hi - self.window))
        return any_visible, all_visible


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class BlockSparse(Mask):
    """Query i sees key j iff layout[i // block, j // block].

    Attributes:
      layout: bool numpy array, blocks of query positions by blocks of keys. For T queries at the
        same positions as S = T keys: [ceil(T/block), ceil(S/block)]. Rows follow the position of a
        query, as in all other masks, so one layout of a whole sequence also serves a single query
        that decodes at an offset. Positions outside the layout see nothing.
      block: length of a block in both directions.

    `visible` gathers from the layout, which a kernel can't: see `within_live_tiles`.
    """

    layout: np.ndarray
    block: int

    def __post_init__(self):
        check_int("BlockSparse", "block", self.block, 1)
        if isinstance(self.layout, jax.core.Tracer):
            raise TypeError("BlockSparse: layout is traced; it must be a static numpy array")
        layout = np.array(self.layout)
        if layout.dtype != np.bool_ or layout.ndim != 2 or layout.size == 0:
            raise ValueError(
                f"BlockSparse: layout is {layout.dtype}{list(layout.shape)}; it must be "
                "bool [ceil(T/block), ceil(S/block)]"
            )
        layout.setflags(write=False)
        object.__setattr__(self, "layout", layout)

    @functools.cached_property
    def _key(self):
        return self.layout.shape, self.layout.tobytes(), int(self.block)

    @functools.cached_property
    def _hash(self):
        return hash(self._key)

    @functools.cached_property
    def _counts(self):
        """counts[r, c], the number of live blocks above row r and left of column c."""
        return np.pad(self.layout, ((1, 0), (1, 0))).cumsum(0, np.int32).cumsum(1, np.int32)

    def __eq__(self, other):
        return isinstance(other, BlockSparse) and self._key == other._key

    def __hash__(self):
        return self._hash

    def __repr__(self):
        rows, columns = self.layout.shape
        live = int(self.layout.sum())
        return f"BlockSparse({live} live of {rows}x{columns} blocks, block={self.block})"

    def visible(
        self,
        q_index: Index,
        k_index: Index,
        q_segments: SegmentIds = None,
        k_segments: SegmentIds = None,
    ) -> Visible:
        """Returns whether query i sees key j, as `Mask.visible`."""
        xp = array_module(q_index, k_index)
        rows, columns = self.layout.shape
        r, c = q_index // self.block, k_index // self.block
        inside = (r >= 0) & (r < rows) & (c >= 0) & (c < columns)
        layout = xp.asarray(self.layout)
        return inside & layout[xp.clip(r, 0, rows - 1), xp.clip(c, 0, columns - 1)]

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
        xp = array_module(q_lo, q_hi, k_lo, k_hi)
        (r0, r1, rows_inside), (c0, c1, columns_inside) = (
            (xp.clip(lo // b, 0, n), xp.clip(hi // b + 1, 0, n), (lo >= 0) & (hi // b < n))
            for lo, hi, b, n in zip(
                (q_lo, k_lo), (q_hi, k_hi), (self.block,) * 2, self.layout.shape, strict=True
            )
        )
        counts = xp.asarray(self._counts)
        live = counts[r1, c1] - counts[r0, c1] - counts[r1, c0] + counts[r0, c0]
        return live > 0, rows_inside & columns_inside & (live == (r1 - r0) * (c1 - c0))


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("q_ids", "kv_ids"), meta_fields=()
)
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Segments(Mask):
    """Equal segment ids see each other: packed documents, or padding.

    Attributes:
      q_ids: integers [B, T], by row of the queries.
      kv_ids: integers [B, S], None for self-attention (then S = T and q_ids serve both).

    Tiles are judged by their least and greatest ids: empty if the ranges don't meet, full if both
    are one and the same id. That is exact for ids that rise along the sequence without gaps.
    """

    # Arrays, or whatever a tree of arrays is mapped to; `validate` checks them.
    q_ids: Any
    kv_ids: Any = None

    def __eq__(self, other):
        same = isinstance(other, Segments)
        return same and self.q_ids is other.q_ids and self.kv_ids is other.kv_ids

    __hash__ = None

    def __repr__(self):
        def show(x):
            return f"{x.dtype}{list(x.shape)}" if hasattr(x, "dtype") else repr(x)

        return f"Segments(q_ids={show(self.q_ids)}, kv_ids={show(self.kv_ids)})"

    def segments(self) -> Segments:
        """Returns this mask."""
        return self

    def both(self, T: int, S: int) -> tuple[Integer[AnyArray, "B {T}"], Integer[AnyArray, "B {S}"]]:
        """Returns the ids of queries and of keys; ValueError if their lengths are not T and S."""
        kv_ids = self.kv_ids
        if kv_ids is None:
            if T != S:
                raise ValueError(
                    f"Segments: kv_ids is needed, since T={T} queries and S={S} keys differ"
                )
            kv_ids = self.q_ids
        for name, ids, letter, length in (
            ("q_ids", self.q_ids, "T", T),
            ("kv_ids", kv_ids, "S", S),
        ):
            if np.ndim(ids) != 2 or np.shape(ids)[1] != length:
                raise ValueError(
                    f"Segments: {name} has shape {list(np.shape(ids))}; it must be [B, {letter}] "
                    f"= [B, {length}]"
                )
        return self.q_ids, kv_ids

    def visible(
        self,
        q_index: Index,
        k_index: Index,
        q_segments: SegmentIds = None,
        k_segments: SegmentIds = None,
    ) -> Visible:
        """Returns whether query i sees key j, as `Mask.visible`."""
        _need_segments("visible", q_segments, k_segments)
        return q_segments == k_segments

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
        _need_segments("tile_summary", q_segments, k_segments)
        (q_min, q_max), (k_min, k_max) = q_segments, k_segments
        return (q_min <= k_max) & (k_min <= q_max), (q_min == k_max) & (k_min == q_max)


def _need_segments(method, q_segments, k_segments):
    if q_segments is None or k_segments is None:
        raise ValueError(
            f"{method}: q_segments and k_segments are needed, since the mask holds Segments"
        )


@dataclasses.dataclass(frozen=True, repr=False)
class Composed(Mask):
    """Masks combined by an operation; see `And` and `Or`."""

    masks: tuple[Mask, ...]

    def __repr__(self):
        def show(m):
            return f"({m!r})" if isinstance(m, Composed) else repr(m)

        return f" {self._sign} ".join(map(show, self.masks))

    def segments(self) -> Segments | None:
        """Returns the Segments in these masks; ValueError if there are two different ones."""
        found = [s for s in (m.segments() for m in self.masks) if s is not None]
        if any(s != found[0] for s in found[1:]):
            raise ValueError(
                "a mask can hold one Segments only: write (a | b) & Segments(ids), or combine the "
                "ids into one array"
            )
        return found[0] if found else None

    def band(self) -> Band | None:
        """Returns the mask as one range of keys per query, if it is one."""
        bands = [m.band() for m in self.masks]
        result = bands[0]
        for other in bands[1:]:
            if result is None or other is None:
                return None
            result = self._operation(result, other)
        return result

    def visible(
        self,
        q_index: Index,
        k_index: Index,
        q_segments: SegmentIds = None,
        k_segments: SegmentIds = None,
    ) -> Visible:
        """Returns whether query i sees key j, as `Mask.visible`."""
        found = [m.visible(q_index, k_index, q_segments, k_segments) for m in self.masks]
        return _fold(self._operation, found)

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
        band = self.band()
        if band is not None:
            return band.tile_summary(q_lo, q_hi, k_lo, k_hi)
        found = [m.tile_summary(q_lo, q_hi, k_lo, k_hi, q_segments, k_segments) for m in self.masks]
        any_visible, all_visible = zip(*found, strict=True)
        return _fold(self._operation, any_visible), _fold(self._operation, all_visible)


class And(Composed):
    """A query sees the keys that it sees in all of `masks`; written `a & b`."""

    _sign = "&"
    _operation = staticmethod(operator.and_)


class Or(Composed):
    """A query sees the keys that it sees in any of `masks`; written `a | b`."""

    _sign = "|"
    _operation = staticmethod(operator.or_)


for _kind in (And, Or):
    jax.tree_util.register_pytree_node(
        _kind, lambda m: (m.masks, None), lambda _, masks, kind=_kind: kind(tuple(masks))
    )
