"""Which tiles of the score matrix a GPU kernel visits, and in which order.

A kernel works on one *row* of tiles at a time (a row of query tiles in the forward and dQ kernels,
a row of key tiles in the dK/dV kernel) and walks along its *live* tiles: first those that are
visible throughout, which need no masking, then those that are visible in part. Softmax and sums do
not mind the order. Empty tiles are not in the walk at all, so they cost nothing.

A `TileSchedule` describes the walk of every row in one of two forms:

* ranges: live tiles are contiguous and so are the full ones among them (causal, window). Four
  integers a row, whatever the length, and q_offset may be traced.
* lists: any set of tiles, as a table of tile indices. What block-sparse and packed masks need.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from tilescan.pallas_kernels.gpu.block_sizes import BlockSizes

EMPTY, PARTIAL, FULL = 0, 1, 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TileSchedule:
    """The walk over live tiles of every row of tiles; M is 1, or B where the batch rows differ.

    bounds: int32 (full_start, n_full, live_start, n_live) of every row.
        Ranges: step i visits full_start + i while i < n_full, then the other tiles of
        live_start .. live_start + n_live - 1 in order. Lists: only n_full and n_live are read.
    tiles: int32 tile index of each step, full tiles first, or None.
    """

    bounds: Int[Array | np.ndarray, "M rows 4"]
    tiles: Int[Array | np.ndarray, "M rows width"] | None = None

    @property
    def rows(self) -> int:
        """Number of rows of tiles."""
        return self.bounds.shape[1]


def window_schedule(
    rows: int,
    block_row: int,
    cols: int,
    block_col: int,
    *,
    n_cols: int,
    before: int | None,
    after: int | None,
    offset: Int[Array, ""] | int,
) -> TileSchedule:
    """Returns ranges of a window: index r of the row side sees the indices of the column side from
    r + offset - before to r + offset + after.

    Args:
        rows, block_row: number and size of the tiles on the row side.
        cols, block_col: number and size of the tiles on the column side.
        n_cols: how many column indices are real; a tile that reaches past them is never full.
        before, after: the window's reach, None for unbounded. Causal queries are (None, 0).
        offset: added to the row index; a Python int or a traced int32 scalar.

    Returns:
        A TileSchedule with M = 1 and no lists.
    """
    xp = np if isinstance(offset, int | np.integer) else jnp
    first = xp.arange(rows) * block_row + offset
    last = first + block_row - 1
    real_full = n_cols // block_col  # tiles from here on hold padding

    def clip(x, low, high):
        return xp.clip(x, low, high)

    zero = xp.zeros_like(first)
    live_lo = zero if before is None else clip((first - before) // block_col, 0, cols)
    live_hi = zero + cols if after is None else clip((last + after) // block_col + 1, 0, cols)
    # A tile is full when the narrowest window over the row tile covers it.
    full_lo = zero if before is None else -((before - last) // block_col)
    full_hi = zero + real_full if after is None else (first + after + 1) // block_col
    n_live = xp.maximum(live_hi - live_lo, 0)
    full_lo = clip(full_lo, live_lo, live_lo + n_live)
    full_hi = clip(xp.minimum(full_hi, real_full), full_lo, live_lo + n_live)
    bounds = xp.stack([full_lo, full_hi - full_lo, live_lo, n_live], axis=-1)
    return TileSchedule(bounds[None].astype(xp.int32))


def list_schedule(kinds: Int[Array | np.ndarray, "M rows cols"]) -> TileSchedule:
    """Returns lists from a table of tile kinds: EMPTY, PARTIAL and FULL.

    A numpy table (static masks) gives lists as wide as the longest row; a traced one (segments)
    lists as wide as the table.
    """
    xp = np if isinstance(kinds, np.ndarray) else jnp
    kinds = kinds.astype(xp.int32)
    n_full = (kinds == FULL).sum(-1)
    n_live = (kinds != EMPTY).sum(-1)
    order = xp.argsort(-kinds, axis=-1, stable=True).astype(xp.int32)
    if xp is np:
        order = order[..., : max(1, int(n_live.max(initial=0)))]
    zero = xp.zeros_like(n_full)
    bounds = xp.stack([zero, n_full, zero, n_live], axis=-1).astype(xp.int32)
    return TileSchedule(bounds, order)


def attention_schedule(
    q_len: int,
    k_len: int,
    blocks: BlockSizes,
    *,
    before: int | None,
    after: int | None,
    offset: Int[Array, ""] | int | None = None,
    transposed: bool = False,
) -> TileSchedule:
    """Returns ranges of a window: query i sees keys i + offset - before to i + offset + after.

    Args:
        q_len, k_len: T and S.
        blocks: the kernel's BlockSizes.
        before, after: None for unbounded; full attention is (None, None), causal (None, 0).
        offset: position of the first query among the keys, k_len - q_len if None.
        transposed: rows are key tiles, as the dK/dV kernel wants them.
    """
    if offset is None:
        offset = k_len - q_len
    rows, cols = -(-q_len // blocks.block_q), -(-k_len // blocks.block_k)
    if not transposed:
        return window_schedule(
            rows, blocks.block_q, cols, blocks.block_k,
            n_cols=k_len, before=before, after=after, offset=offset,
        )  # fmt: skip
    # Padded queries weigh nothing (their log-sum-exp is inf), so every query column counts as real.
    return window_schedule(
        cols, blocks.block_k, rows, blocks.block_q,
        n_cols=rows * blocks.block_q, before=after, after=before, offset=-offset,
    )  # fmt: skip
