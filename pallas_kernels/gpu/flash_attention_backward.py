"""FlashAttention-2 backward for Hopper, in Pallas Mosaic GPU: one kernel for dK and dV, one for dQ.

Tri Dao, "FlashAttention-2" (2023), algorithm 2, split in two so that every sum stays inside one
thread block: no atomics, the same bits every time, seven matrix products instead of five. The
weights are recomputed from the log-sum-exp. As in the forward kernel one producer warpgroup issues
TMA copies and two compute warpgroups own 64 rows each (keys for dK/dV, queries for dQ).

Both take two float32 statistics of every query:
    lse2: log-sum-exp in base 2, +inf where a query sees no key;
    delta: rowsum(dO * O) minus the cotangent of the log-sum-exp, so dS = P * (dP - delta).

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


def _inputs(
    q, k, v, do, lse2, delta, schedule, q_offset, segments, bias, q_padded, k_padded
) -> dict:
    """Returns the kernels' operands by name; statistics and ids padded to whole tiles."""
    inputs = {"q": q, "k": k, "v": v, "do": do, "bounds": jnp.asarray(schedule.bounds)}
    inputs["lse"] = common.pad_axis(lse2, 2, q_padded, jnp.inf)
    inputs["delta"] = common.pad_axis(delta, 2, q_padded)
    inputs["offset"] = jnp.asarray(q_offset, jnp.int32).reshape(1)
    if schedule.tiles is not None:
        inputs["tiles"] = jnp.asarray(schedule.tiles)
    if bias is not None:
        inputs["bias"] = bias
    if segments is not None:
        inputs["q_ids"] = common.pad_axis(segments[0], 1, q_padded)
        inputs["k_ids"] = common.pad_axis(segments[1], 1, k_padded)
    return inputs


def _weights(logits, statistic):
    """Returns (p, slope) of `x_of_dots`' results; masks x - lse2, since lse2 may be NaN."""
    x, factor, slope, seen = logits
    x = x * factor - statistic
    return jnp.exp2(x if seen is None else jnp.where(seen, x, -jnp.inf)), slope


def _weights_and_dp(left, right, x_of_dots, statistic, shape, overlap):
    """Returns P and dP of a tile.

    Args:
        left, right: operands (a, b) in shared memory of the logits' and of dP's product.
        x_of_dots: dots -> (x, factor, slope) of base2_logits and which are seen, None for all.
        statistic: () -> lse2 of the tile, broadcast.
        overlap: have both products in flight at once. Not where a mask is computed in between: that
            wants the registers which dP would hold.

    Returns:
        (p, dp, slope or None), float32 in registers.
    """

    def weights(dots):
        return _weights(x_of_dots(dots), statistic())

    def both(s_ref, dp_ref):
        plgpu.wgmma(s_ref, *left)
        plgpu.wgmma(dp_ref, *right)
        p, slope = weights(plgpu.wgmma_accumulator_load(s_ref, wait_n=1))
        return (p, dp_ref[...]) if slope is None else (p, dp_ref[...], slope)

    if overlap:
        acc = plgpu.ACC(shape, jnp.float32)
        p, dp, *slope = pl.run_scoped(both, acc, acc)
        return p, dp, slope[0] if slope else None
    p, slope = weights(common.matmul(*left, shape))
    return p, common.matmul(*right, shape), slope


