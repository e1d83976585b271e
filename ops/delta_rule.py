"""The delta rule, plain and gated: a state that replaces what it held for a key.

In chunks by the WY form (arXiv 2406.06484, section 3.2; gated, 2412.06464, section 3.3). With b
the cumulative decay and S_in the chunk's first state, the values u that are written solve

    u_i + beta_i sum_{j < i} (b_i / b_j) (k_i . k_j) u_j = beta_i (v_i - b_i S_in^T k_i)

a unit triangular system; from there on u is the v of `ops.chunked_scan`.

Dimensions: B batch, T time, H heads, G key-value heads (H is a multiple of G), D head dim,
P value dim, C chunk.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tilescan.ops.arrays import AnyArray, check_number
from tilescan.ops.attention_xla import varying
from tilescan.ops.chunked_scan import (
    Chunks,
    cumulative_decays,
    decay_gradient,
    on_platform,
    scan_chunks,
    score_gradients,
    scores,
    sum_shared_heads,
    transpose,
)
from tilescan.ops.explicit_axes import partitioned_by_dimensions
from tilescan.ops.recurrence_arguments import (
    SegmentIds,
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


@partitioned_by_dimensions(
    ("BTHP", "BHDP"),
    q="BTHD",
    k="BTGD",
    v="BTGP",
    beta="BTH",
    initial_state="BHDP",
    segment_ids="BT",
)
def delta_rule(
    q: Float[AnyArray, "B T H D"],
    k: Float[AnyArray, "B T G D"],
    v: Float[AnyArray, "B T G P"],
    beta: Float[AnyArray, "B T H"],
    *,
    scale: float | None = None,
    initial_state: Float[AnyArray, "B H D P"] | None = None,
    segment_ids: SegmentIds | None = None,
    chunk: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H P"], Float[Array, "B H D P"]]:
    """Computes S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T and o_t = scale S_t^T q_t.

    Arguments, results and errors are those of `gated_delta_rule`, of which this is the case without
    decay.
    """
    check_implementation("delta_rule", implementation)
    return _checked(q, k, v, beta, None, scale, initial_state, segment_ids, chunk)


@partitioned_by_dimensions(
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
    q: Float[AnyArray, "B T H D"],
    k: Float[AnyArray, "B T G D"],
    v: Float[AnyArray, "B T G P"],
    beta: Float[AnyArray, "B T H"],
    log_decay: Float[AnyArray, "B T H"],
    *,
    scale: float | None = None,
    initial_state: Float[AnyArray, "B H D P"] | None = None,
    segment_ids: SegmentIds | None = None,
    chunk: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H P"], Float[Array, "B H D P"]]:
    """Computes S_t = S' + beta_t k_t (v_t - S'^T k_t)^T with S' = exp(log_decay_t) S_{t-1}.

    The output is o_t = scale S_t^T q_t.

    Args:
      q, k, v: queries [B, T, H, D], keys [B, T, G, D], values [B, T, G, P], of one floating
        dtype. Query head h reads key-value head h // (H // G). Keys are not normalised here; the
        rule is stable where beta |k|^2 <= 2, so models normalise them to length 1.
      beta: fraction of the old value that is replaced, [B, T, H].
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
    check_number("scale", scale)
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
    return on_platform("delta_rule", _forward, chunk, q, k, v, log_decay, beta, initial_state)


def _delta_fwd(*arguments):
    return _delta(*arguments), arguments[:-1]


def _delta_bwd(chunk, inputs, cotangents):
    return on_platform("delta_rule", _backward, chunk, *inputs, *cotangents)


_delta.__wrapped__.defvjp(_delta_fwd, _delta_bwd)


def _forward(q, k, v, log_decay, beta, S, *, chunk, cached):
    chunks = Chunks.of(q, k, v, S, chunk, cached)

    def block(S, q, k, v, a, beta):
        d = cumulative_decays(a)
        # o = A U + (b Q) S_in, with u in the place of v.
        S_in, U, S = _states(k, d, *_writes(k, v, beta, d), S)
        return S, (scores(q, k, d) @ U + (q * d.from_start) @ S_in,)

    S, (o,), _ = chunks.scan(block, S, (q, k, v, log_decay, beta), chunks.outputs(q, v))
    return o, S


