"""The delta rule, plain and gated: a state that replaces what it held for a key.

In chunks by the WY form (arXiv 2406.06484, section 3.2; gated, 2412.06464, section 3.3). With b
the cumulative decay and S_in the chunk's first state, the values that are written solve

    u_i + beta_i sum_{j < i} (b_i / b_j) (k_i . k_j) u_j = beta_i (v_i - b_i S_in^T k_i)

a unit triangular system; from there on u is the v of `ops.chunked_scan`.

Letters: B batch, T time, H heads, G key-value heads (H is a multiple of G), D head dim,
P value dim, C chunk.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tilescan.ops.attention_xla import varying
from tilescan.ops.chunked_scan import (
    Chunks,
    decay_gradient,
    decays,
    fit,
    on_platform,
    over_chunks,
    score_gradients,
    scores,
    transpose,
)
from tilescan.ops.explicit_axes import cut_by_letters
from tilescan.ops.recurrence_arguments import (
    check_chunk,
    check_floating,
    check_heads,
    check_implementation,
    check_shape,
    check_state,
    forget_at_starts,
    state_dtype,
)
from tilescan.ops.reverse_mode import written_vjp

# Rows of the triangular systems that are solved at once.
BLOCK = 8


@cut_by_letters(
    ("BTHP", "BHDP"),
    q="BTHD",
    k="BTGD",
    v="BTGP",
    beta="BTH",
    initial_state="BHDP",
    segment_ids="BT",
)
def delta_rule(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T G D"],
    v: Float[Array, "B T G P"],
    beta: Float[Array, "B T H"],
    *,
    scale: float | None = None,
    initial_state: Float[Array, "B H D P"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    chunk: int | None = None,
    implementation: str | None = None,
):
    """S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T and o_t = scale S_t^T q_t.

    `gated_delta_rule` without decay: arguments, results and errors are described there.
    """
    check_implementation("delta_rule", implementation)
    return _checked(q, k, v, beta, None, scale, initial_state, segment_ids, chunk)


@cut_by_letters(
    ("BTHP", "BHDP"),
    q="BTHD",
    k="BTGD",
    v="BTGP",
    beta="BTH",
    log_decay="BTH",
    initial_state="BHDP",
    segment_ids="BT",
)
def gated_delta_rule(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T G D"],
    v: Float[Array, "B T G P"],
    beta: Float[Array, "B T H"],
    log_decay: Float[Array, "B T H"],
    *,
    scale: float | None = None,
    initial_state: Float[Array, "B H D P"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    chunk: int | None = None,
    implementation: str | None = None,
):
    """S_t = S' + beta_t k_t (v_t - S'^T k_t)^T with S' = exp(log_decay_t) S_{t-1}.

    The output is o_t = scale S_t^T q_t.

    Args:
      q, k, v: queries [B, T, H, D], keys [B, T, G, D], values [B, T, G, P], of one floating
        dtype. Query head h reads key-value head h // (H // G). Keys are taken as they come; the
        rule is stable where beta |k|^2 <= 2, so models normalise them to length 1.
      beta: how much is replaced, [B, T, H].
      log_decay: log of the decay, at most 0: [B, T, H]. -inf forgets the state.
      scale: factor of the output, D**-0.5 when None.
      initial_state: [B, H, D, P]; zeros when None.
      segment_ids: integers [B, T], or [B, 1 + T] with the segment of initial_state first. Where
        neighbours differ a segment starts, and the state before it counts as 0. By [B, T] ids the
        first step goes on with initial_state's segment.
      chunk: steps that are computed by matrix products, a multiple of 16; by platform when None.
      implementation: "xla" or None.

    Returns:
      o [B, T, H, P] in q's dtype, and the state after the last step [B, H, D, P], float32
      (float64 for float64). Both are differentiable in all inputs and in initial_state.

    Of bfloat16 inputs "xla" computes the state as exactly as of float32 ones: on CPUs its largest
    error is below 1e-5 of its largest entry.

    Raises:
      ValueError: shapes, chunk or implementation that do not fit.
      TypeError: dtypes that are not floating or differ, ids that are not integers.
    """
    check_implementation("gated_delta_rule", implementation)
    return _checked(q, k, v, beta, log_decay, scale, initial_state, segment_ids, chunk)


def _checked(q, k, v, beta, log_decay, scale, initial_state, segment_ids, chunk):
    B, T, H, D, P = check_heads(q, k, v)
    dtype = state_dtype(q)
    for name, x in (("beta", beta), ("log_decay", log_decay)):
        check_shape(name, x, "B, T, H", (B, T, H))
    check_floating(beta=beta, log_decay=log_decay)
    check_chunk(chunk)
    initial_state = check_state(initial_state, (B, H, D, P), "B, H, D, P", dtype)
    if log_decay is None:
        log_decay = jnp.zeros((B, T, 1), dtype)
    log_decay = forget_at_starts(log_decay.astype(dtype), segment_ids)[..., None]
    q = q * jnp.asarray(D**-0.5 if scale is None else scale, q.dtype)
    arrays = q, k, v, log_decay, beta[..., None], initial_state
    return _delta(*varying(arrays, arrays), chunk)


@functools.partial(jax.jit, static_argnums=6)
@functools.partial(written_vjp, nondiff_argnums=(6,))
def _delta(q, k, v, log_decay, beta, initial_state, chunk):
    return on_platform(_forward, chunk, q, k, v, log_decay, beta, initial_state)


def _delta_fwd(*arguments):
    return _delta(*arguments), arguments[:-1]


def _delta_bwd(chunk, inputs, cotangents):
    return on_platform(_backward, chunk, *inputs, *cotangents)


_delta.__wrapped__.defvjp(_delta_fwd, _delta_bwd)


def _forward(q, k, v, log_decay, beta, S, *, chunk, cached):
    cut = Chunks.of(q, k, v, S, chunk, cached)

    def block(S, q, k, v, a, beta):
        d = decays(a)
        S_in, U, S = _states(k, d, *_writes(k, v, beta, d), S)
        return S, (scores(q, k, d) @ U + (q * d.into) @ S_in,)

    S, (o,), _ = cut.scan(block, S, (q, k, v, log_decay, beta), cut.outputs(q, v))
    return o, S


def _writes(k, v, beta, d):
    """U_0 and W: what is written is u = U_0 - W S_in, which solve it for beta v and beta b k."""
    both = jnp.concatenate([beta * v, beta * d.into * k], -1)
    both = _solve(_system(k, beta, d), both)
    return both[..., : v.shape[-1]], both[..., v.shape[-1] :]


def _states(k, d, U0, W, S):
    """The states at each chunk's start, what is written, and the state at the end."""

    def step(S, x):
        U0, W, k_out, whole = x
        U = U0 - W @ S
        return whole * S + transpose(k_out) @ U, (S, U)

    (S_in, U), S = over_chunks(step, S, (U0, W, k * d.out, transpose(d.whole)))
    return S_in, U, S