def flash_attention_dkv(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S G D"],
    v: Float[Array, "B S G P"],
    do: Float[Array, "B T H P"],
    lse2: Float[Array, "B H T_real"],
    delta: Float[Array, "B H T_real"],
    schedule: TileSchedule,
    *,
    visible: Callable | None,
    q_offset: Int[Array, ""] | int,
    segments: tuple[Int[Array, "B T_real"], Int[Array, "B S_real"]] | None = None,
    bias: Float[Array, "#B #H T S"] | None = None,
    scale: float,
    logit_cap: float | None = None,
    blocks: BlockSizes,
    want_dk: bool = True,
    want_dv: bool = True,
    interpret: bool = False,
) -> tuple[Float[Array, "B S G D"] | None, Float[Array, "B S G P"] | None]:
    """Returns the gradients of keys and values, summed over the query heads of a group.

    Args:
        q, k, v, do: bf16 or f16.
        lse2, delta: float32, see the module's text.
        schedule: live query tiles of every key tile.
        want_dk, want_dv: which to compute. Both accumulators fit the registers up to D + P = 256.
        bias: as in flash_attention_forward, with T a multiple of 8 too; a copy is transposed.
        visible, q_offset, segments, scale, logit_cap, interpret: as in flash_attention_forward.

    Returns:
        (dk, dv) in k's dtype, None for what is not wanted.
    """
    batch, _, heads, head_dim = q.shape
    kv_heads, value_dim = v.shape[2:]
    group = heads // kv_heads
    block_q, stages = blocks.block_q, blocks.stages
    rows = schedule.rows
    q_padded = pl.cdiv(q.shape[1], block_q) * block_q
    dtype = q.dtype
    heavy = logit_cap is not None or segments is not None
    wide = max(head_dim, value_dim) > (96 if heavy else 128)
    if bias is not None:
        bias = bias.swapaxes(2, 3)
    k_padded = rows * blocks.block_k
    inputs = _inputs(
        q, k, v, do, lse2, delta, schedule, q_offset, segments, bias, q_padded, k_padded
    )
    inputs["q_index"] = jnp.arange(q_padded, dtype=jnp.int32) + inputs.pop("offset")
    outputs = {}
    if want_dk:
        outputs["k"] = jax.ShapeDtypeStruct(k.shape, dtype)
    if want_dv:
        outputs["v"] = jax.ShapeDtypeStruct(v.shape, dtype)
    n_out = len(outputs)

    def flash_dkv(*refs):
        gmem = dict(zip(inputs, refs, strict=False))
        out = dict(zip(outputs, refs[len(inputs) :], strict=False))
        k_smem, v_smem, q_smem, do_smem, floats_smem, ints_smem, *rest = refs[len(inputs) + n_out :]
        # Buffers start at multiples of 1024 bytes: one for every two statistics of a query.
        lse_smem, delta_smem = floats_smem.at[0], floats_smem.at[1] if want_dk else None
        index_smem, ids_smem = ints_smem.at[0], None if segments is None else ints_smem.at[1]
        # Without dK no values are needed; where keys are as wide, dV is stored from their buffer.
        dv_smem = k_smem if v_smem is None else v_smem
        bias_smem, staging, own_bar, ready, free = rest
        wg = lax.axis_index("wg")

        def place():
            # Asked in each role, so that no value has to live across both.
            b, g, row = (lax.axis_index(name) for name in ("batch", "heads", "rows"))
            return b, g, row, *common.row_walk(gmem["bounds"], gmem.get("tiles"), b, row)

        @pl.when(wg == COMPUTE_WARPGROUPS)
        def _produce():
            plgpu.set_max_registers(blocks.producer_registers, action="decrease")
            b, g, row, _, n_live, tile_of = place()

            @pl.loop(0, n_live * group)
            def _(step):
                slot = lax.rem(step, jnp.int32(stages))
                i, member = lax.div(step, jnp.int32(group)), lax.rem(step, jnp.int32(group))
                queries, h = pl.ds(tile_of(i) * block_q, block_q), g * group + member
                pl.when(step >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
                for name, smem, source in (
                    ("q", q_smem, (b, queries, h)),
                    ("do", do_smem, (b, queries, h)),
                    ("lse", lse_smem, (b, h, queries)),
                    ("delta", delta_smem, (b, h, queries)),
                    ("q_index", index_smem, (queries,)),
                    ("q_ids", ids_smem, (b, queries)),
                ):
                    if smem is None:
                        continue
                    source = gmem[name].at[source]
                    plgpu.copy_gmem_to_smem(source, smem.at[slot], ready.at[slot])
                if bias is not None:
                    start = row * blocks.block_k, tile_of(i) * block_q
                    common.bring_bias(gmem["bias"], bias_smem, ready, slot, (b, h), *start)

            @pl.loop(jnp.maximum(n_live * group - stages, 0), n_live * group)
            def _(step):
                plgpu.barrier_wait(free.at[lax.rem(step, jnp.int32(stages))])

        @pl.when(wg < COMPUTE_WARPGROUPS)
        def _compute():
            plgpu.set_max_registers(blocks.compute_registers, action="increase")
            b, g, row, n_full, n_live, _ = place()
            k_start = row * blocks.block_k + wg * WG_ROWS
            own = (b, pl.ds(k_start, WG_ROWS), g)
            plgpu.copy_gmem_to_smem(gmem["k"].at[own], k_smem.at[wg], own_bar.at[wg])
            if want_dk:
                plgpu.copy_gmem_to_smem(gmem["v"].at[own], v_smem.at[wg], own_bar.at[wg])
            plgpu.barrier_wait(own_bar.at[wg])
            my_staging = None if staging is None else staging.at[wg]
            shape = (WG_ROWS, block_q)

            def step_tile(step, carry, *, masked):
                slot = lax.rem(step, jnp.int32(stages))

                def per_query(smem):
                    # Indices too are loaded: the compiler would compute them once for all steps
                    # and keep them in registers that it does not have.
                    line = plgpu.load(smem.at[slot], layout=common.PER_COL)
                    return common.along_cols(line, shape)

                def x_of_dots(dots):
                    x, factor, slope = common.base2_logits(dots, scale, logit_cap)
                    if bias is not None:
                        x, factor = common.add_bias(x, factor, bias_smem.at[slot, wg])
                    seen = None
                    if masked and visible is not None:
                        k_index = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=common.MATRIX)
                        ids = (None, None)
                        if ids_smem is not None:
                            k_ids = common.load_ids(gmem["k_ids"], b, k_start, WG_ROWS, 0)
                            ids = per_query(ids_smem), common.along_rows(k_ids, shape)
                        # Padded keys need no hiding: they are rows, which no other row sees.
                        seen = visible(per_query(index_smem), k_index + k_start, *ids)
                    return x, factor, slope, seen

                plgpu.barrier_wait(ready.at[slot])
                own_tile = common.unhoisted(wg, step, n_live) if wide else wg
                left = (k_smem.at[own_tile], q_smem.at[slot].transpose((1, 0)))
                right = want_dk and (v_smem.at[own_tile], do_smem.at[slot].transpose((1, 0)))

                def ds_of(p, dp, slope):
                    ds = p * (dp - per_query(delta_smem))
                    return (ds if slope is None else ds * slope).astype(dtype)

                if not want_dk:
                    logits = x_of_dots(common.matmul(*left, shape))
                    p, _ = _weights(logits, per_query(lse_smem))
                    term = (p.astype(dtype), do_smem.at[slot])
                    carry = common.accumulate_all(carry, [term], my_staging)
                elif masked and want_dv:
                    # One product after the other, which needs the fewest registers.
                    dk, dv = carry
                    logits = x_of_dots(common.matmul(*left, shape))
                    p, slope = _weights(logits, per_query(lse_smem))
                    term = (p.astype(dtype), do_smem.at[slot])
                    (dv,) = common.accumulate_all((dv,), [term], my_staging)
                    term = (ds_of(p, common.matmul(*right, shape), slope), q_smem.at[slot])
                    (dk,) = common.accumulate_all((dk,), [term], my_staging)
                    carry = dk, dv
                else:
                    p, dp, slope = _weights_and_dp(
                        left, right, x_of_dots, lambda: per_query(lse_smem), shape, not masked
                    )
                    terms = [(ds_of(p, dp, slope), q_smem.at[slot])]
                    if want_dv:
                        terms.append((p.astype(dtype), do_smem.at[slot]))
                    carry = common.accumulate_all(carry, terms, my_staging)
                plgpu.barrier_arrive(free.at[slot])
                return carry

            # Heads of the group run fastest, so that the full tiles of all of them come first.
            widths = [head_dim] * want_dk + [value_dim] * want_dv
            carry = tuple(common.zeros((WG_ROWS, width)) for width in widths)
            for masked, start, stop in ((False, 0, n_full), (True, n_full, n_live)):
                carry = lax.fori_loop(
                    start * group,
                    stop * group,
                    lambda step, c, masked=masked: step_tile(step, c, masked=masked),
                    carry,
                )

            for name, grad in zip(outputs, carry, strict=True):
                smem = (k_smem if name == "k" else dv_smem).at[wg]
                smem[...] = (grad * scale if name == "k" else grad).astype(dtype)
            plgpu.commit_smem()
            for name in outputs:
                smem = (k_smem if name == "k" else dv_smem).at[wg]
                plgpu.copy_smem_to_gmem(smem, out[name].at[own])
            plgpu.wait_smem_to_gmem(0)

    copies = 4 + want_dk + (segments is not None)
    copies += 0 if bias is None else COMPUTE_WARPGROUPS
    # Profilers and compilers' logs show the kernel by this name.
    flash_dkv.__name__ = "flash_d" + "k" * want_dk + "v" * want_dv
    pair = (COMPUTE_WARPGROUPS, WG_ROWS)
    results = plgpu.kernel(
        flash_dkv,
        out_type=tuple(outputs.values()),
        scratch_types=[
            common.smem_tile((*pair, head_dim), dtype, block_q),
            None
            if value_dim == head_dim and not want_dk
            else common.smem_tile((*pair, value_dim), dtype, block_q),
            common.smem_tile((stages, block_q, head_dim), dtype),
            common.smem_tile((stages, block_q, value_dim), dtype),
            plgpu.SMEM((1 + want_dk, stages, block_q), jnp.float32),
            plgpu.SMEM((1 + (segments is not None), stages, block_q), jnp.int32),
            common.bias_tiles(bias, block_q, stages),
            common.smem_tile((*pair, block_q), dtype) if interpret else None,
            plgpu.Barrier(num_arrivals=1 + want_dk, num_barriers=COMPUTE_WARPGROUPS),
            plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
            plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=stages),
        ],
        **common.launch((kv_heads, rows, batch), interpret),
    )(*inputs.values())
    results = dict(zip(outputs, results, strict=True))
    return results.get("k"), results.get("v")


