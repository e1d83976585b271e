"""Chunked scan of a state with a decay for each key dim, for Hopper (Mosaic GPU).

S_t = diag(a_t) S_{t-1} + k_t v_t^T and o_t = S_t^T q_t: gated linear attention (arXiv 2312.06635,
section 4). Three kernels, of which only the second goes through the chunks in order:

- `scores`: a chunk's A_ij = q_i . (b_i / b_j) k_j, j <= i, and its queries and keys with the decays
  that lead to the chunk's start and end.
- `walk`: o from A and the states at the chunks' starts. With queries for keys, output gradients for
  values and A^T for A, from the last chunk to the first, it is its own backward pass.
- `gradients`: those of q, k and the decays, from the states at both ends of a chunk.

How A is computed for decays of any strength. Steps i > j of a chunk whose indices differ first in
the bit h lie in the two halves of a stretch of 2h steps. The decay between them is that of the
steps of j's half after j, times that of the steps of i's half up to i: factors of at most 1, one
for queries and one for keys. One tile X_h holds q_i with its factor for each i of a right half and
k_j with its factor for each j of a left half, so that A is read off the products X_h X_h^T, one for
each of the 6 bits, and off q k^T where i = j. The factors are powers of sums of logarithms; each
sum is a product with a matrix of zeros and ones, and is no difference of others, so that neither
strong decays nor their gradients lose digits.

Conventions:
- q, k [B, T, heads, D], v [B, T, heads, P], bf16 or f16; heads divide H; D is 64 or 128, P a
  multiple of 64, T of the chunk; padded steps have keys and values of 0 and no decay.
- high, low [B, T, heads, D] in q's dtype: their sum is the decay's logarithm in units of log 2,
  each at least -160, which stands for a decay of 0.
- States are transposed, [P, D], float32; as an operand of products they have q's dtype.

Letters: B batch, T time, H heads, D key dim, P value dim, V tiles of value dims, C chunk, N chunks.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu import common, ssd
from pallas_kernels.gpu.ssd import CHUNK, STAGES, load, tile, turned

WIDTH = 64  # key or value dims of a tile
HALVES = (1, 2, 4, 8, 16, 32)
INTO, OUT = len(HALVES), len(HALVES) + 1  # after the halves' matrices of sums
# Thread blocks that an H100's 132 multiprocessors hold at once, and the most chunks of each.
RESIDENT, LONGEST_RUN = 264, 8


def sums(dtype) -> jax.Array:
    """[8, C, C] of 0 and 1: which steps' logarithms make up those of a step's factors.

    Those in X_h, for each h; from the chunk's start through the step; and after it to the end.
    """
    i, t = np.indices((CHUNK, CHUNK))
    halves = [((i ^ t) < h) & np.where(i & h, t <= i, t > i) for h in HALVES]
    return jnp.asarray(np.stack([*halves, t <= i, t > i]), dtype)


def products(*terms) -> tuple[jax.Array, ...]:
    """The sum of a @ b over each list of (a, b) in shared memory, float32, all in flight."""

    def run(*accs):
        for acc, pairs in zip(accs, terms, strict=True):
            for a, b in pairs:
                plgpu.wgmma(acc, a, b)
        return tuple(acc[...] for acc in accs)

    shapes = [(pairs[0][0].shape[0], pairs[0][1].shape[1]) for pairs in terms]
    return tuple(pl.run_scoped(run, *(plgpu.ACC(shape, jnp.float32) for shape in shapes)))


def factors(smem: dict, which: int) -> jax.Array:
    """The decays [C, WIDTH] whose sums are those of matrix `which`."""
    rows = smem["sums"].at[which]
    return jnp.exp2(products([(rows, smem["high"]), (rows, smem["low"])])[0])


def in_right_half(h: int) -> jax.Array:
    """Whether a row of a C x WIDTH tile is in the right half of its stretch of 2h steps."""
    row = plgpu.broadcasted_iota(jnp.int32, (CHUNK, WIDTH), 0, layout=common.MATRIX)
    return (row & h) != 0


def mixed(smem: dict, h: int, decay: jax.Array) -> jax.Array:
    """X_h: queries of right halves and keys of left ones, with their factors."""
    return jnp.where(in_right_half(h), load(smem["q"]), load(smem["k"])) * decay


def copy_in(pairs, barrier) -> None:
    """Bring all (source, target) and wait for them; the barrier counts one arrival for each."""
    for source, target in pairs:
        plgpu.copy_gmem_to_smem(source, target, barrier)
    plgpu.barrier_wait(barrier)


def all_warps(barrier) -> None:
    """Wait until all warps are here: what they have read may be overwritten by TMA."""
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)


def launch(grid: dict, interpret: bool) -> dict:
    """Arguments of plgpu.kernel, as `ssd.launch` gives them, for a grid by names."""
    options = ssd.launch(1, 1, 1, interpret)
    return options | {"grid": tuple(grid.values()), "grid_names": tuple(grid)}


def scores(
    q: jax.Array, k: jax.Array, high: jax.Array, low: jax.Array, H: int, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(A [B, H, N, C, C], q with b_i [B, T, H, D], k with b_C / b_j [B, T, H, D]), q's dtype.

    Args:
        q, k, high, low: see the module's text.
        H: heads, a multiple of all inputs' own.
        interpret: run on the CPU in GPU interpret mode.
    """
    (B, T, _, D), dtype = q.shape, q.dtype
    N = T // CHUNK
    run = max(1, min(LONGEST_RUN, B * H * N // RESIDENT))  # chunks of a thread block
    inputs = {"q": q, "k": k, "high": high, "low": low}

    def gla_scores(*refs):
        gmem = dict(zip(inputs, refs, strict=False))
        sums_ref, A_ref, q_in, k_out, *rest = refs[len(inputs) :]
        smem = dict(zip(scratch, rest, strict=True))
        b, h = lax.axis_index("batch"), lax.axis_index("heads")
        head = {name: lax.div(h, jnp.int32(H // x.shape[2])) for name, x in inputs.items()}
        copy_in([(sums_ref, smem["sums"])], smem["begun"])

        def step(n):
            time = pl.ds(n * CHUNK, CHUNK)
            A = common.zeros((CHUNK, CHUNK))
            for d in range(D // WIDTH):
                dims = pl.ds(d * WIDTH, WIDTH)
                source = lambda name, dims=dims: gmem[name].at[b, time, head[name], dims]
                copy_in([(source(name), smem[name]) for name in inputs], smem["ready"])
                A += inside(smem)
                for name, which, out in (("q", INTO, q_in), ("k", OUT, k_out)):
                    smem[name][...] = (load(smem[name]) * factors(smem, which)).astype(dtype)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(smem[name], out.at[b, time, h, dims])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                all_warps(smem["free"])
            i, j = ssd.indices()
            smem["X"].at[0][...] = jnp.where(i >= j, A, 0.0).astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(smem["X"].at[0], A_ref.at[b, h, n])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        first = lax.axis_index("runs") * run
        lax.fori_loop(first, jnp.minimum(first + run, N), lambda n, _: step(n), None)
        plgpu.wait_smem_to_gmem(0)

    def inside(smem):
        """A tile's share of A, to be masked where j > i."""
        (A,) = products([(smem["q"], turned(smem["k"]))])

        def pairs(n, A):
            h = jnp.int32(1) << n
            # In turns: other warps may still read the one before.
            X = smem["X"].at[lax.rem(n, jnp.int32(2))]
            X[...] = mixed(smem, h, factors(smem, n)).astype(dtype)
            plgpu.commit_smem()
            i, j = ssd.indices()
            return jnp.where((i ^ j) >= h, products([(X, turned(X))])[0], A)

        return lax.fori_loop(0, len(HALVES), pairs, A)

    scratch = {name: tile(CHUNK, WIDTH, dtype=dtype) for name in inputs} | {
        "sums": tile(len(HALVES) + 2, CHUNK, CHUNK, dtype=dtype),
        "X": tile(2, CHUNK, WIDTH, dtype=dtype),
        "begun": plgpu.Barrier(),
        "ready": plgpu.Barrier(num_arrivals=len(inputs)),
        "free": plgpu.Barrier(),
    }
    out = jax.ShapeDtypeStruct((B, T, H, D), dtype)
    return plgpu.kernel(
        gla_scores,
        out_type=(jax.ShapeDtypeStruct((B, H, N, CHUNK, CHUNK), dtype), out, out),
        scratch_types=list(scratch.values()),
        **launch({"batch": B, "heads": H, "runs": pl.cdiv(N, run)}, interpret),
    )(*inputs.values(), sums(dtype))


def walk(
    reader: jax.Array | None,
    writer: jax.Array,
    values: jax.Array,
    A: jax.Array | None,
    whole: jax.Array,
    state: jax.Array,
    *,
    want_states: bool = False,
    reverse: bool = False,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """out_n = reader_n S_n^T + A_n values_n and S_{n+1} = whole_n S_n + values_n^T writer_n.

    Args:
        reader, writer: [B, T, H, D], what `scores` gives: (q, k) or, in reverse, (k, q). Without a
            reader there is no `out`, and no A.
        values: [B, T, heads, P]; v or, in reverse, o's gradient.
        A: [B, H, N, C, C]; in reverse its transpose is taken.
        whole: [B, H, N, D] float32, the chunks' decays.
        state: [B, H, P, D] float32, before the first chunk; in reverse after the last.
        want_states: return the state before each chunk is passed.
        reverse: go from the last chunk to the first.

    Returns:
        out [B, T, H, P], if there is a reader; the states [B, H, N, P, D], if wanted; both in
        values' dtype. The last state [B, H, P, D] float32.
    """
    B, H, P, D = state.shape
    T, dtype = values.shape[1], values.dtype
    N = T // CHUNK
    inputs = {"writer": writer, "values": values, "whole": whole}
    if reader is not None:
        inputs |= {"reader": reader, "A": A}
    group = H // values.shape[2]
    results = {}
    if reader is not None:
        results["out"] = jax.ShapeDtypeStruct((B, T, H, P), dtype)
    if want_states:
        results["states"] = jax.ShapeDtypeStruct((B, H, N, P, D), dtype)
    results["last"] = jax.ShapeDtypeStruct(state.shape, jnp.float32)

    def gla_walk(*refs):
        names = (*inputs, "first", *results)
        gmem = dict(zip(names, refs, strict=False))
        smem = dict(zip(scratch, refs[len(names) :], strict=True))
        b, h, p = (lax.axis_index(name) for name in ("batch", "heads", "values"))
        dims = pl.ds(p * WIDTH, WIDTH)

        def bring(n, slot):
            time = pl.ds(n * CHUNK, CHUNK)
            place = {
                "reader": (b, time, h),
                "writer": (b, time, h),
                "values": (b, time, lax.div(h, jnp.int32(group)), dims),
                "A": (b, h, n),
                "whole": (b, h, n),
            }
            for name in inputs:
                source, target = gmem[name].at[place[name]], smem[name].at[slot]
                plgpu.copy_gmem_to_smem(source, target, smem["ready"].at[slot])

        def step(n, slot, S):
            own = {name: smem[name].at[slot] for name in inputs}
            S16 = smem["S"]
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            S16[...] = S.astype(dtype)
            decay = plgpu.load(own["whole"], layout=common.PER_COL)
            S *= common.along_cols(decay, S.shape)
            plgpu.commit_smem()
            if want_states:
                plgpu.copy_smem_to_gmem(S16, gmem["states"].at[b, h, n, dims])
            if reader is not None:
                A = turned(own["A"]) if reverse else own["A"]
                (out,) = products([(own["reader"], turned(S16)), (A, own["values"])])
                smem["out"][...] = out.astype(dtype)
                plgpu.commit_smem()
                target = gmem["out"].at[b, pl.ds(n * CHUNK, CHUNK), h, dims]
                plgpu.copy_smem_to_gmem(smem["out"], target)
            (new,) = products([(turned(own["values"]), own["writer"])])
            return S + new

        S = plgpu.load(gmem["first"].at[b, h, dims], layout=common.MATRIX, optimized=False)
        S = ssd.in_order(N, bring, smem["ready"], smem["free"], step, S, reverse=reverse)
        plgpu.store(gmem["last"].at[b, h, dims], S, optimized=False)
        plgpu.wait_smem_to_gmem(0)

    scratch = {
        "writer": tile(STAGES, CHUNK, D, dtype=dtype),
        "values": tile(STAGES, CHUNK, WIDTH, dtype=dtype),
        "whole": plgpu.SMEM((STAGES, D), jnp.float32),
        "S": tile(WIDTH, D, dtype=dtype),
        "ready": plgpu.Barrier(num_arrivals=len(inputs), num_barriers=STAGES),
        "free": plgpu.Barrier(num_barriers=STAGES),
    }
    if reader is not None:
        scratch["reader"] = tile(STAGES, CHUNK, D, dtype=dtype)
        scratch["A"] = tile(STAGES, CHUNK, CHUNK, dtype=dtype)
        scratch["out"] = tile(CHUNK, WIDTH, dtype=dtype)
    gla_walk.__name__ = "gla_" + ("back" if reverse else "states" if want_states else "forward")
    return plgpu.kernel(
        gla_walk,
        out_type=tuple(results.values()),
        scratch_types=list(scratch.values()),
        **launch({"batch": B, "heads": H, "values": P // WIDTH}, interpret),
    )(*inputs.values(), state)


def gradients(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    high: jax.Array,
    low: jax.Array,
    do: jax.Array,
    whole: jax.Array,
    S: jax.Array,
    dS: jax.Array,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(dq, dk, da) [V, B, T, H, D], to be summed over V; da float32, of natural logarithms.

    Args:
        q, k, v, high, low: see the module's text; do: [B, T, H, P].
        whole: [B, H, N, D] float32, the chunks' decays.
        S, dS: [B, H, N, P, D], the states before the chunks and the gradients of those after them.
    """
    (B, H, N, P, D), dtype = S.shape, q.dtype
    parts = 2 if P % (2 * WIDTH) == 0 else 1  # tiles of values of a thread block
    V = P // (parts * WIDTH)
    grid = {"batch": B, "heads": H * D // WIDTH, "chunks": N, "values": V}
    inputs = {"q": q, "k": k, "high": high, "low": low, "v": v, "do": do, "S": S, "dS": dS}
    by_time = ("q", "k", "high", "low", "v", "do")

    def gla_gradients(*refs):
        gmem = dict(zip(inputs, refs, strict=False))
        whole_ref, sums_ref, dq_ref, dk_ref, da_ref, *rest = refs[len(inputs) :]
        smem = dict(zip(scratch, rest, strict=True))
        b, hd, n, r = (lax.axis_index(name) for name in grid)
        h, d = lax.div(hd, jnp.int32(D // WIDTH)), lax.rem(hd, jnp.int32(D // WIDTH))
        head = {name: lax.div(h, jnp.int32(H // inputs[name].shape[2])) for name in by_time}
        time, dims = pl.ds(n * CHUNK, CHUNK), pl.ds(d * WIDTH, WIDTH)

        def sources():
            yield sums_ref, smem["sums"]
            for name in ("q", "k", "high", "low"):
                yield gmem[name].at[b, time, head[name], dims], smem[name]
            for part in range(parts):
                values = pl.ds((r * parts + part) * WIDTH, WIDTH)
                for i, name in enumerate(("v", "do", "S", "dS")):
                    if name in by_time:
                        source = gmem[name].at[b, time, head[name], values]
                    else:
                        source = gmem[name].at[b, h, n, values, dims]
                    yield source, smem["tiles"].at[i * parts + part]

        copy_in(sources(), smem["ready"])
        decay = plgpu.load(whole_ref.at[b, h, n, dims], layout=common.PER_COL, optimized=False)
        dq, dk = from_pairs(smem, *from_states(smem, decay))
        smem["q"][...] = dq.astype(dtype)
        smem["k"][...] = dk.astype(dtype)
        plgpu.commit_smem()
        place = r, b, time, h, dims
        plgpu.copy_smem_to_gmem(smem["q"], dq_ref.at[place])
        plgpu.copy_smem_to_gmem(smem["k"], dk_ref.at[place])
        moved = [smem["tiles"].at[n] for n in range(len(HALVES))]
        moved += [smem["moved"].at[n] for n in range(2)]
        (da,) = products([(turned(smem["sums"].at[n]), x) for n, x in enumerate(moved)])
        d_whole = plgpu.load(smem["d_whole"], layout=common.PER_COL)
        plgpu.store(da_ref.at[place], da + common.along_cols(d_whole, da.shape), optimized=False)
        plgpu.wait_smem_to_gmem(0)

    def from_states(smem, decay):
        """(dq, dk) of the states and of pairs i = j."""
        tiles = lambda i: [smem["tiles"].at[i * parts + part] for part in range(parts)]
        v, do, S, dS = map(tiles, range(4))
        pairs = lambda a, b: list(zip(a, b, strict=True))
        d_whole = sum((load(x) * load(y)).sum(axis=0) for x, y in pairs(S, dS))
        smem["d_whole"][...] = d_whole * decay
        turn = lambda xs: [turned(x) for x in xs]
        dA, dA_turned = products(pairs(do, turn(v)), pairs(v, turn(do)))
        i, j = ssd.indices()
        diagonal = common.along_rows(jnp.where(i == j, dA, 0.0).sum(axis=1), (CHUNK, WIDTH))
        smem["both"][...] = jnp.where(i > j, dA, dA_turned).astype(dtype)

        def one(x, other, terms, which):
            (d,) = products(terms)
            d *= factors(smem, which)
            smem["moved"].at[which - INTO][...] = (load(smem[x]) * d).astype(dtype)
            return d + diagonal * load(smem[other])

        return one("q", "k", pairs(do, S), INTO), one("k", "q", pairs(v, dS), OUT)

    def from_pairs(smem, dq, dk):
        """(dq, dk) with the shares of pairs of steps i > j."""
        X, d_here = (smem["tiles"].at[len(HALVES) + n] for n in range(2))

        def pairs(n, carry):
            dq, dk = carry
            h = jnp.int32(1) << n
            decay = factors(smem, n)
            # Tiles of values, or of the half before, are overwritten: all warps are done with them.
            plgpu.commit_smem()
            X[...] = mixed(smem, h, decay).astype(dtype)
            i, j = ssd.indices()
            here = (i >> n) == ((j >> n) ^ 1)
            d_here[...] = jnp.where(here, load(smem["both"]), 0.0).astype(dtype)
            plgpu.commit_smem()
            (dX,) = products([(d_here, X)])
            smem["tiles"].at[n][...] = (load(X) * dX).astype(dtype)
            dX *= decay
            right = in_right_half(h)
            return dq + jnp.where(right, dX, 0.0), dk + jnp.where(right, 0.0, dX)

        return lax.fori_loop(0, len(HALVES), pairs, (dq, dk))

    scratch = {name: tile(CHUNK, WIDTH, dtype=dtype) for name in ("q", "k", "high", "low")} | {
        # First v, do, S and dS by parts; then `moved` of each h, X_h and its pairs' gradient.
        "tiles": tile(len(HALVES) + 2, CHUNK, WIDTH, dtype=dtype),
        "moved": tile(2, CHUNK, WIDTH, dtype=dtype),
        "both": tile(CHUNK, CHUNK, dtype=dtype),
        "sums": tile(len(HALVES) + 2, CHUNK, CHUNK, dtype=dtype),
        "d_whole": plgpu.SMEM((WIDTH,), jnp.float32),
        "ready": plgpu.Barrier(num_arrivals=5 + 4 * parts),
    }
    shape = (V, B, N * CHUNK, H, D)
    by_key = jax.ShapeDtypeStruct(shape, dtype)
    return plgpu.kernel(
        gla_gradients,
        out_type=(by_key, by_key, jax.ShapeDtypeStruct(shape, jnp.float32)),
        scratch_types=list(scratch.values()),
        **launch(grid, interpret),
    )(*inputs.values(), whole, sums(dtype))
