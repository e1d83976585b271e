"""Chunked scan of a state with a decay for each key dim, for Hopper (Mosaic GPU).

S_t = diag(a_t) S_{t-1} + k_t v_t^T and o_t = S_t^T q_t: gated linear attention (arXiv 2312.06635,
section 4). Three kernels, of which only the second goes through the chunks in order:

- `scores`: a chunk's A_ij = q_i . (b_i / b_j) k_j, j <= i, and its queries and keys with the decays
  that lead to the chunk's start and end.
- `walk`: o from A and the states at the chunks' starts. With queries for keys, output gradients for
  values and A^T for A, from the last chunk to the first, it is its own backward pass.
- `gradients`: those of q, k and the decays, from the states at both ends of a chunk.

How A is computed for decays of any strength. Steps i > j of a chunk whose indices differ first in
the bit h lie in the two halves of one interval of 2h steps. The decay between them is that of the
steps of j's half after j, times that of the steps of i's half up to i: factors of at most 1, one
for queries and one for keys. One tile X_h holds q_i with its factor for each i of a right half and
k_j with its factor for each j of a left half, so that A's entries are those of the products
X_h X_h^T, one for each of the 6 bits, and of q k^T where i = j. The factors are powers of sums of
logarithms; each sum is a product with a matrix of zeros and ones, and is not a difference of
others, so that neither strong decays nor their gradients lose digits.

Conventions:
- q, k and v are bf16 or f16; their heads divide H; D is 64 or 128, P a multiple of 64, T of the
  chunk; padded steps have keys and values of 0 and no decay.
- high and low are in q's dtype: their sum is the decay's logarithm in units of log 2, each at least
  -160, which stands for a decay of 0.
- States are transposed, [P, D], float32; as an operand of products they have q's dtype.

Dimensions: B batch, T time, H heads, D key dim, P value dim, V tiles of value dims, C chunk,
N chunks; width: WIDTH dims of a tile.
"""

from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float

from tilescan.pallas_kernels.gpu import common, ssd
from tilescan.pallas_kernels.gpu.common import Index, Ref
from tilescan.pallas_kernels.gpu.ssd import CHUNK, STAGES, load, tile, transposed

WIDTH = 64  # key or value dims of a tile
HALVES = 6  # h = 1, 2, 4 .. C / 2
LEFT, RIGHT = 0, 1  # halves of an interval of 2h steps
# Thread blocks that an H100's 132 multiprocessors hold at once, and the most chunks of each.
RESIDENT, LONGEST_RUN = 264, 8


def ones(n: Index, half: int = LEFT) -> Float[Array, "C C"]:
    """Returns the matrix of 0 and 1 whose product with logarithms sums up those of X_h, h = 2^n.

    h = C stands for the whole chunk: as a left half, its row i sums up the steps after i, and as a
    right one those up to i.
    """
    i, j = (x + half * CHUNK for x in ssd.indices())
    start = (i >> n) << n
    right = (i & (1 << n)) != 0
    first, end = jnp.where(right, start, i + 1), jnp.where(right, i + 1, start + (1 << n))
    return jnp.where((j >= first) & (j < end), 1.0, 0.0)


def products(*terms: Sequence[tuple[Ref, Ref]]) -> tuple[Float[Array, "_ _"], ...]:
    """Returns the sum of a @ b over each list of (a, b) in shared memory, in float32."""

    def multiply(*accs):
        for acc, pairs in zip(accs, terms, strict=True):
            for a, b in pairs:
                plgpu.wgmma(acc, a, b)
        return tuple(acc[...] for acc in accs)

    shapes = [(pairs[0][0].shape[0], pairs[0][1].shape[1]) for pairs in terms]
    return tuple(pl.run_scoped(multiply, *(plgpu.ACC(shape, jnp.float32) for shape in shapes)))


def add_to(total: Ref, *terms: tuple[Ref, Ref]) -> None:
    """Adds the sum of a @ b to `total`, a float32 tile in shared memory."""
    total[...] = plgpu.load(total, layout=common.MATRIX) + products(terms)[0]


def factors(smem: dict[str, Ref], rows: Ref) -> Float[Array, "C width"]:
    """Returns the decays whose logarithms' sums are those by the matrix `rows`."""
    return jnp.exp2(products([(rows, smem["high"]), (rows, smem["low"])])[0])


