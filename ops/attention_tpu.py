"""Attention on TPUs: translates `ops.attention`'s arguments to pallas_kernels.tpu.flash_attention.

Decided here: heads before time, padding to tiles, which tiles, how a mask becomes a walk over them,
and what the kernels can't do. A walk is one of three:

- masks whose live keys are one range (`mask.band()`): computed from the grid's indices;
- with Segments: the same, with the ranges of live tiles in a table of two integers per tile row;
- others (Lambda, BlockSparse, holes in general): lists of live tiles in scalar memory.

Dimensions: B batch, T query time, S key time, H heads, G key-value heads, D head dim, P value dim.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from tilescan.ops import attention_xla, masks
from tilescan.ops.attention_operands import Offset, backward_operands, forward_operands
from tilescan.pallas_kernels import tiles
from tilescan.pallas_kernels.dropout import Dropout
from tilescan.pallas_kernels.tpu import flash_attention as kernels
from tilescan.pallas_kernels.tpu.block_sizes import tile_for

# Scalar memory is 1 MiB on all generations supported; the compiler reserves some of it.
TABLE_LIMIT = 768 * 2**10
# Distinct partial tiles are read from HBM like a bias would be.
STACK_LIMIT = 256 * 2**20
VMEM_LIMIT = 48 * 2**20
DTYPES = (jnp.bfloat16, jnp.float32)


def unsupported(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S G D"],
    v: Float[Array, "B S G P"],
    bias: Float[Array, "#B #H #T #S"] | None,
    mask: masks.Mask,
    q_offset: Offset,
) -> str | None:
    """Returns why the kernels can't take these arguments and what would work; None if they can."""
    if q.dtype not in DTYPES:
        return f"q, k and v are {q.dtype}; bfloat16 and float32 have a kernel"
    for name, size in (("D", q.shape[3]), ("P", v.shape[3])):
        if not 16 <= size <= 256:
            return f"head dim {name}={size}; 16 to 256 have a kernel"
    try:
        for kernel in ("forward", "dq", "dkv"):
            _check_plan(kernel, q, k, v, mask, q_offset)
    except _NoKernelError as error:
        return str(error)
    return None


def no_dropout(dropout: Dropout) -> str | None:
    """Returns why the kernels can't take this dropout and what would work; None if they can."""
    limit = TABLE_LIMIT // 8  # of the same memory as a mask's tables
    if 4 * dropout.seeds.size > limit:
        return (
            f"the seeds of dropout take {4 * dropout.seeds.size} bytes of scalar memory, of which "
            f'{limit} are free; lower the batch, or use implementation="xla"'
        )
    return None


def forward(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S G D"],
    v: Float[Array, "B S G P"],
    bias: Float[Array, "#B #H #T #S"] | None,
    mask: masks.Mask,
    q_offset: Offset,
    *,
    scale: float,
    logit_cap: float | None,
    dropout: Dropout | None = None,
    interpret: Any = False,
    tile: tuple[int, int] | None = None,
) -> tuple[Float[Array, "B T H P"], Float32[Array, "B T H"]]:
    """Returns (o, lse); arguments as in `ops.attention`.

    tile: (queries, keys) of a tile, by default what suits the chip.
    """
    k, v = forward_operands(k, v, mask, bias)
    plan = plan_for("forward", q, k, v, mask, q_offset, _whole("forward", tile)).dropping(dropout)
    o, lse = kernels.forward(
        *plan.queries_first(q), *plan.keys_first(k, v),
        plan.schedule, plan.tile, plan.scores(scale, logit_cap),
        **plan.sides(bias), vmem_limit=VMEM_LIMIT, interpret=interpret,
    )  # fmt: skip
    T = q.shape[1]
    return o[:, :, :T].swapaxes(1, 2), lse[:, :, 0, :T].swapaxes(1, 2)


