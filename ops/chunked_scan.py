"""Decaying states in chunks: S_t = diag(a_t) S_{t-1} + k_t v_t^T and o_t = S_t^T q_t.

One pair (decay, state) represents an interval of time: an earlier pair followed by a later one is
(a2 a1, a2 S1 + S2). Inside a chunk of C steps everything is a matmul (state space duality,
arXiv 2405.21060, section 6; gated linear attention, arXiv 2312.06635, section 4), between chunks
the pairs are scanned. With b the cumulative decay from the chunk's start, inclusive:

    o_i = b_i q_i S_in + sum_{j <= i} (q_i . (b_i / b_j) k_j) v_j
    S_out = b_C S_in + sum_j (b_C / b_j k_j) v_j^T

Ratios b_i / b_j are powers of differences of log-decays, so nothing overflows however strong the
decay is. The backward pass is a custom one: it keeps the inputs and recomputes the rest. CPUs
compute a few chunks at a time, so that their intermediates stay in a cache; other platforms all at
once.

Dimensions: B batch, T time, H heads, G groups of heads, R heads of a group, D key dim, P value dim,
C chunk, N chunks, M chunks that are computed together.
"""

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from tilescan.ops.attention_xla import LOG2_E, exp2, varying
from tilescan.ops.lowering import NO_KERNEL, choose_when_lowered, note, other_platform
from tilescan.ops.reverse_mode import written_vjp

# Steps of a chunk where none are asked for.
CHUNK = {"cpu": 64, "cuda": 64, "rocm": 64, "tpu": 128}
IMPLEMENTATIONS = ("xla", "pallas", None)
KERNELS = {"tpu": "tilescan.ops.chunked_scan_tpu", "cuda": "tilescan.ops.chunked_scan_gpu"}
OP = "ssd, gated_linear_attention"  # what this is the core of
SUBCHUNK = 16
# Floats of the C x C matrices that are computed together on CPUs, so that they stay in a cache.
CACHED = 2**17
# Chunks computed together, up to which the scan of their states is unrolled.
UNROLLED = 8
# Up to this many halvings within a chunk, b_i / b_j may be computed as a quotient.
MILD = 24.0


