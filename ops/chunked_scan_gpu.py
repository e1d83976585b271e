"""Chunked scans on Hopper GPUs: translates `ops.chunked_scan`'s arguments to pallas_kernels.gpu.

Decided here: padding of time and dims to tiles, the decays as the kernels read them, sums
over heads and value tiles that share an input, and what the kernels can't do.

Dimensions: B batch, T time, H heads, D key dim, P value dim, C chunk, N chunks, V tiles of values.
"""

import functools
import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from tilescan.ops.attention_gpu import is_hopper

# pallas_kernels.gpu is imported where it is called: most programs on CPUs never need it.

CHUNK = 64
DTYPES = (jnp.bfloat16, jnp.float16)
MAX_KEY_DIM = 128
LOG2E = math.log2(math.e)
LOG2_OF_ZERO = -160.0  # a log-decay in units of log 2 that stands for 0


def unsupported(
    q: Float[Array, "B T _ D"],
    k: Float[Array, "B T _ D"],
    v: Float[Array, "B T _ P"],
    log_decay: Float[Array, "B T _ #D"],
    initial_state: Float[Array, "B H D P"],
    chunk: int | None,
) -> str | None:
    """Returns why the kernels can't take these arguments and what would work; None if they can."""
    if not all(x.dtype in DTYPES for x in (q, k, v)) or initial_state.dtype != jnp.float32:
        return f"q, k and v are {q.dtype}; bfloat16 and float16 have a kernel"
    if q.shape[3] > MAX_KEY_DIM:
        return f"the key dim D={q.shape[3]}; up to {MAX_KEY_DIM} have a kernel"
    if q.size == 0:
        return f"q is empty, {q.shape}; one step or more have a kernel"
    if chunk not in (None, CHUNK):
        return f"chunk={chunk}; {CHUNK} has a kernel on GPUs"
    if not is_hopper():
        return (
            "this GPU is not a Hopper (compute capability 9.0), whose instructions the kernels use"
        )
    return None


def forward(
    q: Float[Array, "B T _ D"],
    k: Float[Array, "B T _ D"],
    v: Float[Array, "B T _ P"],
    log_decay: Float[Array, "B T _ #D"],
    initial_state: Float[Array, "B H D P"],
    *,
    chunk: int | None = None,
    interpret: Any = False,
) -> tuple[Float[Array, "B T H P"], Float[Array, "B H D P"]]:
    """Returns (o, final_state); arguments as of `ops.chunked_scan`."""
    if log_decay.shape[3] > 1:
        return _forward_by_dim(q, k, v, log_decay, initial_state, interpret)
    from tilescan.pallas_kernels.gpu import ssd

    (T, D), P = (q.shape[1], q.shape[3]), v.shape[3]
    inputs = (*map(_pad, (q, k, v)), _lines(log_decay), _pad_state(initial_state))
    o, state = ssd.forward(*inputs, interpret=interpret)
    return o[:, :T, :, :P], _join_state(state, D, P)


def backward(
    q: Float[Array, "B T _ D"],
    k: Float[Array, "B T _ D"],
    v: Float[Array, "B T _ P"],
    log_decay: Float[Array, "B T _ #D"],
    initial_state: Float[Array, "B H D P"],
    do: Float[Array, "B T H P"],
    d_final: Float[Array, "B H D P"],
    *,
    chunk: int | None = None,
    interpret: Any = False,
) -> tuple[
    Float[Array, "B T _ D"],
    Float[Array, "B T _ D"],
    Float[Array, "B T _ P"],
    Float[Array, "B T _ #D"],
    Float[Array, "B H D P"],
]:
    """Returns the gradients of q, k, v, log_decay and initial_state, in their dtypes."""
    if log_decay.shape[3] > 1:
        return _backward_by_dim(q, k, v, log_decay, initial_state, do, d_final, interpret)
    from tilescan.pallas_kernels.gpu import ssd

    D, P = q.shape[3], v.shape[3]
    padded, lines = [_pad(x) for x in (q, k, v)], _lines(log_decay)
    states, _ = ssd.forward(
        None, *padded[1:], lines, _pad_state(initial_state), want_states=True, interpret=interpret
    )
    do = _pad(do.astype(v.dtype))
    dq, dk, dv, d_lines, d_initial = ssd.backward(
        *padded, lines, states, do, _pad_state(d_final), interpret=interpret
    )
    gradients = (_gradient(g, x) for g, x in zip((dq, dk, dv[None]), (q, k, v), strict=True))
    return *gradients, _decay_gradient(d_lines, log_decay), _join_state(d_initial, D, P)


def _forward_by_dim(q, k, v, log_decay, initial_state, interpret):
    """Computes `forward` for decays by key dimension."""
    from tilescan.pallas_kernels.gpu import gla

    (T, D), P, H = (q.shape[1], q.shape[3]), v.shape[3], initial_state.shape[1]
    high, low, whole = _logarithms(log_decay, H, q.dtype)
    A, q_in, k_out = gla.scores(_pad(q), _pad(k), high, low, H, interpret=interpret)
    state = _pad_state(initial_state)
    o, state = gla.walk(q_in, k_out, _pad(v), A, whole, state, interpret=interpret)
    return o[:, :T, :, :P], _join_state(state, D, P)


