"""The diagonal recurrence h_t = a_t h_{t-1} + b_t for TPU (Mosaic): the scan and its gradient.

Channels lie on the lanes of a vector, 128 to a grid step, time on its 8 sublanes. Chunks of time
run in sequence ("arbitrary"), with the state in VMEM scratch from one to the next. The steps of a
recurrence do not run in parallel on sublanes, so a chunk is divided into strips, 8 to a vector, and
strided loads gather one step of 8 strips in a vector:

1. every strip runs its steps from a state of 0 and keeps its pair (p, s): the product of its decays
   and its last state, so that a state h becomes p h + s;
2. the pairs of the strips are scanned (3 rounds of an associative scan within a vector, then
   vector after vector), which gives each strip the state it starts from;
3. every strip runs its steps again, now from that state, and writes the outputs.

All arithmetic is the definition's own, step by step, without a division by a decay. Each input and
each output moves between HBM and VMEM once, and that bandwidth bounds the kernels.

Complex values are two planes of real ones: "planes" is a tuple of one array, or of two. Decays are
[B or 1, T, D], or [B or 1, 1, D] where they are the same at all steps: then they are read once.

Dimensions: B batch, T time, D channels, C chunk.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

LANES = 128
SUBLANES = 8


@dataclasses.dataclass(frozen=True)
class Strips:
    """A chunk of time: `groups` vectors of 8 strips, of `steps` steps each."""

    groups: int
    steps: int

    @property
    def rows(self) -> int:
        """Steps of the chunk."""
        return self.groups * SUBLANES * self.steps


def strips_for(T: int) -> Strips:
    """Returns the strips for a length, from the sweep in benchmarks/scans_tpu_static.py.

    8 groups hide the latency of a step. A stride of 20 rows hits 8 different banks of VMEM, which
    a power of 2 would not: 16 takes half as long again. The last chunk may be incomplete.
    """
    if T >= 8 * SUBLANES * 20:
        return Strips(8, 20)
    groups = 8 if T >= 256 else 2
    return Strips(groups, -(-T // (groups * SUBLANES)))


def scan(
    a: tuple[Float[Array, "#B #T D"], ...],
    b: tuple[Float[Array, "B T D"], ...],
    state: tuple[Float[Array, "B D"], ...],
    *,
    reverse: bool = False,
    after: bool = False,
    strips: Strips | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[tuple[Float[Array, "B T D"], ...], tuple[Float[Array, "B D"], ...]]:
    """Returns (o, the last state) of s_t = a_t s_{t-1} + b_t with o = s; or, `after`, of
    o_t = s_{t-1} + b_t and s_t = a_t o_t, where the decay acts after the output.

    Args:
      a: planes of decays, float32 or bfloat16.
      b: planes, float32 or bfloat16; the output's dtype.
      state: planes, float32: before the first step.
      reverse: from the last step to the first.
      strips: how a chunk is divided.

    Returns:
      planes in b's dtype, and planes in float32.
    """
    walk = _walk(a, b, reverse, after, strips, interpret)
    channel = walk.specs(walk.time)
    rows = (1, 1, LANES)
    state = [s[:, None] for s in state]
    inputs = dict(
        a=(a, walk.decay_spec(a[0])),
        b=(b, channel),
        state=(state, walk.specs(walk.whole, rows)),
    )
    B, T, D = b[0].shape
    outputs = dict(
        o=([((B, T, D), x.dtype) for x in b], channel),
        last=([((B, 1, D), jnp.float32) for _ in b], walk.specs(walk.whole, rows)),
    )
    wide = {name: x for name, (x, _) in inputs.items() if name in walk.streams}
    wide["o"] = b
    out = _call(_scan_kernel, "linear_scan", walk, inputs, outputs, wide)
    return out["o"], tuple(x[:, 0] for x in out["last"])


def gradient(
    a: tuple[Float[Array, "#B #T D"], ...],
    h: tuple[Float[Array, "B T D"], ...],
    state: tuple[Float[Array, "B D"], ...],
    dh: tuple[Float[Array, "B T D"], ...],
    dlast: tuple[Float[Array, "B D"], ...],
    *,
    reverse: bool = False,
    strips: Strips | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[
    tuple[Float[Array, "B #T D"], ...],
    tuple[Float[Array, "B T D"], ...],
    tuple[Float[Array, "B D"], ...],
]:
    """Returns (da, db, dstate) of `scan` without `after`, from its output h and the cotangents of
    its two results.

    db_t = dh_t + a_{t+1} db_{t+1} and da_t = h_{t-1} db_t, in one pass: h, dh and a are read and da
    and db are written once.

    Returns:
      da: planes, not summed over a batch that shares decays, or [B, 1, D] in float32 for decays
        that are the same at all steps; db: planes in dh's dtype; dstate: planes in float32.
    """
    walk = _walk(a, dh, not reverse, True, strips, interpret)
    channel, rows = walk.specs(walk.time), (1, 1, LANES)
    whole = walk.specs(walk.whole, rows)
    edge_rows = SUBLANES * 4 // h[0].dtype.itemsize
    inputs = dict(
        a=(a, walk.decay_spec(a[0])),
        dh=(dh, channel),
        h=(h, channel),
        # The step that a chunk's first step started from, which lies in the chunk before.
        edge=(h, walk.specs(functools.partial(walk.edge, edge_rows), (1, edge_rows, LANES))),
        state=([s[:, None] for s in state], whole),
        dlast=([s[:, None] for s in dlast], whole),
    )
    B, T, D = dh[0].shape
    full = a[0].shape[1] == T and T > 1
    da_dtype = a[0].dtype if a[0].shape[0] == B else jnp.float32
    outputs = dict(
        da=(
            [((B, T, D), da_dtype) if full else ((B, 1, D), jnp.float32) for _ in a],
            channel if full else whole,
        ),
        db=([((B, T, D), x.dtype) for x in dh], channel),
        dstate=([((B, 1, D), jnp.float32) for _ in a], whole),
    )
    wide = {name: x for name, (x, _) in inputs.items() if name in ("dh", "h")}
    wide["db"] = dh
    if full:
        wide["a"] = a
        wide["da"] = [jax.ShapeDtypeStruct((), da_dtype)] * len(a)
    out = _call(_gradient_kernel, "linear_scan_gradient", walk, inputs, outputs, wide)
    return out["da"], out["db"], tuple(x[:, 0] for x in out["dstate"])


@dataclasses.dataclass(frozen=True)
class _Walk:
    """The order in which a kernel takes the chunks of time, and the rows of one chunk."""

    batch: int
    length: int
    channels: int
    planes: int
    strips: Strips
    reverse: bool
    after: bool
    constant: bool  # decays are the same at all steps
    interpret: bool

    @property
    def chunks(self):
        return pl.cdiv(self.length, self.strips.rows)

    @property
    def grid(self):
        return self.batch, pl.cdiv(self.channels, LANES), self.chunks

    @property
    def streams(self):
        """Inputs of `scan` that are read step by step."""
        return ("b",) if self.constant else ("a", "b")

    def chunk(self, t):
        return self.chunks - 1 - t if self.reverse else t

    # Index maps, and the blocks they belong to.

    def time(self, b, d, t):
        return b, self.chunk(t), d

    def whole(self, b, d, t):
        return b, 0, d

    def edge(self, rows, b, d, t):
        """The block of `rows` steps next to a chunk, after the chunk's last step walked."""
        count = pl.cdiv(self.length, rows)
        chunk, per = self.chunk(t), self.strips.rows // rows
        if self.reverse:
            return b, jnp.maximum(chunk * per - 1, 0), d
        return b, jnp.minimum((chunk + 1) * per, count - 1), d

    def specs(self, index, block=None):
        return pl.BlockSpec(block or (1, self.strips.rows, LANES), index)

    def decay_spec(self, a):
        index = self.whole if self.constant else self.time
        shared = a.shape[0] == 1
        block = (1, 1, LANES) if self.constant else None
        return self.specs(lambda b, d, t: index(0 if shared else b, d, t), block)

    # Rows of a chunk.

    def rows(self, i, group):
        """Step i of each strip of a group."""
        steps = self.strips.steps
        start = group * SUBLANES * steps + i
        return pl.ds(start, SUBLANES, stride=steps)

    def index(self, chunk, i, group):
        """Time of the `rows`, [8, 128]."""
        steps = self.strips.steps
        row = lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 0)
        first = chunk * self.strips.rows + group * SUBLANES * steps + i
        return first + steps * row

    def step(self, j):
        """The j-th step that a strip takes."""
        return self.strips.steps - 1 - j if self.reverse else j

    def unroll(self, steps):
        """How many steps a loop has in its body: a divisor of `steps`."""
        if self.interpret:
            return 1
        return max((n for n in (2, 3, 4, 5) if steps and steps % n == 0), default=1)

    def groups(self):
        groups = range(self.strips.groups)
        return groups[::-1] if self.reverse else groups


