"""Decaying states in chunks: S_t = diag(a_t) S_{t-1} + k_t v_t^T and o_t = S_t^T q_t.

One pair (decay, state) stands for a stretch of time: a later pair after an earlier one is
(a2 a1, a2 S1 + S2). Inside a chunk of C steps everything is a matmul (state space duality,
arXiv 2405.21060, section 6; gated linear attention, arXiv 2312.06635, section 4), between chunks
runs a scan of the pairs. With b the cumulative decay from the chunk's start, inclusive:

    o_i = b_i q_i S_in + sum_{j <= i} (q_i . (b_i / b_j) k_j) v_j
    S_out = b_C S_in + sum_j (b_C / b_j k_j) v_j^T

Ratios b_i / b_j are powers of differences of log-decays, so nothing overflows however strong the
decay is. The backward pass is written: it keeps the inputs, and recomputes the rest. CPUs take a
few chunks after the other, so that what these need stays in a cache; others take all at once.

Letters: B batch, T time, H heads, G groups of heads, R heads of a group, D key dim, P value dim,
C chunk, N chunks, M chunks that are computed together.
"""

import functools
import importlib
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tilescan.ops.attention_xla import LOG2_E, exp2, varying
from tilescan.ops.lowering import choose_when_lowered
from tilescan.ops.reverse_mode import written_vjp

# Steps of a chunk where none are asked for.
CHUNK = {"cpu": 64, "cuda": 64, "rocm": 64, "tpu": 128}
IMPLEMENTATIONS = ("xla", "pallas", None)
KERNELS = {"tpu": "tilescan.ops.chunked_scan_tpu", "cuda": "tilescan.ops.chunked_scan_gpu"}
SUBCHUNK = 16
# Floats of the C x C matrices that are computed together on CPUs, so that they stay in a cache.
CACHED = 2**17
# Chunks computed together, up to which the scan of their states is unrolled.
UNROLLED = 8
# Up to this many halvings within a chunk, b_i / b_j may be computed as a quotient.
MILD = 24.0