def backward(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S G D"],
    v: Float[Array, "B S G P"],
    bias: Float[Array, "#B #H #T #S"] | None,
    mask: masks.Mask,
    q_offset: Offset,
    o: Float[Array, "B T H P"],
    lse: Float[Array, "B T H"],
    do: Float[Array, "B T H P"],
    dlse: Float[Array, "B T H"],
    *,
    scale: float,
    logit_cap: float | None,
    dropout: Dropout | None = None,
    interpret: Any = False,
    tile: tuple[int, int] | None = None,
) -> tuple[
    Float[Array, "B T H D"],
    Float[Array, "B S G D"],
    Float[Array, "B S G P"],
    Float[Array, "#B #H #T #S"] | None,
]:
    """Returns (dq, dk, dv, dbias or None) in the dtypes of (q, k, v, bias); tile as in `forward`.

    dbias comes from the XLA implementation, which the compiler drops where dbias is not used.
    """
    # delta_i = sum_p dO_ip O_ip - dlse_i; lse in units of log 2, NO_KEYS for rows without keys.
    rest = q, k, v, o, lse, do, dlse
    q, k, v, o, lse, do, dlse = backward_operands(*rest, mask, bias)
    delta = jnp.sum(o.astype(jnp.float32) * do.astype(jnp.float32), axis=-1) - dlse
    lse = jnp.where(jnp.isneginf(lse), kernels.NO_KEYS, lse * math.log2(math.e))

    # Two kernels: dQ walks by queries, dK and dV by keys.
    gradients = []
    for name, kernel in (("dq", kernels.backward_dq), ("dkv", kernels.backward_dkv)):
        plan = plan_for(name, q, k, v, mask, q_offset, _whole(name, tile)).dropping(dropout)
        (q_,), (k_, v_), (do_,) = (
            plan.queries_first(q),
            plan.keys_first(k, v),
            plan.queries_first(do),
        )
        # Padded rows have all weights 0, as rows without keys have.
        rows = [
            plan.pad(x.swapaxes(1, 2)[:, :, None], 3, plan.queries, fill)
            for x, fill in ((lse, kernels.NO_KEYS), (delta, 0.0))
        ]
        gradients += jax.tree.leaves(
            kernel(
                q_, k_, v_, do_, *rows, plan.schedule, plan.tile, plan.scores(scale, logit_cap),
                **plan.sides(bias), vmem_limit=VMEM_LIMIT, interpret=interpret,
            )
        )  # fmt: skip

    # Without padding, time before heads.
    lengths = (q.shape[1], k.shape[1], k.shape[1])
    dq, dk, dv = (
        x[:, :, :length].swapaxes(1, 2) for x, length in zip(gradients, lengths, strict=True)
    )
    dbias = None
    if bias is not None:
        residuals = (q, k, v, bias, mask, q_offset, o, _natural(lse), do, dlse)
        options = dict(scale=scale, logit_cap=logit_cap, dropout=dropout)
        dbias = attention_xla.backward(*residuals, **options)[3]
    return dq, dk, dv, dbias


def _natural(lse):
    """Returns the log-sum-exp in natural units again, the inverse of what `backward` does to it."""
    return jnp.where(lse == kernels.NO_KEYS, -jnp.inf, lse * math.log(2))


def _whole(kernel, tile):
    """Returns a kernel's tile of these sides whose inner axis is computed in one step, or None."""
    return tile and kernels.Tile(*tile, tile[0] if kernel == "dkv" else tile[1])