def chunked_scan(
    q: Float[Array, "B T _ D"],
    k: Float[Array, "B T _ D"],
    v: Float[Array, "B T _ P"],
    log_decay: Float[Array, "B T _ #D"],
    initial_state: Float[Array, "B H D P"],
    *,
    chunk: int | None = None,
    implementation: str | None = "xla",
) -> tuple[Float[Array, "B T H P"], Float[Array, "B H D P"]]:
    """Computes S_t = diag(a_t) S_{t-1} + k_t v_t^T and o_t = S_t^T q_t.

    Args:
      q, k, v: [B, T, H or G, D], the same, and [B, T, H or G, P]; H is a multiple of G, and each
        of G heads serves H // G of the others.
      log_decay: log a_t <= 0, in the state's dtype; -inf forgets all. [B, T, H, D] or, where all
        of D or of the heads share it, 1 in their place.
      initial_state: [B, H, D, P]; its dtype is that of the computation.
      chunk: C, a multiple of 16; by platform when None.
      implementation: "xla", "pallas", or None: the Pallas kernels where the platform that the
        program is lowered for has them for these arguments, "xla" elsewhere.

    Returns:
      o [B, T, H, P] in q's dtype and the state after the last step [B, H, D, P].

    Raises:
      ValueError: an unknown implementation, or, when the program is lowered, "pallas" on a platform
        without a kernel for these arguments.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation={implementation!r} is unknown; it must be one of "
            + ", ".join(map(repr, IMPLEMENTATIONS))
        )
    if q.shape[1] == 1 and implementation != "pallas":
        return one_step(q, k, v, log_decay, initial_state)
    # The gradient of a state that is replicated in a shard_map may differ by device.
    arrays = q, k, v, log_decay, initial_state
    return _scan(*varying(arrays, arrays), chunk, implementation)


def one_step(
    q: Float[Array, "B 1 _ D"],
    k: Float[Array, "B 1 _ D"],
    v: Float[Array, "B 1 _ P"],
    log_decay: Float[Array, "B 1 _ #D"],
    S: Float[Array, "B H D P"],
) -> tuple[Float[Array, "B 1 H P"], Float[Array, "B H D P"]]:
    """Computes the recurrence itself for T = 1, as in decoding: a chunk would be mostly padding."""
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
        if implementation is None:
            note(OP, reason)
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
        if implementation is None:
            note(OP, other_platform("TPUs and Hopper GPUs", platform))
        return None if platform == "cpu" else on(platform)

    return choose_when_lowered(pick, on("cpu"), *arrays)


def on_platform(op: str, f: Callable[..., PyTree], chunk: int | None, *arrays: Array) -> PyTree:
    """Returns f(*arrays, chunk=C, cached=...) with the platform's C and whether it is a CPU.

    op: what f is of, an op without kernels. cached: whether f is to compute a few chunks at a time.
    """

    def of(platform):
        return functools.partial(f, chunk=chunk or CHUNK[platform], cached=platform == "cpu")

    def pick(platform):
        note(op, NO_KERNEL)
        return None if platform == "cpu" else of(platform)

    return choose_when_lowered(pick, of("cpu"), *arrays)


def forward(
    q: Float[Array, "B T _ D"],
    k: Float[Array, "B T _ D"],
    v: Float[Array, "B T _ P"],
    log_decay: Float[Array, "B T _ #D"],
    initial_state: Float[Array, "B H D P"],
    *,
    chunk: int,
    cached: bool,
) -> tuple[Float[Array, "B T H P"], Float[Array, "B H D P"]]:
    """Computes `chunked_scan` in XLA; cached: a few chunks at a time.

    With b_i = a_1 ... a_i in a chunk: A_ij = (q_i . (b_i / b_j) k_j) for j <= i, else 0, and
    o = A V + (b Q) S_in.
    """
    chunks = Chunks.of(q, k, v, initial_state, chunk, cached)

    def block(S, q, k, v, a):
        d = cumulative_decays(a)
        S_in, S = chunk_states(k, v, d, S)
        # Within the chunk by scores, from before it by the state.
        return S, (scores(q, k, d) @ v + (q * d.from_start) @ S_in,)

    S, (o,), _ = chunks.scan(block, initial_state, (q, k, v, log_decay), chunks.outputs(q, v))
    return o, S


def backward(
    q: Float[Array, "B T _ D"],
    k: Float[Array, "B T _ D"],
    v: Float[Array, "B T _ P"],
    log_decay: Float[Array, "B T _ #D"],
    initial_state: Float[Array, "B H D P"],
    do: Float[Array, "B T H P"],
    dS_out: Float[Array, "B H D P"],
    *,
    chunk: int,
    cached: bool,
) -> tuple[
    Float[Array, "B T _ D"],
    Float[Array, "B T _ D"],
    Float[Array, "B T _ P"],
    Float[Array, "B T _ #D"],
    Float[Array, "B H D P"],
]:
    """Computes the gradients of q, k, v, log_decay and initial_state in XLA.

    Chunks are visited in reverse, with the states at their starts recomputed. With dA = dO V^T and
    dS_out the cotangent of a chunk's last state,

        dS_in = b_C dS_out + (b Q)^T dO        dV = A^T dO + (b_C / b K) dS_out
        dQ = dA (b_i / b_j K) + b dO S_in^T    dK = dA^T (b_i / b_j Q) + b_C / b V dS_out^T
    """
    inputs = q, k, v, log_decay
    chunks = Chunks.of(q, k, v, initial_state, chunk, cached)
    next_state = lambda S, k, v, a: (chunk_states(k, v, cumulative_decays(a), S)[1], ())
    # The states before each block of chunks.
    *_, starts = chunks.scan(next_state, initial_state, inputs[1:])

    def block(dS, q, k, v, a, do, S):
        d = cumulative_decays(a)
        S_in, _ = chunk_states(k, v, d, S)
        # From chunk to chunk.
        step = lambda dS, x: (x[1] * dS + x[0], dS)
        xs = transpose(q * d.from_start) @ do, transpose(d.total)
        dS_out, dS = scan_chunks(step, dS, xs, reverse=True)
        # Within a chunk, then by its states.
        A, dq, dk, dlog = score_gradients(q, k, do @ transpose(v), d)
        dq_state = (do @ transpose(S_in)) * d.from_start
        dk_state = (v @ transpose(dS_out)) * d.to_end
        dv = transpose(A) @ do + (k * d.to_end) @ dS_out
        total = d.total * jnp.sum(S_in * dS_out, -1)[..., None, :]
        da = decay_gradient(dlog, q * dq_state, k * dk_state, total, a)
        dq, dk = (
            sum_shared_heads(dq, q) + sum_shared_heads(dq_state, q),
            sum_shared_heads(dk, k) + sum_shared_heads(dk_state, k),
        )
        return dS, (dq, dk, sum_shared_heads(dv, v), da)

    dS, grads, _ = chunks.scan(block, dS_out, (*inputs, do), inputs, starts, reverse=True)
    return *grads, dS


class Decays(NamedTuple):
    """Cumulative decays of chunks, [..., C, D or 1], and their logarithms in units of log 2."""

    coarse: jax.Array  # log2 b_i, rounded so that sums and differences are exact
    fine: jax.Array  # log2 b_i - coarse
    from_start: jax.Array  # b_i, of the steps 1 ... i
    to_end: jax.Array  # b_C / b_j, of the steps j + 1 ... C
    total: jax.Array  # b_C [..., 1, D or 1]


def cumulative_decays(a: Float[Array, "*S C F"]) -> Decays:
    """Returns the cumulative decays of log-decays [..., C, D or 1]."""
    a = jnp.maximum(a * LOG2_E, log2_of_zero(a.dtype))
    coarse = jnp.round(a * 256) / 256
    coarse, fine = _sums(coarse, True), _sums(a - coarse, True)
    from_start = exp2(coarse + fine)
    to_end = exp2((coarse[..., -1:, :] - coarse) + (fine[..., -1:, :] - fine))
    return Decays(coarse, fine, from_start, to_end, from_start[..., -1:, :])


def chunk_states(
    k: Float[Array, "M *_ C D"],
    v: Float[Array, "M *_ C P"],
    d: Decays,
    S: Float[Array, "*h D P"],
) -> tuple[Float[Array, "M *h D P"], Float[Array, "*h D P"]]:
    """Returns the states at each chunk's start and at the end, from S at the first start.

    S_out = b_C S_in + sum_j (b_C / b_j k_j) v_j^T.
    """
    xs = transpose(k * d.to_end) @ v, transpose(d.total)
    return scan_chunks(lambda S, x: (x[1] * S + x[0], S), S, xs)


def scan_chunks(
    step: Callable[[Any, Any], tuple[Any, Any]],
    carry: PyTree,
    xs: PyTree,
    reverse: bool = False,
) -> tuple[PyTree, PyTree]:
    """Returns (outputs of `step` for each chunk, last carry) of a scan, unrolled if short."""
    M = jax.tree.leaves(xs)[0].shape[0]
    unroll = M if M <= UNROLLED else 1
    carry, ys = jax.lax.scan(step, varying(carry, xs), xs, reverse=reverse, unroll=unroll)
    return ys, carry


def scores(
    q: Float[Array, "*_ C D"], k: Float[Array, "*_ C D"], d: Decays
) -> Float[Array, "*s C C"]:
    """Returns A_ij = q_i . (b_i / b_j) k_j for j <= i, else 0."""
    if d.coarse.shape[-1] == 1:
        return (q @ transpose(k)) * _ratios(d)
    return jax.lax.cond(_mild(d), _mild_scores, _strong_scores, q, k, d)


def score_gradients(
    q: Float[Array, "*_ C D"],
    k: Float[Array, "*_ C D"],
    dA: Float[Array, "*_ C C"],
    d: Decays,
) -> tuple[
    Float[Array, "*s C C"],
    Float[Array, "*_ C D"],
    Float[Array, "*_ C D"],
    Float[Array, "*_ C _"],
]:
    """Returns (scores A, dq, dk, dlog) where dA is A's cotangent.

    dlog [..., C, D or 1] is that of the log cumulative decays, without the diagonal, whose
    decays are 1: what cancels there would drown the gradients of strong decays.
    """
    if d.coarse.shape[-1] == 1:
        ratios, s = _ratios(d), q @ transpose(k)
        ds = dA * ratios
        below = jnp.where(_lower(q, False), ds * s, 0.0)
        dlog = jnp.sum(below, -1) - jnp.sum(below, -2)
        ds = sum_shared_heads(ds, s)
        return s * ratios, ds @ k, transpose(ds) @ q, dlog[..., None]
    return jax.lax.cond(_mild(d), _mild_gradients, _strong_gradients, q, k, dA, d)


def _ratios(d):
    """Returns b_i / b_j for j <= i, else 0, where D shares the decay: [..., C, C]."""
    x = (d.coarse - transpose(d.coarse)) + (d.fine - transpose(d.fine))
    return exp2(jnp.where(_lower(x), x, -jnp.inf))


def _mild(d):
    return jnp.min(d.coarse, initial=0.0) > -MILD


def _mild_scores(q, k, d):
    return jnp.where(_lower(q), (q * d.from_start) @ transpose(k / d.from_start), 0.0)


def _mild_gradients(q, k, dA, d):
    q_, k_ = q * d.from_start, k / d.from_start
    A = jnp.where(_lower(q), q_ @ transpose(k_), 0.0)
    below = jnp.where(_lower(q, False), dA, 0.0)
    dq, dk = (below @ k_) * d.from_start, (transpose(below) @ q_) / d.from_start
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
    """Returns a subchunk's queries and all earlier keys, with decays from and to its start."""
    own, past = slice(i, i + SUBCHUNK), slice(0, i)
    start = slice(max(i - 1, 0), max(i, 1))
    since = lambda x, s: x[..., s, :] - x[..., start, :]
    q_decay = exp2(since(d.coarse, own) + since(d.fine, own))
    k_decay = exp2(-since(d.coarse, past) - since(d.fine, past))
    return (q[..., own, :], q_decay), (k[..., past, :], k_decay)