def _writes(k, v, beta, d):
    """Returns U_0 and W such that u = U_0 - W S_in: the solutions for beta v and beta b k."""
    both = jnp.concatenate([beta * v, beta * d.from_start * k], -1)
    both = _solve(_system(k, beta, d), both)
    return both[..., : v.shape[-1]], both[..., v.shape[-1] :]


def _states(k, d, U0, W, S):
    """Returns the states at each chunk's start, the values written, and the state at the end."""

    def step(S, x):
        U0, W, k_end, total = x
        U = U0 - W @ S
        return total * S + transpose(k_end) @ U, (S, U)

    (S_in, U), S = scan_chunks(step, S, (U0, W, k * d.to_end, transpose(d.total)))
    return S_in, U, S


def _system(k, beta, d):
    """Returns the strictly lower part of the triangular system, [..., C, C]."""
    return beta * jnp.tril(scores(k, k, d), -1)


def _solve(A, x, transposed=False):
    """Returns (I + A)^-1 x for a strictly lower A [..., C, C], or its transpose, by blocks of rows.

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
    """Returns (I + A)^-1 of many small strictly lower A [..., c, c], row by row."""
    A = jnp.moveaxis(A, (-2, -1), (0, 1))  # the batch comes last, to be vectorized
    c = A.shape[0]
    X = jnp.broadcast_to(jnp.eye(c, dtype=A.dtype).reshape(c, c, *(1,) * (A.ndim - 2)), A.shape)
    for i in range(1, c):
        X = X.at[i].add(-jnp.sum(A[i, :i, None] * X[:i], 0))
    return jnp.moveaxis(X, (0, 1), (-2, -1))


def _backward(q, k, v, log_decay, beta, S, do, dS, *, chunk, cached):
    inputs = q, k, v, log_decay, beta
    chunks = Chunks.of(q, k, v, S, chunk, cached)

    def next_state(S, k, v, a, beta):
        d = cumulative_decays(a)
        return _states(k, d, *_writes(k, v, beta, d), S)[2], ()

    # The states before each block of chunks.
    *_, starts = chunks.scan(next_state, S, inputs[1:])

    def block(dS, q, k, v, a, beta, do, S):
        d = cumulative_decays(a)
        U0, W = _writes(k, v, beta, d)
        S_in, U, _ = _states(k, d, U0, W, S)
        # Of o = A U + (b Q) S_in.
        A, dq, dk, dlog = score_gradients(q, k, do @ transpose(U), d)

        def step(dS, x):
            dU, own, W, k_end, total = x
            dU = dU + k_end @ dS
            return total * dS + own - transpose(W) @ dU, (dS, dU)

        xs = (
            transpose(A) @ do,
            transpose(q * d.from_start) @ do,
            W,
            k * d.to_end,
            transpose(d.total),
        )
        (dS_out, dU), dS = scan_chunks(step, dS, xs, reverse=True)
        # From u = beta (v - b k S_in - A u) with A_ij = (b_i / b_j) k_i . k_j for j < i: dr is the
        # cotangent of beta times the parenthesis.
        dr = _solve(_system(k, beta, d), dU, transposed=True)
        dv = beta * dr
        A, dk_i, dk_j, dlog_k = score_gradients(k, k, jnp.tril(-dv @ transpose(U), -1), d)
        residual = v - (d.from_start * k) @ S_in - jnp.tril(A, -1) @ U
        dbeta = jnp.sum(dr * residual, -1, keepdims=True)
        # By the states: from the chunk's start into o and u, from u into its end.
        dq_state = (do @ transpose(S_in)) * d.from_start
        dk_start = -(dv @ transpose(S_in)) * d.from_start
        dk_end = (U @ transpose(dS_out)) * d.to_end
        total = d.total * jnp.sum(S_in * dS_out, -1)[..., None, :]
        from_start, to_end = q * dq_state + k * dk_start, k * dk_end
        da = decay_gradient(dlog + dlog_k, from_start, to_end, total, a)
        dk = sum(sum_shared_heads(g, k) for g in (dk, dk_i, dk_j, dk_start, dk_end))
        return dS, (sum_shared_heads(dq + dq_state, q), dk, sum_shared_heads(dv, v), da, dbeta)

    dS, grads, _ = chunks.scan(block, dS, (*inputs, do), inputs, starts, reverse=True)
    return *grads, dS
