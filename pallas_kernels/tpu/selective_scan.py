"""Mamba-1's selective scan for TPU (Mosaic): forward and backward.

h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t, y_t = C_t h_t (arXiv 2312.00752, algorithm 2). The state
[N, E] of a row of the batch has its N on the sublanes and its channels on the lanes of vectors, and
is carried through time step by step, in VMEM scratch from one chunk to the next; the states of all
steps never exist in HBM. Forward keeps the state at the start of every chunk, from which backward
computes a chunk's states again, into VMEM, and walks back through them.

- B_t and C_t are broadcast over lanes: a column of [N, C] becomes [N, 128] with equal lanes, for
  the steps of a whole chunk at once. Their gradients, summed over channels in float32, are reduced
  to columns again. All blocks of channels process a chunk in turn, so this is done once for all.
- Sums over N are added up to 8 sublanes in each step and stored so; strided loads gather the same
  sublane of 8 steps, and the sum of the 8 is 8 steps of the result.

Lengths are multiples of the chunk, channels of the block, N of 8. A dt of 0 is a step that changes
nothing.

Dimensions: B batch, T time, E channels, N state dim, C chunk.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from tilescan.pallas_kernels.tpu.linear_scan import batched_in_front, vary_alike

LANES = 128
SUBLANES = 8
LOG2E = math.log2(math.e)
UNROLL = 8  # steps of a loop's body


@dataclasses.dataclass(frozen=True)
class Block:
    """Steps of a chunk and channels of a grid step.

    parts: how many parts the channels fall into that cores may share.
    """

    steps: int
    channels: int
    parts: int = 1


def forward(
    x: Float[Array, "B T E"],
    dt: Float[Array, "B T E"],
    A: Float[Array, "N E"],
    B: Float[Array, "B chunks N C"],
    C: Float[Array, "B chunks N C"],
    state: Float[Array, "B N E"],
    keep: Float[Array, "B chunks N C"] | None,
    block: Block,
    *,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[Float[Array, "B T E"], Float[Array, "B N E"], Float[Array, "chunks B N E"]]:
    """Returns (y, the last state, the states that chunks start from), all float32.

    Args:
      x: float32 or bfloat16; all others float32.
      keep: 0 at the steps that forget the state before them and 1 elsewhere; or None.
    """
    shape = _Shape.of(x, A, block, reverse=False)
    inputs = dict(x=x, dt=dt, A=A, B=B, C=C, state=state, keep=keep)
    outputs = dict(
        y=(x.shape, "time"),
        last=(state.shape, "last"),
        starts=((shape.chunks, *state.shape), "start"),
    )
    scratch = (
        shape.lane_broadcast("B", "C", "keep")
        | shape.by_column("dt", "u")
        | {
            "h": shape.states,
            "parts": (shape.columns, block.steps * SUBLANES, LANES),
        }
    )
    if keep is None:
        del inputs["keep"], scratch["lanes keep"]
    out = _call(_forward_kernel, "selective_scan", shape, inputs, outputs, scratch, interpret)
    return out["y"], out["last"], out["starts"]


def backward(
    x: Float[Array, "B T E"],
    dt: Float[Array, "B T E"],
    A: Float[Array, "N E"],
    B: Float[Array, "B chunks N C"],
    C: Float[Array, "B chunks N C"],
    keep: Float[Array, "B chunks N C"] | None,
    starts: Float[Array, "chunks B N E"],
    dy: Float[Array, "B T E"],
    dlast: Float[Array, "B N E"],
    block: Block,
    *,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[
    Float[Array, "B T E"],
    Float[Array, "B T E"],
    Float[Array, "B N E"],
    Float[Array, "B parts chunks N C"],
    Float[Array, "B parts chunks N C"],
    Float[Array, "B N E"],
]:
    """Returns the cotangents of x, dt, A, B, C and the first state, from those of y and the last
    state; dx in x's dtype, the others float32, dA for each row of the batch.
    """
    shape = _Shape.of(x, A, block, reverse=True)
    inputs = dict(x=x, dt=dt, A=A, B=B, C=C, keep=keep, starts=starts, dy=dy, dlast=dlast)
    packed = (shape.batch, block.parts, *B.shape[1:])
    outputs = dict(
        dx=(x.shape, "time"),
        ddt=(x.shape, "time"),
        dA=(dlast.shape, "last"),
        dB=(packed, "gradient"),
        dC=(packed, "gradient"),
        dstate=(dlast.shape, "last"),
    )
    states = (shape.columns, block.steps * shape.N, LANES)
    parts = (shape.columns, block.steps * SUBLANES, LANES)
    scratch = (
        shape.lane_broadcast("B", "C", "keep", "dB", "dC")
        | shape.by_column("dt", "u", "dy")
        | {
            "dh": shape.states,
            "dA sum": shape.states,
            "before": states,
            "du": parts,
            "ddt parts": parts,
        }
    )
    if keep is None:
        del inputs["keep"], scratch["lanes keep"]
    out = _call(
        _backward_kernel, "selective_scan_backward", shape, inputs, outputs, scratch, interpret
    )
    return tuple(out[name] for name in outputs)


@dataclasses.dataclass(frozen=True)
class _Shape:
    """What a kernel knows of its problem. Its grid: batch, parts, chunks, blocks of channels."""

    batch: int
    blocks: int
    chunks: int
    N: int
    block: Block
    reverse: bool

    @classmethod
    def of(cls, x, A, block, reverse):
        batch, T, E = x.shape
        blocks = E // (block.channels * block.parts)
        return cls(batch, blocks, T // block.steps, A.shape[0], block, reverse)

    @property
    def columns(self):
        """Number of vectors of channels in a block."""
        return self.block.channels // LANES

    @property
    def states(self):
        return self.blocks * self.columns, self.N, LANES

    def lane_broadcast(self, *names):
        return {f"lanes {name}": (self.block.steps * self.N, LANES) for name in names}

    def by_column(self, *names):
        return {f"rows {name}": (self.columns, self.block.steps, LANES) for name in names}

    def spec(self, kind):
        """Returns the BlockSpec of an array: its block, and the block's index at (b, p, t, e).

        What is needed in the first chunk alone, or final in the last, has one index in the others.
        """
        steps, channels, blocks = self.block.steps, self.block.channels, self.blocks
        at = lambda t: self.chunks - 1 - t if self.reverse else t
        first = lambda t, e: jnp.where(t == 0, e, blocks - 1)
        last = lambda t, e: jnp.where(t == self.chunks - 1, e, 0)
        block, index = {
            "time": ((1, steps, channels), lambda b, p, t, e: (b, at(t), p * blocks + e)),
            "packed": ((1, 1, self.N, steps), lambda b, p, t, e: (b, at(t), 0, 0)),
            "gradient": ((1, 1, 1, self.N, steps), lambda b, p, t, e: (b, p, at(t), 0, 0)),
            "rates": ((self.N, channels), lambda b, p, t, e: (0, p * blocks + e)),
            "first": ((1, self.N, channels), lambda b, p, t, e: (b, 0, p * blocks + first(t, e))),
            "last": ((1, self.N, channels), lambda b, p, t, e: (b, 0, p * blocks + last(t, e))),
            "start": ((1, 1, self.N, channels), lambda b, p, t, e: (at(t), b, 0, p * blocks + e)),
        }[kind]
        return pl.BlockSpec(block, index)


_KINDS = {
    "x": "time", "dt": "time", "dy": "time", "A": "rates", "B": "packed", "C": "packed",
    "keep": "packed", "state": "first", "dlast": "first", "starts": "start",
}  # fmt: skip


def _forward_kernel(refs, shape, t, e, unroll):
    # `h` holds the states of all blocks of channels; this block's begin at `own`.
    h_ref, columns = refs["h"], range(shape.columns)
    own = e * shape.columns

    @pl.when(t == 0)
    def begin():
        for w in columns:
            h_ref[own + w] = refs["state"][0, :, _column(w)]

    pl.when(e == 0)(lambda: _broadcast_over_lanes(refs, shape, unroll))
    _split_channels(refs, shape)
    states = [h_ref[own + w] for w in columns]
    for w, h in enumerate(states):
        refs["starts"][0, 0, :, _column(w)] = h

    # h_t = exp(dt_t A) h_{t-1} + u_t B_t and C_t h_t, with sums over N still in 8 sublanes.
    def step(i, states):
        new = []
        C = _lanes_of(refs, "C", i, shape)
        for w, h in enumerate(states):
            h = _advance(refs, shape, i, w, h)
            _store_parts(refs["parts"], i, w, C * h)
            new.append(h)
        return new

    states = lax.fori_loop(0, shape.block.steps, step, states, unroll=unroll)
    for w, h in enumerate(states):
        h_ref[own + w] = h
        refs["last"][0, :, _column(w)] = h

    # y_t, 8 steps at a time.
    def store_outputs(i, _):
        for w in columns:
            at = 0, _rows(i, SUBLANES), _column(w)
            refs["y"][at] = _sum_parts(refs["parts"], i, w)

    _loop(shape.block.steps // SUBLANES, store_outputs, None, unroll)


def _backward_kernel(refs, shape, t, e, unroll):
    dh_ref, dA_ref, N, columns = refs["dh"], refs["dA sum"], shape.N, range(shape.columns)
    own, steps = e * shape.columns, shape.block.steps
    zero = jnp.zeros((N, LANES), jnp.float32)

    @pl.when(t == 0)
    def begin():
        for w in columns:
            dh_ref[own + w] = refs["dlast"][0, :, _column(w)]
            dA_ref[own + w] = zero

    @pl.when(e == 0)
    def begin_chunk():
        _broadcast_over_lanes(refs, shape, unroll)
        for name in ("lanes dB", "lanes dC"):
            refs[name][...] = jnp.zeros_like(refs[name])

    _split_channels(refs, shape)

    # The chunk's states from its first one, as the forward kernel computed them.
    def recompute(i, states):
        new = []
        for w, h in enumerate(states):
            refs["before"][w, _rows(i, N), :] = h
            new.append(_advance(refs, shape, i, w, h))
        return new

    starts = [refs["starts"][0, 0, :, _column(w)] for w in columns]
    states = lax.fori_loop(0, steps, recompute, starts, unroll=unroll)

    # From the last step to the first: dh_t += C_t dy_t, dC_t = h_t dy_t, dB_t = dh_t u_t,
    # du_t = dh_t B_t; then dh_{t-1} = exp(dt_t A) dh_t, and of the decay's logarithm dt_t A
    # the gradient dh_{t-1} h_{t-1}, which gives those of dt_t and A.
    def step(j, carry):
        i = steps - 1 - j
        B, C, dB, dC = (_lanes_of(refs, name, i, shape) for name in ("B", "C", "dB", "dC"))
        new = []
        for w, (h, dh, dA) in enumerate(carry):
            dt, u, dy = (_row(refs, name, i, w) for name in ("dt", "u", "dy"))
            dh = dh + C * dy
            dC = dC + h * dy
            dB = dB + dh * u
            _store_parts(refs["du"], i, w, dh * B)
            # The log-decay's cotangent: the decay comes first, so that 0 * inf cannot arise.
            dh = _decay(refs, shape, i, w) * dh
            h = refs["before"][w, _rows(i, N), :]
            dlog = dh * h
            _store_parts(refs["ddt parts"], i, w, dlog * refs["A"][:, _column(w)])
            new.append((h, dh, dA + dlog * dt))
        refs["lanes dB"][_rows(i, N), :] = dB
        refs["lanes dC"][_rows(i, N), :] = dC
        return new

    # dh goes on to the chunk before; dA is summed over chunks.
    carry = [(h, dh_ref[own + w], zero) for w, h in enumerate(states)]
    carry = lax.fori_loop(0, steps, step, carry, unroll=unroll)
    for w, (_, dh, dA) in enumerate(carry):
        dA = dA_ref[own + w] + dA
        dh_ref[own + w], dA_ref[own + w] = dh, dA
        refs["dstate"][0, :, _column(w)], refs["dA"][0, :, _column(w)] = dh, dA

    # ddt_t = sum over N of dlog_t A + x_t du_t and dx_t = dt_t du_t, 8 steps at a time.
    def store_gradients(i, _):
        for w in columns:
            at = 0, _rows(i, SUBLANES), _column(w)
            x, dt = refs["x"][at].astype(jnp.float32), refs["dt"][at]
            du = _sum_parts(refs["du"], i, w)
            refs["ddt"][at] = _sum_parts(refs["ddt parts"], i, w) + x * du
            refs["dx"][at] = (dt * du).astype(refs["dx"].dtype)

    _loop(steps // SUBLANES, store_gradients, None, unroll)

    # dB and dC, summed over the lanes, as columns of [N, C].
    def store_columns(name):
        lane = lax.broadcasted_iota(jnp.int32, (N, steps), 1)

        def column(i, gradient):
            sums = jnp.sum(_lanes_of(refs, name, i, shape), axis=1, keepdims=True)
            return jnp.where(lane == i, sums, gradient)

        zeros = jnp.zeros((N, steps), jnp.float32)
        refs[name][0, 0, 0] = _loop(steps, column, zeros, unroll)

    @pl.when(e == shape.blocks - 1)
    def end_chunk():
        for name in ("dB", "dC"):
            store_columns(name)


def _broadcast_over_lanes(refs, shape, unroll):
    """Broadcasts B, C and keep over the lanes, for all steps of a chunk."""

    def broadcast(name):
        def step(i, _):
            column = refs[name][0, 0, :, pl.ds(i, 1)]
            lanes = jnp.broadcast_to(column, (shape.N, LANES))
            refs[f"lanes {name}"][_rows(i, shape.N), :] = lanes

        _loop(shape.block.steps, step, None, unroll)

    for name in ("B", "C", "keep"):
        if name in refs:
            broadcast(name)


def _loop(count, body, carry, unroll):
    """A loop over 0 to count - 1, whose indices the kernel needs to know ahead."""
    if unroll == 1:  # interpreted: less to compile
        return lax.fori_loop(0, count, body, carry)
    for i in range(count):
        carry = body(i, carry)
    return carry


def _split_channels(refs, shape):
    """Stores dt, u = dt x and dy by vectors of channels, whose rows can be read one by one."""
    for w in range(shape.columns):
        part = {n: refs[n][0, :, _column(w)] for n in ("x", "dt", "dy") if n in refs}
        part["u"] = part["dt"] * part.pop("x").astype(jnp.float32)
        for name, value in part.items():
            refs[f"rows {name}"][w] = value


def _advance(refs, shape, i, w, h):
    """Returns the state after step i, [N, 128]."""
    u = _row(refs, "u", i, w)
    return _decay(refs, shape, i, w) * h + u * _lanes_of(refs, "B", i, shape)


def _decay(refs, shape, i, w):
    rates = refs["A"][:, _column(w)] * LOG2E
    decay = jnp.exp2(_row(refs, "dt", i, w) * rates)
    return decay * _lanes_of(refs, "keep", i, shape) if "keep" in refs else decay


def _column(w):
    return pl.ds(w * LANES, LANES)


def _rows(i, count):
    return pl.ds(i * count, count)


def _lanes_of(refs, name, i, shape):
    """Returns step i of B, C or keep, [N, 128] with equal lanes."""
    return refs[f"lanes {name}"][_rows(i, shape.N), :]


def _row(refs, name, i, w):
    """Returns step i of dt, u or dy, [1, 128]."""
    return refs[f"rows {name}"][w, pl.ds(i, 1), :]


def _store_parts(ref, i, w, x):
    """Stores x [N, 128], added up to 8 sublanes."""
    parts = [x[n : n + SUBLANES] for n in range(0, x.shape[0], SUBLANES)]
    ref[w, _rows(i, SUBLANES), :] = functools.reduce(jnp.add, parts)


def _sum_parts(ref, i, w):
    """Returns the sums over N of the i-th 8 steps, [8, 128]."""
    rows = lambda s: pl.ds(i * SUBLANES**2 + s, SUBLANES, stride=SUBLANES)
    return functools.reduce(jnp.add, [ref.at[w][rows(s), :] for s in range(SUBLANES)])


def _call(kernel, name, shape, inputs, outputs, scratch, interpret):
    """Calls a kernel, which finds arrays by name; outputs: {name: (shape, kind)}."""
    names = (*inputs, *outputs, *scratch)
    unroll = 1 if interpret else UNROLL

    def body(*refs):
        kernel(
            dict(zip(names, refs, strict=True)), shape, pl.program_id(2), pl.program_id(3), unroll
        )

    arrays = vary_alike(list(inputs.values()))
    varying = jax.typeof(arrays[0]).manual_axis_type
    dtype = lambda n: inputs["x"].dtype if n == "dx" else jnp.float32
    shapes = [
        jax.ShapeDtypeStruct(s, dtype(n), manual_axis_type=varying) for n, (s, _) in outputs.items()
    ]
    size = lambda x: math.prod(x.shape) * x.dtype.itemsize
    states = math.prod(inputs["x"].shape) * shape.N
    call = pl.pallas_call(
        body,
        name=name,
        grid=(shape.batch, shape.block.parts, shape.chunks, shape.blocks),
        in_specs=[shape.spec(_KINDS[n]) for n in inputs],
        out_specs=[shape.spec(kind) for _, kind in outputs.values()],
        out_shape=shapes,
        scratch_shapes=[pltpu.VMEM(s, jnp.float32) for s in scratch.values()],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=states * (18 if "dy" in inputs else 6),
            bytes_accessed=sum(map(size, arrays + shapes)),
            transcendentals=states * (2 if "dy" in inputs else 1),
        ),
        interpret=interpret,
    )
    return dict(zip(outputs, batched_in_front(call)(*arrays), strict=True))
