"""Chunked scan of a decaying matrix state for TPU (Mosaic): S_t = diag(a_t) S_{t-1} + k_t v_t^T.

With o_t = S_t^T q_t this is Mamba-2's state space duality (arXiv 2405.21060, section 6) where all
key dimensions share a decay, and gated linear attention (arXiv 2312.06635, section 4) where each
has its own. One family of kernels for both: the grid walks over blocks of time in sequence, with
the states in VMEM; a block is some chunks, whose products are matrix products.

Conventions of all kernels:
- Heads come before time, and q, k, v and decays may have G < H heads that H // G heads share,
  without being repeated: the heads of a group are the innermost axis of the grid, so that a shared
  block stays in VMEM, and the gradients of what they share are summed there.
- States are [P, D] (D in lanes), float32: then a decay by key dimension is a row.
- Logarithms are in units of log 2, at least -160 a step, which stands for a decay of 0.
- Ratios of cumulative decays are powers of sums of logarithms that are not positive, so nothing
  overflows. By head, the sums come as rows of two parts, a coarse one whose differences are exact
  and the rest. By key dimension they are summed in the kernel over a binary tree, see `_ByDim`.
- The backward pass keeps the states at the blocks' starts (`borders`), recomputes those of a
  block's chunks, and goes through the blocks from the last to the first.

Dimensions: B batch, T time, H heads, G groups of heads, R heads of a program, D key dim,
P value dim, C chunk, N chunks.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from tilescan.pallas_kernels.tiles import divide

LANES = 128  # of a vector register
HIDDEN = -1.0e4  # a logarithm whose power is 0

_NN = (((1,), (0,)), ((), ()))  # x @ y
_NT = (((1,), (1,)), ((), ()))  # x @ y.T
_TN = (((0,), (0,)), ((), ()))  # x.T @ y


@dataclasses.dataclass(frozen=True)
class Block:
    """Time of a grid step: `chunks` chunks of `chunk` steps (a power of 2 for decays by dim)."""

    chunk: int
    chunks: int

    @property
    def steps(self) -> int:
        """Steps of the block."""
        return self.chunk * self.chunks


# Static data, from `python -m tilescan.benchmarks.chunked_scans_tpu_static --sweep`: (decays by
# dimension, bytes of an element) -> the chunk and the chunks of a grid step.
_BLOCKS = {
    (False, 2): Block(256, 4),
    (False, 4): Block(128, 4),
    (True, 2): Block(128, 4),
    (True, 4): Block(64, 2),
}


def block_for(by_dim: bool, itemsize: int) -> Block:
    """Returns the block where no chunk is asked for."""
    return _BLOCKS[by_dim, itemsize]


def _dot(x, y, dimensions=_NN):
    # Float32 inputs ask for float32 products; bfloat16 ones are exact in one pass.
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return lax.dot_general(
        x, y, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


def _lanes(x, width):
    """Returns a column [rows, 128] with equal lanes as [rows, width]."""
    if width <= LANES:
        return x[:, :width]
    return jnp.tile(x, (1, -(-width // LANES)))[:, :width]


def _column(row):
    """Returns a row [1, C] as a column [C, 128] with equal lanes."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def _row(column, eye):
    """Returns a column [C, 1] as a row [1, C]."""
    return jnp.sum(jnp.where(eye, column, 0.0), 0, keepdims=True)


def _indices(C):
    return (lax.broadcasted_iota(jnp.int32, (C, C), axis) for axis in (0, 1))


