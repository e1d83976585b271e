"""FlashAttention for TPU (Mosaic): a forward and two backward kernels, dK/dV and dQ.

The structure is FlashAttention-2's (Dao 2023, arXiv 2307.08691): forward and dQ walk over tiles of
keys for each tile of queries, dK/dV over tiles of queries for each tile of keys. The innermost
axis of a TPU's grid runs in sequence on one core, so accumulators live in VMEM scratch from a
walk's first step to its last. Which tiles are walked, and which of them need masking, is a
`Schedule` (pallas_kernels/tiles.py).

Conventions of all three kernels:
- Heads come before time, and T and S are multiples of the blocks. Query head h reads key-value head
  h // (H // G) through the index maps; nothing is repeated, and dK/dV sum over a group inside of
  the kernel.
- Scores are kept in units of log2, `exp2` being what the hardware has: log2(e) is folded into the
  scale. The log-sum-exp is converted on input and output; outside it is natural.
- Per-row statistics are vectors [rows, 128] with equal lanes in VMEM (`lse` in HBM is [B, H, 1, T]:
  128 times less), except the sum of weights, whose lanes are added up only at a walk's end.
- A masked score is MASKED; the running maximum starts at FLOOR, far above it. So a weight of a
  masked score is exactly 0 even where all scores of a row are masked, without a test for that.
  In the backward pass score - lse is masked: the log-sum-exp of a row that saw NaN is NaN.
- In dK/dV scores are transposed, [keys, queries]: then statistics are rows, as they are stored,
  and no product needs a transposed left side.

Dimensions: B batch, T query time, S key time, H heads, G key-value heads, D head dim, P value dim.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from tilescan.pallas_kernels.dropout import kept, row_hash
from tilescan.pallas_kernels.tiles import FULL, PARTIAL, Schedule, TileMask, divide
from tilescan.pallas_kernels.tpu.ring_attention import Carry

LANES = 128
LOG2E = math.log2(math.e)
MASKED = -2.0e38
FLOOR = -1.0e30 * LOG2E
NO_KEYS = 1.0e38  # stands for the log-sum-exp of a row without keys: all its weights become 0

_NT = (((1,), (1,)), ((), ()))  # x @ y.T


@dataclasses.dataclass(frozen=True)
class Tile:
    """Tile of one kernel: rows of queries, columns of keys, and the length of a compute step.

    `compute` divides the inner axis (keys in forward and dQ, queries in dK/dV): the steps of a
    tile are unrolled, so that the products of one overlap the exponentials of another.
    """

    queries: int
    keys: int
    compute: int


@dataclasses.dataclass(frozen=True)
class Scores:
    """How a product q k^T becomes a score: what is the same for all tiles of a call.

    keys: real number of keys, of which the last tile may hold fewer than its length.
    """

    scale: float
    logit_cap: float | None
    keys: int
    mask: TileMask
    dropout: float = 0.0  # the rate; above 0 the schedule has a table "dropout", [B * H] seeds


def _lanes(x, width):
    """Returns statistics [rows, 128] with equal lanes as [rows, width]."""
    if width % LANES == 0:
        return x if width == LANES else jnp.tile(x, (1, width // LANES))
    return x[:, :width] if width < LANES else jnp.tile(x, (1, -(-width // LANES)))[:, :width]


def _column(row, rows):
    """Returns a row [1, rows] as statistics [rows, 128] with equal lanes."""
    return jnp.broadcast_to(row, (LANES, rows)).T


def _positions(first, stride, shape, axis):
    """Returns first, first + stride, ... along an axis."""
    steps = lax.broadcasted_iota(jnp.int32, shape, axis)
    return first + (steps if stride == 1 else stride * steps)


def _dot(x, y, dimensions=(((1,), (0,)), ((), ()))):
    # Float32 inputs ask for float32 products; bfloat16 ones are exact in one pass.
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return lax.dot_general(
        x, y, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


def _score(product, bias, options):
    """Returns scores in units of log2, and a soft cap's tanh (else None) for its derivative."""
    tanh = None
    if options.logit_cap is None:
        score = product * (options.scale * LOG2E)
    else:
        tanh = jnp.tanh(product * (options.scale / options.logit_cap))
        score = tanh * (options.logit_cap * LOG2E)
    if bias is not None:
        score = score + bias.astype(jnp.float32) * LOG2E
    return score, tanh


