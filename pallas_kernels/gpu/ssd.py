"""Chunked scan of a decaying matrix state for Hopper (Mosaic GPU): S_t = a_t S_{t-1} + k_t v_t^T.

With o_t = S_t^T q_t this is Mamba-2's state space duality (arXiv 2405.21060, section 6): all key
dimensions share a decay. Everything inside a chunk of 64 steps is a product on the tensor cores
(wgmma); the chunks follow each other, with the state in registers. One warpgroup works on a batch
row, a head and 64 value dims; TMA brings a chunk's tiles while the one before is computed.

Conventions of all kernels:
- The state is transposed, [P, D], float32; as an operand of products it is rounded to 16 bits.
- `lines` [B, H or 1, 4, T] float32 holds a chunk's decays, with b_i the cumulative decay from the
  chunk's start, inclusive: two parts of log2 b_i, the first of which has exact differences, then
  b_i itself and b_C / b_j. Ratios b_i / b_j are powers of differences that are not positive, so
  nothing overflows.
- D and P are multiples of 64, T of the chunk; padded steps have keys and values of 0 and no decay.

Letters: B batch, T time, H heads, D key dim, P value dim, V tiles of 64 value dims, C chunk,
N chunks.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from tilescan.pallas_kernels.gpu import common

CHUNK = 64
VALUES = 64  # value dims of a thread block
STAGES = 2
COARSE, FINE, INTO, OUT = range(4)
HIDDEN = -1.0e4  # a logarithm whose power is 0


def tile(*shape: int, dtype) -> plgpu.SMEM:
    """Shared memory of 16-bit tiles, the last dim a multiple of 64."""
    return common.smem_tile(shape, dtype)


def load(smem) -> jax.Array:
    """A 16-bit tile as float32 in registers."""
    return plgpu.load(smem, layout=common.MATRIX).astype(jnp.float32)


def matmuls(*terms) -> tuple[jax.Array, ...]:
    """a @ b in float32 for each (a, b) in shared memory, all in flight together."""

    def run(*accs):
        for acc, (a, b) in zip(accs, terms, strict=True):
            plgpu.wgmma(acc, a, b)
        return tuple(acc[...] for acc in accs)

    shapes = [(a.shape[0], b.shape[1]) for a, b in terms]
    return tuple(pl.run_scoped(run, *(plgpu.ACC(shape, jnp.float32) for shape in shapes)))


def matmul_sum(*terms) -> jax.Array:
    """The sum of a @ b in float32 over (a, b) in shared memory, in one accumulator."""

    def run(acc):
        for a, b in terms:
            plgpu.wgmma(acc, a, b)
        return acc[...]

    shape = terms[0][0].shape[0], terms[0][1].shape[1]
    return pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))


def turned(smem):
    """The transposed view of a tile."""
    return smem.transpose((1, 0))


def indices() -> tuple[jax.Array, jax.Array]:
    """(i, j) of a C x C tile."""
    return tuple(
        plgpu.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis, layout=common.MATRIX)
        for axis in (0, 1)
    )


def ratios(lines) -> jax.Array:
    """b_i / b_j for j <= i, else 0, from a chunk's lines in shared memory."""
    shape = (CHUNK, CHUNK)
    difference = common.zeros(shape)
    for part in (COARSE, FINE):
        row = plgpu.load(lines.at[part], layout=common.PER_ROW)
        col = plgpu.load(lines.at[part], layout=common.PER_COL)
        difference += common.along_rows(row, shape) - common.along_cols(col, shape)
    i, j = indices()
    return jnp.exp2(jnp.where(i >= j, difference, HIDDEN))


def by_row(lines, part: int, width: int) -> jax.Array:
    """A line of one value a step, along the rows of a [C, width] tile."""
    line = plgpu.load(lines.at[part], layout=common.PER_ROW)
    return common.along_rows(line, (CHUNK, width))


def unhoisted(smem, whole):
    """The only part of a buffer [1, ...], by an index that the compiler does not know to be 0.

    Descriptors and addresses of one buffer after the other would else be computed before the loop
    over chunks, and held in registers. `whole` is a chunk's decay, from memory.
    """
    return smem.at[jnp.where(whole < 0, 1, 0)]