class _ByHead:
    """A chunk's decays where the key dimensions share them: coarse and fine sums, rows [1, C]."""

    def __init__(self, coarse, fine):
        self.C = C = coarse.shape[1]
        coarse_column, fine_column = _column(coarse), _column(fine)
        whole = coarse[:, C - 1 :], fine[:, C - 1 :]
        self.whole = jnp.exp2(whole[0] + whole[1])
        self.into = jnp.exp2(coarse_column + fine_column)
        self.out = jnp.exp2((whole[0] - coarse_column) + (whole[1] - fine_column))
        between = (_lanes(coarse_column, C) - coarse) + (_lanes(fine_column, C) - fine)
        i, j = _indices(C)
        self.below, self.eye = i > j, i == j
        self.ratios = jnp.exp2(jnp.where(i >= j, between, HIDDEN))

    def scores(self, q, k):
        """Returns A_ij = q_i . k_j b_i / b_j for j <= i, with b_i the decays' product up to i."""
        return _dot(q, k, _NT) * self.ratios

    def read(self, q, S):
        """Returns (decay q)^T S of the state [P, D] before the chunk: [C, P]."""
        return _dot(q, S.astype(q.dtype), _NT) * _lanes(self.into, S.shape[0])

    def write(self, k, v, S):
        """Returns the state after the chunk."""
        k = (k.astype(jnp.float32) * _lanes(self.out, k.shape[1])).astype(k.dtype)
        return self.whole * S + _dot(v, k, _TN)

    def gradients(self, q, k, v, do, S, dS):
        """Returns (dq, dk, dv, the decay's gradient, dS before the chunk) for dS after it.

        The decay's gradient is [2, C]: what is to be summed over the steps from each one on, and
        over the steps before each one.
        """
        f32 = lambda x: x.astype(jnp.float32)
        s = _dot(q, k, _NT)
        ds = _dot(do, v, _NT) * self.ratios
        # Without the diagonal, where the decay is 1: it would drown strong decays' gradients.
        moved = jnp.where(self.below, ds * s, 0.0)
        # dq_i = sum_j ds_ij k_j + b_i S^T do_i, dk_j = sum_i ds_ij q_i + (b_C / b_j) dS^T v_j,
        # dv_j = sum_i A_ij do_i + (b_C / b_j) dS k_j.
        A, ds = (s * self.ratios).astype(v.dtype), ds.astype(q.dtype)
        dS_, S_ = dS.astype(v.dtype), S.astype(v.dtype)
        dq_state = _dot(do, S_) * _lanes(self.into, q.shape[1])
        dk_state = _dot(v, dS_) * _lanes(self.out, q.shape[1])
        dv = _dot(A, do, _TN) + _dot(k, dS_, _NT) * _lanes(self.out, v.shape[1])
        # A decay's gradient: of b_i by row i, of 1 / b_j by column j, and of the chunk's b_C.
        into = jnp.sum(moved, 1, keepdims=True) + jnp.sum(f32(q) * dq_state, 1, keepdims=True)
        out = jnp.sum(f32(k) * dk_state, 1, keepdims=True)
        whole = self.whole * jnp.sum(jnp.sum(S * dS, 0, keepdims=True), 1, keepdims=True)
        # The first row is summed over all later steps, so the whole's share stands at the last.
        last = lax.broadcasted_iota(jnp.int32, (1, self.C), 1) == self.C - 1
        from_each = _row(into, self.eye) - jnp.sum(moved, 0, keepdims=True)
        from_each = from_each + jnp.where(last, whole, 0.0)
        da = jnp.concatenate([from_each, _row(out, self.eye)], 0)
        # dS before the chunk: b_C dS + sum_i b_i do_i q_i^T.
        q_in = (f32(q) * _lanes(self.into, q.shape[1])).astype(q.dtype)
        dS = self.whole * dS + _dot(do, q_in, _TN)
        dq, dk = _dot(ds, k) + dq_state, _dot(ds, q, _TN) + dk_state
        return dq, dk, dv, da, dS


