"""FlashAttention-2 forward for Hopper, in Pallas Mosaic GPU: wgmma, TMA, warp specialization.

Tri Dao, "FlashAttention-2" (2023), algorithm 1; the division of work is FlashAttention-3's: one
producer warpgroup issues the TMA copies of key and value tiles into a ring of shared-memory slots,
two compute warpgroups own 64 query rows each and take turns, so that one does its softmax while the
other has the tensor cores.

Dimensions: B batch, T queries, S keys, H query heads, G key-value heads, D head dim, P value dim;
T_real, S_real: without the padding that TMA needs.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from tilescan.pallas_kernels.gpu import common
from tilescan.pallas_kernels.gpu.block_sizes import BlockSizes
from tilescan.pallas_kernels.gpu.common import COMPUTE_WARPGROUPS, WG_ROWS
from tilescan.pallas_kernels.gpu.tiles import TileSchedule


def flash_attention_forward(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S G D"],
    v: Float[Array, "B S G P"],
    schedule: TileSchedule,
    *,
    visible: Callable | None,
    q_offset: Int[Array, ""] | int,
    segments: tuple[Int[Array, "B T_real"], Int[Array, "B S_real"]] | None = None,
    bias: Float[Array, "#B #H T S"] | None = None,
    scale: float,
    logit_cap: float | None = None,
    blocks: BlockSizes,
    k_length: int | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "B T H P"], Float[Array, "B H T"]]:
    """Returns attention over the schedule's tiles, and its log-sum-exp.

    Args:
        q, k, v: bf16 or f16, D and P multiples of 16, T and S multiples of 8 (in interpret mode
            any).
        schedule: live key tiles of every query tile, for blocks.block_q and blocks.block_k.
        visible: callable(q_index, k_index, q_ids, k_ids) -> bool for partial tiles, None for no
            mask.
        q_offset: int32 scalar added to query indices before `visible`.
        segments: int32 ids of queries and keys, given (gathered) to `visible`, or None.
        bias: float32 or 16-bit, added to the logits; S a multiple of 8.
        k_length: number of real keys, S if None; the schedule must call a tile with others partial.
        interpret: run on the CPU in GPU interpret mode.

    Returns:
        o in q's dtype and lse in float32 (natural log); rows that see no key are 0 and -inf.
    """
    batch, q_len, heads, head_dim = q.shape
    _, k_len, kv_heads, value_dim = v.shape
    k_length = k_len if k_length is None else k_length
    group = heads // kv_heads
    block_k, stages = blocks.block_k, blocks.stages
    rows = schedule.rows
    padded = rows * blocks.block_q
    dtype, wide = q.dtype, max(head_dim, value_dim) > 128

    inputs = {"q": q, "k": k, "v": v, "bounds": jnp.asarray(schedule.bounds)}
    inputs["offset"] = jnp.asarray(q_offset, jnp.int32).reshape(1)
    if schedule.tiles is not None:
        inputs["tiles"] = jnp.asarray(schedule.tiles)
    if bias is not None:
        inputs["bias"] = bias
    if segments is not None:
        inputs["q_ids"] = common.pad_axis(segments[0], 1, padded)
        inputs["k_ids"] = common.pad_axis(segments[1], 1, pl.cdiv(k_len, block_k) * block_k)

    def flash_forward(*refs):
        gmem = dict(zip(inputs, refs, strict=False))
        o_ref, lse_ref = refs[len(inputs) : len(inputs) + 2]
        q_smem, k_smem, v_smem, o_smem, lse_smem, staging, *rest = refs[len(inputs) + 2 :]
        q_bar, k_bar, v_bar, k_free, v_free, turn, bias_smem, bias_bar, bias_free = rest
        wg = lax.axis_index("wg")

        def place():
            # Asked in each role, so that no value has to live across both.
            b, h = lax.axis_index("batch"), lax.axis_index("heads")
            # Late rows of a causal mask hold the most tiles: start them first.
            row = rows - 1 - lax.axis_index("rows")
            return b, h, row, *common.row_walk(gmem["bounds"], gmem.get("tiles"), b, row)

        @pl.when(wg == COMPUTE_WARPGROUPS)
        def _produce():
            plgpu.set_max_registers(blocks.producer_registers, action="decrease")
            b, h, row, _, n_live, tile_of = place()
            g = lax.div(h, jnp.int32(group))

            def bring(name, smem, ready, i, slot):
                source = gmem[name].at[b, pl.ds(tile_of(i) * block_k, block_k), g]
                plgpu.copy_gmem_to_smem(source, smem.at[slot], ready.at[slot])

            def bring_bias(i, slot):
                start = row * blocks.block_q, tile_of(i) * block_k
                common.bring_bias(gmem["bias"], bias_smem, bias_bar, slot, (b, h), *start)

            rings = [
                (partial(bring, "k", k_smem, k_bar), k_free),
                (partial(bring, "v", v_smem, v_bar), v_free),
            ]
            if bias is not None:
                rings.insert(1, (bring_bias, bias_free))
            common.produce(n_live, stages, rings)

        @pl.when(wg < COMPUTE_WARPGROUPS)
        def _compute():
            plgpu.set_max_registers(blocks.compute_registers, action="increase")
            b, h, row, n_full, n_live, tile_of = place()
            q_start = row * blocks.block_q + wg * WG_ROWS
            source = (b, pl.ds(q_start, WG_ROWS), h)
            plgpu.copy_gmem_to_smem(gmem["q"].at[source], q_smem.at[wg], q_bar.at[wg])
            plgpu.barrier_wait(q_bar.at[wg])
            my_staging = None if staging is None else staging.at[wg]
            offset = gmem["offset"][0]

            def take_turns():
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(turn)

            def step_tile(step, carry, *, masked):
                acc, peak, total = carry
                slot = lax.rem(step, jnp.int32(stages))
                plgpu.barrier_wait(k_bar.at[slot])

                def scores(ref):
                    own = q_smem.at[common.unhoisted(wg, step, n_live) if wide else wg]
                    plgpu.wgmma(ref, own, k_smem.at[slot].transpose((1, 0)))
                    take_turns()
                    return ref[...]

                dots = pl.run_scoped(scores, plgpu.ACC((WG_ROWS, block_k), jnp.float32))
                plgpu.barrier_arrive(k_free.at[slot])
                x, factor, _ = common.base2_logits(dots, scale, logit_cap)
                if bias is not None:
                    plgpu.barrier_wait(bias_bar.at[slot])
                    x, factor = common.add_bias(x, factor, bias_smem.at[slot, wg])
                    plgpu.barrier_arrive(bias_free.at[slot])
                if masked:
                    k_start = tile_of(step) * block_k
                    ids = common.tile_ids(gmem, b, q_start, k_start, x.shape)
                    place = q_start + offset, k_start, k_length
                    x = jnp.where(common.seen_in(x.shape, visible, *place, **ids), x, -jnp.inf)
                new_peak = jnp.maximum(peak, x.max(axis=1) * factor)
                shrink = jnp.exp2(peak - new_peak)
                p = jnp.exp2(x * factor - common.along_rows(new_peak, x.shape))
                acc = acc * common.along_rows(shrink, acc.shape)
                total = total * shrink + p.sum(axis=1)
                p16 = p.astype(dtype)
                acc, total, new_peak, p16 = lax.optimization_barrier((acc, total, new_peak, p16))
                plgpu.barrier_arrive(turn)  # the softmax is done
                plgpu.barrier_wait(v_bar.at[slot])
                plgpu.barrier_wait(turn)  # until the other warpgroup leaves the tensor cores
                (acc,) = common.accumulate_all((acc,), [(p16, v_smem.at[slot])], my_staging)
                plgpu.barrier_arrive(v_free.at[slot])
                return acc, new_peak, total

            carry = (
                common.zeros((WG_ROWS, value_dim)),
                plgpu.layout_cast(
                    jnp.full((WG_ROWS,), common.MAX_START, jnp.float32), common.PER_ROW
                ),
                common.zeros((WG_ROWS,), common.PER_ROW),
            )
            pl.when(wg == 1)(take_turns)
            carry = lax.fori_loop(0, n_full, lambda i, c: step_tile(i, c, masked=False), carry)
            acc, peak, total = lax.fori_loop(
                n_full, n_live, lambda i, c: step_tile(i, c, masked=True), carry
            )
            pl.when(wg == 0)(take_turns)

            empty = total == 0
            acc = acc * common.along_rows(jnp.where(empty, 0.0, 1.0 / total), acc.shape)
            lse = (peak + jnp.log2(total)) * common.LN2
            # The queries are done with, so their buffer can take the output.
            out_smem = (q_smem if o_smem is None else o_smem).at[wg]
            out_smem[...] = acc.astype(dtype)
            lse_smem.at[wg][...] = jnp.where(empty, -jnp.inf, lse)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem, o_ref.at[source])
            plgpu.copy_smem_to_gmem(lse_smem.at[wg], lse_ref.at[b, h, pl.ds(q_start, WG_ROWS)])
            plgpu.wait_smem_to_gmem(0)

    pair = (COMPUTE_WARPGROUPS, WG_ROWS)
    ring = plgpu.Barrier(num_barriers=stages)
    free = plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=stages)
    o, lse = plgpu.kernel(
        flash_forward,
        out_type=(
            jax.ShapeDtypeStruct((batch, q_len, heads, value_dim), dtype),
            jax.ShapeDtypeStruct((batch, heads, padded), jnp.float32),
        ),
        scratch_types=[
            common.smem_tile((*pair, head_dim), dtype, block_k),
            common.smem_tile((stages, block_k, head_dim), dtype),
            common.smem_tile((stages, block_k, value_dim), dtype),
            None if value_dim == head_dim else common.smem_tile((*pair, value_dim), dtype),
            plgpu.SMEM(pair, jnp.float32),
            common.smem_tile((*pair, block_k), dtype) if interpret else None,
            plgpu.Barrier(num_barriers=COMPUTE_WARPGROUPS),
            ring,
            ring,
            free,
            free,
            plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS),
            common.bias_tiles(bias, block_k, stages),
            None if bias is None else free,
            None if bias is None else free,
        ],
        **common.launch((heads, rows, batch), interpret),
    )(*inputs.values())
    return o, lse[:, :, :q_len]