@dataclasses.dataclass(frozen=True)
class _Walk:
    """What the three kernels share: a grid step's tile, its kind, and its masking.

    Queries are rows of a score tile in forward and dQ (`q_axis` 0), columns in dK/dV (1).
    """

    schedule: Schedule
    tile: Tile
    options: Scores
    q_axis: int
    padded: bool  # the last tile of keys holds padding

    @property
    def kept_scale(self) -> float:
        """What weights that dropout keeps are multiplied by."""
        return 1.0 / (1.0 - self.options.dropout)

    def visit(self, refs, tables, batch, head, heads, outer, step, compute):
        """Calls `compute(parts, hide, keep)` for each compute step of this grid step's tile.

        All steps of a tile form one call of `compute` with a list of parts, for one basic block of
        instructions; a partial tile whose parts can be judged skips the empty ones.
        """
        # The tile's kind and first row and column, in the schedule's order.
        inner, kind = self.schedule.lookup(batch, outer, step, tables)
        kinds = self.schedule.kinds
        size = self.tile.keys if self.q_axis == 0 else self.tile.queries
        parts = range(size // self.tile.compute)
        q_tile, k_tile = (outer, inner) if self.q_axis == 0 else (inner, outer)
        q_first, k_first = q_tile * self.tile.queries, k_tile * self.tile.keys

        def keep(part, x):
            return self._keep(tables, batch * heads + head, q_first, k_first, part, x)

        def full():
            compute(parts, lambda part, x: x, keep)

        def hide(part, x):
            return self._hide(refs, tables, q_first, k_first, part, x)

        def partial():
            if self.schedule.sub_kind is None or len(parts) == 1:
                compute(parts, hide, keep)
                return
            for part in parts:
                bounds = self._bounds(q_first, k_first, part)
                seen, _ = self.schedule.sub_kind(batch, *bounds, tables)
                pl.when(seen)(functools.partial(compute, [part], hide, keep))

        # Branches only for kinds that occur, and none where there is one kind.
        for name, branch in ((FULL, full), (PARTIAL, partial)):
            if kinds == {name}:
                branch()
            elif name in kinds:
                pl.when(kind == name)(branch)

    def _bounds(self, q_first, k_first, part):
        q_last, k_last = q_first + self.tile.queries - 1, k_first + self.tile.keys - 1
        start = part * self.tile.compute
        if self.q_axis == 0:
            k_first = k_first + start
            return q_first, q_last, k_first, k_first + self.tile.compute - 1
        q_first = q_first + start
        return q_first, q_first + self.tile.compute - 1, k_first, k_last

    def _hide(self, refs, tables, q_first, k_first, part, x):
        """Returns a tile x of exponents, MASKED where scores are hidden or padding."""
        # This compute step's rows and columns of the tile.
        start = part * self.tile.compute
        within = pl.ds(start, self.tile.compute)
        q_ids = k_ids = stack = None
        if self.q_axis == 0:
            k_first, q_part, k_part = k_first + start, slice(None), within
        else:
            q_first, q_part, k_part = q_first + start, within, slice(None)
        # Segment ids, one of the two as a column: a row is transposed as statistics are.
        if "q_segments" in refs:
            q_ids, k_ids = refs["q_segments"][0, :, q_part], refs["k_segments"][0, :, k_part]
            if self.q_axis == 0:
                q_ids = _column(q_ids, self.tile.queries)[:, :1]
            else:
                k_ids = _column(k_ids, self.tile.keys)[:, :1]
        if "stack" in refs:
            stack = refs["stack"][0, :, within]
        # Positions of the scores; padding only occurs where rows of keys are their positions.
        q_place, k_place = self.schedule.place(q_first, k_first, tables)
        q_stride, k_stride = self.schedule.strides
        q_index = _positions(q_place, q_stride, x.shape, self.q_axis)
        k_index = _positions(k_place, k_stride, x.shape, 1 - self.q_axis)
        # Visible is what the mask, the stack and the number of keys all let through.
        seen = []
        if self.options.mask.visible is not None:
            seen.append(self.options.mask.visible(q_index, k_index, q_ids, k_ids))
        if stack is not None:
            seen.append(stack.astype(jnp.int32) != 0)
        if self.padded:
            seen.append(k_index < self.options.keys)
        return jnp.where(functools.reduce(jnp.logical_and, seen), x, MASKED)

    def _keep(self, tables, place, q_first, k_first, part, x):
        """Returns a tile x of weights, or of their cotangents, with 0 where dropout drops."""
        if self.options.dropout == 0:
            return x
        start = part * self.tile.compute
        if self.q_axis == 0:
            k_first = k_first + start
        else:
            q_first = q_first + start
        line = lambda axis: tuple(n if a == axis else 1 for a, n in enumerate(x.shape))
        queries = _positions(q_first, 1, line(self.q_axis), self.q_axis)
        keys = _positions(k_first, 1, line(1 - self.q_axis), 1 - self.q_axis)
        rows = row_hash(tables["dropout"][place], queries)
        return jnp.where(kept(rows, keys, self.options.dropout), x, 0.0)

    def bias(self, refs, part):
        """Returns the bias of a compute step, [rows or 1, columns or 1], or None."""
        if "bias" not in refs:
            return None
        ref = refs["bias"]
        if ref.shape[3] == 1:
            return ref[0, 0]
        return ref[0, 0, :, pl.ds(part * self.tile.compute, self.tile.compute)]


def _forward_kernel(refs, tables, walk, ids, grid):
    m_ref, l_ref, acc_ref = refs["m"], refs["l"], refs["acc"]
    (batch, head, outer, step), heads = ids, grid[1]

    @pl.when(step == 0)
    def begin():
        m_ref[...] = jnp.full_like(m_ref, FLOOR)
        l_ref[...] = jnp.zeros_like(l_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def compute(parts, hide, keep):
        q = refs["q"][0, 0]
        m, l, acc = m_ref[...], l_ref[...], acc_ref[...]
        # Online softmax: m' = max(m, max_j s_j), p = 2^(s - m'), alpha = 2^(m - m'),
        # l' = alpha l + sum_j p_j, acc' = alpha acc + p v.
        for part in parts:
            columns = pl.ds(part * walk.tile.compute, walk.tile.compute)
            score, _ = _score(
                _dot(q, refs["k"][0, 0, columns], _NT), walk.bias(refs, part), walk.options
            )
            score = hide(part, score)
            m_next = jnp.maximum(m, jnp.max(score, axis=1, keepdims=True))
            p = jnp.exp2(score - _lanes(m_next, score.shape[1]))
            alpha = jnp.exp2(m - m_next)
            # Lane by lane: one sum across lanes, at the end of the walk, is enough.
            sums = [p[:, i : i + LANES] for i in range(0, p.shape[1], LANES)]
            l = alpha * l + functools.reduce(jnp.add, sums)
            v = refs["v"][0, 0, columns]
            p = keep(part, p)
            acc = acc * _lanes(alpha, acc.shape[1]) + _dot(p.astype(v.dtype), v)
            m = m_next
        m_ref[...], l_ref[...], acc_ref[...] = m, l, acc

    walk.visit(refs, tables, batch, head, heads, outer, step, compute)

    # o = acc / l and lse = ln 2 m + ln l; 0 and -inf for a row without visible keys.
    @pl.when(step == grid[3] - 1)
    def end():
        l = jnp.sum(l_ref[...], axis=1, keepdims=True)
        o = acc_ref[...] * jnp.where(l == 0, 0.0, walk.kept_scale / l)
        refs["o"][0, 0] = o.astype(refs["o"].dtype)
        lse = jnp.where(l == 0, -jnp.inf, m_ref[...] * math.log(2) + jnp.log(l))
        refs["lse"][0, 0] = lse.T[:1]


def _dq_kernel(refs, tables, walk, ids, grid):
    acc_ref, lse_ref, delta_ref = refs["acc"], refs["lse_column"], refs["delta_column"]
    (batch, head, outer, step), heads = ids, grid[1]

    @pl.when(step == 0)
    def begin():
        acc_ref[...] = jnp.zeros_like(acc_ref)
        lse_ref[...] = _column(refs["lse"][0, 0], walk.tile.queries)
        delta_ref[...] = _column(refs["delta"][0, 0], walk.tile.queries)

    def compute(parts, hide, keep):
        q, do = refs["q"][0, 0], refs["do"][0, 0]
        acc = acc_ref[...]
        # p = 2^(s - lse), dp = do v^T, ds = p (dp - delta), dq = scale sum over tiles of ds k.
        for part in parts:
            columns = pl.ds(part * walk.tile.compute, walk.tile.compute)
            k = refs["k"][0, 0, columns]
            score, tanh = _score(_dot(q, k, _NT), walk.bias(refs, part), walk.options)
            p = jnp.exp2(hide(part, score - _lanes(lse_ref[...], score.shape[1])))
            dp = keep(part, _dot(do, refs["v"][0, 0, columns], _NT))
            dp = dp if walk.kept_scale == 1.0 else dp * walk.kept_scale
            ds = p * (dp - _lanes(delta_ref[...], score.shape[1]))
            if tanh is not None:
                ds = ds * (1.0 - tanh * tanh)
            acc = acc + _dot(ds.astype(k.dtype), k)
        acc_ref[...] = acc

    walk.visit(refs, tables, batch, head, heads, outer, step, compute)

    @pl.when(step == grid[3] - 1)
    def end():
        refs["dq"][0, 0] = (acc_ref[...] * walk.options.scale).astype(refs["dq"].dtype)


def _dkv_kernel(refs, tables, walk, ids, grid):
    dk_ref, dv_ref = refs["dk_acc"], refs["dv_acc"]
    batch, group, outer, member, step = ids
    head, heads = group * grid[3] + member, grid[1] * grid[3]

    @pl.when((member == 0) & (step == 0))
    def begin():
        dk_ref[...] = jnp.zeros_like(dk_ref)
        dv_ref[...] = jnp.zeros_like(dv_ref)

    def compute(parts, hide, keep):
        k, v = refs["k"][0, 0], refs["v"][0, 0]
        dk, dv = dk_ref[...], dv_ref[...]
        # Transposed: p = 2^(s - lse), dv = p do, ds = p (v do^T - delta), dk = scale ds q.
        for part in parts:
            rows = pl.ds(part * walk.tile.compute, walk.tile.compute)
            q, do = refs["q"][0, 0, rows], refs["do"][0, 0, rows]
            score, tanh = _score(_dot(k, q, _NT), walk.bias(refs, part), walk.options)
            p = jnp.exp2(hide(part, score - refs["lse"][0, 0, :, rows]))
            dv = dv + _dot(keep(part, p).astype(do.dtype), do)
            dp = keep(part, _dot(v, do, _NT))
            dp = dp if walk.kept_scale == 1.0 else dp * walk.kept_scale
            ds = p * (dp - refs["delta"][0, 0, :, rows])
            if tanh is not None:
                ds = ds * (1.0 - tanh * tanh)
            dk = dk + _dot(ds.astype(q.dtype), q)
        dk_ref[...], dv_ref[...] = dk, dv

    walk.visit(refs, tables, batch, head, heads, outer, step, compute)

    @pl.when((member == grid[3] - 1) & (step == grid[4] - 1))
    def end():
        refs["dk"][0, 0] = (dk_ref[...] * walk.options.scale).astype(refs["dk"].dtype)
        dv = dv_ref[...] if walk.kept_scale == 1.0 else dv_ref[...] * walk.kept_scale
        refs["dv"][0, 0] = dv.astype(refs["dv"].dtype)


def _vary_alike(arrays):
    """Returns the arrays, all varying over the same axes of a manual mesh (usually none)."""
    axes = [jax.typeof(x).manual_axis_type.varying for x in arrays]
    union = frozenset().union(*axes)
    return [
        lax.pcast(x, tuple(union - own), to="varying") if union - own else x
        for x, own in zip(arrays, axes, strict=True)
    ]


def _call(
    kernel, name, walk, grid, inputs, outputs, scratch, *, flops, vmem_limit, interpret, carry=None
):
    """Calls a kernel by `pallas_call`; it and its index maps find arrays and tables by name.

    inputs: {name: (array, block, index map)}, outputs: {name: (shape and dtype, block, index map)},
    with index maps (grid indices, tables) -> block indices. Returns the outputs in order, then
    what `carry`, a `ring_attention.Carry`, receives.
    """
    tables = walk.schedule.tables
    carried = {} if carry is None else carry.named(interpret)
    launched, indices = (grid, lambda ids: ids) if carry is None else carry.share(grid)

    def spec(block, index_map):
        count = len(launched)
        return pl.BlockSpec(
            block,
            lambda *ids: index_map(
                indices(ids[:count]), dict(zip(tables, ids[count:], strict=True))
            ),
        )

    def body(*refs):
        table_refs, refs = refs[: len(tables)], refs[len(tables) :]
        arriving = [f"arriving {x}" for x in carried]
        semaphores = ("sent", "received") if carried else ()
        names = (*inputs, *carried, *outputs, *arriving, *scratch, *semaphores)
        refs = dict(zip(names, refs, strict=True))
        ids = tuple(map(pl.program_id, range(len(launched))))
        compute = functools.partial(
            kernel, refs, dict(zip(tables, table_refs, strict=True)), walk, indices(ids), grid
        )
        compute() if carry is None else carry.around(compute, refs, ids, launched, grid)

    # Operands: tables, inputs, and the arrays that the kernel sends.
    size = lambda x: math.prod(x.shape) * x.dtype.itemsize
    # Under `shard_map`, outputs vary over the mesh axes that any input varies over.
    arrays = [*tables.values(), *(array for array, *_ in inputs.values()), *carried.values()]
    arrays = _vary_alike(arrays)
    varying = jax.typeof(arrays[-1]).manual_axis_type
    shapes = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=varying)
        for x, *_ in outputs.values()
    ]
    shapes += [pltpu.HBM.from_type(jax.typeof(x)) for x in arrays[len(arrays) - len(carried) :]]
    whole = [pl.BlockSpec(memory_space=pltpu.HBM)] * len(carried)
    semantics = ("parallel",) * 3 + ("arbitrary",) * (len(grid) - 3)
    options = (
        dict(dimension_semantics=semantics) if carry is None else carry.options(launched, grid)
    )
    return pl.pallas_call(
        body,
        name=name,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(tables),
            grid=launched,
            in_specs=[*(spec(block, index) for _, block, index in inputs.values()), *whole],
            out_specs=[*(spec(block, index) for _, block, index in outputs.values()), *whole],
            scratch_shapes=[
                *(pltpu.VMEM(shape, jnp.float32) for shape in scratch.values()),
                *[pltpu.SemaphoreType.DMA((len(carried),))] * (2 if carried else 0),
            ],
        ),
        out_shape=shapes,
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=vmem_limit, **options),
        cost_estimate=pl.CostEstimate(
            flops=flops,
            bytes_accessed=sum(map(size, arrays + shapes)),
            transcendentals=math.prod(grid) * walk.tile.queries * walk.tile.keys,
        ),
        interpret=interpret,
    )(*arrays)