class _ByDim:
    """A chunk's decays by key dimension: `a` [C, D], logarithms in units of log 2.

    Steps i > j whose indices differ first in the bit h lie in the two halves of one interval of
    2h steps. The decay between them is that of the steps of j's half after j, times that of the
    steps of i's half up to i: two factors of at most 1, one for queries and one for keys, however
    strong the decays are. So the scores are log2(C) matrix products, one for each h, and i = j.
    The logarithms' sums over halves come by doubling, without a difference of any two sums.
    """

    def __init__(self, a):
        self.C = C = a.shape[0]
        step = lax.broadcasted_iota(jnp.int32, a.shape, 0)
        self.halves = [2**n for n in range(C.bit_length() - 1)]
        self.right = {h: (step & h) != 0 for h in self.halves}
        i, j = _indices(C)
        self.differing_bits, self.lower = i ^ j, (i >= j).astype(jnp.float32)
        # Of intervals of h steps: through this step, after this step, and all of the interval.
        before, after, whole = a, jnp.zeros_like(a), a
        self.decays = {}
        for h in self.halves:
            right = self.right[h]
            self.decays[h] = jnp.exp2(jnp.where(right, before, after))
            other = self._swapped(whole, h)
            before = jnp.where(right, before + other, before)
            after = jnp.where(right, after, after + other)
            whole = whole + other
        self.into, self.out = jnp.exp2(before), jnp.exp2(after)
        self.whole = jnp.exp2(whole[:1])

    def _swapped(self, x, h):
        """Returns x with the two halves of each interval of 2h steps swapped."""
        right = pltpu.roll(x, h, 0)
        if 2 * h == self.C:
            return right
        return jnp.where(self.right[h], right, pltpu.roll(x, self.C - h, 0))

    def _at(self, x, h):
        return (x.astype(jnp.float32) * self.decays[h]).astype(x.dtype)

    def scores(self, q, k):
        A = _dot(q, k, _NT)
        for h in self.halves:
            A = jnp.where(self.differing_bits >= h, _dot(self._at(q, h), self._at(k, h), _NT), A)
        return A * self.lower

    def read(self, q, S):
        q = (q.astype(jnp.float32) * self.into).astype(q.dtype)
        return _dot(q, S.astype(q.dtype), _NT)

    def write(self, k, v, S):
        k = (k.astype(jnp.float32) * self.out).astype(k.dtype)
        return self.whole * S + _dot(v, k, _TN)

    def gradients(self, q, k, v, do, S, dS):
        """As `_ByHead.gradients`; the decay's gradient is that of the logarithms, [C, D]."""
        f32 = lambda x: x.astype(jnp.float32)
        # Of the state and of pairs i = j, which meet no decay.
        q32, k32 = f32(q), f32(k)
        dS_, S_ = dS.astype(v.dtype), S.astype(v.dtype)
        A, dA = _dot(q, k, _NT), _dot(do, v, _NT) * self.lower
        diagonal = jnp.sum(f32(do) * f32(v), 1, keepdims=True)
        dq_state, dk_state = _dot(do, S_) * self.into, _dot(v, dS_) * self.out
        dq, dk = dq_state + diagonal * k32, dk_state + diagonal * q32
        # Through this step, after this step, all: as in the sums over all of the chunk.
        d_before, d_after = q32 * dq_state, k32 * dk_state
        step = lax.broadcasted_iota(jnp.int32, q.shape, 0)
        d_whole = jnp.where(step == 0, self.whole * jnp.sum(S * dS, 0, keepdims=True), 0.0)
        scores = {}
        for h in reversed(self.halves):
            right, q_h, k_h = self.right[h], self._at(q, h), self._at(k, h)
            # Pairs whose bits differ first in h: from the largest h down, those not yet taken.
            here = (self.differing_bits >= h).astype(jnp.float32)
            scores[h] = _dot(q_h, k_h, _NT)
            dA_h = dA * here
            dA = dA - dA_h
            dA_h = dA_h.astype(q.dtype)
            dq_h = _dot(dA_h, k_h) * self.decays[h]
            dk_h = _dot(dA_h, q_h, _TN) * self.decays[h]
            dq, dk = dq + dq_h, dk + dk_h
            d_other = d_whole + jnp.where(right, d_before, d_after)
            d_whole = d_whole + self._swapped(d_other, h)
            # Of this level's decays: dq_h is 0 in left halves, dk_h in right ones.
            d_before, d_after = d_before + q32 * dq_h, d_after + k32 * dk_h
        # A again, from the products of all levels.
        for h in self.halves:
            A = jnp.where(self.differing_bits >= h, scores[h], A)
        # dv and dS as by head, with decays by dimension.
        A = (A * self.lower).astype(v.dtype)
        k_out, q_in = (k32 * self.out).astype(k.dtype), (q32 * self.into).astype(q.dtype)
        dv = _dot(A, do, _TN) + _dot(k_out, dS_, _NT)
        dS = self.whole * dS + _dot(do, q_in, _TN)
        return dq, dk, dv, d_before + d_whole, dS


def _decays(refs, block):
    """Yields the decays of the chunks of a grid step."""
    if refs["a"].ndim == 5:
        rows = refs["a"][0, 0, 0]
        for m in range(block.chunks):
            yield _ByHead(rows[2 * m : 2 * m + 1], rows[2 * m + 1 : 2 * m + 2])
    else:
        for m in range(block.chunks):
            yield _ByDim(refs["a"][0, 0, pl.ds(m * block.chunk, block.chunk)])


