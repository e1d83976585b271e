"""Which tiles of the score matrix a kernel visits, in which order, and which of them need masking.

A kernel walks, for each *outer* tile (of queries in the forward pass, of keys in the dK/dV pass),
over the live *inner* tiles. A `Schedule` finds the inner tile and its kind from scalars alone, so
that index maps and predicates can use it:

- `interval_schedule`: live tiles of a row are one range. The range is computed from the grid's
  indices, with no table whatever the length, or, with segment ids, read from one table of ranges.
- `list_schedule`: any other mask, from compact lists of live tiles in scalar memory.

Either way the grid is as long as the longest row of live tiles where that is known ahead. A shorter
row begins with steps that do nothing, on the index of its first live tile. So not even a transfer
is issued for them, and the row's first transfers, which the pipeline issues one step ahead, run
beside the last live step of the row before; with idle steps at the end nothing would hide them.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

# Where tiles and positions are known ahead they are Python's or NumPy's, in a kernel JAX's.
Index = int | np.ndarray | jax.Array
Table = np.ndarray | jax.Array

EMPTY, PARTIAL, FULL = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class TileMask:
    """What kernels need to know of a mask. Positions of queries include the offset.

    visible(q, k, q_segments, k_segments) -> bool, elementwise with broadcasting; None where a
        stack of partial tiles stands for it.
    summary(q_lo, q_hi, k_lo, k_hi, q_segments, k_segments) -> (any, all visible), for inclusive
        bounds and (least, greatest) segment ids, on scalars.
    key_bounds(q_lo, q_hi, S) and query_bounds(k_lo, k_hi, q_first, q_last) -> (first, last) of the
        live keys or queries; last < first without any. None without a closed form.
    width: greatest distance from first to last live key of a query, plus 1; None if unbounded.
    """

    visible: Callable | None
    summary: Callable | None = None
    key_bounds: Callable | None = None
    query_bounds: Callable | None = None
    width: int | None = None


@dataclasses.dataclass(frozen=True)
class Axis:
    """One axis of the score matrix divided into tiles, the last of which may be ragged."""

    length: int
    block: int

    @property
    def tiles(self) -> int:
        """Number of tiles."""
        return -(-self.length // self.block)

    @property
    def padded(self) -> int:
        """Length of all tiles together."""
        return self.tiles * self.block

    def bounds(self, tile: Index) -> tuple[Index, Index]:
        """Returns inclusive bounds of a tile's real elements."""
        low = tile * self.block
        high = low + (self.block - 1)
        if self.length % self.block:
            high = _module(high).minimum(high, self.length - 1)
        return low, high


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The walk of a kernel over tiles.

    steps: extent of the grid's innermost axis.
    tables: arrays for scalar memory, by name.
    lookup(batch, outer, step, tables) -> (inner tile, kind), the tile clamped to the live ones.
    sub_kind(batch, q_lo, q_hi, k_lo, k_hi, tables) -> (any, all visible) of any part of a partial
        tile in indices of the arrays, or None where only whole tiles are known.
    kinds: the kinds that occur at all, so that a kernel can leave out branches which never run.
    place(q_row, k_row, tables) -> the positions of a tile's first query and key.
    stacked(batch, outer, step, tables) -> place in the stack of partial tiles, if there is one.
    strides: distances of the positions of neighboring queries, and keys, of a tile.
    """

    steps: int
    tables: Mapping[str, jax.Array]
    lookup: Callable
    sub_kind: Callable | None
    kinds: frozenset[int]
    place: Callable
    stacked: Callable | None = None
    strides: tuple[int, int] = (1, 1)


def _module(*values):
    return jnp if any(isinstance(value, jax.Array) for value in values) else np


def divide(x: Index, y: int) -> Index:
    """Returns max(x, 0) // y; in a kernel without `//`, whose care for signs asks for the TPU."""
    x = _module(x).maximum(x, 0)
    return x // y if _module(x) is np else jax.lax.div(x, jnp.asarray(y, x.dtype))


def _offset(offset: int | Int[Array, ""]) -> tuple[dict, Callable]:
    """Returns the offset's table (none if it is known) and a function that reads it."""
    if isinstance(offset, (int, np.integer)):
        return {}, lambda tables: int(offset)
    return {"offset": jnp.asarray(offset, jnp.int32).reshape(1)}, lambda tables: tables["offset"][0]


