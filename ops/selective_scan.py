"""Mamba's selective scan: a diagonal recurrence whose decays the input selects.

arXiv 2312.00752, algorithm 2.

The states of all steps, [T, N, E], never exist at once. Time is split into chunks; the forward pass
keeps the state at the start of each, and the backward pass recomputes a chunk's states from there.
CPUs compute a chunk step by step, as do TPUs in a kernel (ops/selective_scan_tpu.py); other
platforms by an associative scan.

Dimensions: B batch, T time, E channels, G groups of channels that share B and C, N state dim,
C chunk.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tilescan.ops import diagonal_scan
from tilescan.ops.arrays import AnyArray
from tilescan.ops.attention_xla import varying
from tilescan.ops.explicit_axes import partitioned_by_dimensions
from tilescan.ops.recurrence_arguments import (
    SegmentIds,
    check_floating,
    check_groups,
    check_shape,
    check_time,
)
from tilescan.ops.reverse_mode import written_vjp
from tilescan.ops.sizes import check_sizes

# Steps of a chunk, whose states and decays exist at once in the backward pass.
CHUNK = 64
_KERNELS = {"tpu": "tilescan.ops.selective_scan_tpu"}


@partitioned_by_dimensions(
    ("BTE", "BEN"),
    x="BTE",
    dt="BTE",
    A="EN",
    B=("BTN", "BTGN"),
    C=("BTN", "BTGN"),
    D="E",
    z="BTE",
    dt_bias="E",
    initial_state="BEN",
    segment_ids="BT",
)
def selective_scan(
    x: Float[AnyArray, "B T E"],
    dt: Float[AnyArray, "B T E"],
    A: Float[AnyArray, "E N"],
    B: Float[AnyArray, "B T N"] | Float[AnyArray, "B T G N"],
    C: Float[AnyArray, "B T N"] | Float[AnyArray, "B T G N"],
    *,
    D: Float[AnyArray, "E"] | None = None,
    z: Float[AnyArray, "B T E"] | None = None,
    dt_bias: Float[AnyArray, "E"] | None = None,
    dt_softplus: bool = False,
    initial_state: Float[AnyArray, "B E N"] | None = None,
    segment_ids: SegmentIds | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T E"], Float[Array, "B E N"]]:
    """Computes h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t and y_t = (C_t h_t + D x_t) silu(z_t).

    Args:
      x: inputs [B, T, E].
      dt: step sizes [B, T, E]; 0 leaves the state unchanged. Any floating dtype, as all below.
      A: rates [E, N], negative where the state is to decay. Nothing is divided by the
        decays exp(dt A), so they may be 0.
      B, C: input and output projections, [B, T, N]; or [B, T, G, N], and channel e reads group
        e // (E // G).
      D: factor of the skip connection, [E].
      z: gate [B, T, E]; y is multiplied by silu(z).
      dt_bias: added to dt, [E].
      dt_softplus: dt becomes log(1 + exp(dt)), after the bias.
      initial_state: h before the first step, [B, E, N]; zeros when None.
      segment_ids: integers [B, T], or [B, 1 + T] with the segment of initial_state first. Where
        neighbours differ a segment starts, and the state before it counts as 0. By [B, T] ids the
        first step goes on with initial_state's segment.
      implementation: "xla", "pallas" (TPU), or None, which takes the Pallas kernel where the
        platform that the program is lowered for has one for these shapes and dtypes, and "xla"
        elsewhere.

    Returns:
      y [B, T, E] in x's dtype, and final_state [B, E, N], to be given as the next call's
      initial_state, in float32 (float64 for float64), in which all is computed.

    Of bfloat16 inputs "xla" computes the state as exactly as of float32 ones: on CPUs its largest
    error is below 1e-5 of its largest entry.

    First derivatives reach every input from both results.

    Raises:
      ValueError: shapes or an implementation that do not fit, or, when the program is lowered,
        "pallas" on a platform without a kernel for them.
      TypeError: dtypes that are not floating, ids that are not integers.
    """
    diagonal_scan.check_implementation(implementation)
    _validate(x, dt, A, B, C, D, z, dt_bias, initial_state)
    (b, T, E), N = x.shape, A.shape[1]
    # All in float32 at least.
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    wide = lambda v: v.astype(dtype)
    dt = wide(dt)
    if dt_bias is not None:
        dt = dt + wide(dt_bias)[None, None]
    if dt_softplus:
        dt = jax.nn.softplus(dt)

    # The scan, over channels last.
    first = None if segment_ids is None else diagonal_scan.resets(segment_ids, b, T)
    h = jnp.zeros((b, E, N), dtype) if initial_state is None else wide(initial_state)
    arrays = x, dt, wide(A).T, B, C, jnp.swapaxes(h, 1, 2), first
    scan = lambda *arrays: _core(*arrays, implementation)
    scan = scan if B.ndim == 3 else _by_groups(scan, B.shape[2])
    # Under shard_map a derivative must vary over the same devices as its argument.
    y, h = scan(*varying(arrays, arrays))

    # Skip connection and gate.
    if D is not None:
        y = y + wide(D)[None, None] * wide(x)
    if z is not None:
        y = y * jax.nn.silu(wide(z))
    return y.astype(x.dtype), jnp.swapaxes(h, 1, 2)


def _by_groups(scan, G):
    """Returns `scan`, which is `_core`, for B and C [B, T, G, N]."""

    def grouped(x, dt, A, B, C, h, first):
        split = lambda v: v.reshape(*v.shape[:-1], G, v.shape[-1] // G)
        axes = 2, 2, 1, 2, 2, 2, None
        y, h = jax.vmap(scan, in_axes=axes, out_axes=2)(
            split(x), split(dt), split(A), B, C, split(h), first
        )
        return y.reshape(x.shape), h.reshape(*h.shape[:2], x.shape[2])

    return grouped


@functools.partial(jax.jit, static_argnums=7)
@functools.partial(written_vjp, nondiff_argnums=(7,))
def _core(x, dt, A, B, C, h, first, implementation):
    """Returns (y [B, T, E] without D and z, h [B, N, E]) for A [N, E] and h [B, N, E]."""
    return _core_fwd(x, dt, A, B, C, h, first, implementation)[0]


def _core_fwd(x, dt, A, B, C, h, first, implementation):
    y, h, starts = diagonal_scan.choose(
        "selective_scan", implementation, _KERNELS, _on_platform(_forward, _loop, _tree),
        lambda module: module.forward, x, dt, A, B, C, h, first,
    )  # fmt: skip
    return (y, h), (x, dt, A, B, C, first, starts)


def _core_bwd(implementation, residuals, cotangents):
    grads = diagonal_scan.choose(
        "selective_scan", implementation, _KERNELS, _on_platform(_backward, _loop_vjp, _tree_vjp),
        lambda module: module.backward, *residuals, *cotangents,
    )  # fmt: skip
    return *grads, None


_core.__wrapped__.defvjp(_core_fwd, _core_bwd)


def _on_platform(f, loop, tree):
    """Returns platform -> f that computes chunks by `loop` on CPUs, by `tree` elsewhere."""
    return lambda platform: functools.partial(f, loop if platform == "cpu" else tree)


def _forward(chunk, x, dt, A, B, C, h, first):
    """Returns (y, the last h, h at the start of each chunk [T / C, B, N, E])."""
    T = x.shape[1]
    steps = jax.tree.map(_padded, (x, dt, B, C, first))

    def step(carry, i):
        h, y = carry
        new, y_i = chunk(A, h, *_chunk(steps, i))
        return (new, _paste(y, y_i, i)), h

    y = varying(jnp.zeros(steps[0].shape, h.dtype), h)
    (h, y), starts = jax.lax.scan(step, (h, y), jnp.arange(y.shape[1] // _size(T)))
    return y[:, :T], h, starts


def _backward(chunk_vjp, x, dt, A, B, C, first, starts, dy, dh):
    """Returns cotangents of x, dt, A, B, C and the first h."""
    T = x.shape[1]
    steps = jax.tree.map(_padded, (x, dt, B, C, first, dy))

    def step(carry, x):
        dh, dA, grads = carry
        i, h = x
        *steps_i, dy_i = _chunk(steps, i)
        dh, dA_i, *grads_i = chunk_vjp(A, h, *steps_i, dh, dy_i)
        grads = tuple(_paste(g, g_i, i) for g, g_i in zip(grads, grads_i, strict=True))
        return (dh, dA + dA_i, grads), None

    zeros = (jnp.zeros_like(A), tuple(jnp.zeros_like(v) for v in steps[:4]))
    carry = dh, *varying(zeros, dh)
    (dh, dA, grads), _ = jax.lax.scan(
        step, carry, (jnp.arange(starts.shape[0]), starts), reverse=True
    )
    dx, ddt, dB, dC = (g[:, :T] for g in grads)
    return dx, ddt, dA, dB, dC, dh


def _loop(A, h, x, dt, B, C, first):
    """Returns (h after a chunk, y [B, C, E]), a step at a time."""

    def step(t, carry):
        h, y = carry
        _, h = _step(A, h, *_at((x, dt, B, first), t))
        return h, _put(y, jnp.sum(h * _at(C, t, h)[..., None], axis=1), t)

    return jax.lax.fori_loop(0, x.shape[1], step, (h, varying(jnp.zeros(x.shape, h.dtype), h)))


def _loop_vjp(A, h, x, dt, B, C, first, dh, dy):
    """Returns cotangents (dh, dA, dx, ddt, dB, dC) of a chunk from those of its last h and of y."""
    # The chunk's states and decays again.
    size = x.shape[1]

    def remember(t, carry):
        h, before, decays = carry
        decay, after = _step(A, h, *_at((x, dt, B, first), t))
        return after, before.at[t].set(h), decays.at[t].set(decay)

    empty = varying(jnp.zeros((size, *h.shape), h.dtype), h)
    h, before, decays = jax.lax.fori_loop(0, size, remember, (h, empty, empty))

    # Back through its steps: y_t = C_t h_t, h_t = a_t h_{t-1} + u_t B_t, a_t = exp(dt_t A) and
    # u_t = dt_t x_t.
    def step(i, carry):
        t = size - 1 - i
        dh, h, dA, (dx, ddt, dB, dC) = carry
        x_t, dt_t, B_t, C_t, dy_t = _at((x, dt, B, C, dy), t, h)
        dh = dh + C_t[..., None] * dy_t[:, None]
        du = jnp.sum(dh * B_t[..., None], axis=1)
        dB = _put(dB, jnp.einsum("bne,be->bn", dh, dt_t * x_t), t)
        dC = _put(dC, jnp.einsum("bne,be->bn", h, dy_t), t)
        # The log-decay's cotangent: the decay comes first, so that 0 * inf cannot arise.
        dh = decays[t] * dh
        h = before[t]
        dlog = dh * h
        ddt = _put(ddt, jnp.sum(dlog * A[None], axis=1) + x_t * du, t)
        dx = _put(dx, dt_t * du, t)
        return dh, h, dA + dlog * dt_t[:, None], (dx, ddt, dB, dC)

    grads = tuple(jnp.zeros(v.shape, h.dtype) for v in (x, dt, B, C))
    dA, grads = varying((jnp.zeros_like(h), grads), h)
    dh, _, dA, grads = jax.lax.fori_loop(0, size, step, (dh, h, dA, grads))
    return dh, jnp.sum(dA, axis=0), *grads


def _step(A, h, x, dt, B, first):
    """Returns (decay, next h), [B, N, E]."""
    x, dt, B = (v.astype(h.dtype) for v in (x, dt, B))
    decay = _forget(jnp.exp(dt[:, None] * A[None]), first)
    return decay, decay * h + (dt * x)[:, None] * B[..., None]


def _tree(A, h, x, dt, B, C, first):
    """Computes `_loop` by an associative scan."""
    x, dt, B, C = (v.astype(h.dtype) for v in (x, dt, B, C))
    decay = _forget(jnp.exp(dt[:, :, None] * A[None, None]), first)
    inputs = (dt * x)[:, :, None] * B[..., None]
    h, last = diagonal_scan.scan(decay, inputs, h)
    return last, jnp.einsum("btne,btn->bte", h, C, precision="highest")


def _tree_vjp(A, h, x, dt, B, C, first, dh, dy):
    chunk = lambda A, h, x, dt, B, C: _tree(A, h, x, dt, B, C, first)
    A = varying(A, h)
    dA, dh, *grads = jax.vjp(chunk, A, h, x, dt, B, C)[1]((dh, dy))
    return dh, dA, *grads


def _forget(decay, first):
    """Returns decay [B, ..., N, E] with 0 where a segment starts, `first` [B, ...] or None."""
    return decay if first is None else jnp.where(first[..., None, None], 0.0, decay)


def _size(T):
    return min(CHUNK, T)


def _padded(v):
    """Returns v padded to whole chunks with zeros: dt = 0 leaves the state unchanged."""
    T = v.shape[1]
    extra = -T % _size(T)
    return jnp.pad(v, ((0, 0), (0, extra), *[(0, 0)] * (v.ndim - 2))) if extra else v


def _chunk(steps, i):
    """Returns the i-th chunk of arrays [B, T, ...] of whole chunks; None stays."""
    size = _size(steps[0].shape[1])
    take = lambda v: jax.lax.dynamic_slice_in_dim(v, i * size, size, axis=1)
    return jax.tree.map(take, steps)


def _paste(v, chunk, i):
    return jax.lax.dynamic_update_slice_in_dim(v, chunk.astype(v.dtype), i * chunk.shape[1], axis=1)


def _at(steps, t, like=None):
    """Returns step t of arrays [B, C, ...], in `like`'s dtype."""
    dtype = lambda v: v.dtype if like is None else like.dtype
    at = lambda v: jax.lax.dynamic_index_in_dim(v, t, axis=1, keepdims=False).astype(dtype(v))
    return jax.tree.map(at, steps)