def _forward_kernel(refs, block):
    step, r = pl.program_id(2), pl.program_id(3)

    @pl.when(step == 0)
    def begin():
        refs["S"][r] = refs["initial"][0, 0]

    # o = A v + (decay q)^T S and S' = whole S + (decay k)^T v, chunk by chunk.
    S = refs["S"][r]
    for m, d in enumerate(_decays(refs, block)):
        time = pl.ds(m * block.chunk, block.chunk)
        q, k, v = (refs[name][0, 0, time] for name in "qkv")
        o = _dot(d.scores(q, k).astype(v.dtype), v) + d.read(q, S)
        refs["o"][0, 0, time] = o.astype(refs["o"].dtype)
        S = d.write(k, v, S)
    refs["S"][r] = S

    @pl.when(step == pl.num_programs(2) - 1)
    def end():
        refs["final"][0, 0] = S


def _borders_kernel(refs, block):
    step, r = pl.program_id(2), pl.program_id(3)

    @pl.when(step == 0)
    def begin():
        refs["S"][r] = refs["initial"][0, 0]

    S = refs["S"][r]
    refs["borders"][0, 0, 0] = S
    for m, d in enumerate(_decays(refs, block)):
        time = pl.ds(m * block.chunk, block.chunk)
        k, v = (refs[name][0, 0, time] for name in "kv")
        S = d.write(k, v, S)
    refs["S"][r] = S


def _backward_kernel(refs, block):
    step, r = pl.program_id(2), pl.program_id(3)

    @pl.when(step == 0)
    def begin():
        refs["dS"][r] = refs["d_final"][0, 0]

    # The states at the chunks' starts, from the block's.
    decays, states = list(_decays(refs, block)), [refs["borders"][0, 0, 0]]
    times = [pl.ds(m * block.chunk, block.chunk) for m in range(block.chunks)]
    for m in range(block.chunks - 1):
        k, v = (refs[name][0, 0, times[m]] for name in "kv")
        states.append(decays[m].write(k, v, states[m]))
    # From the last chunk to the first, each with its state before and dS after it.
    dS = refs["dS"][r]
    for m in reversed(range(block.chunks)):
        q, k, v, do = (refs[name][0, 0, times[m]] for name in ("q", "k", "v", "do"))
        *gradients, da, dS = decays[m].gradients(q, k, v, do, states[m], dS)
        if refs["a"].ndim == 5:
            refs["da"][0, 0, 0, pl.ds(2 * m, 2)] = da
        else:
            refs["da"][0, 0, times[m]] = da
        for name, x in zip(("dq", "dk", "dv"), gradients, strict=True):
            _add(refs, name, times[m], x, r)
    refs["dS"][r] = dS

    @pl.when(step == pl.num_programs(2) - 1)
    def end():
        refs["d_initial"][0, 0] = dS


def _add(refs, name, time, x, r):
    """Writes a gradient, or sums it over the heads r that share the input."""
    out, total = refs[name], refs.get(f"{name}_sum")
    if total is None:
        out[0, 0, time] = x.astype(out.dtype)
        return

    @pl.when(r == 0)
    def first():
        total[time] = x

    @pl.when(r > 0)
    def rest():
        total[time] += x

    @pl.when(r == pl.num_programs(3) - 1)
    def end():
        out[0, 0, time] = total[time].astype(out.dtype)