def chunked_scan(q, k, v, log_decay, initial_state, *, chunk=None, implementation="xla"):
    """(o [B, T, H, P], final_state [B, H, D, P]) of S_t = diag(a_t) S_{t-1} + k_t v_t^T.

    Args:
      q, k, v: [B, T, H or G, D], the same, and [B, T, H or G, P]; H is a multiple of G, and heads
        that are fewer serve H // G heads each.
      log_decay: log a_t <= 0, in the state's dtype; -inf forgets all. [B, T, H, D] or, where all
        of D or of the heads share it, 1 in their place.
      initial_state: [B, H, D, P]; its dtype is that of the computation.
      chunk: C, a multiple of 16; by platform when None.
      implementation: "xla", "pallas", or None: the Pallas kernels where the platform that the
        program is lowered for has them for these arguments, "xla" elsewhere.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation={implementation!r} is unknown; it must be one of "
            + ", ".join(map(repr, IMPLEMENTATIONS))
        )
    if q.shape[1] == 1 and implementation != "pallas":
        return one_step(q, k, v, log_decay, initial_state)
    # A state of zeros that all devices of a shard_map share has a gradient that they don't.
    arrays = q, k, v, log_decay, initial_state
    return _scan(*varying(arrays, arrays), chunk, implementation)


def one_step(q, k, v, log_decay, S):
    """The formula itself for T = 1, as decoding calls it: a chunk would be mostly padding."""
    H = S.shape[1]
    every = lambda x: jnp.repeat(x[:, 0].astype(S.dtype), H // x.shape[2], axis=1)
    S = jnp.exp(every(log_decay))[..., None] * S + every(k)[..., None] * every(v)[..., None, :]
    o = jnp.sum(every(q)[..., None] * S, -2)
    return o[:, None].astype(q.dtype), S


@functools.partial(jax.jit, static_argnums=(5, 6))
@functools.partial(written_vjp, nondiff_argnums=(5, 6))
def _scan(q, k, v, log_decay, initial_state, chunk, implementation):
    return _dispatch("forward", chunk, implementation, q, k, v, log_decay, initial_state)


def _scan_fwd(q, k, v, log_decay, initial_state, chunk, implementation):
    inputs = q, k, v, log_decay, initial_state
    return _scan(*inputs, chunk, implementation), inputs


def _scan_bwd(chunk, implementation, inputs, cotangents):
    return _dispatch("backward", chunk, implementation, *inputs, *cotangents)


_scan.__wrapped__.defvjp(_scan_fwd, _scan_bwd)


def _dispatch(direction, chunk, implementation, *arrays):
    """Calls `direction` of one implementation, or leaves the choice to the lowering."""
    xla = {"forward": forward, "backward": backward}[direction]

    def on(platform):
        return functools.partial(xla, chunk=chunk or CHUNK[platform], cached=platform == "cpu")

    def kernel(platform, *arrays):
        module = importlib.import_module(KERNELS[platform])
        reason = module.unsupported(*arrays[:5], chunk)
        if reason is None:
            return getattr(module, direction)(*arrays, chunk=chunk)
        if implementation == "pallas":
            raise ValueError(
                f'implementation="pallas": {reason}; implementation="xla" has no limit'
            )
        return on(platform)(*arrays)

    def pick(platform):
        if implementation != "xla" and platform in KERNELS:
            return functools.partial(kernel, platform)
        if implementation == "pallas":
            raise ValueError(
                f'implementation="pallas" has kernels for {", ".join(KERNELS)}, and this program '
                f'is lowered for {platform}; implementation="xla" or None runs anywhere'
            )
        return None if platform == "cpu" else on(platform)

    return choose_when_lowered(pick, on("cpu"), *arrays)


def on_platform(f, chunk, *arrays):
    """f(*arrays, chunk=C, cached=whether to compute few chunks at once) of the platform."""

    def of(platform):
        return functools.partial(f, chunk=chunk or CHUNK[platform], cached=platform == "cpu")

    return choose_when_lowered(
        lambda platform: None if platform == "cpu" else of(platform), of("cpu"), *arrays
    )


def forward(q, k, v, log_decay, initial_state, *, chunk, cached):
    cut = Chunks.of(q, k, v, initial_state, chunk, cached)

    def block(S, q, k, v, a):
        d = decays(a)
        S_in, S = states(k, v, d, S)
        return S, (scores(q, k, d) @ v + (q * d.into) @ S_in,)

    S, (o,), _ = cut.scan(block, initial_state, (q, k, v, log_decay), cut.outputs(q, v))
    return o, S


def backward(q, k, v, log_decay, initial_state, do, dS_out, *, chunk, cached):
    inputs = q, k, v, log_decay
    cut = Chunks.of(q, k, v, initial_state, chunk, cached)
    next_state = lambda S, k, v, a: (states(k, v, decays(a), S)[1], ())
    *_, starts = cut.scan(next_state, initial_state, inputs[1:])

    def block(dS, q, k, v, a, do, S):
        d = decays(a)
        S_in, _ = states(k, v, d, S)
        step = lambda dS, x: (x[1] * dS + x[0], dS)
        xs = transpose(q * d.into) @ do, transpose(d.whole)
        dS_out, dS = over_chunks(step, dS, xs, reverse=True)
        A, dq, dk, dlog = score_gradients(q, k, do @ transpose(v), d)
        dq_state = (do @ transpose(S_in)) * d.into
        dk_state = (v @ transpose(dS_out)) * d.out
        dv = transpose(A) @ do + (k * d.out) @ dS_out
        whole = d.whole * jnp.sum(S_in * dS_out, -1)[..., None, :]
        da = decay_gradient(dlog, q * dq_state, k * dk_state, whole, a)
        dq, dk = fit(dq, q) + fit(dq_state, q), fit(dk, k) + fit(dk_state, k)
        return dS, (dq, dk, fit(dv, v), da)

    dS, grads, _ = cut.scan(block, dS_out, (*inputs, do), inputs, starts, reverse=True)
    return *grads, dS


class Decays(NamedTuple):
    """Cumulative decays of chunks, [..., C, D or 1], and their logarithms in units of log 2."""

    coarse: jax.Array  # the logarithm, rounded so that sums and differences are exact
    fine: jax.Array  # what is left of it
    into: jax.Array  # b_i: from the chunk's start through i
    out: jax.Array  # b_C / b_j: from after j through the chunk's end
    whole: jax.Array  # b_C [..., 1, D or 1]


def decays(a):
    """Of the log-decays `a` [..., C, D or 1]."""
    a = jnp.maximum(a * LOG2_E, nothing(a.dtype))
    coarse = jnp.round(a * 256) / 256
    coarse, fine = _sums(coarse, True), _sums(a - coarse, True)
    into = exp2(coarse + fine)
    out = exp2((coarse[..., -1:, :] - coarse) + (fine[..., -1:, :] - fine))
    return Decays(coarse, fine, into, out, into[..., -1:, :])


def states(k, v, d, S):
    """The states at each chunk's start, [M, ..., D, P], and at the end."""
    xs = transpose(k * d.out) @ v, transpose(d.whole)
    return over_chunks(lambda S, x: (x[1] * S + x[0], S), S, xs)


