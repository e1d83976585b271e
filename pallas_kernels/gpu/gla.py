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
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from tilescan.pallas_kernels.gpu import common, ssd
from tilescan.pallas_kernels.gpu.ssd import CHUNK, STAGES, load, tile, turned

WIDTH = 64  # key or value dims of a tile
HALVES = 6  # h = 1, 2, 4 .. C / 2
LEFT, RIGHT = 0, 1  # of a stretch of 2h steps
# Thread blocks that an H100's 132 multiprocessors hold at once, and the most chunks of each.
RESIDENT, LONGEST_RUN = 264, 8


def ones(n, half: int = LEFT) -> jax.Array:
    """The matrix [C, C] of 0 and 1 whose product with logarithms sums up those of X_h, h = 2^n.

    h = C stands for the whole chunk: as a left half, its row i sums up the steps after i, and as a
    right one those up to i.
    """
    i, j = (x + half * CHUNK for x in ssd.indices())
    start = (i >> n) << n
    right = (i & (1 << n)) != 0
    first, end = jnp.where(right, start, i + 1), jnp.where(right, i + 1, start + (1 << n))
    return jnp.where((j >= first) & (j < end), 1.0, 0.0)


def products(*terms) -> tuple[jax.Array, ...]:
    """The sum of a @ b over each list of (a, b) in shared memory, float32, all in flight."""

    def run(*accs):
        for acc, pairs in zip(accs, terms, strict=True):
            for a, b in pairs:
                plgpu.wgmma(acc, a, b)
        return tuple(acc[...] for acc in accs)

    shapes = [(pairs[0][0].shape[0], pairs[0][1].shape[1]) for pairs in terms]
    return tuple(pl.run_scoped(run, *(plgpu.ACC(shape, jnp.float32) for shape in shapes)))


def add_to(total, *terms) -> None:
    """total += the sum of a @ b, for a float32 tile in shared memory."""
    total[...] = plgpu.load(total, layout=common.MATRIX) + products(terms)[0]