class _NoKernelError(ValueError):
    """A mask for which there is no walk; the message says what would work."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How one kernel walks one problem.

    Attributes:
      queries, keys: the two axes of the score matrix, in tiles.
      compute: queries or keys of a tile that are computed at a time.
      mask: evaluated inside partial tiles.
      schedule: which tiles are visited, and in which order.
      segments: ids of queries and keys, or None.
      stack: distinct partial tiles of a mask that the kernel can't evaluate, or None.
      dropout: rate of dropout.
    """

    queries: tiles.Axis
    keys: tiles.Axis
    compute: int
    mask: tiles.TileMask
    schedule: tiles.Schedule
    segments: tuple[Any, Any] | None
    stack: np.ndarray | None
    dropout: float = 0.0

    def dropping(self, dropout: Dropout | None) -> "Plan":
        """Returns the plan with this dropout."""
        if dropout is None:
            return self
        tables = dict(self.schedule.tables, dropout=dropout.seeds.reshape(-1))
        schedule = dataclasses.replace(self.schedule, tables=tables)
        return dataclasses.replace(self, schedule=schedule, dropout=dropout.rate)

    @property
    def tile(self) -> kernels.Tile:
        """The kernel's tile."""
        return kernels.Tile(self.queries.block, self.keys.block, self.compute)

    def scores(self, scale: float, logit_cap: float | None) -> kernels.Scores:
        """Returns how the kernels compute weights from products of queries and keys."""
        return kernels.Scores(scale, logit_cap, self.keys.length, self.mask, self.dropout)

    def pad(self, x: jax.Array, axis: int, length: tiles.Axis, fill: float = 0) -> jax.Array:
        """Returns x with an axis padded to whole tiles."""
        if length.padded == x.shape[axis]:
            return x
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, length.padded - x.shape[axis])
        return jnp.pad(x, widths, constant_values=fill)

    def queries_first(self, *arrays: Float[Array, "B T H _"]) -> list[Float[Array, "B H _ _"]]:
        """Returns arrays of queries with heads before time, padded."""
        return [self.pad(x.swapaxes(1, 2), 2, self.queries) for x in arrays]

    def keys_first(self, *arrays: Float[Array, "B S G _"]) -> list[Float[Array, "B G _ _"]]:
        """Returns arrays of keys with heads before time, padded."""
        return [self.pad(x.swapaxes(1, 2), 2, self.keys) for x in arrays]

    def sides(self, bias: Float[Array, "#B #H #T #S"] | None) -> dict[str, Any]:
        """Returns optional inputs of the kernels, padded."""
        if bias is not None:
            for axis, length in ((2, self.queries), (3, self.keys)):
                if bias.shape[axis] > 1:
                    bias = self.pad(bias, axis, length)
        segments = None
        if self.segments is not None:
            lengths = (self.queries, self.keys)
            segments = tuple(
                self.pad(jnp.asarray(ids, jnp.int32), 1, length)
                for ids, length in zip(self.segments, lengths, strict=True)
            )
        stack = None if self.stack is None else jnp.asarray(self.stack)
        return {"bias": bias, "segments": segments, "stack": stack}