def over_chunks(step, carry, xs, reverse=False):
    """(what `step` gives of each chunk, the last carry)"""
    M = jax.tree.leaves(xs)[0].shape[0]
    unroll = M if M <= UNROLLED else 1
    carry, ys = jax.lax.scan(step, varying(carry, xs), xs, reverse=reverse, unroll=unroll)
    return ys, carry


def scores(q, k, d):
    """q_i . (b_i / b_j) k_j for j <= i, else 0: [..., C, C]."""
    if d.coarse.shape[-1] == 1:
        return (q @ transpose(k)) * _ratios(d)
    return jax.lax.cond(_mild(d), _mild_scores, _strong_scores, q, k, d)


def score_gradients(q, k, dA, d):
    """(scores A, dq, dk, dlog) where dA [..., C, C] is A's cotangent.

    dlog [..., C, D or 1] is that of the log cumulative decays, without the diagonal, whose
    decays are 1: what cancels there would drown the gradients of strong decays.
    """
    if d.coarse.shape[-1] == 1:
        ratios, s = _ratios(d), q @ transpose(k)
        ds = dA * ratios
        moved = jnp.where(_lower(q, False), ds * s, 0.0)
        dlog = jnp.sum(moved, -1) - jnp.sum(moved, -2)
        ds = fit(ds, s)
        return s * ratios, ds @ k, transpose(ds) @ q, dlog[..., None]
    return jax.lax.cond(_mild(d), _mild_gradients, _strong_gradients, q, k, dA, d)


def _ratios(d):
    """b_i / b_j for j <= i, else 0, where D shares the decay: [..., C, C]."""
    x = (d.coarse - transpose(d.coarse)) + (d.fine - transpose(d.fine))
    return exp2(jnp.where(_lower(x), x, -jnp.inf))


def _mild(d):
    return jnp.min(d.coarse, initial=0.0) > -MILD


def _mild_scores(q, k, d):
    return jnp.where(_lower(q), (q * d.into) @ transpose(k / d.into), 0.0)


def _mild_gradients(q, k, dA, d):
    q_, k_ = q * d.into, k / d.into
    A = jnp.where(_lower(q), q_ @ transpose(k_), 0.0)
    below = jnp.where(_lower(q, False), dA, 0.0)
    dq, dk = (below @ k_) * d.into, (transpose(below) @ q_) / d.into
    dlog = q * dq - k * dk
    diagonal = jnp.diagonal(dA, axis1=-2, axis2=-1)[..., None]
    return A, dq + diagonal * k, dk + diagonal * q, dlog


def _strong_scores(q, k, d):
    rows = []
    for i in range(0, q.shape[-2], SUBCHUNK):
        q_, k_ = _at_start(q, k, d, i)
        left = (q_[0] * q_[1]) @ transpose(k_[0] * k_[1])
        pairs, q_i, k_i = _pairs(q, k, d, i)
        own = jnp.sum(q_i[..., :, None, :] * k_i[..., None, :, :] * pairs, -1)
        rows.append(_row(left, own, q.shape[-2]))
    return jnp.concatenate(rows, -2)