def _backward_by_dim(q, k, v, log_decay, initial_state, do, d_final, interpret):
    """Computes `backward` for decays by key dimension, recomputing what the chunks hold."""
    from tilescan.pallas_kernels.gpu import gla

    D, P, H = q.shape[3], v.shape[3], initial_state.shape[1]
    q_, k_, v_, do = _pad(q), _pad(k), _pad(v), _pad(do.astype(v.dtype))
    high, low, whole = _logarithms(log_decay, H, q.dtype)
    walk = functools.partial(gla.walk, whole=whole, want_states=True, interpret=interpret)
    A, q_in, k_out = gla.scores(q_, k_, high, low, H, interpret=interpret)
    S, _ = walk(None, k_out, v_, None, state=_pad_state(initial_state))
    dv, dS, d_initial = walk(k_out, q_in, do, A, state=_pad_state(d_final), reverse=True)
    dq, dk, da = gla.gradients(q_, k_, v_, high, low, do, whole, S, dS, interpret=interpret)
    gradients = (_gradient(g, x) for g, x in zip((dq, dk, dv[None]), (q, k, v), strict=True))
    da = _gradient(da, log_decay)
    da = jnp.where(log_decay * LOG2E > LOG2_OF_ZERO, da, 0.0)
    return *gradients, da, _join_state(d_initial, D, P)


def _logarithms(log_decay, H, dtype):
    """Returns `high` and `low` of pallas_kernels.gpu.gla, and the chunks' decays [B, H, N, D]."""
    a = _pad(jnp.maximum(log_decay * LOG2E, LOG2_OF_ZERO))
    B, T, heads, D = a.shape
    whole = jnp.exp2(jnp.sum(a.reshape(B, -1, CHUNK, heads, D), 2)).swapaxes(1, 2)
    whole = jnp.broadcast_to(whole, (B, H, *whole.shape[2:]))
    kind = jnp.finfo(dtype)
    # Not by a cast, whose rounding XLA may elide, and with it the rest.
    high = lax.reduce_precision(a, kind.nexp, kind.nmant)
    return high.astype(dtype), (a - high).astype(dtype), whole


def _up(n, multiple):
    return -(-n // multiple) * multiple


def _pad(x):
    """Returns x [B, T, heads, F] with time and features padded to multiples of 64."""
    widths = [(0, _up(n, 64) - n) if axis % 2 else (0, 0) for axis, n in enumerate(x.shape)]
    return jnp.pad(x, widths)


def _pad_state(S):
    """Returns [B, H, D, P] as [B, H, P, D], both padded to multiples of 64."""
    widths = [(0, _up(n, 64) - n) for n in S.shape[2:]]
    return jnp.pad(S, ((0, 0), (0, 0), *widths)).swapaxes(2, 3)


def _join_state(S, D, P):
    return S[:, :, :P, :D].swapaxes(2, 3)


def _lines(log_decay):
    """Returns the kernels' `lines` [B, heads, 4, T] of log decays [B, T, heads, 1]."""
    a = jnp.maximum(log_decay[..., 0] * LOG2E, LOG2_OF_ZERO).swapaxes(1, 2)
    B, heads, T = a.shape
    a = jnp.pad(a, ((0, 0), (0, 0), (0, _up(T, CHUNK) - T))).reshape(B, heads, -1, CHUNK)
    coarse = jnp.round(a * 256) / 256  # sums and differences of these are exact
    coarse, fine = jnp.cumsum(coarse, 3), jnp.cumsum(a - coarse, 3)
    from_start = jnp.exp2(coarse + fine)
    to_end = jnp.exp2((coarse[..., -1:] - coarse) + (fine[..., -1:] - fine))
    return jnp.stack([coarse, fine, from_start, to_end], 2).reshape(B, heads, 4, -1)


def _gradient(g, x):
    """Returns a kernel's gradients [V, B, T, H, F] summed to those of x [B, T, heads, F]."""
    V, B, T, H, F = g.shape
    heads = x.shape[2]
    g = g[:, :, : x.shape[1], :, : x.shape[3]]
    if V > 1 or heads < H:
        g = g.reshape(*g.shape[:3], heads, H // heads, g.shape[4])
        g = jnp.sum(g, (0, 4), dtype=jnp.float32)[None]
    return g[0].astype(x.dtype)


def _decay_gradient(d_lines, log_decay):
    """Returns the log decays' gradient of the kernel's lines [V, B, H, N, 4, C]."""
    T = log_decay.shape[1]
    rows, cols, before, whole = jnp.moveaxis(jnp.sum(d_lines, 0), 3, 0)
    da = jnp.cumsum((rows - cols)[..., ::-1], 3)[..., ::-1]
    da += jnp.cumsum(before, 3) - before + jnp.sum(whole, 3, keepdims=True)
    da = da.reshape(*da.shape[:2], -1)[:, :, :T].swapaxes(1, 2)[..., None]
    if log_decay.shape[2] < da.shape[2]:
        da = jnp.sum(da, 2, keepdims=True)
    return jnp.where(log_decay * LOG2E > LOG2_OF_ZERO, da, 0.0).astype(log_decay.dtype)
