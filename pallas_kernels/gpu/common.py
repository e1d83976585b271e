"""What the Mosaic GPU attention kernels share: layouts, the walk over tiles, logits in base 2.

Dimensions: B batch, T queries, S keys, H heads, M 1 or B; rows and cols of one tile.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float, Int, Shaped

# Indices are known ahead or computed; references are Pallas' own, or parts of them by `at`.
Index = int | jax.Array
Ref = Any

LOG2E = math.log2(math.e)
LN2 = math.log(2.0)
# Shared memory that one thread block may have on Hopper (227 KiB).
SMEM_LIMIT = 232448
# Rows of one wgmma instruction, and so of one compute warpgroup's tile.
WG_ROWS = 64
COMPUTE_WARPGROUPS = 2
# Running maxima start here rather than at -inf: exp2(-inf - MAX_START) is 0 and never NaN, so a row
# without any visible key, or with logits below -1e30 alone, needs no special case.
MAX_START = -1e30 * LOG2E

MATRIX = plgpu.Layout.WGMMA
PER_ROW = plgpu.Layout.WGMMA.reduce(1)
PER_COL = plgpu.Layout.WGMMA.reduce(0)


def tma_transforms(width: int, rows: int) -> tuple:
    """Returns tiling and swizzle of a 16-bit tile of `rows` x `width`, as TMA and wgmma want them.

    Raises:
        ValueError: a side that is no multiple of 16.
    """
    for columns in (64, 32, 16):
        # A product over the tile's rows goes by steps of the swizzle.
        if width % columns == 0 and rows % columns == 0:
            tiling, swizzle = (
                plgpu.TilingTransform((8, columns)),
                plgpu.SwizzleTransform(2 * columns),
            )
            return tiling, swizzle
    raise ValueError(f"a tile must be a multiple of 16 elements wide and long, got {width}, {rows}")


def smem_tile(
    shape: tuple[int, ...], dtype: jax.typing.DTypeLike, rows: int | None = None
) -> pl.MemoryRef:
    """Returns a shared-memory buffer of 16-bit tiles that TMA fills and wgmma reads.

    `rows`, if fewer than the tile's own, are those of the tiles it is multiplied with: both
    operands of a product have to be swizzled alike.
    """
    return plgpu.SMEM(shape, dtype, transforms=tma_transforms(shape[-1], rows or shape[-2]))


def bias_tiles(
    bias: Float[Array, "#B #H T S"] | None, block: int, stages: int
) -> pl.MemoryRef | None:
    """Returns the ring of a bias's tiles, of 64 x block for each compute warpgroup; None without.

    With the dK/dV kernel's transposed bias, T and S are the other way around.
    """
    if bias is None:
        return None
    columns = min(block, 128 // bias.dtype.itemsize)
    transforms = (
        plgpu.TilingTransform((8, columns)),
        plgpu.SwizzleTransform(columns * bias.dtype.itemsize),
    )
    shape = (stages, COMPUTE_WARPGROUPS, WG_ROWS, block)
    return plgpu.SMEM(shape, bias.dtype, transforms=transforms)


def bring_bias(
    ref: Ref,
    smem: Ref,
    ready: Ref,
    slot: Index,
    batch_and_head: tuple[Index, Index],
    row_start: Index,
    col_start: Index,
) -> None:
    """Has TMA fill a slot of `bias_tiles`; the bias may have one batch row, or head, for all."""
    place = tuple(x if n > 1 else 0 for x, n in zip(batch_and_head, ref.shape[:2], strict=True))
    for wg in range(COMPUTE_WARPGROUPS):
        rows = pl.ds(row_start + wg * WG_ROWS, WG_ROWS)
        source = ref.at[(*place, rows, pl.ds(col_start, smem.shape[-1]))]
        plgpu.copy_gmem_to_smem(source, smem.at[slot, wg], ready.at[slot])


def add_bias(
    x: Float[Array, "rows cols"], factor: float, smem: Ref
) -> tuple[Float[Array, "rows cols"], float]:
    """Returns (x, factor) of `base2_logits` with a tile of the bias, in shared memory, added."""
    bias = plgpu.load(smem, layout=MATRIX).astype(jnp.float32)
    return x * factor + bias * LOG2E, 1.0


def zeros(shape: tuple[int, ...], layout: Any = MATRIX) -> Float[Array, "..."]:
    """Returns float32 zeros in registers."""
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)


def along_rows(x: Shaped[Array, "rows"], shape: tuple[int, int]) -> Shaped[Array, "rows cols"]:
    """Broadcasts one value a row over the columns."""
    return lax.broadcast_in_dim(x, shape, (0,))


def along_cols(x: Shaped[Array, "cols"], shape: tuple[int, int]) -> Shaped[Array, "rows cols"]:
    """Broadcasts one value a column over the rows."""
    return lax.broadcast_in_dim(x, shape, (1,))


def matmul(a: Ref, b: Ref, shape: tuple[int, int]) -> Float[Array, "rows cols"]:
    """Returns a @ b in float32 with both operands in shared memory; waits for the result."""

    def multiply(acc):
        plgpu.wgmma(acc, a, b)
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def accumulate_all(
    accs: tuple[Float[Array, "rows _"], ...],
    terms: Sequence[tuple[Float[Array, "rows inner"], Ref]],
    staging: Ref | None,
) -> tuple[Float[Array, "rows _"], ...]:
    """Returns acc + a @ b for each acc and (a, b), with `a` in registers and b in shared memory.

    On the hardware `a` stays in registers, the sums are kept in the accumulators and all products
    are in flight together (`staging` is None). Interpret mode can run neither, so there each `a`
    goes through the shared-memory buffer `staging`.
    """
    if staging is None:

        def multiply(refs):
            for ref, (a, b) in zip(refs, terms, strict=True):
                plgpu.wgmma(ref, a, b)

        return tuple(pl.run_state(multiply)(tuple(map(plgpu.ACC.init, accs))))
    sums = []
    for acc, (a, b) in zip(accs, terms, strict=True):
        staging[...] = a
        plgpu.commit_smem()
        sums.append(acc + matmul(staging, b, acc.shape))
    return tuple(sums)


def unhoisted(wg: Index, step: Index, count: Index) -> Int[Array, ""]:
    """Returns wg, as an expression that the compiler must compute anew in each step of a loop.

    Descriptors of the warpgroup's own operands would else be computed before the loop, one for each
    16 elements of a head dim, and held in registers, of which wide heads need all. `count` is any
    integer read from memory that is at least 0: of the step alone the compiler knows as much.
    """
    return jnp.where(step + count >= 0, wg, 0)


def produce(
    n_steps: Index,
    stages: int,
    rings: Sequence[tuple[Callable[[Index, Index], None], Ref]],
) -> None:
    """Runs the producer's loop, which keeps a ring of slots filled by TMA.

    Args:
        n_steps, stages: tiles to bring and slots to bring them to.
        rings: (bring, free barriers) of each operand, where bring(step, slot) starts its copies.
    """

    @pl.loop(0, n_steps)
    def _(step):
        slot = lax.rem(step, jnp.int32(stages))
        for bring, free in rings:
            pl.when(step >= stages)(lambda free=free: plgpu.barrier_wait(free.at[slot]))
            bring(step, slot)

    @pl.loop(jnp.maximum(n_steps - stages, 0), n_steps)
    def _(step):
        slot = lax.rem(step, jnp.int32(stages))
        for _, free in rings:
            plgpu.barrier_wait(free.at[slot])


def launch(grid: tuple[int, int, int], interpret: bool) -> dict:
    """Returns arguments of plgpu.kernel that all the attention kernels share.

    Args:
        grid: (heads, rows, batch).
        interpret: run on the CPU in GPU interpret mode.
    """
    return {
        "grid": grid,
        "grid_names": ("heads", "rows", "batch"),
        "num_threads": COMPUTE_WARPGROUPS + 1,
        "thread_name": "wg",
        "compiler_params": plgpu.CompilerParams(approx_math=True),
        "interpret": plgpu.InterpretGPUParams() if interpret else None,
    }


def computed(tree: Any) -> Any:
    """Returns a pytree of arrays without the manual axes of a shard_map.

    Within a kernel, what is read has them and what is computed has none, and no bound or carry of a
    loop may change its type.
    """
    has_axes = lambda x: bool(jax.typeof(x).manual_axis_type.varying)
    return jax.tree.map(lambda x: x + jnp.zeros((), x.dtype) if has_axes(x) else x, tree)


def row_walk(
    bounds_ref: Ref, tiles_ref: Ref | None, batch: Index, row: Index
) -> tuple[Int[Array, ""], Int[Array, ""], Callable[[Index], Index]]:
    """Returns (n_full, n_live, tile_of_step) of one row of tiles; see TileSchedule."""
    m = batch if bounds_ref.shape[0] > 1 else 0
    n_full, n_live = computed((bounds_ref[m, row, 1], bounds_ref[m, row, 3]))
    if tiles_ref is not None:
        return n_full, n_live, lambda step: tiles_ref[m, row, step]
    full_start = bounds_ref[m, row, 0]
    live_start = bounds_ref[m, row, 2]

    def tile_of(step):
        partial = live_start + step - n_full
        partial = jnp.where(partial >= full_start, partial + n_full, partial)
        return jnp.where(step < n_full, full_start + step, partial)

    return n_full, n_live, tile_of


def base2_logits(
    dots: Float[Array, "rows cols"], scale: float, logit_cap: float | None
) -> tuple[Float[Array, "rows cols"], float, Float[Array, "rows cols"] | None]:
    """Returns (x, factor, slope): the logits are x * factor * ln 2, and slope is their derivative
    by scale * dots.

    `factor` is left for the caller to fold into a fused multiply-add; slope is None where it is 1.
    """
    if logit_cap is None:
        if scale > 0:
            return dots, scale * LOG2E, None
        return dots * (scale * LOG2E), 1.0, None
    # tanh by base-2 exponential: the hardware's own tanh is good to 11 bits only, which a cap of 50
    # would turn into an error of 0.02 in the logits.
    tanh = 1.0 - 2.0 / (1.0 + jnp.exp2(dots * (2.0 * LOG2E * scale / logit_cap)))
    return tanh, logit_cap * LOG2E, 1.0 - tanh * tanh


def seen_in(
    shape: tuple[int, int],
    visible: Callable | None,
    q_start: Index,
    k_start: Index,
    k_length: int,
    *,
    q_ids: Int[Array, "rows cols"] | None = None,
    k_ids: Int[Array, "rows cols"] | None = None,
) -> Bool[Array, "rows cols"]:
    """Returns which keys of a tile, queries by keys, are neither padding nor hidden by the mask.

    Args:
        shape: of the tile.
        visible: callable(q_index, k_index, q_ids, k_ids) -> bool, or None for no mask.
        q_start, k_start: index of the tile's first query and key.
        k_length: number of real keys.
        q_ids, k_ids: segment ids of the tile, broadcast to the tile's shape, or None.
    """
    k_index = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=MATRIX) + k_start
    seen = k_index < k_length
    if visible is not None:
        q_index = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=MATRIX) + q_start
        seen = seen & visible(q_index, k_index, q_ids, k_ids)
    return seen


def load_ids(ref: Ref, batch: Index, start: Index, length: int, axis: int) -> Int[Array, "length"]:
    """Returns segment ids from global memory, laid out along `axis` of a tile."""
    layout = PER_ROW if axis == 0 else PER_COL
    return plgpu.load(ref.at[batch, pl.ds(start, length)], layout=layout, optimized=False)


def tile_ids(
    gmem: dict[str, Ref], batch: Index, q_start: Index, k_start: Index, shape: tuple[int, int]
) -> dict[str, Int[Array, "rows cols"]]:
    """Returns segment ids of a tile as arguments of `seen_in`; {} without segments."""
    if "q_ids" not in gmem:
        return {}
    q_ids = load_ids(gmem["q_ids"], batch, q_start, shape[0], 0)
    k_ids = load_ids(gmem["k_ids"], batch, k_start, shape[1], 1)
    return {"q_ids": along_rows(q_ids, shape), "k_ids": along_cols(k_ids, shape)}


def pad_axis(
    x: Shaped[Array, "..."], axis: int, length: int, value: float = 0
) -> Shaped[Array, "..."]:
    """Returns x with `axis` padded at its end to `length`."""
    pads = [(0, 0)] * x.ndim
    pads[axis] = (0, length - x.shape[axis])
    return jnp.pad(x, pads, constant_values=value)
