"""Chunked scan of a decaying matrix state for Hopper (Mosaic GPU): S_t = a_t S_{t-1} + k_t v_t^T.

With o_t = S_t^T q_t this is Mamba-2's state space duality (arXiv 2405.21060, section 6): all key
dimensions share a decay. Everything inside a chunk of 64 steps is a product on the tensor cores
(wgmma); the chunks follow each other, with the state in registers. One warpgroup works on a batch
row, a head and 64 value dims; TMA copies a chunk's tiles while the one before is computed.

Conventions of all kernels:
- The state is transposed, [P, D], float32; as an operand of products it is rounded to 16 bits.
- `lines` [B, H or 1, 4, T] float32 holds a chunk's decays, with b_i the cumulative decay from the
  chunk's start, inclusive: two parts of log2 b_i, the first of which has exact differences, then
  b_i itself and b_C / b_j. Ratios b_i / b_j are powers of differences that are not positive, so
  nothing overflows.
- D and P are multiples of 64, T of the chunk; padded steps have keys and values of 0 and no decay.

Dimensions: B batch, T time, H heads, D key dim, P value dim, V tiles of 64 value dims,
C chunk, N chunks.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from tilescan.pallas_kernels.gpu import common
from tilescan.pallas_kernels.gpu.common import Index, Ref

CHUNK = 64
VALUES = 64  # value dims of a thread block
STAGES = 2
COARSE, FINE, INTO, OUT = range(4)
HIDDEN = -1.0e4  # a logarithm whose power is 0


def tile(*shape: int, dtype: jax.typing.DTypeLike) -> pl.MemoryRef:
    """Returns shared memory for 16-bit tiles, the last dim a multiple of 64."""
    return common.smem_tile(shape, dtype)


def load(smem: Ref) -> Float[Array, "rows cols"]:
    """Returns a 16-bit tile as float32 in registers."""
    return plgpu.load(smem, layout=common.MATRIX).astype(jnp.float32)


def matmuls(*terms: tuple[Ref, Ref]) -> tuple[Float[Array, "_ _"], ...]:
    """Returns a @ b in float32 for each (a, b) in shared memory, all in flight together."""

    def multiply(*accs):
        for acc, (a, b) in zip(accs, terms, strict=True):
            plgpu.wgmma(acc, a, b)
        return tuple(acc[...] for acc in accs)

    shapes = [(a.shape[0], b.shape[1]) for a, b in terms]
    return tuple(pl.run_scoped(multiply, *(plgpu.ACC(shape, jnp.float32) for shape in shapes)))


def matmul_sum(*terms: tuple[Ref, Ref]) -> Float[Array, "rows cols"]:
    """Returns the sum of a @ b in float32 over (a, b) in shared memory, in one accumulator."""

    def multiply(acc):
        for a, b in terms:
            plgpu.wgmma(acc, a, b)
        return acc[...]

    shape = terms[0][0].shape[0], terms[0][1].shape[1]
    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def transposed(smem: Ref) -> Ref:
    """Returns the transposed view of a tile."""
    return smem.transpose((1, 0))


def indices() -> tuple[Int[Array, "C C"], Int[Array, "C C"]]:
    """Returns (i, j) of a C x C tile."""
    return tuple(
        plgpu.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis, layout=common.MATRIX)
        for axis in (0, 1)
    )


def ratios(lines: Ref) -> Float[Array, "C C"]:
    """Returns b_i / b_j for j <= i, else 0, from a chunk's `lines` [4, C] in shared memory."""
    shape = (CHUNK, CHUNK)
    difference = common.zeros(shape)
    for part in (COARSE, FINE):
        row = plgpu.load(lines.at[part], layout=common.PER_ROW)
        col = plgpu.load(lines.at[part], layout=common.PER_COL)
        difference += common.along_rows(row, shape) - common.along_cols(col, shape)
    i, j = indices()
    return jnp.exp2(jnp.where(i >= j, difference, HIDDEN))


def by_row(lines: Ref, part: int, width: int) -> Float[Array, "C {width}"]:
    """Returns one of a chunk's `lines`, a value for each step, along the rows of a tile."""
    line = plgpu.load(lines.at[part], layout=common.PER_ROW)
    return common.along_rows(line, (CHUNK, width))


def unhoisted(smem: Ref, whole: Float[Array, ""]) -> Ref:
    """Returns the only part of a buffer [1, ...], by an index that the compiler can't know is 0.

    Descriptors and addresses of one buffer after the other would else be computed before the loop
    over chunks, and held in registers. `whole` is a chunk's decay, from memory.
    """
    return smem.at[jnp.where(whole < 0, 1, 0)]