def _pairs(q, k, d, i):
    """Returns b_i / b_j [..., c, c, D] of the subchunk at i, its queries and its keys."""
    own = slice(i, i + SUBCHUNK)
    between = lambda x: x[..., own, None, :] - x[..., None, own, :]
    x = between(d.coarse) + between(d.fine)
    q, k = q[..., own, :], k[..., own, :]
    return exp2(jnp.where(_lower(q)[..., None], x, -jnp.inf)), q, k


def _row(left, own, C):
    """Returns scores of a subchunk with all keys of the chunk."""
    right = C - left.shape[-1] - own.shape[-1]
    empty = jnp.zeros((*own.shape[:-1], right), own.dtype)
    return jnp.concatenate([left, own, empty], -1)


def decay_gradient(
    dlog: Float[Array, "*_ C _"],
    from_start: Float[Array, "*_ C D"],
    to_end: Float[Array, "*_ C D"],
    total: Float[Array, "*_ 1 D"],
    a: Float[Array, "*s C F"],
) -> Float[Array, "*s C F"]:
    """Returns the cotangent of the log-decays `a` [..., C, D or 1] of a chunk.

    Args:
      dlog: cotangent of log b by pairs of steps inside the chunk, [..., C, D or 1].
      from_start, to_end, total: value times cotangent of b_i, b_C / b_j and b_C.
      a: the log-decays.
    """
    if a.shape[-1] == 1:
        from_start, to_end, total = (
            jnp.sum(x, -1, keepdims=True) for x in (from_start, to_end, total)
        )
    # b_i has the log-decays of steps 1 ... i, b_C / b_j those of j + 1 ... C, b_C all.
    da = _sums(dlog + from_start, False) + _sums(to_end, True, inclusive=False) + total
    return sum_shared_heads(jnp.where(a * LOG2_E > log2_of_zero(a.dtype), da, 0.0), a)


