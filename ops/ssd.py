"""Mamba-2's state space duality: scalar decays that the input selects (arXiv 2405.21060).

Dimensions: B batch, T time, H heads, G groups of heads that share B and C, P head dim, N state dim.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tilescan.ops.arrays import AnyArray
from tilescan.ops.chunked_scan import chunked_scan
from tilescan.ops.explicit_axes import partitioned_by_dimensions
from tilescan.ops.recurrence_arguments import (
    SegmentIds,
    check_chunk,
    check_floating,
    check_groups,
    check_one_dtype,
    check_shape,
    check_state,
    check_time,
    forget_at_starts,
    state_dtype,
)
from tilescan.ops.sizes import check_sizes


@partitioned_by_dimensions(
    ("BTHP", "BHPN"),
    x="BTHP",
    dt="BTH",
    A="H",
    B="BTGN",
    C="BTGN",
    D="H",
    dt_bias="H",
    initial_state="BHPN",
    segment_ids="BT",
)
def ssd(
    x: Float[AnyArray, "B T H P"],
    dt: Float[AnyArray, "B T H"],
    A: Float[AnyArray, "H"],
    B: Float[AnyArray, "B T G N"],
    C: Float[AnyArray, "B T G N"],
    *,
    D: Float[AnyArray, "H"] | None = None,
    dt_bias: Float[AnyArray, "H"] | None = None,
    dt_softplus: bool = False,
    initial_state: Float[AnyArray, "B H P N"] | None = None,
    segment_ids: SegmentIds | None = None,
    chunk: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H P"], Float[Array, "B H P N"]]:
    """Computes h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T and y_t = h_t C_t + D x_t.

    Args:
      x: inputs [B, T, H, P]. B and C have its dtype; dt, A, D and dt_bias may have another.
      dt: step sizes [B, T, H], at least 0 after dt_bias and softplus.
      A: [H], negative.
      B, C: input and output projections [B, T, G, N]; head h reads group h // (H // G).
      D: [H], factor of the skip connection.
      dt_bias: [H], added to dt.
      dt_softplus: whether dt becomes log(1 + exp(dt)), after the bias.
      initial_state: [B, H, P, N]; zeros when None.
      segment_ids: integers [B, T], or [B, 1 + T] with the segment of initial_state first. Where
        neighbours differ a segment starts, and the state before it counts as 0. By [B, T] ids the
        first step goes on with initial_state's segment.
      chunk: steps that are computed by matrix products, a multiple of 16; by platform when None.
      implementation: "xla", "pallas" (TPUs and Hopper GPUs), or None, which takes the Pallas
        kernels where the platform the program is lowered for has them for these arguments, and
        "xla" elsewhere. Or "quadratic", for short rows: all T steps as one masked product, in
        memory of B H T^2.

    Returns:
      y [B, T, H, P] in x's dtype, and the state after the last step [B, H, P, N], float32
      (float64 for float64). Both are differentiable in all inputs and in initial_state.

    dt x is rounded to x's dtype, which is all that bfloat16 inputs cost the state of "xla": on CPUs
    its largest error is below 2^-8 of its largest entry (below 1e-5 of float32 inputs).

    Raises:
      ValueError: shapes, chunk or implementation that do not fit, or, when the program is lowered,
        "pallas" on a platform without a kernel for it.
      TypeError: dtypes that are not floating, x, B and C that differ in theirs, ids that are not
        integers.
    """
    # Arguments.
    check_one_dtype(x=x, B=B, C=C)
    check_floating(dt=dt, A=A, D=D, dt_bias=dt_bias)
    if x.ndim != 4:
        raise ValueError(f"x must be [B, T, H, P], got shape {x.shape}")
    batch, T, H, P = x.shape
    if B.ndim != 4 or B.shape[:2] != (batch, T) or C.shape != B.shape:
        raise ValueError(
            f"B and C must be [B, T, G, N] with [B, T] = {(batch, T)}, got {B.shape} and {C.shape}"
        )
    check_sizes(x=(x, "B, T, H, P"), B=(B, "B, T, G, N"))
    G, N = B.shape[2:]
    check_groups("x's heads", H, "B's and C's groups", G)
    check_time(x=x, B=B)
    check_shape("dt", dt, "B, T, H", (batch, T, H))
    for name, a in (("A", A), ("D", D), ("dt_bias", dt_bias)):
        check_shape(name, a, "H", (H,))
    check_chunk(chunk)
    dtype = state_dtype(x)
    state = check_state(initial_state, (batch, H, P, N), "B, H, P, N", dtype)

    # The recurrence of `chunked_scan` with k = B, v = dt x, q = C and log-decay dt A.
    dt = dt.astype(dtype)
    if dt_bias is not None:
        dt = dt + dt_bias.astype(dtype)[None, None]
    if dt_softplus:
        dt = jax.nn.softplus(dt)
    log_decay = forget_at_starts(dt * A.astype(dtype)[None, None], segment_ids)
    steps = (x.astype(dtype) * dt[..., None]).astype(x.dtype)
    if implementation == "quadratic":
        before = None if initial_state is None else state
        y, state = _quadratic(C, B, steps, log_decay, before, segment_ids is not None)
    else:
        state = jnp.swapaxes(state, 2, 3)
        y, state = chunked_scan(
            C, B, steps, log_decay[..., None], state, chunk=chunk, implementation=implementation
        )
        state = jnp.swapaxes(state, 2, 3)
    if D is not None:
        y = (y.astype(dtype) + D.astype(dtype)[None, None, :, None] * x.astype(dtype)).astype(
            x.dtype
        )
    return y, state


def _quadratic(
    C: Float[Array, "B T G N"],
    B: Float[Array, "B T G N"],
    steps: Float[Array, "B T H P"],
    log_decay: Float[Array, "B T H"],
    before: Float[Array, "B H P N"] | None,
    forgets: bool,
) -> tuple[Float[Array, "B T H P"], Float[Array, "B H P N"]]:
    """Computes y = (C B^T * L) dt x, with L_ij the decay from step j to step i (section 6).

    The state after the last step is a product of its own, which a compiler leaves out where nobody
    reads it. Decays multiply what each head has of its own, so B and C are not repeated.

    Args:
      C, B, steps, log_decay: as of `chunked_scan`, steps dt x.
      before: the state before the first step; zeros when None.
      forgets: whether a decay may be -inf.
    """
    (batch, T, H, P), G, dtype = steps.shape, B.shape[2], log_decay.dtype
    grouped = lambda a: a.astype(dtype).reshape(batch, T, G, H // G, *a.shape[3:])
    q, k, v, a = C.astype(dtype), B.astype(dtype), grouped(steps), grouped(log_decay)
    starts = jnp.isneginf(a) if forgets else jnp.zeros_like(a, bool)
    segment = jnp.cumsum(starts, axis=1)
    a = jnp.cumsum(jnp.where(starts, 0.0, a), axis=1)

    # Within the T steps.
    seen = jnp.tril(jnp.ones((T, T), bool))[None, :, :, None, None]
    if forgets:
        seen = seen & (segment[:, :, None] == segment[:, None])
    L = jnp.exp(jnp.where(seen, a[:, :, None] - a[:, None], -jnp.inf))
    y = jnp.einsum("bijgr,bjgrp->bigrp", jnp.einsum("bign,bjgn->bijg", q, k)[..., None] * L, v)

    # The state after the last step; before the first one it counts until a segment starts.
    kept = jnp.where(segment == segment[:, -1:], jnp.exp(a[:, -1:] - a), 0.0)
    after = jnp.einsum("bjgrp,bjgn->bgrpn", v * kept[..., None], k)
    if before is not None:
        before = before.reshape(after.shape)
        left = jnp.where(segment == 0, jnp.exp(a), 0.0)
        y = y + jnp.einsum("bign,bgrpn->bigrp", q, before) * left[..., None]
        after = after + left[:, -1, ..., None, None] * before
    return y.reshape(steps.shape).astype(steps.dtype), after.reshape(batch, H, P, -1)