def place(heads: dict):
    """(batch, value tile, head of each operand) of this thread block."""
    b, h, p = (lax.axis_index(name) for name in ("batch", "heads", "values"))
    H = heads["all"]
    return b, p, {name: lax.div(h, jnp.int32(H // n)) for name, n in heads.items()}


def launch(batch: int, heads: int, tiles: int, interpret: bool) -> dict:
    """Arguments of plgpu.kernel that the scans share.

    All layouts are given, which leaves nothing for the inference of the other lowering to find out.
    """
    return {
        "grid": (batch, heads, tiles),
        "grid_names": ("batch", "heads", "values"),
        "compiler_params": plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        "interpret": plgpu.InterpretGPUParams() if interpret else None,
    }


def in_order(n_chunks: int, bring, ready, free, step, carry, reverse: bool = False):
    """step(chunk, slot, carry) for all chunks, their tiles brought STAGES - 1 ahead.

    Args:
        bring: (chunk, slot) -> None starts the copies that arrive on ready[slot].
        ready, free: barriers of the slots; `free` only makes the warpgroup wait for all its warps.
        reverse: go from the last chunk to the first.
    """

    def chunk_of(i):
        return n_chunks - 1 - i if reverse else i

    for i in range(min(STAGES, n_chunks)):
        bring(chunk_of(i), i)

    def body(i, carry):
        slot = lax.rem(i, jnp.int32(STAGES))
        plgpu.barrier_wait(ready.at[slot])
        carry = step(chunk_of(i), slot, carry)
        plgpu.barrier_arrive(free.at[slot])
        plgpu.barrier_wait(free.at[slot])
        pl.when(i + STAGES < n_chunks)(lambda: bring(chunk_of(i + STAGES), slot))
        return carry

    return lax.fori_loop(0, n_chunks, body, common.computed(carry))


def forward(
    q: jax.Array | None,
    k: jax.Array,
    v: jax.Array,
    lines: jax.Array,
    state: jax.Array,
    *,
    want_states: bool = False,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """(o [B, T, H, P], final state [B, H, P, D] float32), or the states instead of o.

    Args:
        q: [B, T, heads, D], None with want_states; k the same, v: [B, T, heads, P]; bf16 or f16,
            each of heads that divide H. D is 64 or 128.
        lines: [B, heads, 4, T], see the module's text.
        state: [B, H, P, D] float32.
        want_states: return the states at the chunks' starts, [B, H, N, P, D] in k's dtype.
        interpret: run on the CPU in GPU interpret mode.
    """
    B, H, P, D = state.shape
    T, dtype = k.shape[1], k.dtype
    N, tiles = T // CHUNK, P // VALUES
    inputs = {"k": k, "v": v, "lines": lines}
    if not want_states:
        inputs["q"] = q
    heads = {"k": k.shape[2], "v": v.shape[2], "lines": lines.shape[1], "all": H}
    if not want_states:
        heads["q"] = q.shape[2]
    shape = (B, H, N, P, D) if want_states else (B, T, H, P)

    def ssd_forward(*refs):
        gmem = dict(zip(inputs, refs, strict=False))
        initial, out, final, *rest = refs[len(inputs) :]
        smem = dict(zip(scratch, rest, strict=True))
        b, p, head = place(heads)
        values = pl.ds(p * VALUES, VALUES)

        def bring(n, slot):
            time = pl.ds(n * CHUNK, CHUNK)
            sources = {
                "k": (b, time, head["k"]),
                "v": (b, time, head["v"], values),
                "lines": (b, head["lines"], slice(None), time),
            }
            if not want_states:
                sources["q"] = (b, time, head["q"])
            for name, source in sources.items():
                source = gmem[name].at[source]
                plgpu.copy_gmem_to_smem(source, smem[name].at[slot], smem["ready"].at[slot])

        def step(n, slot, S):
            lines = smem["lines"].at[slot]
            k, v = smem["k"].at[slot], smem["v"].at[slot]
            whole = smem["lines"][slot, INTO, CHUNK - 1]
            S16 = unhoisted(smem["S"], whole)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            S16[...] = S.astype(dtype)
            if not want_states:
                q, A = smem["q"].at[slot], unhoisted(smem["A"], whole)
                scores = matmul_sum((q, turned(k)))
                A[...] = (scores * ratios(lines)).astype(dtype)
            plgpu.commit_smem()
            if want_states:
                plgpu.copy_smem_to_gmem(S16, out.at[b, head["all"], n, values])
            else:
                carried, o = matmuls((q, turned(S16)), (A, v))
                o += carried * by_row(lines, INTO, VALUES)
                # The scores are done with, and so are the values: both leave their buffers.
                A[...] = o.astype(dtype)
                plgpu.commit_smem()
                target = out.at[b, pl.ds(n * CHUNK, CHUNK), head["all"], values]
                plgpu.copy_smem_to_gmem(A, target)
            v[...] = (load(v) * by_row(lines, OUT, VALUES)).astype(dtype)
            plgpu.commit_smem()
            own = matmul_sum((turned(v), k))
            return S * whole + own

        source = initial.at[b, head["all"], values]
        S = plgpu.load(source, layout=common.MATRIX, optimized=False)
        S = in_order(N, bring, smem["ready"], smem["free"], step, S)
        plgpu.store(final.at[b, head["all"], values], S, optimized=False)
        plgpu.wait_smem_to_gmem(0)

    scratch = {
        "k": tile(STAGES, CHUNK, D, dtype=dtype),
        "v": tile(STAGES, CHUNK, VALUES, dtype=dtype),
        "lines": plgpu.SMEM((STAGES, 4, CHUNK), jnp.float32),
        "S": tile(1, VALUES, D, dtype=dtype),
        "ready": plgpu.Barrier(num_arrivals=len(inputs), num_barriers=STAGES),
        "free": plgpu.Barrier(num_barriers=STAGES),
    }
    if not want_states:
        scratch["q"] = tile(STAGES, CHUNK, D, dtype=dtype)
        scratch["A"] = tile(1, CHUNK, CHUNK, dtype=dtype)
    ssd_forward.__name__ = "ssd_states" if want_states else "ssd_forward"
    return plgpu.kernel(
        ssd_forward,
        out_type=(
            jax.ShapeDtypeStruct(shape, dtype),
            jax.ShapeDtypeStruct(state.shape, jnp.float32),
        ),
        scratch_types=list(scratch.values()),
        **launch(B, H, tiles, interpret),
    )(*inputs.values(), state)


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lines: jax.Array,
    states: jax.Array,
    do: jax.Array,
    d_final: jax.Array,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """(dq, dk, dv, d_lines, d_initial), from the last chunk to the first.

    Args:
        q, k, v, lines: as in `forward`.
        states: [B, H, N, P, D], those at the chunks' starts, from `forward`.
        do: [B, T, H, P]; d_final: [B, H, P, D] float32.

    Returns:
        dq, dk [V, B, T, H, D], to be summed over the tiles of value dims and over the heads that
        share q and k; dv [B, T, H, P]; in q's dtype.
        d_lines [V, B, H, N, 4, C] float32, to be summed over V. The gradient of a chunk's
        logarithms (natural ones) is line 0 - line 1 summed over the steps from each on, plus line 2
        summed over the steps before each, plus the sum of line 3.
        d_initial [B, H, P, D] float32.
    """
    B, H, P, D = d_final.shape
    T, dtype = k.shape[1], k.dtype
    N, tiles = T // CHUNK, P // VALUES
    inputs = {"q": q, "k": k, "v": v, "do": do, "states": states, "lines": lines}
    heads = {"q": q.shape[2], "k": k.shape[2], "v": v.shape[2], "lines": lines.shape[1], "all": H}

    def ssd_backward(*refs):
        gmem = dict(zip(inputs, refs, strict=False))
        final, dq_ref, dk_ref, dv_ref, d_lines_ref, d_initial, *rest = refs[len(inputs) :]
        smem = dict(zip(scratch, rest, strict=True))
        b, p, head = place(heads)
        h, values = head["all"], pl.ds(p * VALUES, VALUES)
        sums = smem["sums"]

        def bring(n, slot):
            time = pl.ds(n * CHUNK, CHUNK)
            for name, source in (
                ("q", gmem["q"].at[b, time, head["q"]]),
                ("k", gmem["k"].at[b, time, head["k"]]),
                ("v", gmem["v"].at[b, time, head["v"], values]),
                ("do", gmem["do"].at[b, time, h, values]),
                ("states", gmem["states"].at[b, h, n, values]),
                ("lines", gmem["lines"].at[b, head["lines"], slice(None), time]),
            ):
                plgpu.copy_gmem_to_smem(source, smem[name].at[slot], smem["ready"].at[slot])

        def step(n, slot, dS):
            names = ("q", "k", "v", "do", "states", "lines")
            q, k, v, do, S, lines = (smem[name].at[slot] for name in names)
            whole = smem["lines"][slot, INTO, CHUNK - 1]
            A, ds, dS16, dq = (unhoisted(smem[name], whole) for name in ("A", "ds", "dS", "dq"))
            time = pl.ds(n * CHUNK, CHUNK)

            # Inside the chunk.
            scores, dA = matmuls((q, turned(k)), (do, turned(v)))
            decay = ratios(lines)
            A[...] = (scores * decay).astype(dtype)
            dA *= decay
            ds[...] = dA.astype(dtype)
            i, j = indices()
            # Without the diagonal, where the decay is 1: it would drown strong decays' gradients.
            moved = jnp.where(i > j, dA * scores, 0.0)
            rows = moved.sum(axis=1)
            sums.at[1][...] = moved.sum(axis=0)
            sums.at[3][...] = (load(S) * dS).sum(axis=1) * whole
            dS16[...] = dS.astype(dtype)
            plgpu.commit_smem()

            # Where the state comes in, its share of the decay's gradient is taken from products of
            # P dims rather than D, which need fewer registers.
            to_state, dv = matmuls((k, turned(dS16)), (turned(A), do))
            to_state *= by_row(lines, OUT, VALUES)
            sums.at[2][...] = (load(v) * to_state).sum(axis=1)
            # Buffers whose contents are done with take the results.
            A[...] = (dv + to_state).astype(dtype)
            v[...] = (load(v) * by_row(lines, OUT, VALUES)).astype(dtype)
            do[...] = (load(do) * by_row(lines, INTO, VALUES)).astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(A, dv_ref.at[b, time, h, values])
            carried = matmul_sum((q, turned(S)))
            sums.at[0][...] = rows + (load(do) * carried).sum(axis=1)
            dq[...] = matmul_sum((do, S), (ds, k)).astype(dtype)
            S[...] = matmul_sum((v, dS16), (turned(ds), q)).astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(dq, dq_ref.at[p, b, time, h])
            plgpu.copy_smem_to_gmem(S, dk_ref.at[p, b, time, h])
            plgpu.copy_smem_to_gmem(sums, d_lines_ref.at[p, b, h, n])
            own = matmul_sum((turned(do), q))
            # The slot is filled anew once this returns.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            return dS * whole + own

        dS = plgpu.load(final.at[b, h, values], layout=common.MATRIX, optimized=False)
        dS = in_order(N, bring, smem["ready"], smem["free"], step, dS, reverse=True)
        plgpu.store(d_initial.at[b, h, values], dS, optimized=False)
        plgpu.wait_smem_to_gmem(0)

    scratch = {
        "q": tile(STAGES, CHUNK, D, dtype=dtype),
        "k": tile(STAGES, CHUNK, D, dtype=dtype),
        "v": tile(STAGES, CHUNK, VALUES, dtype=dtype),
        "do": tile(STAGES, CHUNK, VALUES, dtype=dtype),
        "states": tile(STAGES, VALUES, D, dtype=dtype),
        "lines": plgpu.SMEM((STAGES, 4, CHUNK), jnp.float32),
        "A": tile(1, CHUNK, CHUNK, dtype=dtype),
        "ds": tile(1, CHUNK, CHUNK, dtype=dtype),
        "dS": tile(1, VALUES, D, dtype=dtype),
        "dq": tile(1, CHUNK, D, dtype=dtype),
        "sums": plgpu.SMEM((4, CHUNK), jnp.float32),
        "ready": plgpu.Barrier(num_arrivals=len(inputs), num_barriers=STAGES),
        "free": plgpu.Barrier(num_barriers=STAGES),
    }
    by_key = jax.ShapeDtypeStruct((tiles, B, T, H, D), dtype)
    return plgpu.kernel(
        ssd_backward,
        out_type=(
            by_key,
            by_key,
            jax.ShapeDtypeStruct((B, T, H, P), dtype),
            jax.ShapeDtypeStruct((tiles, B, H, N, 4, CHUNK), jnp.float32),
            jax.ShapeDtypeStruct(d_final.shape, jnp.float32),
        ),
        scratch_types=list(scratch.values()),
        **launch(B, H, tiles, interpret),
    )(*inputs.values(), d_final)
