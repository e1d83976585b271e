"""h_t = a_t h_{t-1} + b_t by elements: the scan that the diagonal recurrences share.

One pair (decay, state) represents an interval of time: an earlier pair followed by a later one is
(a2 a1, a2 b1 + b2). CPUs compute one step at a time, which there is several times faster than the
associative scan; TPUs have a kernel (ops/linear_recurrence_tpu.py); other platforms scan the pairs
within chunks, in log2(CHUNK) rounds.

The backward pass is the same scan in the other direction, so derivatives exist to any order, and
only inputs and output are kept for it. Nothing is divided by a decay, so decays may be 0.

Dimensions: B batch, T time, D any number of axes of channels.
"""

import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Inexact, PyTree

from tilescan.ops.arrays import AnyArray
from tilescan.ops.attention_xla import varying
from tilescan.ops.lowering import choose_when_lowered, note, other_platform
from tilescan.ops.reverse_mode import written_vjp

# Steps that are scanned at once where the scan is associative.
CHUNK = 256
IMPLEMENTATIONS = ("xla", "pallas", None)
_KERNELS = {"tpu": "tilescan.ops.linear_recurrence_tpu"}


def scan(
    a: Inexact[Array, "..."],
    b: Inexact[Array, "B T *D"],
    state: Inexact[Array, "B *D"],
    *,
    reverse: bool = False,
    implementation: str | None = "xla",
) -> tuple[Inexact[Array, "B T *D"], Inexact[Array, "B *D"]]:
    """Computes h_t = a_t h_{t-1} + b_t: h in b's dtype, and the last h in `state`'s.

    Args:
      a: decays [B or 1, T or 1, *(D or 1)].
      b: inputs [B, T, *D].
      state: [B, *D], the h before the first step; its dtype is that of the computation.
      reverse: from the last step to the first, h_t = a_t h_{t+1} + b_t.
      implementation: "xla", "pallas" or None, as of `ops.linear_recurrence`.

    Raises:
      ValueError: an unknown implementation, or, when the program is lowered, "pallas" on a platform
        without a kernel for these arguments.
    """
    check_implementation(implementation)
    # Under shard_map a derivative must vary over the same devices as its argument.
    a, b, state = varying((a, b, state), (a, b, state))
    return _scan(a, b, state, reverse, False, implementation)