def in_right_half(h: Index) -> Bool[Array, "C width"]:
    """Returns whether a row of a tile is in the right half of its interval of 2h steps."""
    row = plgpu.broadcasted_iota(jnp.int32, (CHUNK, WIDTH), 0, layout=common.MATRIX)
    return (row & h) != 0


def mixed(
    smem: dict[str, Ref], h: Index, decay: Float[Array, "C width"]
) -> Float[Array, "C width"]:
    """Returns X_h: queries of right halves and keys of left ones, with their factors."""
    return jnp.where(in_right_half(h), load(smem["q"]), load(smem["k"])) * decay


def copy_in(pairs: Iterable[tuple[Ref, Ref]], barrier: Ref) -> None:
    """Copies all (source, target) and waits for them; the barrier counts one arrival for each."""
    for source, target in pairs:
        plgpu.copy_gmem_to_smem(source, target, barrier)
    plgpu.barrier_wait(barrier)


def all_warps(barrier: Ref) -> None:
    """Waits for all warps, after which TMA may overwrite what they have read."""
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)


def launch(grid: dict, interpret: bool) -> dict:
    """Returns the arguments of plgpu.kernel, as `ssd.launch` does, for a grid by names."""
    options = ssd.launch(1, 1, 1, interpret)
    return options | {"grid": tuple(grid.values()), "grid_names": tuple(grid)}