def _walk(a, b, reverse, after, strips, interpret):
    B, T, D = b[0].shape
    constant, strips = a[0].shape[1] == 1, strips or strips_for(T)
    return _Walk(B, T, D, len(b), strips, reverse, after, constant, interpret)


# Arithmetic on planes.


def _multiply(x, y):
    if len(x) == 1:
        return (x[0] * y[0],)
    return x[0] * y[0] - x[1] * y[1], x[0] * y[1] + x[1] * y[0]


def _add(x, y):
    return tuple(u + v for u, v in zip(x, y, strict=True))


def _where(condition, x, y):
    return tuple(jnp.where(condition, u, v) for u, v in zip(x, y, strict=True))


def _constant(value, planes, shape=(SUBLANES, LANES)):
    return tuple(jnp.full(shape, value if i == 0 else 0.0, jnp.float32) for i in range(planes))


def _map(function, *planes):
    return tuple(function(*x) for x in zip(*planes, strict=True))


def _advance(a, b, s, after):
    """Returns (output, next state) of one step."""
    if after:
        o = _add(s, b)
        return o, _multiply(a, o)
    s = _add(_multiply(a, s), b)
    return s, s


# Kernels. `refs` holds tuples of references by name; those that are read or written step by step
# are float32 (`wide`), in scratch where the arrays are not. `t` is the grid's step along time, and
# `masked` says that the chunk is incomplete.