def check_implementation(implementation: Any) -> None:
    """Checks that scans have this implementation.

    Raises:
      ValueError: they don't.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation={implementation!r} is unknown; it must be one of "
            + ", ".join(map(repr, IMPLEMENTATIONS))
        )


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
@functools.partial(written_vjp, nondiff_argnums=(3, 4, 5))
def _scan(a, b, state, reverse, after, implementation):
    """Computes `scan`, or with a decay `after` the output: o_t = s_{t-1} + b_t, s_t = a_t o_t."""

    def on(platform):
        return functools.partial(
            sequential if platform == "cpu" else associative, reverse=reverse, after=after
        )

    def kernel(module):
        return functools.partial(module.scan, reverse=reverse, after=after)

    return choose("linear_recurrence", implementation, _KERNELS, on, kernel, a, b, state)


def _scan_fwd(a, b, state, reverse, after, implementation):
    h, last = _scan(a, b, state, reverse, after, implementation)
    return (h, last), (a, h, state)


def _scan_bwd(reverse, after, implementation, residuals, cotangents):
    if after:
        return _pullback(*residuals, *cotangents, reverse, after, implementation)
    return _gradient(*residuals, *cotangents, reverse, implementation)


_scan.__wrapped__.defvjp(_scan_fwd, _scan_bwd)


def _pullback(a, h, state, dh, dlast, reverse, after, implementation):
    """Returns (da, db, dstate) by another scan.

    The transpose of a scan is the scan in the other direction, its decay on the other side of its
    output: dh_t = dy_t + a_{t+1} dh_{t+1}, da_t = h_{t-1} dh_t.
    """
    db, dstate = _scan(a, dh, dlast, not reverse, not after, implementation)
    wide = lambda x: x.astype(state.dtype)
    if after:
        da = wide(h) * _previous(wide(db), dlast, not reverse)
    else:
        da = _previous(wide(h), state, reverse) * wide(db)
    axes = tuple(i for i, n in enumerate(a.shape) if n == 1)
    return jnp.sum(da, axes, keepdims=True).astype(a.dtype), db, dstate


@functools.partial(written_vjp, nondiff_argnums=(5, 6))
def _gradient(a, h, state, dh, dlast, reverse, implementation):
    """Computes `_pullback` for a decay before the output, which a kernel does in one pass."""

    def on(platform):
        del platform  # `_pullback`'s scan chooses by it
        return lambda *arrays: _pullback(*arrays, reverse, False, "xla")

    def kernel(module):
        return functools.partial(module.gradient, reverse=reverse)

    arrays = a, h, state, dh, dlast
    return choose("linear_recurrence", implementation, _KERNELS, on, kernel, *arrays)


def _gradient_fwd(*arguments):
    *arrays, reverse, implementation = arguments
    return _gradient(*arrays, reverse, implementation), arrays


def _gradient_bwd(reverse, implementation, arrays, cotangents):
    pullback = lambda *arrays: _pullback(*arrays, reverse, False, implementation)
    return jax.vjp(pullback, *arrays)[1](cotangents)


_gradient.defvjp(_gradient_fwd, _gradient_bwd)


def choose(
    op: str,
    implementation: str | None,
    kernels: Mapping[str, str],
    xla: Callable[[str], Callable],
    kernel: Callable[[Any], Callable],
    *arrays: PyTree,
) -> PyTree:
    """Returns `kernel(module)(*arrays)` or `xla(platform)(*arrays)`, chosen when lowered.

    Args:
      op: its name, for `lowering.choices`.
      implementation: "xla", "pallas" or None.
      kernels: {platform: name of the module that has its kernels}. The module's `unsupported`
        returns why it can't take the arrays, or None.
      xla: from a platform to the implementation in XLA.
      kernel: from a module to its implementation.
      *arrays: arguments of both.

    Raises:
      ValueError: when the program is lowered, "pallas" where there is no kernel for the arrays.
    """

    def try_kernel(module, platform, *arrays):
        reason = module.unsupported(*arrays)
        note(op, reason)
        if reason is None:
            return kernel(module)(*arrays)
        if implementation == "pallas":
            raise ValueError(f'implementation="pallas": {reason}; implementation="xla" takes all')
        return xla(platform)(*arrays)

    def pick(platform):
        if implementation == "xla":
            return xla(platform)
        if platform in kernels:
            module = importlib.import_module(kernels[platform])
            return functools.partial(try_kernel, module, platform)
        if implementation == "pallas":
            raise ValueError(
                'implementation="pallas" has a kernel for TPUs, and this program is lowered for '
                f'{platform}; implementation="xla" or None runs anywhere'
            )
        note(op, other_platform("TPUs", platform))
        return xla(platform)

    return choose_when_lowered(pick, xla("cpu"), *arrays)


def sequential(
    a: Inexact[Array, "..."],
    b: Inexact[Array, "B T *D"],
    state: Inexact[Array, "B *D"],
    *,
    reverse: bool,
    after: bool,
) -> tuple[Inexact[Array, "B T *D"], Inexact[Array, "B *D"]]:
    """Computes `scan` step by step, in place: rows of any batch are read without a transpose."""
    T = b.shape[1]

    def row(x, t):
        return x if x.shape[1] == 1 else jax.lax.dynamic_slice_in_dim(x, t, 1, axis=1)

    def step(t, carry):
        s, h = carry
        t = T - 1 - t if reverse else t
        o, s = _step(row(a, t).astype(s.dtype), row(b, t).astype(s.dtype), s, after)
        return s, jax.lax.dynamic_update_slice_in_dim(h, o.astype(h.dtype), t, axis=1)

    carry = state[:, None], varying(jnp.zeros(b.shape, b.dtype), b)
    last, h = jax.lax.fori_loop(0, T, step, carry)
    return h, last[:, 0]


def _step(a, b, s, after):
    """Returns (output, next state); the barrier keeps XLA from computing shared terms twice."""
    if after:
        o = jax.lax.optimization_barrier(s + b)
        return o, a * o
    h = jax.lax.optimization_barrier(a * s + b)
    return h, h


def associative(
    a: Inexact[Array, "..."],
    b: Inexact[Array, "B T *D"],
    state: Inexact[Array, "B *D"],
    *,
    reverse: bool,
    after: bool,
) -> tuple[Inexact[Array, "B T *D"], Inexact[Array, "B *D"]]:
    """Computes `scan` chunk by chunk, each of CHUNK steps by an associative scan of its pairs."""
    T = b.shape[1]
    C = min(CHUNK, T)
    n = -(-T // C)
    a = jnp.broadcast_to(a, b.shape)

    def chunks(x, value):
        # Padding changes nothing: (1, 0) is the identity of the pairs.
        pad = [(0, n * C - T if axis == 1 else 0) for axis in range(x.ndim)]
        x = jnp.pad(x, pad, constant_values=value)
        return jnp.moveaxis(x.reshape(x.shape[0], n, C, *x.shape[2:]), 1, 0)

    def chunk(s, x):
        a, b = (y.astype(s.dtype) for y in x)
        pair = a, a * b if after else b
        decay, h = jax.lax.associative_scan(combine, pair, axis=1, reverse=reverse)
        h = decay * s[:, None] + h
        o = _previous(h, s, reverse) + b if after else h
        return h[:, 0 if reverse else -1], o

    last, o = jax.lax.scan(chunk, state, (chunks(a, 1), chunks(b, 0)), reverse=reverse)
    o = jnp.moveaxis(o, 0, 1).reshape(b.shape[0], n * C, *b.shape[2:])
    return o[:, :T].astype(b.dtype), last


def combine(
    earlier: tuple[Inexact[Array, "*S"], Inexact[Array, "*S"]],
    later: tuple[Inexact[Array, "*S"], Inexact[Array, "*S"]],
) -> tuple[Inexact[Array, "*S"], Inexact[Array, "*S"]]:
    """Returns the pair (decay, state) of two successive intervals of time."""
    a1, b1 = earlier
    a2, b2 = later
    return a2 * a1, a2 * b1 + b2


def _previous(h, state, reverse):
    """Returns the states before each step: `state`, then h but for its last."""
    if reverse:
        return jnp.concatenate([h[:, 1:], state[:, None]], axis=1)
    return jnp.concatenate([state[:, None], h[:, :-1]], axis=1)


def resets(segment_ids: Any, B: int, T: int, reverse: bool = False) -> Bool[AnyArray, "{B} {T}"]:
    """Returns the steps that start a segment, at which the state before them is dropped.

    Args:
      segment_ids: integers [B, T], where the first step goes on with the initial state's segment;
        or [B, 1 + T] with that segment first ([B, T + 1], last, if reverse). A segment starts
        wherever neighbours differ.
      B, T: numbers of sequences and of steps.
      reverse: whether the recurrence goes from the last step to the first.

    Raises:
      ValueError: ids of another shape.
      TypeError: ids that are not integers.
    """
    ids = jnp.asarray(segment_ids)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"segment_ids must be integers, got {ids.dtype}")
    if ids.shape not in ((B, T), (B, T + 1)):
        raise ValueError(
            f"segment_ids must be [B, T] = {(B, T)}, or {(B, T + 1)} with the initial state's "
            f"segment {'after the last' if reverse else 'before the first'} step; got {ids.shape}"
        )
    if ids.shape[1] == T:
        edge = ids[:, -1:] if reverse else ids[:, :1]
        ids = jnp.concatenate([ids, edge] if reverse else [edge, ids], axis=1)
    return ids[:, 1:] != ids[:, :-1]