@dataclasses.dataclass(frozen=True)
class _Grid:
    """(B, programs, blocks of time, heads of a program), and the blocks of arrays in it."""

    B: int
    H: int
    programs: int
    blocks: int
    block: Block
    reverse: bool = False

    @classmethod
    def of(cls, k, state, programs, block, reverse=False):
        (B, H), T = state.shape[:2], k.shape[2]
        return cls(B, H, programs, T // block.steps, block, reverse)

    @property
    def sizes(self):
        return self.B, self.programs, self.blocks, self.H // self.programs

    def head(self, ids, heads):
        """Returns the head, of an array with so many, that a step reads."""
        if heads == self.H:
            return ids[1] * (self.H // self.programs) + ids[3]
        return divide(ids[1], self.programs // heads)

    def when(self, ids):
        return self.blocks - 1 - ids[2] if self.reverse else ids[2]

    def time(self, x):
        """[B, heads, T, F] by blocks of time."""
        shape = (1, 1, self.block.steps, x.shape[3])
        return x, shape, lambda *ids: (ids[0], self.head(ids, x.shape[1]), self.when(ids), 0)

    def decay(self, a):
        """[B, heads, T, D], or [B, heads, blocks, rows, C]."""
        if a.ndim == 4:
            return self.time(a)
        shape = (1, 1, 1, *a.shape[3:])
        return a, shape, lambda *ids: (ids[0], self.head(ids, a.shape[1]), self.when(ids), 0, 0)

    def borders(self, x):
        """[B, H, blocks, P, D]."""
        index = lambda *ids: (ids[0], self.head(ids, self.H), self.when(ids), 0, 0)
        return x, (1, 1, 1, *x.shape[3:]), index

    def first(self, x):
        """[B, H, P, D], read at the first step: later ones stay at the last head's, unread."""
        last = self.H // self.programs - 1
        head = lambda ids: ids[1] * (last + 1) + jnp.where(ids[2] == 0, ids[3], last)
        return x, (1, 1, *x.shape[2:]), lambda *ids: (ids[0], head(ids), 0, 0)

    def last(self, x):
        """[B, H, P, D], written at the last step: earlier ones stay at the first head's."""
        size = self.H // self.programs
        head = lambda ids: ids[1] * size + jnp.where(ids[2] == self.blocks - 1, ids[3], 0)
        return x, (1, 1, *x.shape[2:]), lambda *ids: (ids[0], head(ids), 0, 0)


def _vary_alike(arrays):
    """Returns the arrays, all varying over the same axes of a manual mesh (usually none)."""
    axes = [jax.typeof(x).manual_axis_type.varying for x in arrays]
    union = frozenset().union(*axes)
    return [
        lax.pcast(x, tuple(union - own), to="varying") if union - own else x
        for x, own in zip(arrays, axes, strict=True)
    ]


def _call(kernel, name, grid, inputs, outputs, scratch, *, flops, vmem_limit, interpret):
    """Calls a kernel, which finds arrays by name; inputs and outputs as `_Grid` gives them."""
    names = (*inputs, *outputs, *scratch)

    def body(*refs):
        kernel(dict(zip(names, refs, strict=True)), grid.block)

    arrays = _vary_alike([x for x, *_ in inputs.values()])
    varying = jax.typeof(arrays[0]).manual_axis_type
    shapes = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=varying)
        for x, *_ in outputs.values()
    ]
    size = lambda x: math.prod(x.shape) * x.dtype.itemsize
    steps = math.prod(grid.sizes) * grid.block.steps
    results = pl.pallas_call(
        body,
        name=name,
        grid=grid.sizes,
        in_specs=[pl.BlockSpec(block, index) for _, block, index in inputs.values()],
        out_specs=[pl.BlockSpec(block, index) for _, block, index in outputs.values()],
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch.values()],
        out_shape=shapes,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=vmem_limit,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * steps * flops,
            bytes_accessed=sum(map(size, (*arrays, *shapes))),
            transcendentals=steps * grid.block.chunk,
        ),
        interpret=interpret,
    )(*arrays)
    return tuple(results)