def _shifted_place(position: Callable) -> Callable:
    """Returns a schedule's `place` where every query's position is its row plus one offset."""
    return lambda q_row, k_row, tables: (q_row + position(tables), k_row)


def interval_schedule(
    mask: TileMask,
    queries: Axis,
    keys: Axis,
    offset: int | Int[Array, ""],
    *,
    outer: str,
    segments: tuple[
        Int[Table, "B q_tiles"],
        Int[Table, "B q_tiles"],
        Int[Table, "B k_tiles"],
        Int[Table, "B k_tiles"],
    ]
    | None = None,
    kinds: Int[Table, "B q_tiles k_tiles"] | None = None,
) -> Schedule:
    """Returns the schedule of a mask whose live tiles are one range per outer tile.

    Args:
      outer: "queries" or "keys".
      segments: with segment ids, (q_min, q_max, k_min, k_max) per tile.
      kinds: with segment ids, the kinds of all tiles, from which each row's range is taken; dead
        tiles inside of a range are skipped but fetched.
    """
    # The axes that the grid and a row of it go along, and the tables of what is not known ahead.
    tables, position = _offset(offset)
    along, across = (queries, keys) if outer == "queries" else (keys, queries)
    if segments is not None:
        live = (kinds if outer == "queries" else kinds.swapaxes(1, 2)) != EMPTY
        first = jnp.argmax(live, axis=-1)
        last = jnp.where(live.any(-1), across.tiles - 1 - jnp.argmax(live[..., ::-1], axis=-1), -1)
        names = ("first", "last", "q_min", "q_max", "k_min", "k_max")
        values = (first, last, *segments)
        tables |= {n: jnp.asarray(x, jnp.int32).ravel() for n, x in zip(names, values, strict=True)}

    def extent(batch, tile, shift, tables):
        """First and last inner tile of an outer one; last < first without any."""
        if segments is not None:
            row = batch * along.tiles + tile
            return tables["first"][row], tables["last"][row]
        low, high = along.bounds(tile)
        if outer == "queries":
            first, last = mask.key_bounds(low + shift, high + shift, keys.length)
        else:
            first, last = mask.query_bounds(low, high, shift, shift + (queries.length - 1))
            first, last = first - shift, last - shift
        # An empty range, which may end anywhere below its beginning, stays empty.
        return divide(first, across.block), divide(last + across.block, across.block) - 1

    def sub_kind(batch, q_lo, q_hi, k_lo, k_hi, tables):
        shift = position(tables)
        q_ids = k_ids = None
        if segments is not None:
            q_row = batch * queries.tiles + divide(q_lo, queries.block)
            k_row = batch * keys.tiles + divide(k_lo, keys.block)
            q_ids = tables["q_min"][q_row], tables["q_max"][q_row]
            k_ids = tables["k_min"][k_row], tables["k_max"][k_row]
        q_end, k_end = (
            (_module(high).minimum(high, axis.length - 1) if axis.length % axis.block else high)
            for axis, high in ((queries, q_hi), (keys, k_hi))
        )
        seen, whole = mask.summary(q_lo + shift, q_end + shift, k_lo, k_end, q_ids, k_ids)
        if keys.length % keys.block:
            seen, whole = seen & (k_lo < keys.length), whole & (k_hi < keys.length)
        return seen, whole

    def kind(batch, tile, inner, tables):
        q_tile, k_tile = (tile, inner) if outer == "queries" else (inner, tile)
        q_lo, k_lo = q_tile * queries.block, k_tile * keys.block
        ends = q_lo + (queries.block - 1), k_lo + (keys.block - 1)
        return sub_kind(batch, q_lo, ends[0], k_lo, ends[1], tables)

    def lookup(batch, tile, step, tables):
        first, last = extent(batch, tile, position(tables), tables)
        last = jnp.minimum(last, across.tiles - 1)
        inner = last - (steps - 1 - step)
        live = inner >= first
        inner = jnp.minimum(jnp.maximum(inner, first), across.tiles - 1)
        seen, whole = kind(batch, tile, inner, tables)
        return inner, jnp.where(live & seen, jnp.where(whole, FULL, PARTIAL), EMPTY)

    # The longest row bounds the grid; known ahead, the rows also tell which kinds occur.
    steps, occurring = across.tiles, frozenset({EMPTY, PARTIAL, FULL})
    if mask.width is not None:
        steps = min(steps, (along.block + mask.width - 2) // across.block + 2)
    if segments is None and not tables:
        rows = np.arange(along.tiles)
        first, last = (np.broadcast_to(x, rows.shape) for x in extent(0, rows, position({}), {}))
        counts = np.minimum(last, across.tiles - 1) - np.maximum(first, 0) + 1
        steps = max(int(counts.max()), 1)
        if along.tiles * across.tiles <= 1 << 22:
            seen, whole = kind(0, rows[:, None], np.arange(across.tiles)[None, :], {})
            seen, whole = (np.broadcast_to(x, (along.tiles, across.tiles)) for x in (seen, whole))
            found = ((FULL, np.any(seen & whole)), (PARTIAL, np.any(seen & ~whole)))
            occurring = frozenset(kind for kind, present in found if present)
            # Ranges are exact, hence dead steps stand only at the beginning of a short row.
            occurring |= {EMPTY} if np.any(counts < steps) else frozenset()
    return Schedule(steps, tables, lookup, sub_kind, occurring, _shifted_place(position))


def list_schedule(
    kinds: Int[Table, "M q_tiles k_tiles"],
    offset: int | Int[Array, ""],
    *,
    outer: str,
    stack_index: Int[np.ndarray, "q_tiles k_tiles"] | None = None,
    most: int | None = None,
) -> Schedule:
    """Returns the schedule of any mask, from the kinds of all tiles, int8; M is 1 or B.

    The tables: `counts`, live tiles per row, and `entries`, per live tile 4 * inner + kind. With
    kinds known ahead (numpy) a row is as long as the longest row of live tiles, with traced ones
    as long as the axis, or as `most`, more live tiles than which no row may have.
    stack_index, the place of a partial tile in a stack of distinct ones, becomes a table `stack`
    parallel to `entries`.
    """
    if outer == "keys":
        kinds = kinds.swapaxes(1, 2)
    xp = _module(kinds)
    batches, rows, width = kinds.shape
    live = kinds != EMPTY
    counts = live.sum(-1)
    steps = max(int(counts.max()), 1) if xp is np else min(width, most or width)
    # A stable sort by "dead" puts the live tiles first, in ascending order.
    order = xp.argsort(~live, axis=-1, stable=True)[..., :steps]
    entries = order * 4 + xp.take_along_axis(kinds.astype(np.int32), order, axis=-1)
    tables, position = _offset(offset)
    named = {"counts": counts, "entries": entries}
    if stack_index is not None:
        index = stack_index if outer == "queries" else stack_index.T
        index = xp.broadcast_to(xp.asarray(index), kinds.shape)
        named["stack"] = xp.take_along_axis(index, order, axis=-1)
    tables |= {name: jnp.asarray(x, jnp.int32).ravel() for name, x in named.items()}

    def place(batch, tile, step, tables):
        row = batch * rows + tile if batches > 1 else tile
        place = step - (steps - tables["counts"][row])
        return row * steps + jnp.maximum(place, 0), place >= 0

    def lookup(batch, tile, step, tables):
        at, live = place(batch, tile, step, tables)
        entry = tables["entries"][at]
        return entry >> 2, jnp.where(live, entry & 3, EMPTY)

    def stacked(batch, tile, step, tables):
        return tables["stack"][place(batch, tile, step, tables)[0]]

    occurring = frozenset({EMPTY, PARTIAL, FULL})
    if xp is np:
        occurring = frozenset(int(kind) for kind in np.unique(kinds[live]))
        occurring |= {EMPTY} if np.any(counts < steps) else frozenset()
    return Schedule(
        steps,
        tables,
        lookup,
        None,
        occurring,
        _shifted_place(position),
        None if stack_index is None else stacked,
    )


def table_bytes(schedule: Schedule) -> int:
    """Returns the bytes of scalar memory that a schedule's tables take."""
    return sum(4 * table.size for table in schedule.tables.values())