def factors(smem: dict, rows) -> jax.Array:
    """The decays [C, WIDTH] whose logarithms' sums are those by the matrix `rows`."""
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
        A_ref, q_in, k_out, *rest = refs[len(inputs) :]
        smem = dict(zip(scratch, rest, strict=True))
        b, h = lax.axis_index("batch"), lax.axis_index("heads")
        head = {name: lax.div(h, jnp.int32(H // x.shape[2])) for name, x in inputs.items()}

        @pl.loop(0, HALVES + 1)
        def _(n):
            smem["ones"].at[n][...] = ones(n).astype(dtype)

        smem["ones"].at[HALVES + 1][...] = ones(HALVES, RIGHT).astype(dtype)
        plgpu.commit_smem()

        def step(n):
            time = pl.ds(n * CHUNK, CHUNK)
            A = common.zeros((CHUNK, CHUNK))
            for d in range(D // WIDTH):
                dims = pl.ds(d * WIDTH, WIDTH)
                source = lambda name, dims=dims: gmem[name].at[b, time, head[name], dims]
                copy_in([(source(name), smem[name]) for name in inputs], smem["ready"])
                A += inside(smem)
                for name, which, out in (("q", HALVES + 1, q_in), ("k", HALVES, k_out)):
                    decay = factors(smem, smem["ones"].at[which])
                    smem[name][...] = (load(smem[name]) * decay).astype(dtype)
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
            X[...] = mixed(smem, h, factors(smem, smem["ones"].at[n])).astype(dtype)
            plgpu.commit_smem()
            i, j = ssd.indices()
            return jnp.where((i ^ j) >= h, products([(X, turned(X))])[0], A)

        return lax.fori_loop(0, HALVES, pairs, A)

    scratch = {name: tile(CHUNK, WIDTH, dtype=dtype) for name in inputs} | {
        "ones": tile(HALVES + 2, CHUNK, CHUNK, dtype=dtype),
        "X": tile(2, CHUNK, WIDTH, dtype=dtype),
        "ready": plgpu.Barrier(num_arrivals=len(inputs)),
        "free": plgpu.Barrier(),
    }
    out = jax.ShapeDtypeStruct((B, T, H, D), dtype)
    return plgpu.kernel(
        gla_scores,
        out_type=(jax.ShapeDtypeStruct((B, H, N, CHUNK, CHUNK), dtype), out, out),
        scratch_types=list(scratch.values()),
        **launch({"batch": B, "heads": H, "runs": pl.cdiv(N, run)}, interpret),
    )(*inputs.values())


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
        whole_ref, dq_ref, dk_ref, da_ref, *rest = refs[len(inputs) :]
        smem = dict(zip(scratch, rest, strict=True))
        b, hd, n, r = (lax.axis_index(name) for name in grid)
        h, d = lax.div(hd, jnp.int32(D // WIDTH)), lax.rem(hd, jnp.int32(D // WIDTH))
        head = {name: lax.div(h, jnp.int32(H // inputs[name].shape[2])) for name in by_time}
        time, dims = pl.ds(n * CHUNK, CHUNK), pl.ds(d * WIDTH, WIDTH)

        def sources():
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
        place = r, b, time, hd
        plgpu.copy_smem_to_gmem(smem["q"], dq_ref.at[place])
        plgpu.copy_smem_to_gmem(smem["k"], dk_ref.at[place])
        plgpu.copy_smem_to_gmem(smem["da"], da_ref.at[place])
        plgpu.wait_smem_to_gmem(0)

    def from_states(smem, decay):
        """(dq, dk), and da in shared memory, of the states and of pairs i = j."""
        tiles = lambda i: [smem["tiles"].at[i * parts + part] for part in range(parts)]
        v, do, S, dS = map(tiles, range(4))
        terms = lambda a, b: list(zip(a, b, strict=True))
        turn = lambda xs: [turned(x) for x in xs]
        d_whole = sum((load(x) * load(y)).sum(axis=0) for x, y in terms(S, dS))
        smem["da"][...] = common.along_cols(d_whole * decay, (CHUNK, WIDTH))
        dA, dA_turned = products(terms(do, turn(v)), terms(v, turn(do)))
        i, j = ssd.indices()
        diagonal = common.along_rows(jnp.where(i == j, dA, 0.0).sum(axis=1), (CHUNK, WIDTH))
        both = jnp.where(i > j, dA, dA_turned).astype(dtype)
        dq, dk = products(terms(do, S), terms(v, dS))
        plgpu.commit_smem()  # all warps are done with the tiles, which are others from here on
        smem["tiles"].at[5][...] = both
        up_to, after, moved_q, moved_k = (smem["tiles"].at[n] for n in range(4))
        up_to[...] = ones(HALVES, RIGHT).astype(dtype)
        after[...] = ones(HALVES).astype(dtype)
        plgpu.commit_smem()
        dq *= factors(smem, up_to)
        moved_q[...] = (load(smem["q"]) * dq).astype(dtype)
        dk *= factors(smem, after)
        moved_k[...] = (load(smem["k"]) * dk).astype(dtype)
        plgpu.commit_smem()
        add_to(smem["da"], (turned(up_to), moved_q), (turned(after), moved_k))
        return dq + diagonal * load(smem["k"]), dk + diagonal * load(smem["q"])

    def from_pairs(smem, dq, dk):
        """(dq, dk), and da in shared memory, with the shares of pairs of steps i > j."""
        moved, X, d_here, both = (smem["tiles"].at[n] for n in range(2, 6))

        def pairs(n, carry):
            dq, dk = carry
            h = jnp.int32(1) << n
            rows = smem["tiles"].at[lax.rem(n, jnp.int32(2))]
            rows[...] = ones(n).astype(dtype)
            plgpu.commit_smem()
            decay = factors(smem, rows)
            X[...] = mixed(smem, h, decay).astype(dtype)
            i, j = ssd.indices()
            here = (i >> n) == ((j >> n) ^ 1)
            d_here[...] = jnp.where(here, load(both), 0.0).astype(dtype)
            plgpu.commit_smem()
            (dX,) = products([(d_here, X)])
            moved[...] = (load(X) * dX).astype(dtype)
            plgpu.commit_smem()
            dX *= decay
            right = jnp.where(in_right_half(h), 1.0, 0.0)
            dq += right * dX
            dk += (1.0 - right) * dX
            add_to(smem["da"], (turned(rows), moved))
            return dq, dk

        # The first matrix is written where all warps read another until here.
        plgpu.commit_smem()
        return lax.fori_loop(0, HALVES, pairs, (dq, dk))

    scratch = {name: tile(CHUNK, WIDTH, dtype=dtype) for name in ("q", "k", "high", "low")} | {
        # First v, do, S and dS by parts; then six for the products inside the chunk.
        "tiles": tile(max(4 * parts, 6), CHUNK, WIDTH, dtype=dtype),
        "da": plgpu.SMEM(
            (CHUNK, WIDTH),
            jnp.float32,
            transforms=(plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128)),
        ),
        "ready": plgpu.Barrier(num_arrivals=4 + 4 * parts),
    }
    shape = (V, B, N * CHUNK, H * D // WIDTH, WIDTH)
    by_key = jax.ShapeDtypeStruct(shape, dtype)
    results = plgpu.kernel(
        gla_gradients,
        out_type=(by_key, by_key, jax.ShapeDtypeStruct(shape, jnp.float32)),
        scratch_types=list(scratch.values()),
        **launch(grid, interpret),
    )(*inputs.values(), whole)
    return tuple(x.reshape(V, B, N * CHUNK, H, D) for x in results)