def flash_attention_dq(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S G D"],
    v: Float[Array, "B S G P"],
    do: Float[Array, "B T H P"],
    lse2: Float[Array, "B H T_real"],
    delta: Float[Array, "B H T_real"],
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
) -> Float[Array, "B T H D"]:
    """Returns the gradient of the queries; arguments as in flash_attention_dkv.

    The schedule holds the live key tiles of every query tile, as in flash_attention_forward.
    """
    batch, _, heads, head_dim = q.shape
    _, k_len, kv_heads, value_dim = v.shape
    k_length = k_len if k_length is None else k_length
    group = heads // kv_heads
    block_k, stages = blocks.block_k, blocks.stages
    rows = schedule.rows
    q_padded, k_padded = rows * blocks.block_q, pl.cdiv(k_len, block_k) * block_k
    dtype = q.dtype
    heavy = logit_cap is not None or segments is not None
    wide = max(head_dim, value_dim) > (96 if heavy else 128)
    inputs = _inputs(
        q, k, v, do, lse2, delta, schedule, q_offset, segments, bias, q_padded, k_padded
    )

    def flash_dq(*refs):
        gmem = dict(zip(inputs, refs, strict=False))
        dq_ref = refs[len(inputs)]
        q_smem, do_smem, k_smem, v_smem, lse_smem, delta_smem, staging, *rest = refs[
            len(inputs) + 1 :
        ]
        own_bar, k_bar, v_bar, k_free, v_free, bias_smem, bias_bar, bias_free = rest
        wg = lax.axis_index("wg")

        def place():
            b, h = lax.axis_index("batch"), lax.axis_index("heads")
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
            queries = pl.ds(q_start, WG_ROWS)
            for name, smem, source in (
                ("q", q_smem, (b, queries, h)),
                ("do", do_smem, (b, queries, h)),
                ("lse", lse_smem, (b, h, queries)),
                ("delta", delta_smem, (b, h, queries)),
            ):
                plgpu.copy_gmem_to_smem(gmem[name].at[source], smem.at[wg], own_bar.at[wg])
            plgpu.barrier_wait(own_bar.at[wg])
            my_staging = None if staging is None else staging.at[wg]
            offset = gmem["offset"][0]
            shape = (WG_ROWS, block_k)

            def per_row(smem):
                # Loaded in each step: with the widest heads no registers are free to hold it.
                line = plgpu.load(smem.at[wg], layout=common.PER_ROW)
                return common.along_rows(line, shape)

            def step_tile(i, dq, *, masked):
                slot = lax.rem(i, jnp.int32(stages))

                def x_of_dots(dots):
                    x, factor, slope = common.base2_logits(dots, scale, logit_cap)
                    if bias is not None:
                        plgpu.barrier_wait(bias_bar.at[slot])
                        x, factor = common.add_bias(x, factor, bias_smem.at[slot, wg])
                        plgpu.barrier_arrive(bias_free.at[slot])
                    seen = None
                    if masked:
                        k_start = tile_of(i) * block_k
                        ids = common.tile_ids(gmem, b, q_start, k_start, shape)
                        place = q_start + offset, k_start, k_length
                        seen = common.seen_in(shape, visible, *place, **ids)
                    return x, factor, slope, seen

                plgpu.barrier_wait(k_bar.at[slot])
                plgpu.barrier_wait(v_bar.at[slot])
                own_tile = common.unhoisted(wg, i, n_live) if wide else wg
                p, dp, slope = _weights_and_dp(
                    (q_smem.at[own_tile], k_smem.at[slot].transpose((1, 0))),
                    (do_smem.at[own_tile], v_smem.at[slot].transpose((1, 0))),
                    x_of_dots,
                    lambda: per_row(lse_smem),
                    shape,
                    overlap=not masked,
                )
                plgpu.barrier_arrive(v_free.at[slot])
                ds = p * (dp - per_row(delta_smem))
                ds = ds if slope is None else ds * slope
                (dq,) = common.accumulate_all(
                    (dq,), [(ds.astype(dtype), k_smem.at[slot])], my_staging
                )
                plgpu.barrier_arrive(k_free.at[slot])
                return dq

            dq = common.zeros((WG_ROWS, head_dim))
            dq = lax.fori_loop(0, n_full, lambda i, c: step_tile(i, c, masked=False), dq)
            dq = lax.fori_loop(n_full, n_live, lambda i, c: step_tile(i, c, masked=True), dq)
            q_smem.at[wg][...] = (dq * scale).astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_smem.at[wg], dq_ref.at[b, queries, h])
            plgpu.wait_smem_to_gmem(0)

    pair = (COMPUTE_WARPGROUPS, WG_ROWS)
    ring = plgpu.Barrier(num_barriers=stages)
    free = plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=stages)
    return plgpu.kernel(
        flash_dq,
        out_type=jax.ShapeDtypeStruct(q.shape, dtype),
        scratch_types=[
            common.smem_tile((*pair, head_dim), dtype, block_k),
            common.smem_tile((*pair, value_dim), dtype, block_k),
            common.smem_tile((stages, block_k, head_dim), dtype),
            common.smem_tile((stages, block_k, value_dim), dtype),
            plgpu.SMEM(pair, jnp.float32),
            plgpu.SMEM(pair, jnp.float32),
            common.smem_tile((*pair, block_k), dtype) if interpret else None,
            plgpu.Barrier(num_arrivals=4, num_barriers=COMPUTE_WARPGROUPS),
            ring,
            ring,
            free,
            free,
            common.bias_tiles(bias, block_k, stages),
            None if bias is None else free,
            None if bias is None else free,
        ],
        **common.launch((heads, rows, batch), interpret),
    )(*inputs.values())