def log2_of_zero(dtype: jax.typing.DTypeLike) -> float:
    """Returns a log-decay in units of log 2 that stands for 0: its power of 2 underflows to 0."""
    return -160.0 if dtype == jnp.float32 else -1200.0


def transpose(x: Float[Array, "*s C F"]) -> Float[Array, "*s F C"]:
    """Returns matrices transposed."""
    return jnp.swapaxes(x, -1, -2)


def sum_shared_heads(x: Float[Array, "*_ C F"], like: Float[Array, "*s C _"]) -> Array:
    """Returns x [..., G, R, C, F] summed over the heads that share `like`."""
    for axis in range(1, x.ndim - 2):
        if like.shape[axis] == 1 and x.shape[axis] > 1:
            x = jnp.sum(x, axis, keepdims=True)
    return x


def _lower(like, diagonal=True):
    """Returns whether j <= i (or j < i), [1, ..., 1, C, C], for `like` [..., C, F]."""
    C = like.shape[-2]
    mask = jnp.tri(C, k=0 if diagonal else -1, dtype=bool)
    return mask.reshape((1,) * (like.ndim - 2) + (C, C))


def _sums(x, from_start, inclusive=True):
    """Returns sums of x [..., C, F] along C, from its start or through its end."""
    lower = jnp.tri(x.shape[-2], k=0 if inclusive else -1, dtype=x.dtype)
    order = "ij,...jd->...id" if from_start else "ij,...id->...jd"
    return jnp.einsum(order, lower, x, precision="highest")