def scores(
    q: Float[Array, "B T q_heads D"],
    k: Float[Array, "B T k_heads D"],
    high: Float[Array, "B T a_heads D"],
    low: Float[Array, "B T a_heads D"],
    H: int,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "B {H} N C C"], Float[Array, "B T {H} D"], Float[Array, "B T {H} D"]]:
    """Returns (A, q with b_i, k with b_C / b_j), in q's dtype.

    Args:
        q, k, high, low: see the module's text.
        H: heads, a multiple of all inputs' own.
        interpret: run on the CPU in GPU interpret mode.
    """
    (B, T, _, D), dtype = q.shape, q.dtype
    N = T // CHUNK
    chunks_per_block = max(1, min(LONGEST_RUN, B * H * N // RESIDENT))
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
            # A of one chunk, summed over tiles of key dims; q and k with their decays on the way.
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

        first = lax.axis_index("runs") * chunks_per_block
        lax.fori_loop(first, jnp.minimum(first + chunks_per_block, N), lambda n, _: step(n), None)
        plgpu.wait_smem_to_gmem(0)

    def inside(smem):
        """Returns a tile's share of A, to be masked where j > i."""
        (A,) = products([(smem["q"], transposed(smem["k"]))])

        def pairs(n, A):
            h = jnp.int32(1) << n
            # Two buffers alternate: other warps may still read the one before.
            X = smem["X"].at[lax.rem(n, jnp.int32(2))]
            X[...] = mixed(smem, h, factors(smem, smem["ones"].at[n])).astype(dtype)
            plgpu.commit_smem()
            i, j = ssd.indices()
            return jnp.where((i ^ j) >= h, products([(X, transposed(X))])[0], A)

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
        **launch({"batch": B, "heads": H, "runs": pl.cdiv(N, chunks_per_block)}, interpret),
    )(*inputs.values())


def walk(
    reader: Float[Array, "B T H D"] | None,
    writer: Float[Array, "B T H D"],
    values: Float[Array, "B T v_heads P"],
    A: Float[Array, "B H N C C"] | None,
    whole: Float[Array, "B H N D"],
    state: Float[Array, "B H P D"],
    *,
    want_states: bool = False,
    reverse: bool = False,
    interpret: bool = False,
) -> tuple[Float[Array, "..."], ...]:
    """Computes out_n = reader_n S_n^T + A_n values_n, S_{n+1} = whole_n S_n + values_n^T writer_n.

    Args:
        reader, writer: what `scores` gives: (q, k) or, in reverse, (k, q). Without a reader there
            is no `out`, and no A.
        values: v or, in reverse, o's gradient.
        A: in reverse its transpose is taken.
        whole: float32, the chunks' decays.
        state: float32, before the first chunk; in reverse after the last.
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
            # The state before the chunk as an operand, and decayed by the whole chunk.
            own = {name: smem[name].at[slot] for name in inputs}
            S16 = smem["S"]
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            S16[...] = S.astype(dtype)
            decay = plgpu.load(own["whole"], layout=common.PER_COL)
            S *= common.along_cols(decay, S.shape)
            plgpu.commit_smem()
            if want_states:
                plgpu.copy_smem_to_gmem(S16, gmem["states"].at[b, h, n, dims])
            # out = reader S^T + A values.
            if reader is not None:
                A = transposed(own["A"]) if reverse else own["A"]
                (out,) = products([(own["reader"], transposed(S16)), (A, own["values"])])
                smem["out"][...] = out.astype(dtype)
                plgpu.commit_smem()
                target = gmem["out"].at[b, pl.ds(n * CHUNK, CHUNK), h, dims]
                plgpu.copy_smem_to_gmem(smem["out"], target)
            # S_{n+1} = whole S_n + values^T writer.
            (new,) = products([(transposed(own["values"]), own["writer"])])
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
    q: Float[Array, "B T q_heads D"],
    k: Float[Array, "B T k_heads D"],
    v: Float[Array, "B T v_heads P"],
    high: Float[Array, "B T a_heads D"],
    low: Float[Array, "B T a_heads D"],
    do: Float[Array, "B T H P"],
    whole: Float[Array, "B H N D"],
    S: Float[Array, "B H N P D"],
    dS: Float[Array, "B H N P D"],
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "V B T H D"], Float[Array, "V B T H D"], Float[Array, "V B T H D"]]:
    """Returns (dq, dk, da), to be summed over V; da is float32, of natural logarithms.

    Args:
        q, k, v, high, low: see the module's text.
        do: the outputs' gradient.
        whole: float32, the chunks' decays.
        S, dS: the states before the chunks and the gradients of those after them.
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
        """Returns (dq, dk), and leaves da in shared memory, of the states and of pairs i = j."""
        tiles = lambda i: [smem["tiles"].at[i * parts + part] for part in range(parts)]
        v, do, S, dS = map(tiles, range(4))
        terms = lambda a, b: list(zip(a, b, strict=True))
        transpose = lambda xs: [transposed(x) for x in xs]
        # The decay of the whole chunk, d b_C = sum over p of S_pd dS_pd, at every step of it.
        d_whole = sum((load(x) * load(y)).sum(axis=0) for x, y in terms(S, dS))
        smem["da"][...] = common.along_cols(d_whole * decay, (CHUNK, WIDTH))
        # dA_ij = do_i . v_j, of which pairs i = j meet no decay.
        dA, dA_transposed = products(terms(do, transpose(v)), terms(v, transpose(do)))
        i, j = ssd.indices()
        diagonal = common.along_rows(jnp.where(i == j, dA, 0.0).sum(axis=1), (CHUNK, WIDTH))
        both = jnp.where(i > j, dA, dA_transposed).astype(dtype)
        # dq_i = b_i S^T do_i and dk_j = (b_C / b_j) dS^T v_j; a gradient of a logarithm is that of
        # the factor times the factor, so q_i dq_i counts for the steps up to i, k_j dk_j after j.
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
        add_to(smem["da"], (transposed(up_to), moved_q), (transposed(after), moved_k))
        return dq + diagonal * load(smem["k"]), dk + diagonal * load(smem["q"])

    def from_pairs(smem, dq, dk):
        """Returns (dq, dk), and adds to da, with the shares of pairs of steps i > j."""
        moved, X, d_here, both = (smem["tiles"].at[n] for n in range(2, 6))

        def pairs(n, carry):
            dq, dk = carry
            h = jnp.int32(1) << n
            rows = smem["tiles"].at[lax.rem(n, jnp.int32(2))]
            rows[...] = ones(n).astype(dtype)
            plgpu.commit_smem()
            decay = factors(smem, rows)
            # X_h, and of dA the pairs whose indices differ first in the bit h.
            X[...] = mixed(smem, h, decay).astype(dtype)
            i, j = ssd.indices()
            here = (i >> n) == ((j >> n) ^ 1)
            d_here[...] = jnp.where(here, load(both), 0.0).astype(dtype)
            plgpu.commit_smem()
            # dX = (dA + dA^T) X; rows of right halves are queries', of left ones keys'.
            (dX,) = products([(d_here, X)])
            moved[...] = (load(X) * dX).astype(dtype)
            plgpu.commit_smem()
            dX *= decay
            right = jnp.where(in_right_half(h), 1.0, 0.0)
            dq += right * dX
            dk += (1.0 - right) * dX
            add_to(smem["da"], (transposed(rows), moved))
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