def _scan_kernel(refs, wide, walk, t, masked):
    def write(i, group, o, _):
        _store(wide["o"], walk.rows(i, group), o)

    _walk_chunk(refs, wide, walk, t, masked, "b", "state", "last", write)


def _gradient_kernel(refs, wide, walk, t, masked):
    # The walk runs against the recurrence, whose state before step t is h at the next step walked;
    # after the chunk's last step that is `edge`, and after the last chunk the initial state.
    planes, chunk = walk.planes, walk.chunk(t)
    edge = _map(lambda r: r[0, -1:] if walk.reverse else r[0, :1], refs["edge"])
    state = _map(lambda r: r[0], refs["state"])
    edge = _where(t == walk.chunks - 1, state, _map(lambda x: x.astype(jnp.float32), edge))
    strips, row = walk.strips, lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 0)
    toward = -1 if walk.reverse else 1  # from a step to the next one walked
    outermost = strips.steps - 1

    def before(i, group, inner):
        """h of the step that is walked after step i of each strip."""
        if inner:
            h = _load(wide["h"], walk.rows(i + toward, group))
        else:  # the first step of the next strip
            first = 0 if toward == 1 else outermost
            h = _load(wide["h"], walk.rows(first, group))
            other = group + toward
            if 0 <= other < strips.groups:
                end = 0 if toward == 1 else SUBLANES - 1
                beyond = _load(wide["h"], walk.rows(first, other))
                beyond = _map(lambda x: x[end : end + 1], beyond)
            else:
                beyond = edge
            h = _map(lambda x: pltpu.roll(x, -toward % SUBLANES, 0), h)
            rim = row == (SUBLANES - 1 if toward == 1 else 0)
            h = _where(rim, _map(lambda x: jnp.broadcast_to(x, rim.shape), beyond), h)
        if masked and toward == 1:
            h = _where(walk.index(chunk, i, group) + 1 < walk.length, h, state)
        return h

    # db_t is the scan's output, and da_t = h_{t-1} db_t.
    def write(i, group, o, inner):
        _store(wide["db"], walk.rows(i, group), o)
        da = _multiply(before(i, group, inner), o)
        if not walk.constant:
            _store(wide["da"], walk.rows(i, group), da)
            return None
        if masked:
            da = _where(walk.index(chunk, i, group) < walk.length, da, _constant(0.0, planes))
        return da

    total = _walk_chunk(refs, wide, walk, t, masked, "dh", "dlast", "dstate", write)
    if walk.constant:
        for ref, *parts in zip(refs["da"], *total, strict=True):
            part = jnp.sum(functools.reduce(jnp.add, parts), axis=0, keepdims=True)
            ref[0] = jnp.where(t == 0, part, ref[0] + part)