def _put(v, step, t):
    return jax.lax.dynamic_update_index_in_dim(v, step, t, axis=1)


def _validate(x, dt, A, B, C, D, z, dt_bias, initial_state):
    check_floating(
        x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias, initial_state=initial_state
    )
    if x.ndim != 3:
        raise ValueError(f"x must be [B, T, E], got shape {x.shape}")
    b, T, E = x.shape
    check_sizes(x=(x, "B, T, E"), A=(A, "E, N"))
    check_time(x=x)
    if A.ndim != 2 or A.shape[0] != E:
        raise ValueError(f"A must be [E, N] with E = {E} from x {x.shape}, got shape {A.shape}")
    N = A.shape[1]
    groups = B.shape[2:3] if B.ndim == 4 else ()
    check_sizes(B=(B, "B, T, G, N" if groups else "B, T, N"))
    for name, v in (("B", B), ("C", C)):
        letters = "B, T, G, N" if groups else "B, T, N"
        check_shape(name, v, letters, (b, T, *groups, N))
    if groups:
        check_groups("x's channels", E, "B's and C's groups", *groups)
    for name, v in (("dt", dt), ("z", z)):
        check_shape(name, v, "B, T, E", x.shape)
    for name, v in (("D", D), ("dt_bias", dt_bias)):
        check_shape(name, v, "E", (E,))
    check_shape("initial_state", initial_state, "B, E, N", (b, E, N))