def _system(k, beta, d):
    """The strictly lower part of the triangular system, [..., C, C]."""
    return beta * jnp.tril(scores(k, k, d), -1)


def _solve(A, x, transposed=False):
    """(I + A)^-1 x for a strictly lower A [..., C, C], or its transpose's, by blocks of rows.

    Substitution by matmuls: LAPACK's, a call for each system, takes several times longer on CPUs.
    """
    C = A.shape[-1]
    blocks = [slice(i, i + BLOCK) for i in range(0, C, BLOCK)]
    inverses = _inverses(jnp.stack([A[..., s, s] for s in blocks], -3))
    solved = x[..., :0, :]
    for i, own in reversed([*enumerate(blocks)]) if transposed else enumerate(blocks):
        inverse = inverses[..., i, :, :]
        if transposed:
            left = transpose(A[..., own.stop :, own])
            new = transpose(inverse) @ (x[..., own, :] - left @ solved)
            solved = jnp.concatenate([new, solved], -2)
        else:
            new = inverse @ (x[..., own, :] - A[..., own, : own.start] @ solved)
            solved = jnp.concatenate([solved, new], -2)
    return solved


def _inverses(A):
    """(I + A)^-1 of many small strictly lower A [..., c, c], row after row."""
    A = jnp.moveaxis(A, (-2, -1), (0, 1))  # what many share comes last, to be a vector
    c = A.shape[0]
    X = jnp.broadcast_to(jnp.eye(c, dtype=A.dtype).reshape(c, c, *(1,) * (A.ndim - 2)), A.shape)
    for i in range(1, c):
        X = X.at[i].add(-jnp.sum(A[i, :i, None] * X[:i], 0))
    return jnp.moveaxis(X, (0, 1), (-2, -1))


def _backward(q, k, v, log_decay, beta, S, do, dS, *, chunk, cached):
    inputs = q, k, v, log_decay, beta
    cut = Chunks.of(q, k, v, S, chunk, cached)

    def next_state(S, k, v, a, beta):
        d = decays(a)
        return _states(k, d, *_writes(k, v, beta, d), S)[2], ()

    *_, starts = cut.scan(next_state, S, inputs[1:])

    def block(dS, q, k, v, a, beta, do, S):
        d = decays(a)
        U0, W = _writes(k, v, beta, d)
        S_in, U, _ = _states(k, d, U0, W, S)
        A, dq, dk, dlog = score_gradients(q, k, do @ transpose(U), d)

        def step(dS, x):
            dU, own, W, k_out, whole = x
            dU = dU + k_out @ dS
            return whole * dS + own - transpose(W) @ dU, (dS, dU)

        xs = transpose(A) @ do, transpose(q * d.into) @ do, W, k * d.out, transpose(d.whole)
        (dS_out, dU), dS = over_chunks(step, dS, xs, reverse=True)
        # Of u = beta (v - b k S_in - A u), solved: dr is the cotangent of what beta multiplies,
        # but for beta.
        dr = _solve(_system(k, beta, d), dU, transposed=True)
        dv = beta * dr
        A, dk_i, dk_j, dlog_k = score_gradients(k, k, jnp.tril(-dv @ transpose(U), -1), d)
        left = v - (d.into * k) @ S_in - jnp.tril(A, -1) @ U
        dbeta = jnp.sum(dr * left, -1, keepdims=True)
        dq_state = (do @ transpose(S_in)) * d.into
        dk_start = -(dv @ transpose(S_in)) * d.into
        dk_end = (U @ transpose(dS_out)) * d.out
        whole = d.whole * jnp.sum(S_in * dS_out, -1)[..., None, :]
        into, out = q * dq_state + k * dk_start, k * dk_end
        da = decay_gradient(dlog + dlog_k, into, out, whole, a)
        dk = sum(fit(g, k) for g in (dk, dk_i, dk_j, dk_start, dk_end))
        return dS, (fit(dq + dq_state, q), dk, fit(dv, v), da, dbeta)

    dS, grads, _ = cut.scan(block, dS, (*inputs, do), inputs, starts, reverse=True)
    return *grads, dS