def _load(refs, rows):
    return tuple(ref[rows, :] for ref in refs)


def _store(refs, rows, values):
    for ref, value in zip(refs, values, strict=True):
        ref[rows, :] = value


def _walk_chunk(refs, wide, walk, t, masked, input_name, state_name, last_name, write):
    """Walks a chunk; calls `write(i, group, output, whether i is not a strip's last step walked)`.

    Returns what `write` returned, summed over the steps of each group, or None.
    """
    # The state is carried from chunk to chunk in scratch.
    groups, steps, planes = walk.groups(), walk.strips.steps, walk.planes
    carry_refs, chunk = refs["carry"], walk.chunk(t)

    @pl.when(t == 0)
    def begin():
        for ref, state in zip(carry_refs, refs[state_name], strict=True):
            ref[...] = state[0]

    if walk.constant:
        decay = _map(
            lambda r: jnp.broadcast_to(r[0].astype(jnp.float32), (SUBLANES, LANES)), refs["a"]
        )

    def operands(i, group):
        rows = walk.rows(i, group)
        a = decay if walk.constant else _load(wide["a"], rows)
        b = _load(wide[input_name], rows)
        if masked:  # steps after the end change nothing
            inside = walk.index(chunk, i, group) < walk.length
            a = _where(inside, a, _constant(1.0, planes))
            b = _where(inside, b, _constant(0.0, planes))
        return a, b

    # First pass: the pair (p, s) of each strip, p = product of a, s = the last state from 0.
    def compose(j, pairs):
        new = []
        for group, (p, s) in zip(groups, pairs, strict=True):
            a, b = operands(walk.step(j), group)
            new.append((_multiply(p, a), _advance(a, b, s, walk.after)[1]))
        return new

    identity = _constant(1.0, planes), _constant(0.0, planes)
    pairs = lax.fori_loop(0, steps, compose, [identity] * len(groups), unroll=walk.unroll(steps))
    # The scan of the pairs: the state that each strip starts from, and the chunk's last.
    starts, carry = [], _map(lambda r: r[...], carry_refs)
    for p, s in pairs:
        start, carry = _strip_states(p, s, carry, walk.reverse)
        starts.append(start)
    for ref, last, value in zip(carry_refs, refs[last_name], carry, strict=True):
        ref[...] = value
        last[0] = value

    # Second pass: the steps from the right states, whose outputs are written.
    def step(j, carry, inner):
        states, totals = carry
        i = walk.step(j)
        new, sums = [], []
        for group, s, total in zip(groups, states, totals, strict=True):
            o, s = _advance(*operands(i, group), s, walk.after)
            more = write(i, group, o, inner)
            new.append(s)
            sums.append(None if more is None else _add(total, more))
        return new, sums

    zero = [_constant(0.0, planes)] * len(groups)
    sums = walk.constant and input_name == "dh"
    carry = starts, zero if sums else [None] * len(groups)
    inner = functools.partial(step, inner=True)
    carry = lax.fori_loop(0, steps - 1, inner, carry, unroll=walk.unroll(steps - 1))
    return step(steps - 1, carry, inner=False)[1]


def _strip_states(p, s, carry, reverse):
    """Returns (states [8, 128] that 8 strips start from, the state [1, 128] after all of them)."""
    # Rounds of an associative scan of (p, s): a strip composes with those 1, 2 and 4 before it.
    row = lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 0)
    if reverse:
        row = SUBLANES - 1 - row
    shift = lambda x, n: pltpu.roll(x, -n % SUBLANES if reverse else n, 0)
    for n in (1, 2, 4):
        earlier = _map(lambda x: shift(x, n), p), _map(lambda x: shift(x, n), s)  # noqa: B023
        s = _where(row >= n, _add(_multiply(p, earlier[1]), s), s)
        p = _where(row >= n, _multiply(p, earlier[0]), p)
    # A strip ends in p carry + s, and the next one starts there.
    carry = _map(lambda x: jnp.broadcast_to(x, (SUBLANES, LANES)), carry)
    ends = _add(_multiply(p, carry), s)
    starts = _where(row == 0, carry, _map(lambda x: shift(x, 1), ends))
    end = 0 if reverse else SUBLANES - 1
    return starts, _map(lambda x: x[end : end + 1], ends)