def _strong_gradients(q, k, dA, d):
    C = q.shape[-2]
    heads = jnp.broadcast_shapes(q.shape[:-2], k.shape[:-2], d.coarse.shape[:-2])
    rows, dqs, dlogs = [], [], []
    dk = jnp.zeros((*heads, *k.shape[-2:]), q.dtype)
    dlog_k = jnp.zeros_like(dk)
    for i in range(0, C, SUBCHUNK):
        own = slice(i, i + SUBCHUNK)
        q_, k_ = _at_start(q, k, d, i)
        q_i, k_i = q_[0] * q_[1], k_[0] * k_[1]
        left = q_i @ transpose(k_i)
        d_left = dA[..., own, :i]
        dq_left = (d_left @ k_i) * q_[1]
        dk_left = (transpose(d_left) @ q_i) * k_[1]
        pairs, q_i, k_i = _pairs(q, k, d, i)
        both = q_i[..., :, None, :] * k_i[..., None, :, :] * pairs
        weights = pairs * dA[..., own, own, None]
        dq_own = jnp.sum(weights * k_i[..., None, :, :], -2)
        dk_own = jnp.sum(weights * q_i[..., :, None, :], -3)
        below = jnp.where(_lower(q_i, False)[..., None], dA[..., own, own, None] * both, 0.0)
        rows.append(_row(left, jnp.sum(both, -1), C))
        dqs.append(dq_left + dq_own)
        dlogs.append(q_i * dq_left + jnp.sum(below, -2))
        dk = dk.at[..., :i, :].add(dk_left).at[..., own, :].add(dk_own)
        dlog_k = dlog_k.at[..., :i, :].add(k[..., :i, :] * dk_left)
        dlog_k = dlog_k.at[..., own, :].add(jnp.sum(below, -3))
    dlog = jnp.concatenate(dlogs, -2) - dlog_k
    return jnp.concatenate(rows, -2), jnp.concatenate(dqs, -2), dk, dlog


def _at_start(q, k, d, i):
    """Queries of the subchunk at i, keys before it, each with its decay to or from its start."""
    own, past = slice(i, i + SUBCHUNK), slice(0, i)
    start = slice(max(i - 1, 0), max(i, 1))
    since = lambda x, s: x[..., s, :] - x[..., start, :]
    q_decay = exp2(since(d.coarse, own) + since(d.fine, own))
    k_decay = exp2(-since(d.coarse, past) - since(d.fine, past))
    return (q[..., own, :], q_decay), (k[..., past, :], k_decay)


def _pairs(q, k, d, i):
    """b_i / b_j [..., c, c, D] of the subchunk at i, its queries and its keys."""
    own = slice(i, i + SUBCHUNK)
    between = lambda x: x[..., own, None, :] - x[..., None, own, :]
    x = between(d.coarse) + between(d.fine)
    q, k = q[..., own, :], k[..., own, :]
    return exp2(jnp.where(_lower(q)[..., None], x, -jnp.inf)), q, k


def _row(left, own, C):
    """Scores of a subchunk with all keys of the chunk."""
    right = C - left.shape[-1] - own.shape[-1]
    empty = jnp.zeros((*own.shape[:-1], right), own.dtype)
    return jnp.concatenate([left, own, empty], -1)


def decay_gradient(dlog, into, out, whole, a):
    """The cotangent of the log-decays `a` [..., C, D or 1] of a chunk.

    Args:
      dlog: of the log cumulative decays, [..., C, D or 1], by pairs of steps inside the chunk.
      into, out: [..., C, D], b_i's and (b_C / b_j)'s value times cotangent.
      whole: [..., 1, D], b_C's value times cotangent.
    """
    if a.shape[-1] == 1:
        into, out, whole = (jnp.sum(x, -1, keepdims=True) for x in (into, out, whole))
    da = _sums(dlog + into, False) + _sums(out, True, inclusive=False) + whole
    return fit(jnp.where(a * LOG2_E > nothing(a.dtype), da, 0.0), a)


def nothing(dtype):
    """A log-decay in units of log 2 whose power is exactly 0."""
    return -160.0 if dtype == jnp.float32 else -1200.0


def transpose(x):
    return jnp.swapaxes(x, -1, -2)