def forward(
    q: Float[Array, "B q_heads T D"],
    k: Float[Array, "B k_heads T D"],
    v: Float[Array, "B v_heads T P"],
    a: Float[Array, "B a_heads T D"] | Float[Array, "B a_heads blocks rows C"],
    state: Float[Array, "B H P D"],
    block: Block,
    programs: int,
    *,
    vmem_limit: int | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[Float[Array, "B H T P"], Float[Array, "B H P D"]]:
    """Returns the outputs in q's dtype and the state after the last step, float32.

    Args:
      q, k, v: heads are H or divide `programs`; T is a multiple of the block.
      a: float32, log decays in units of log 2: by key dimension, each at least -160; or by head,
        their sums from each chunk's start, as two rows for each chunk of a block: multiples of
        1/256, so that their differences are exact, and the rest. `rows` is a multiple of 8.
      state: float32.
      block: time of a grid step.
      programs: parts of H that run in parallel, a divisor of H and a multiple of all fewer heads.
      vmem_limit: bytes of VMEM that the kernel may take, the compiler's default for None.
      interpret: False, or True or `pltpu.InterpretParams` on CPUs.
    """
    grid = _Grid.of(k, state, programs, block)
    (B, H, P, D), T, C = state.shape, k.shape[2], block.chunk
    inputs = {
        "q": grid.time(q), "k": grid.time(k), "v": grid.time(v),
        "a": grid.decay(a), "initial": grid.first(state),
    }  # fmt: skip
    outputs = {
        "o": grid.time(jax.ShapeDtypeStruct((B, H, T, P), q.dtype)),
        "final": grid.last(state),
    }
    return _call(
        _forward_kernel, "chunked_scan_forward", grid, inputs, outputs,
        {"S": (H // programs, P, D)}, flops=C * (D + P) + 2 * D * P,
        vmem_limit=vmem_limit, interpret=interpret,
    )  # fmt: skip


def borders(
    k: Float[Array, "B k_heads T D"],
    v: Float[Array, "B v_heads T P"],
    a: Float[Array, "B a_heads T D"] | Float[Array, "B a_heads blocks rows C"],
    state: Float[Array, "B H P D"],
    block: Block,
    programs: int,
    *,
    vmem_limit: int | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> Float[Array, "B H blocks P D"]:
    """Returns the states at the starts of all blocks; arguments as `forward`'s."""
    grid = _Grid.of(k, state, programs, block)
    B, H, P, D = state.shape
    inputs = {"k": grid.time(k), "v": grid.time(v), "a": grid.decay(a)}
    inputs["initial"] = grid.first(state)
    shape = jax.ShapeDtypeStruct((B, H, grid.blocks, P, D), jnp.float32)
    return _call(
        _borders_kernel, "chunked_scan_borders", grid, inputs, {"borders": grid.borders(shape)},
        {"S": (H // programs, P, D)}, flops=D * P, vmem_limit=vmem_limit, interpret=interpret,
    )[0]  # fmt: skip


def backward(
    q: Float[Array, "B q_heads T D"],
    k: Float[Array, "B k_heads T D"],
    v: Float[Array, "B v_heads T P"],
    a: Float[Array, "B a_heads T D"] | Float[Array, "B a_heads blocks rows C"],
    borders: Float[Array, "B H blocks P D"],
    do: Float[Array, "B H T P"],
    d_final: Float[Array, "B H P D"],
    block: Block,
    programs: int,
    *,
    vmem_limit: int | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[
    Float[Array, "B dq_heads T D"],
    Float[Array, "B dk_heads T D"],
    Float[Array, "B dv_heads T P"],
    Float[Array, "B H T D"] | Float[Array, "B H blocks rows C"],
    Float[Array, "B H P D"],
]:
    """Returns (dq, dk, dv, da, the initial state's gradient), float32 but for dq, dk and dv.

    A gradient of an array that has fewer heads than `programs` has one for each program, in
    float32, to be summed; others have the array's shape and dtype. da is by head of H: the natural
    logarithms' gradient; or, by blocks: the gradient of a chunk's logarithms is the sum of its
    first row over the steps from each on, and of its second over the steps before.

    Args as `forward`'s, and:
      borders: the states at the blocks' starts.
      do, d_final: the gradients of the outputs and of the final state.
    """
    grid = _Grid.of(k, d_final, programs, block, reverse=True)
    (B, H, P, D), C = d_final.shape, block.chunk
    inputs = {
        "q": grid.time(q), "k": grid.time(k), "v": grid.time(v), "a": grid.decay(a),
        "borders": grid.borders(borders), "do": grid.time(do), "d_final": grid.first(d_final),
    }  # fmt: skip
    outputs, scratch = {}, {"dS": (H // programs, P, D)}
    for name, x in (("dq", q), ("dk", k), ("dv", v)):
        heads = H if x.shape[1] == H else programs
        dtype = x.dtype if x.shape[1] == heads else jnp.float32
        outputs[name] = grid.time(jax.ShapeDtypeStruct((B, heads, *x.shape[2:]), dtype))
        if heads < H:
            scratch[f"{name}_sum"] = (block.steps, x.shape[3])
    outputs["da"] = grid.decay(jax.ShapeDtypeStruct((B, H, *a.shape[2:]), jnp.float32))
    outputs["d_initial"] = grid.last(d_final)
    return _call(
        _backward_kernel, "chunked_scan_backward", grid, inputs, outputs, scratch,
        flops=C * (3 * D + 2 * P) + 5 * D * P, vmem_limit=vmem_limit, interpret=interpret,
    )  # fmt: skip