def vary_alike(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """Returns the arrays, all varying over the same axes of a manual mesh (usually none)."""
    axes = [jax.typeof(x).manual_axis_type.varying for x in arrays]
    union = frozenset().union(*axes)
    return [
        lax.pcast(x, tuple(union - own), to="varying") if union - own else x
        for x, own in zip(arrays, axes, strict=True)
    ]


def batched_in_front(call: Callable[..., Sequence[jax.Array]]) -> Callable:
    """Returns `call` whose arrays get the axis of a `vmap` as their first, wherever it was: the
    last two axes of a kernel's blocks must not change.
    """
    batched_call = jax.custom_batching.custom_vmap(call)

    @batched_call.def_vmap
    def rule(size, batched, *arrays):
        axes = [0 if b else None for b in batched]
        out = batched_in_front(jax.vmap(call, in_axes=axes, axis_size=size))(*arrays)
        return out, jax.tree.map(lambda _: True, out)

    return batched_call


def _call(kernel, name, walk, inputs, outputs, wide):
    """Calls a kernel, which finds planes by name, by `pallas_call`.

    inputs: {name: (planes, spec)}, outputs: {name: (planes of (shape, dtype), spec)}, wide: {name:
    arrays} of what is to be accessed step by step.
    """
    narrow = [n for n in wide if any(x.dtype != jnp.float32 for x in wide[n])]
    scratch = {"carry": (1, LANES)} | {f"wide {n}": (walk.strips.rows, LANES) for n in narrow}
    names = [*inputs, *outputs, *scratch]

    def body(*flat):
        # References by name; those of other dtypes are accessed in a float32 copy.
        refs = {}
        for i, n in enumerate(names):
            refs[n] = flat[i * walk.planes : (i + 1) * walk.planes]
        accessed = {
            n: refs[f"wide {n}"] if n in narrow else _map(lambda r: r.at[0], refs[n]) for n in wide
        }
        for n in narrow:
            if n in inputs:
                for to, ref in zip(accessed[n], refs[n], strict=True):
                    to[...] = ref[0].astype(jnp.float32)
        # Only the last chunk may be incomplete.
        t = pl.program_id(2)
        kernel_step = functools.partial(kernel, refs, accessed, walk, t)
        last = walk.chunk(t) == walk.chunks - 1
        if walk.length % walk.strips.rows == 0:
            kernel_step(False)
        elif walk.chunks == 1:
            kernel_step(True)
        else:
            pl.when(last)(functools.partial(kernel_step, True))
            pl.when(jnp.logical_not(last))(functools.partial(kernel_step, False))
        for n in narrow:
            if n in outputs:
                for ref, value in zip(refs[n], accessed[n], strict=True):
                    ref[0] = value[...].astype(ref.dtype)

    # Under `shard_map`, outputs vary over the mesh axes that any input varies over.
    arrays = vary_alike([x for planes, _ in inputs.values() for x in planes])
    varying = jax.typeof(arrays[0]).manual_axis_type
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=varying)
        for planes, _ in outputs.values()
        for shape, dtype in planes
    ]
    size = lambda x: math.prod(x.shape) * x.dtype.itemsize
    repeated = lambda group: [spec for planes, spec in group.values() for _ in planes]
    flops = walk.batch * walk.length * walk.channels * (10 if walk.planes == 1 else 40)
    call = pl.pallas_call(
        body,
        name=name,
        grid=walk.grid,
        in_specs=repeated(inputs),
        out_specs=repeated(outputs),
        out_shape=shapes,
        scratch_shapes=[
            pltpu.VMEM(shape, jnp.float32) for shape in scratch.values() for _ in range(walk.planes)
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=flops, bytes_accessed=sum(map(size, arrays + shapes)), transcendentals=0
        ),
        interpret=walk.interpret,
    )
    out = iter(batched_in_front(call)(*arrays))
    return {n: tuple(next(out) for _ in planes) for n, (planes, _) in outputs.items()}