def _bias_input(bias, tile, at):
    """Returns the bias in tiles, as an input of `_call`; `at` gives a grid step's (b, h, i, j)."""
    block = (1, 1, *(1 if n == 1 else b for n, b in zip(bias.shape[2:], tile, strict=True)))

    def index(ids, tables):
        where = at(ids, tables)
        return tuple(0 if n == 1 else i for n, i in zip(bias.shape, where, strict=True))

    return bias, block, index


def _side_inputs(walk, bias, segments, stack, at, outer_step):
    """Returns the inputs that only some calls have: bias, segment ids, stack of partial tiles."""
    tile, inputs = (walk.tile.queries, walk.tile.keys), {}
    if walk.q_axis == 1:
        tile = tile[::-1]
    if bias is not None:
        if walk.q_axis == 0:
            inputs["bias"] = _bias_input(bias, tile, at)
        else:
            transposed = lambda ids, tables: tuple(at(ids, tables)[i] for i in (0, 1, 3, 2))
            inputs["bias"] = _bias_input(bias.swapaxes(2, 3), tile, transposed)
    if segments is not None:
        for name, ids, size, axis in zip(
            ("q_segments", "k_segments"),
            segments,
            (walk.tile.queries, walk.tile.keys),
            (2, 3),
            strict=True,
        ):
            row = lambda ids, tables, axis=axis: (at(ids, tables)[0], 0, at(ids, tables)[axis])
            inputs[name] = ids[:, None, :], (1, 1, size), row
    if stack is not None:
        stack = stack if walk.q_axis == 0 else stack.swapaxes(1, 2)
        index = lambda ids, tables: (
            walk.schedule.stacked(*outer_step(ids), tables), 0, 0,
        )  # fmt: skip
        inputs["stack"] = stack, (1, *tile), index
    return inputs