def fit(x, like):
    """x [..., G, R, C, F] summed over the heads that share `like`."""
    for axis in range(1, x.ndim - 2):
        if like.shape[axis] == 1 and x.shape[axis] > 1:
            x = jnp.sum(x, axis, keepdims=True)
    return x


def _lower(like, diagonal=True):
    """True where j <= i (or j < i), [1, ..., 1, C, C], for `like` [..., C, F]."""
    C = like.shape[-2]
    mask = jnp.tri(C, k=0 if diagonal else -1, dtype=bool)
    return mask.reshape((1,) * (like.ndim - 2) + (C, C))


def _sums(x, from_start, inclusive=True):
    """Sums of x [..., C, F] along C, from its start or through its end."""
    lower = jnp.tri(x.shape[-2], k=0 if inclusive else -1, dtype=x.dtype)
    order = "ij,...jd->...id" if from_start else "ij,...id->...jd"
    return jnp.einsum(order, lower, x, precision="highest")


class Chunks(NamedTuple):
    """How time is cut: into blocks of M chunks of C steps; heads stand as [G, R]."""

    T: int
    G: int
    R: int
    C: int
    M: int
    blocks: int

    @classmethod
    def of(cls, q, k, v, S, chunk, cached):
        (B, T), H = q.shape[:2], S.shape[1]
        G = min(x.shape[2] for x in (q, k, v))
        C = min(chunk, -(-T // SUBCHUNK) * SUBCHUNK)
        N = -(-T // C)
        M = max(1, CACHED // max(B * H * C * C, 1)) if cached else N
        M = -(-N // -(-N // M))
        return cls(T, G, H // G, C, M, -(-N // M))

    def outputs(self, q, v):
        """Shapes of outputs: of all heads, in q's dtype."""
        return [jax.ShapeDtypeStruct((*q.shape[:2], self.G * self.R, v.shape[3]), q.dtype)]

    def scan(self, f, S, arrays, like=(), starts=None, reverse=False):
        """S, results = f(S, *chunks, start) of each block of time, in turn.

        Args:
          f: takes chunks [M, B, G, R, C, F] in S's dtype, where 1 stands for G or R that are
            shared, and the block's of `starts`, if any; its results look like the chunks.
          S: the first state [B, H, D, P]; f's is [B, G, R, D, P].
          arrays: what is cut into chunks, [B, T, heads, F]; zeros follow the end.
          like: shapes [B, T, heads, F] and dtypes of the results.
          starts: states by blocks, as are returned.

        Returns:
          The last S, the results, and the S before each block.
        """
        steps = self.M * self.C
        pad = lambda x: ((0, 0), (0, self.blocks * steps - self.T), *[(0, 0)] * (len(x.shape) - 2))
        arrays = [jnp.pad(x, pad(x)) for x in arrays]
        results = [
            jnp.zeros((x.shape[0], self.blocks * steps, *x.shape[2:]), x.dtype) for x in like
        ]
        S = S.reshape(S.shape[0], self.G, self.R, *S.shape[2:])
        carry = varying((S, results), (S, arrays, starts))

        def step(carry, x):
            (S, results), (i, start) = carry, x
            cut = lambda x: jax.lax.dynamic_slice_in_dim(x, i * steps, steps, 1).astype(S.dtype)
            new, parts = f(S, *(self._split(cut(x)) for x in arrays), *jax.tree.leaves(start))
            put = lambda x, part: jax.lax.dynamic_update_slice_in_dim(
                x, self._join(part).astype(x.dtype), i * steps, 1
            )
            return (new, [put(*pair) for pair in zip(results, parts, strict=True)]), S

        xs = jnp.arange(self.blocks), starts
        (S, results), before = jax.lax.scan(step, carry, xs, reverse=reverse)
        S = S.reshape(S.shape[0], self.G * self.R, *S.shape[3:])
        return S, [x[:, : self.T] for x in results], before

    def _split(self, x):
        B, _, heads, F = x.shape
        G = min(self.G, heads)
        return x.reshape(B, self.M, self.C, G, heads // G, F).transpose(1, 0, 3, 4, 2, 5)

    def _join(self, x):
        M, B, G, R, C, F = x.shape
        return x.transpose(1, 0, 4, 2, 3, 5).reshape(B, M * C, G * R, F)