def block_indices(
    heads: dict[str, int],
) -> tuple[Int[Array, ""], Int[Array, ""], dict[str, Int[Array, ""]]]:
    """Returns (batch, value tile, head of each operand) of this thread block."""
    b, h, p = (lax.axis_index(name) for name in ("batch", "heads", "values"))
    H = heads["all"]
    return b, p, {name: lax.div(h, jnp.int32(H // n)) for name, n in heads.items()}


def launch(batch: int, heads: int, tiles: int, interpret: bool) -> dict:
    """Returns the arguments of plgpu.kernel that the scans share.

    All layouts are given, so the other lowering, which infers them, has nothing to infer.
    """
    return {
        "grid": (batch, heads, tiles),
        "grid_names": ("batch", "heads", "values"),
        "compiler_params": plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        "interpret": plgpu.InterpretGPUParams() if interpret else None,
    }


def in_order(
    n_chunks: int,
    bring: Callable[[Index, Index], None],
    ready: Ref,
    free: Ref,
    step: Callable[[Index, Index, jax.Array], jax.Array],
    carry: Float[Array, "rows cols"],
    reverse: bool = False,
) -> Float[Array, "rows cols"]:
    """Returns the carry of step(chunk, slot, carry) for all chunks, copied STAGES - 1 ahead.

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
    q: Float[Array, "B T q_heads D"] | None,
    k: Float[Array, "B T k_heads D"],
    v: Float[Array, "B T v_heads P"],
    lines: Float[Array, "B a_heads 4 T"],
    state: Float[Array, "B H P D"],
    *,
    want_states: bool = False,
    interpret: bool = False,
) -> tuple[Float[Array, "B T H P"] | Float[Array, "B H N P D"], Float[Array, "B H P D"]]:
    """Returns the outputs in k's dtype and the final state in float32; or the states for outputs.

    Args:
        q, k, v: bf16 or f16, each of heads that divide H; q is None with want_states. D is 64 or
            128.
        lines: float32, see the module's text.
        state: float32.
        want_states: return the states at the chunks' starts, in k's dtype, instead of outputs.
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
        b, p, head = block_indices(heads)
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
            # The chunk's operands, its whole decay b_C, and the state rounded to 16 bits.
            lines = smem["lines"].at[slot]
            k, v = smem["k"].at[slot], smem["v"].at[slot]
            whole = smem["lines"][slot, INTO, CHUNK - 1]
            S16 = unhoisted(smem["S"], whole)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            S16[...] = S.astype(dtype)
            # A_ij = q_i . k_j b_i / b_j for j <= i.
            if not want_states:
                q, A = smem["q"].at[slot], unhoisted(smem["A"], whole)
                scores = matmul_sum((q, transposed(k)))
                A[...] = (scores * ratios(lines)).astype(dtype)
            plgpu.commit_smem()
            # o_i = b_i S q_i + sum over j of A_ij v_j.
            if want_states:
                plgpu.copy_smem_to_gmem(S16, out.at[b, head["all"], n, values])
            else:
                carried, o = matmuls((q, transposed(S16)), (A, v))
                o += carried * by_row(lines, INTO, VALUES)
                # The scores and the values are no longer needed: their buffers are written again.
                A[...] = o.astype(dtype)
                plgpu.commit_smem()
                target = out.at[b, pl.ds(n * CHUNK, CHUNK), head["all"], values]
                plgpu.copy_smem_to_gmem(A, target)
            # S_{n+1} = b_C S_n + sum over j of (b_C / b_j) v_j k_j^T.
            v[...] = (load(v) * by_row(lines, OUT, VALUES)).astype(dtype)
            plgpu.commit_smem()
            own = matmul_sum((transposed(v), k))
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
    q: Float[Array, "B T q_heads D"],
    k: Float[Array, "B T k_heads D"],
    v: Float[Array, "B T v_heads P"],
    lines: Float[Array, "B a_heads 4 T"],
    states: Float[Array, "B H N P D"],
    do: Float[Array, "B T H P"],
    d_final: Float[Array, "B H P D"],
    *,
    interpret: bool = False,
) -> tuple[
    Float[Array, "V B T H D"],
    Float[Array, "V B T H D"],
    Float[Array, "B T H P"],
    Float[Array, "V B H N 4 C"],
    Float[Array, "B H P D"],
]:
    """Returns (dq, dk, dv, d_lines, d_initial), computed from the last chunk to the first.

    dq and dk are to be summed over the tiles of value dims and over the heads that share q and k;
    they and dv are in q's dtype. d_lines, float32, is to be summed over V: the gradient of a
    chunk's logarithms (natural ones) is line 0 - line 1 summed over the steps from each on, plus
    line 2 summed over the steps before each, plus the sum of line 3. d_initial is float32.

    Args:
        q, k, v, lines: as in `forward`.
        states: those at the chunks' starts, from `forward`.
        do: the outputs' gradient, in q's dtype.
        d_final: the final state's gradient, float32.
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
        b, p, head = block_indices(heads)
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

            # Inside the chunk: A_ij = q_i . k_j b_i / b_j, and its gradient from do and v.
            scores, dA = matmuls((q, transposed(k)), (do, transposed(v)))
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
            to_state, dv = matmuls((k, transposed(dS16)), (transposed(A), do))
            to_state *= by_row(lines, OUT, VALUES)
            sums.at[2][...] = (load(v) * to_state).sum(axis=1)
            # Buffers whose contents are no longer needed take the results.
            A[...] = (dv + to_state).astype(dtype)
            v[...] = (load(v) * by_row(lines, OUT, VALUES)).astype(dtype)
            do[...] = (load(do) * by_row(lines, INTO, VALUES)).astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(A, dv_ref.at[b, time, h, values])
            carried = matmul_sum((q, transposed(S)))
            sums.at[0][...] = rows + (load(do) * carried).sum(axis=1)
            dq[...] = matmul_sum((do, S), (ds, k)).astype(dtype)
            S[...] = matmul_sum((v, dS16), (transposed(ds), q)).astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(dq, dq_ref.at[p, b, time, h])
            plgpu.copy_smem_to_gmem(S, dk_ref.at[p, b, time, h])
            plgpu.copy_smem_to_gmem(sums, d_lines_ref.at[p, b, h, n])
            own = matmul_sum((transposed(do), q))
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
