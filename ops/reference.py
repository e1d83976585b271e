"""Plain definitions of the ops, to test the fast ones against; they also run in float64.

Dimensions: B batch, T query time, S key time, H heads, G key-value heads, D head dim, P value dim,
E channels, L kernel length, N state dim.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float64, Inexact, Integer

from tilescan.ops import masks
from tilescan.ops.arrays import AnyArray
from tilescan.ops.mask_bands import Index

# A real number, which may be traced.
Scalar = float | np.floating | Float[AnyArray, ""]
Seed = int | np.integer | Integer[AnyArray, "..."]
SegmentIds = Integer[AnyArray, "B T"] | Integer[AnyArray, "B T+1"]


def attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S G D"],
    v: Float[Array, "B S G P"],
    *,
    mask: masks.Mask | None = None,
    bias: Float[Array, "..."] | None = None,
    scale: Scalar | None = None,
    logit_cap: float | None = None,
    q_offset: Index | None = None,
    return_lse: bool = False,
    dropout_rate: float = 0.0,
    dropout_seed: Seed | None = None,
) -> Float[Array, "B T H P"] | tuple[Float[Array, "B T H P"], Float[Array, "B T H"]]:
    """Computes softmax attention by the whole [B, H, T, S] matrix of logits, in quadratic memory.

    Takes what `ops.attention` takes and returns the same, computed in the inputs' own precision
    (float32 at least). Rows that see no key give zeros, and lse = -inf.
    """
    B, T, H, D = q.shape
    S, G = k.shape[1], k.shape[2]
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    k, v = (jnp.repeat(x, H // G, axis=2) for x in (k, v))
    # Logits are NaN where a query, key or value is not finite, so that the mask hides those too.
    finite = lambda x: jnp.all(jnp.isfinite(x), axis=-1, keepdims=True)
    q_finite, k_finite = finite(q), finite(k) & finite(v)
    q, k, v = jnp.where(q_finite, q, 0), jnp.where(k_finite, k, 0), jnp.where(k_finite, v, 0)
    logits = jnp.einsum("bthd,bshd->bhts", q, k, precision="highest")
    rows = lambda x: x[..., 0].swapaxes(1, 2)
    logits = jnp.where(rows(q_finite)[..., None] & rows(k_finite)[:, :, None], logits, jnp.nan)
    logits = logits * (D**-0.5 if scale is None else scale)
    # Cap, bias and mask.
    if logit_cap is not None:
        logits = logit_cap * jnp.tanh(logits / logit_cap)
    if bias is not None:
        bias = bias.reshape((1,) * (4 - bias.ndim) + bias.shape)
        logits = logits + bias.astype(dtype)
    visible = masks.as_array(masks.Full() if mask is None else mask, T, S, q_offset)
    visible = jnp.asarray(visible).reshape((-1, 1, T, S))
    logits = jnp.where(visible, logits, -jnp.inf)
    # Softmax. A row without keys has no maximum: its peak is the least logit that counts.
    peak = jnp.maximum(jnp.max(logits, axis=-1, keepdims=True), -1e30)
    peak = jax.lax.stop_gradient(peak)
    weights = jnp.exp(logits - peak)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    empty = total == 0
    total = jnp.where(empty, 1.0, total)
    weights = jnp.where(visible, weights / total, 0.0)  # also of a row whose sum is NaN
    # Dropout, and the sum of values.
    if dropout_rate:
        keep = dropout_mask(dropout_rate, dropout_seed, (B, H, T, S))
        weights = jnp.where(keep, weights / (1 - dropout_rate), 0.0)
    o = jnp.einsum("bhts,bshp->bthp", weights, v, precision="highest")
    if not return_lse:
        return o
    lse = jnp.where(empty, -jnp.inf, peak + jnp.log(total))
    return o, jnp.moveaxis(lse[..., 0], 1, 2)


def dropout_mask(
    rate: float, seed: Seed, shape: tuple[int, int, int, int]
) -> Bool[AnyArray, "B H T S"]:
    """Returns which weights of `shape` [B, H, T, S] `ops.attention` keeps.

    Computed by unsigned integers, without the kernels' arithmetic.

    Args:
      rate: of dropout.
      seed: an integer, or integers [B, H].
      shape: of the weights.
    """

    def mix(x):
        x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
        x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
        return x ^ (x >> np.uint32(16))

    step = np.uint32(0x9E3779B9)
    index = lambda axis: np.arange(shape[axis], dtype=np.uint32)
    if isinstance(seed, jax.Array):  # perhaps traced
        x = seed.astype(jnp.uint32)
    else:
        x = (np.asarray(seed).astype(np.int64) % 2**32).astype(np.uint32)
    x = x.reshape(x.shape + (1,) * (2 - x.ndim))
    if np.ndim(seed) == 0:
        x = mix(mix(x + step) + index(0)[:, None] * step) + index(1)[None] * step
    x = mix(mix(x)[..., None] + index(2)[None, None] * step)
    x = mix(x[..., None] + index(3)[None, None, None] * step)
    return x.view(np.int32) >= round(rate * 2**32) - 2**31


def attention_and_gradients(
    q: Float[AnyArray, "B T H D"],
    k: Float[AnyArray, "B S G D"],
    v: Float[AnyArray, "B S G P"],
    do: Float[AnyArray, "B T H P"],
    dlse: Float[AnyArray, "B T H"],
    *,
    mask: masks.Mask | None = None,
    bias: Float[AnyArray, "..."] | None = None,
    scale: Scalar | None = None,
    logit_cap: float | None = None,
    q_offset: Index | None = None,
    dropout_rate: float = 0.0,
    dropout_seed: Seed | None = None,
) -> tuple[
    Float64[np.ndarray, "B T H P"],
    Float64[np.ndarray, "B T H"],
    Float64[np.ndarray, "B T H D"],
    Float64[np.ndarray, "B S G D"],
    Float64[np.ndarray, "B S G P"],
    Float64[np.ndarray, "..."] | None,
]:
    """Computes o, lse, dq, dk, dv, dbias in NumPy by formulas, not by differentiation.

    Shares nothing with the rest but the mask. Args as in `attention`; do and dlse are the
    cotangents of o and lse. With P the weights: dV = P^T dO, dS = P (dO V^T - rowsum(dO O) + dlse).
    """
    # Logits: scale, cap, bias, mask.
    f64 = lambda x: np.asarray(x, np.float64)
    q, k, v, do, dlse = map(f64, (q, k, v, do, dlse))
    (B, T, H, D), (S, G) = q.shape, k.shape[1:3]
    R = H // G
    scale = D**-0.5 if scale is None else scale
    kr, vr = np.repeat(k, R, axis=2), np.repeat(v, R, axis=2)
    s = scale * np.einsum("bthd,bshd->bhts", q, kr)
    slope = 1.0
    if logit_cap is not None:
        slope = 1.0 - np.tanh(s / logit_cap) ** 2
        s = logit_cap * np.tanh(s / logit_cap)
    if bias is not None:
        b = f64(bias)
        b = b.reshape((1,) * (4 - b.ndim) + b.shape)
        s = s + b
    if mask is not None:
        s = np.where(
            np.asarray(masks.as_array(mask, T, S, q_offset)).reshape(-1, 1, T, S), s, -np.inf
        )
    # Weights and outputs.
    with np.errstate(divide="ignore"):
        peak = np.maximum(s.max(-1), -1e30)
        lse = peak + np.log(np.exp(s - peak[..., None]).sum(-1))
    p = np.exp(s - np.where(np.isneginf(lse), np.inf, lse)[..., None])
    kept = np.ones_like(p)
    if dropout_rate:
        kept = dropout_mask(dropout_rate, dropout_seed, p.shape) / (1 - dropout_rate)
    o = np.einsum("bhts,bshp->bthp", p * kept, vr)
    # Gradients.
    delta = np.einsum("bthp,bthp->bht", do, o) - dlse.transpose(0, 2, 1)
    ds = p * (kept * np.einsum("bthp,bshp->bhts", do, vr) - delta[..., None])
    dbias = None
    if bias is not None:
        dbias = ds.sum(tuple(a for a in range(4) if b.shape[a] == 1), keepdims=True)
        dbias = dbias.reshape(np.shape(bias))
    ds = ds * slope * scale
    grouped = lambda x: x.reshape(B, S, G, R, -1).sum(3)
    dq = np.einsum("bhts,bshd->bthd", ds, kr)
    dk = grouped(np.einsum("bhts,bthd->bshd", ds, q))
    dv = grouped(np.einsum("bhts,bthp->bshp", p * kept, do))
    return o, lse.transpose(0, 2, 1), dq, dk, dv, dbias


def flash_attention_1(
    q: Float[Array, "T D"],
    k: Float[Array, "S D"],
    v: Float[Array, "S P"],
    visible: Bool[AnyArray, "T S"],
    block_q: int,
    block_k: int,
) -> Float[Array, "T P"]:
    """Computes FlashAttention's loops for one head, keys outside (arXiv 2205.14135, algorithm 1).

    Every query has to see a key of the first block. Each pair of tiles updates the sum, the maximum
    and O, which stays normalised.
    """
    T = q.shape[0]
    rows = [slice(i, i + block_q) for i in range(0, T, block_q)]
    o = [jnp.zeros((q[r].shape[0], v.shape[1]), v.dtype) for r in rows]
    total = [jnp.zeros(q[r].shape[0], v.dtype) for r in rows]
    peak = [jnp.full(q[r].shape[0], -jnp.inf, v.dtype) for r in rows]
    for j in range(0, k.shape[0], block_k):
        keys = slice(j, j + block_k)
        for i, r in enumerate(rows):
            s = jnp.where(visible[r, keys], q[r] @ k[keys].T * q.shape[1] ** -0.5, -jnp.inf)
            new = jnp.maximum(peak[i], s.max(1))
            p = jnp.exp(s - new[:, None])
            kept = jnp.exp(peak[i] - new) * total[i]
            total[i], peak[i] = kept + p.sum(1), new
            o[i] = (kept[:, None] * o[i] + p @ v[keys]) / total[i][:, None]
    return jnp.concatenate(o)


def flash_attention_2(
    q: Float[Array, "T D"],
    k: Float[Array, "S D"],
    v: Float[Array, "S P"],
    visible: Bool[AnyArray, "T S"],
    block_q: int,
    block_k: int,
) -> Float[Array, "T P"]:
    """Computes FlashAttention-2's loops for one head, queries outside (2307.08691, algorithm 1).

    Arguments are those of `flash_attention_1`. O stays unnormalised until its last tile of keys.
    (Algorithm 1 of the paper prints an inverse at the rescaling of O, a misprint.)
    """
    o = []
    for i in range(0, q.shape[0], block_q):
        q_i = q[i : i + block_q]
        acc = jnp.zeros((q_i.shape[0], v.shape[1]), v.dtype)
        total = jnp.zeros(q_i.shape[0], v.dtype)
        peak = jnp.full(q_i.shape[0], -jnp.inf, v.dtype)
        for j in range(0, k.shape[0], block_k):
            keys = slice(j, j + block_k)
            seen = visible[i : i + block_q, keys]
            s = jnp.where(seen, q_i @ k[keys].T * q.shape[1] ** -0.5, -jnp.inf)
            new = jnp.maximum(peak, s.max(1))
            p, shrink = jnp.exp(s - new[:, None]), jnp.exp(peak - new)
            total = shrink * total + p.sum(1)
            acc = shrink[:, None] * acc + p @ v[keys]
            peak = new
        o.append(acc / total[:, None])
    return jnp.concatenate(o)


def linear_recurrence(
    a: Inexact[Array, "..."],
    b: Inexact[Array, "B T *D"],
    *,
    initial_state: Inexact[Array, "B *D"] | None = None,
    segment_ids: SegmentIds | None = None,
    reverse: bool = False,
) -> tuple[Inexact[Array, "B T *D"], Inexact[Array, "B *D"]]:
    """Computes h_t = a_t h_{t-1} + b_t by steps, with the arguments of `ops.linear_recurrence`.

    Computed in the inputs' own precision; differentiated by JAX.
    """
    B, T, *D = b.shape
    if a.ndim == b.ndim - 2:
        a = a[None, None]
    a = jnp.broadcast_to(a, b.shape)
    h = jnp.zeros((B, *D), jnp.promote_types(a.dtype, b.dtype))
    if initial_state is not None:
        h = h + initial_state
    # The steps at which a segment starts.
    starts = np.zeros((B, T), bool)
    if segment_ids is not None:
        ids = np.asarray(segment_ids)
        changes = ids[:, 1:] != ids[:, :-1]
        n = changes.shape[1]
        starts[:, slice(0, n) if reverse else slice(T - n, T)] = changes

    def step(h, x):
        a_t, b_t, start = x
        h = a_t * jnp.where(start.reshape(B, *(1 for _ in D)), 0.0, h) + b_t
        return h, h

    xs = (jnp.moveaxis(x, 1, 0) for x in (a, b, jnp.asarray(starts)))
    h, out = jax.lax.scan(step, h, tuple(xs), reverse=reverse)
    return jnp.moveaxis(out, 0, 1), h


def state_space_kernel(
    log_dt: Float[np.ndarray, " E"],
    A: Float[np.ndarray, "N N"],
    B: Float[np.ndarray, " N"],
    C: Float[np.ndarray, "E N"],
    length: int,
) -> Float[np.ndarray, "L E"]:
    """Returns K_l = C Abar^l Bbar of E systems with one dense A, bilinear, in NumPy's float64.

    One step after the other: nothing is shared with `ops.s4` but the definition.

    Args:
      log_dt: log of each system's step.
      A, B: of all systems.
      C: of each.
      length: L.
    """
    kernel, eye = np.empty((length, len(C))), np.eye(len(A))
    for h, dt in enumerate(np.exp(log_dt)):
        left = eye - dt / 2 * A
        Abar, x = np.linalg.solve(left, eye + dt / 2 * A), np.linalg.solve(left, dt * B)
        for l in range(length):
            kernel[l, h] = C[h] @ x
            x = Abar @ x
    return kernel


def state_space_kernel_by_powers(
    log_dt: Float[Array, " E"],
    A: Float[Array, "N N"],
    B: Float[Array, " N"],
    C: Float[Array, "E N"],
    length: int,
) -> Float[Array, "L E"]:
    """Returns the kernel of `state_space_kernel` by powers of the dense matrix, as the LSSL has it.

    The states Abar^l Bbar of all times are made by doubling: O(N^2 L) work and O(N L) memory per
    system, in matrix products (Gu et al. 2021, arXiv 2110.13985).
    """
    high = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    A, B = A[None], jnp.broadcast_to(B[None, :, None], (*C.shape, 1))
    eye = jnp.eye(A.shape[1], dtype=A.dtype)[None]
    dt = jnp.exp(log_dt)[:, None, None]
    solved = jnp.linalg.solve(eye - dt / 2 * A, jnp.concatenate([eye + dt / 2 * A, dt * B], axis=2))
    power, states = solved[..., :-1], solved[..., -1:]  # [E, N, N], [E, N, 1]
    while states.shape[2] < length:
        states = jnp.concatenate([states, high(power, states)], 2)
        power = high(power, power)
    return jnp.einsum("hn,hnl->lh", C, states[..., :length], precision="highest")


def selective_scan(
    x: Float[Array, "B T E"],
    dt: Float[Array, "B T E"],
    A: Float[Array, "E N"],
    B: Float[Array, "B T N"],
    C: Float[Array, "B T N"],
    *,
    D: Float[Array, " E"] | None = None,
    z: Float[Array, "B T E"] | None = None,
    dt_bias: Float[Array, " E"] | None = None,
    dt_softplus: bool = False,
    initial_state: Float[Array, "B E N"] | None = None,
    segment_ids: SegmentIds | None = None,
) -> tuple[Float[Array, "B T E"], Float[Array, "B E N"]]:
    """Computes Mamba-1's recurrence by steps, with the arguments of `ops.selective_scan`.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t and y_t = (C_t h_t + D x_t) silu(z_t).
    """
    dt = dt if dt_bias is None else dt + dt_bias[None, None]
    dt = jnp.logaddexp(dt, 0.0) if dt_softplus else dt
    decay = jnp.exp(dt[..., None] * A[None, None])
    h, last = linear_recurrence(
        decay,
        (dt * x)[..., None] * B[:, :, None, :],
        initial_state=initial_state,
        segment_ids=segment_ids,
    )
    y = jnp.einsum("bten,btn->bte", h, C, precision="highest")
    y = y if D is None else y + x * D[None, None]
    y = y if z is None else y * z / (1 + jnp.exp(-z))
    return y, last


def linear_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T _ D"],
    v: Float[Array, "B T _ P"],
    log_decay: Float[Array, "B T H"] | Float[Array, "B T H D"] | None = None,
    beta: Float[Array, "B T H"] | None = None,
    *,
    scale: float | None = None,
    state: Float[Array, "B H D P"] | None = None,
    starts: Bool[AnyArray, "B T"] | None = None,
) -> tuple[Float[Array, "B T H P"], Float[Array, "B H D P"]]:
    """Computes gated linear attention and the delta rules by steps.

    S_t = diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T, o_t = scale S_t^T q_t; with beta,
    beta_t (v_t - (decayed S_{t-1})^T k_t) replaces v_t. Arguments as of
    `ops.gated_linear_attention`; starts, bool [B, T], are the steps that forget what was before.
    """
    (B, T, H, D), P = q.shape, v.shape[3]
    k, v = (jnp.repeat(x, H // x.shape[2], axis=2) for x in (k, v))
    decay = jnp.ones((B, T, H, 1), q.dtype) if log_decay is None else jnp.exp(log_decay)
    decay = decay.reshape(B, T, H, -1)
    if starts is not None:
        decay = jnp.where(starts[:, :, None, None], 0.0, decay)
    S = jnp.zeros((B, H, D, P), q.dtype) if state is None else state

    def step(S, x):
        q, k, v, decay, beta = x
        S = decay[..., None] * S
        if beta is not None:
            v = beta[..., None] * (v - jnp.einsum("bhdp,bhd->bhp", S, k))
        S = S + k[..., :, None] * v[..., None, :]
        return S, jnp.einsum("bhdp,bhd->bhp", S, q)

    xs = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (q, k, v, decay, beta))
    S, o = jax.lax.scan(step, S, xs)
    return jnp.moveaxis(o, 0, 1) * (D**-0.5 if scale is None else scale), S