class Chunks(NamedTuple):
    """Time in blocks of M chunks of C steps, heads as [G, R].

    Attributes:
      T: steps.
      G, R: groups of heads, and heads of a group.
      C: steps of a chunk.
      M: chunks of a block.
      blocks: number of blocks.
    """

    T: int
    G: int
    R: int
    C: int
    M: int
    blocks: int

    @classmethod
    def of(
        cls,
        q: Float[Array, "B T _ D"],
        k: Float[Array, "B T _ D"],
        v: Float[Array, "B T _ P"],
        S: Float[Array, "B H D P"],
        chunk: int,
        cached: bool,
    ) -> "Chunks":
        """Returns the chunks of `forward`'s arguments."""
        (B, T), H = q.shape[:2], S.shape[1]
        G = min(x.shape[2] for x in (q, k, v))
        C = min(chunk, -(-T // SUBCHUNK) * SUBCHUNK)
        N = -(-T // C)
        M = max(1, CACHED // max(B * H * C * C, 1)) if cached else N
        M = -(-N // -(-N // M))
        return cls(T, G, H // G, C, M, -(-N // M))

    def outputs(
        self, q: Float[Array, "B T _ D"], v: Float[Array, "B T _ P"]
    ) -> list[jax.ShapeDtypeStruct]:
        """Returns the shapes of outputs: of all heads, in q's dtype."""
        return [jax.ShapeDtypeStruct((*q.shape[:2], self.G * self.R, v.shape[3]), q.dtype)]

    def scan(
        self,
        f: Callable[..., tuple[Array, Sequence[Array]]],
        S: Float[Array, "B H D P"],
        arrays: Sequence[Array],
        like: Sequence[Array | jax.ShapeDtypeStruct] = (),
        starts: Array | None = None,
        reverse: bool = False,
    ) -> tuple[Float[Array, "B H D P"], list[Array], Array]:
        """Scans S, results = f(S, *chunks, start) over the blocks of time.

        Args:
          f: takes chunks [M, B, G, R, C, F] in S's dtype, where 1 stands for G or R that are
            shared, and the block's of `starts`, if any; its results look like the chunks.
          S: the first state [B, H, D, P]; f's is [B, G, R, D, P].
          arrays: [B, T, heads, F], split into chunks and padded with zeros.
          like: shapes [B, T, heads, F] and dtypes of the results.
          starts: states before each block, as returned.
          reverse: from the last block to the first.

        Returns:
          The last S, the results, and the S before each block.
        """
        # Whole blocks.
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
            take = lambda x: jax.lax.dynamic_slice_in_dim(x, i * steps, steps, 1).astype(S.dtype)
            new, found = f(S, *(self._split(take(x)) for x in arrays), *jax.tree.leaves(start))
            put = lambda x, block: jax.lax.dynamic_update_slice_in_dim(
                x, self._join(block).astype(x.dtype), i * steps, 1
            )
            return (new, [put(*pair) for pair in zip(results, found, strict=True)]), S

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