def _fit(length: int, block: int, least: int, divides: int | None = None) -> int:
    """Returns a block near `block`, a multiple of `least`, that pads few elements of an axis."""
    if divides is not None:
        return max(b for b in range(least, min(block, divides) + 1, least) if divides % b == 0)
    block = -(-length // max(-(-length // block), 1))
    return -(-block // least) * least


def _compute(block: int, wanted: int) -> int:
    """Returns the largest divisor of a block, in whole vectors, up to `wanted`."""
    if block % kernels.LANES:
        return block
    sizes = range(kernels.LANES, block + 1, kernels.LANES)
    return max(size for size in sizes if block % size == 0 and size <= max(wanted, kernels.LANES))


def _axes(kernel, q, k, v, mask, tile=None):
    """Returns the two axes of a kernel and its compute step."""
    T, S = q.shape[1], k.shape[1]
    tile = tile or tile_for(kernel, max(q.shape[3], v.shape[3]), q.dtype.itemsize, _near(mask))
    # Tiles that lie within the blocks of a layout need no masking; not worth it for small blocks.
    blocks = [m.block for m in leaves(mask) if isinstance(m, masks.BlockSparse)]
    within = math.gcd(*blocks) if blocks else None
    if within is not None and (within < 256 or within % kernels.LANES):
        within = None
    short = T <= kernels.LANES and kernel != "dkv" and within is None
    queries = tiles.Axis(T, _fit(T, tile.queries, 16 if short else kernels.LANES, within))
    keys = tiles.Axis(S, _fit(S, tile.keys, kernels.LANES, within))
    return queries, keys, _compute((queries if kernel == "dkv" else keys).block, tile.compute)


def leaves(mask: masks.Mask) -> list[masks.Mask]:
    """Returns the masks that a mask is composed of."""
    operands = getattr(mask, "masks", None)
    return [mask] if operands is None else [leaf for m in operands for leaf in leaves(m)]


def tile_dividing(
    kernel: str,
    queries: int,
    keys: int,
    head_dim: int,
    dtype: jax.typing.DTypeLike,
    mask: masks.Mask,
) -> kernels.Tile:
    """Returns a tile whose sides divide numbers of queries and keys, multiples of LANES."""
    tile = tile_for(kernel, head_dim, jnp.dtype(dtype).itemsize, _near(mask))
    sides = (
        _fit(queries, tile.queries, kernels.LANES, queries),
        _fit(keys, tile.keys, kernels.LANES, keys),
    )
    return kernels.Tile(*sides, _compute(sides[0 if kernel == "dkv" else 1], tile.compute))


def plan_for(
    kernel: str,
    q: Float[Array | jax.ShapeDtypeStruct, "B T H D"],
    k: Float[Array | jax.ShapeDtypeStruct, "B S G D"],
    v: Float[Array | jax.ShapeDtypeStruct, "B S G P"],
    mask: masks.Mask,
    q_offset: Offset,
    tile: kernels.Tile | None = None,
) -> Plan:
    """Returns the plan of "forward", "dq" or "dkv" for these arguments.

    tile: replaces that of the table of block sizes.
    """
    queries, keys, compute = _axes(kernel, q, k, v, mask, tile)
    outer = "keys" if kernel == "dkv" else "queries"
    T, S = queries.length, keys.length
    static = isinstance(q_offset, (int, np.integer))
    segments = masks.segments_of(mask)
    ids = None if segments is None else segments.both(T, S)
    sparse = any(isinstance(m, masks.BlockSparse) for m in leaves(mask))
    band = mask.band()

    # What the kernel evaluates in partial tiles: the mask, what is left of it there, or a table.
    inside, stack, index = mask, None, None
    if sparse:
        inside = masks.within_live_tiles(mask, queries.block, keys.block, q_offset)
        if inside is None:
            inside, layout = _split(mask, static)
            stack, index = _stack(layout, queries, keys, int(q_offset))
    tile_mask = tiles.TileMask(
        visible=None if inside is None else inside.visible, summary=mask.tile_summary
    )

    # One range of keys per query: the live tiles follow from the grid's indices.
    if band is not None:
        tile_mask = dataclasses.replace(
            tile_mask,
            key_bounds=band.key_bounds,
            query_bounds=band.query_bounds,
            width=span(mask),
        )
        schedule = tiles.interval_schedule(tile_mask, queries, keys, q_offset, outer=outer)
        return Plan(queries, keys, compute, tile_mask, schedule, ids, stack)

    # Otherwise by tables: ranges of live tiles with Segments, lists of them without.
    kinds = masks.tile_kinds(mask, T, S, queries.block, keys.block, q_offset)
    if segments is not None and not sparse:
        bounds = [
            bound
            for axis_ids, axis in zip(ids, (queries, keys), strict=True)
            for bound in masks.segment_bounds(axis_ids, axis.block)
        ]
        schedule = tiles.interval_schedule(
            dataclasses.replace(tile_mask, width=span(mask)), queries, keys, q_offset,
            outer=outer, segments=tuple(bounds), kinds=kinds,
        )  # fmt: skip
    else:
        schedule = tiles.list_schedule(kinds, q_offset, outer=outer, stack_index=index)
    return Plan(queries, keys, compute, tile_mask, schedule, ids, stack)


def span(mask: masks.Mask) -> int | None:
    """Returns the greatest span of a query's live keys; None if unbounded or unknown."""
    band = masks.split_segments(mask)[0].band()
    if band is None or band.left is None or band.right is None or band.prefix:
        return None
    return band.left + band.right + 1


def _near(mask):
    """Returns how many keys near a query matter to the choice of a tile; None if all may."""
    windows = [m.window for m in leaves(mask) if isinstance(m, masks.Lambda)]
    return min(windows) if windows else span(mask)


def _split(mask, static):
    """Splits a mask with BlockSparse into what a kernel evaluates, or None, and the static rest."""
    if not static:
        raise _NoKernelError(
            "BlockSparse with a traced q_offset has no kernel; pass q_offset as an int, or use "
            'implementation="xla"'
        )
    if masks.segments_of(mask) is None:
        return None, mask
    layout, segments = masks.split_segments(mask)
    if segments is None:
        raise _NoKernelError(
            "BlockSparse with Segments under | has no kernel; combine them by &, choose a block "
            'that is a multiple of 128 and at least 256, or use implementation="xla"'
        )
    return segments, layout


@functools.lru_cache(maxsize=16)
def _stack(mask, queries, keys, offset):
    """Returns distinct partial tiles, int8 [n, block_q, block_k], and each tile's index in them."""
    T, S = queries.length, keys.length
    kinds = masks.tile_kinds(mask, T, S, queries.block, keys.block, offset)[0]
    index, places, distinct = np.zeros(kinds.shape, np.int32), {}, []
    # Each partial tile once, by its bytes.
    rows, columns = np.arange(queries.block)[:, None], np.arange(keys.block)[None, :]
    for i, j in np.argwhere(kinds == masks.PARTIAL):
        tile = mask(offset + i * queries.block + rows, j * keys.block + columns).astype(np.int8)
        place = places.setdefault(tile.tobytes(), len(distinct))
        if place == len(distinct):
            distinct.append(tile)
            if len(distinct) * tile.size > STACK_LIMIT:
                raise _NoKernelError(
                    f"the mask has over {len(distinct)} distinct partial tiles of {tile.shape}; "
                    "make its block a multiple of 128 and at least 256, or use "
                    'implementation="xla"'
                )
        index[i, j] = place
    if not distinct:  # as when all tiles are full or empty: the kernel still wants an operand
        distinct.append(np.ones((queries.block, keys.block), np.int8))
    return np.stack(distinct), index


def _check_plan(kernel, q, k, v, mask, q_offset):
    """Raises _NoKernelError where `plan_for` would, or where its tables would not fit."""
    queries, keys, _ = _axes(kernel, q, k, v, mask)
    rows, width = (keys.tiles, queries.tiles) if kernel == "dkv" else (queries.tiles, keys.tiles)
    if mask.band() is not None:
        return
    sparse = any(isinstance(m, masks.BlockSparse) for m in leaves(mask))
    static = isinstance(q_offset, (int, np.integer))
    segments = masks.segments_of(mask)
    stacked = False
    if sparse and masks.within_live_tiles(mask, queries.block, keys.block, q_offset) is None:
        layout = _split(mask, static)[1]
        _stack(layout, queries, keys, int(q_offset))
        stacked = True
    # Words of the tables in scalar memory.
    if segments is not None and not sparse:
        words = q.shape[0] * (2 * rows + 2 * queries.tiles + 2 * keys.tiles)
    else:
        if segments is None and static:
            T, S = queries.length, keys.length
            live = masks.tile_kinds(mask, T, S, queries.block, keys.block, q_offset) != 0
            width = int(live.sum(1 if kernel == "dkv" else 2).max())
        words = (q.shape[0] if segments is not None else 1) * rows * (1 + width * (1 + stacked))
    if 4 * words > TABLE_LIMIT:
        raise _NoKernelError(
            f"the mask's lists of live tiles take {4 * words} bytes of scalar memory, of which "
            f"{TABLE_LIMIT} are free; shorten the sequences, lower the batch, or use "
            'implementation="xla"'
        )