def forward(
    q: Float[Array, "B H T D"],
    k: Float[Array, "B G S D"],
    v: Float[Array, "B G S P"],
    schedule: Schedule,
    tile: Tile,
    scores: Scores,
    *,
    bias: Float[Array, "#B #H #T #S"] | None = None,
    segments: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None = None,
    stack: Int[Array, "n q_tile k_tile"] | None = None,
    vmem_limit: int | None = None,
    interpret: bool | pltpu.InterpretParams = False,
    carry: Carry | None = None,
) -> list[jax.Array]:
    """Returns o [B, H, T, P] in q's dtype and the natural log-sum-exp [B, H, 1, T], float32.

    Args:
      q, k, v: float32 or bfloat16; T and S multiples of the tile.
      schedule: walk over tiles of keys, made with the same tile.
      bias: padded like the scores.
      segments: int32 ids of queries and keys, for `scores.mask.visible`.
      stack: distinct partial tiles, int8.
      vmem_limit: bytes of VMEM that the kernel may take, the compiler's default for None.
      interpret: False, or `pltpu.InterpretParams` (or True) on CPUs.
      carry: what the kernel sends meanwhile; what it receives is returned after the rest.
    """
    (B, H, T, D), (G, S), P = q.shape, k.shape[1:3], v.shape[3]
    walk = _Walk(schedule, tile, scores, 0, scores.keys < S)
    group = H // G
    key_tile = lambda ids, tables: schedule.lookup(ids[0], ids[2], ids[3], tables)[0]
    q_map = lambda ids, tables: (ids[0], ids[1], ids[2], 0)
    k_map = lambda ids, tables: (ids[0], divide(ids[1], group), key_tile(ids, tables), 0)
    row_map = lambda ids, tables: (ids[0], ids[1], 0, ids[2])
    at = lambda ids, tables: (*ids[:3], key_tile(ids, tables))
    inputs = {
        "q": (q, (1, 1, tile.queries, D), q_map),
        "k": (k, (1, 1, tile.keys, D), k_map),
        "v": (v, (1, 1, tile.keys, P), k_map),
        **_side_inputs(walk, bias, segments, stack, at, lambda ids: (ids[0], ids[2], ids[3])),
    }
    outputs = {
        "o": (jax.ShapeDtypeStruct((B, H, T, P), q.dtype), (1, 1, tile.queries, P), q_map),
        "lse": (
            jax.ShapeDtypeStruct((B, H, 1, T), jnp.float32), (1, 1, 1, tile.queries), row_map,
        ),
    }  # fmt: skip
    statistics = (tile.queries, LANES)
    scratch = {"m": statistics, "l": statistics, "acc": (tile.queries, P)}
    grid = (B, H, T // tile.queries, schedule.steps)
    return _call(
        _forward_kernel, "flash_attention_forward", walk, grid, inputs, outputs, scratch,
        flops=2 * math.prod(grid) * tile.queries * tile.keys * (D + P),
        vmem_limit=vmem_limit, interpret=interpret, carry=carry,
    )  # fmt: skip


def backward_dq(
    q: Float[Array, "B H T D"],
    k: Float[Array, "B G S D"],
    v: Float[Array, "B G S P"],
    do: Float[Array, "B H T P"],
    lse: Float[Array, "B H 1 T"],
    delta: Float[Array, "B H 1 T"],
    schedule: Schedule,
    tile: Tile,
    scores: Scores,
    *,
    bias: Float[Array, "#B #H #T #S"] | None = None,
    segments: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None = None,
    stack: Int[Array, "n q_tile k_tile"] | None = None,
    vmem_limit: int | None = None,
    interpret: bool | pltpu.InterpretParams = False,
    carry: Carry | None = None,
) -> list[jax.Array]:
    """Returns [dq [B, H, T, D]] in q's dtype, and what `carry` receives.

    Args as `forward`'s, and:
      do: the output's gradient.
      lse: float32, the log-sum-exp in units of log2 with NO_KEYS for rows without keys.
      delta: float32, rowsum(o * do) - dlse.
    """
    (B, H, T, D), G, (S, P) = q.shape, k.shape[1], v.shape[2:]
    walk = _Walk(schedule, tile, scores, 0, scores.keys < S)
    group = H // G
    key_tile = lambda ids, tables: schedule.lookup(ids[0], ids[2], ids[3], tables)[0]
    q_map = lambda ids, tables: (ids[0], ids[1], ids[2], 0)
    k_map = lambda ids, tables: (ids[0], divide(ids[1], group), key_tile(ids, tables), 0)
    row_map = lambda ids, tables: (ids[0], ids[1], 0, ids[2])
    at = lambda ids, tables: (*ids[:3], key_tile(ids, tables))
    inputs = {
        "q": (q, (1, 1, tile.queries, D), q_map),
        "k": (k, (1, 1, tile.keys, D), k_map),
        "v": (v, (1, 1, tile.keys, P), k_map),
        "do": (do, (1, 1, tile.queries, P), q_map),
        "lse": (lse, (1, 1, 1, tile.queries), row_map),
        "delta": (delta, (1, 1, 1, tile.queries), row_map),
        **_side_inputs(walk, bias, segments, stack, at, lambda ids: (ids[0], ids[2], ids[3])),
    }
    outputs = {"dq": (jax.ShapeDtypeStruct(q.shape, q.dtype), (1, 1, tile.queries, D), q_map)}
    statistics = (tile.queries, LANES)
    scratch = {"acc": (tile.queries, D), "lse_column": statistics, "delta_column": statistics}
    grid = (B, H, T // tile.queries, schedule.steps)
    return _call(
        _dq_kernel, "flash_attention_dq", walk, grid, inputs, outputs, scratch,
        flops=2 * math.prod(grid) * tile.queries * tile.keys * (2 * D + P),
        vmem_limit=vmem_limit, interpret=interpret, carry=carry,
    )  # fmt: skip


def backward_dkv(
    q: Float[Array, "B H T D"],
    k: Float[Array, "B G S D"],
    v: Float[Array, "B G S P"],
    do: Float[Array, "B H T P"],
    lse: Float[Array, "B H 1 T"],
    delta: Float[Array, "B H 1 T"],
    schedule: Schedule,
    tile: Tile,
    scores: Scores,
    *,
    bias: Float[Array, "#B #H #T #S"] | None = None,
    segments: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None = None,
    stack: Int[Array, "n q_tile k_tile"] | None = None,
    vmem_limit: int | None = None,
    interpret: bool | pltpu.InterpretParams = False,
    carry: Carry | None = None,
) -> list[jax.Array]:
    """Returns dk [B, G, S, D] and dv [B, G, S, P] in k's and v's dtypes, summed over each group of
    heads, and what `carry` receives.

    Args as `backward_dq`'s; the schedule walks over tiles of queries for each tile of keys.
    """
    (B, H, _, D), (G, S), P = q.shape, k.shape[1:3], v.shape[3]
    walk = _Walk(schedule, tile, scores, 1, scores.keys < S)
    group = H // G
    head = lambda ids: ids[1] * group + ids[3]
    q_tile = lambda ids, tables: schedule.lookup(ids[0], ids[2], ids[4], tables)[0]
    q_map = lambda ids, tables: (ids[0], head(ids), q_tile(ids, tables), 0)
    k_map = lambda ids, tables: (ids[0], ids[1], ids[2], 0)
    row_map = lambda ids, tables: (ids[0], head(ids), 0, q_tile(ids, tables))
    at = lambda ids, tables: (ids[0], head(ids), q_tile(ids, tables), ids[2])
    inputs = {
        "q": (q, (1, 1, tile.queries, D), q_map),
        "k": (k, (1, 1, tile.keys, D), k_map),
        "v": (v, (1, 1, tile.keys, P), k_map),
        "do": (do, (1, 1, tile.queries, P), q_map),
        "lse": (lse, (1, 1, 1, tile.queries), row_map),
        "delta": (delta, (1, 1, 1, tile.queries), row_map),
        **_side_inputs(walk, bias, segments, stack, at, lambda ids: (ids[0], ids[2], ids[4])),
    }
    outputs = {
        "dk": (jax.ShapeDtypeStruct(k.shape, k.dtype), (1, 1, tile.keys, D), k_map),
        "dv": (jax.ShapeDtypeStruct(v.shape, v.dtype), (1, 1, tile.keys, P), k_map),
    }
    scratch = {"dk_acc": (tile.keys, D), "dv_acc": (tile.keys, P)}
    grid = (B, G, S // tile.keys, group, schedule.steps)
    return _call(
        _dkv_kernel, "flash_attention_dkv", walk, grid, inputs, outputs, scratch,
        flops=2 * math.prod(grid) * tile.queries * tile.keys * 2 * (D + P),
        vmem_limit=vmem_limit, interpret=interpret, carry=carry,
    )  # fmt: skip
