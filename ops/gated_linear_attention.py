"""Linear attention with a decaying state, by scalar, by vector, or not at all.

Dimensions: B batch, T time, H heads, G key-value heads (H is a multiple of G), D head dim,
P value dim.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from tilescan.ops.arrays import AnyArray, check_number
from tilescan.ops.chunked_scan import chunked_scan
from tilescan.ops.explicit_axes import partitioned_by_dimensions
from tilescan.ops.recurrence_arguments import (
    SegmentIds,
    check_chunk,
    check_floating,
    check_heads,
    check_state,
    forget_at_starts,
    state_dtype,
)


@partitioned_by_dimensions(
    ("BTHP", "BHDP"),
    q="BTHD",
    k="BTGD",
    v="BTGP",
    log_decay="BTHD",
    initial_state="BHDP",
    segment_ids="BT",
)
def gated_linear_attention(
    q: Float[AnyArray, "B T H D"],
    k: Float[AnyArray, "B T G D"],
    v: Float[AnyArray, "B T G P"],
    log_decay: Float[AnyArray, "B T H"] | Float[AnyArray, "B T H D"] | None = None,
    *,
    scale: float | None = None,
    initial_state: Float[AnyArray, "B H D P"] | None = None,
    segment_ids: SegmentIds | None = None,
    chunk: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H P"], Float[Array, "B H D P"]]:
    """Computes S_t = diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T and o_t = scale S_t^T q_t.

    Linear attention (arXiv 2006.16236, without its normaliser), retention and lightning attention
    with one decay for a head, GLA (arXiv 2312.06635) with one for each key dimension.

    Args:
      q, k, v: queries [B, T, H, D], keys [B, T, G, D], values [B, T, G, P], of one floating
        dtype. Query head h reads key-value head h // (H // G).
      log_decay: log of the decay, at most 0: [B, T, H], or [B, T, H, D]; no decay when None.
        -inf forgets the state. Keep it in float32 where the inputs are bfloat16.
      scale: factor of the output, D**-0.5 when None.
      initial_state: [B, H, D, P]; zeros when None.
      segment_ids: integers [B, T], or [B, 1 + T] with the segment of initial_state first. Where
        neighbours differ a segment starts, and the state before it counts as 0. By [B, T] ids the
        first step goes on with initial_state's segment.
      chunk: steps that are computed by matrix products, a multiple of 16; by platform when None.
      implementation: "xla", "pallas" (TPUs and Hopper GPUs), or None, which takes the Pallas
        kernels where the platform the program is lowered for has them for these arguments, and
        "xla" elsewhere.

    Returns:
      o [B, T, H, P] in q's dtype, and the state after the last step [B, H, D, P], float32
      (float64 for float64). Both are differentiable in all inputs and in initial_state.

    Of bfloat16 inputs "xla" computes the state as exactly as of float32 ones: on CPUs its largest
    error is below 1e-5 of its largest entry.

    Raises:
      ValueError: shapes, chunk or implementation that do not fit, or, when the program is lowered,
        "pallas" on a platform without a kernel for it.
      TypeError: dtypes that are not floating or differ, ids that are not integers.
    """
    # The decay of a head or of each of its key dimensions, in the state's dtype.
    B, T, H, D, P = check_heads(q, k, v)
    dtype = state_dtype(q)
    check_chunk(chunk)
    check_number("scale", scale)
    if log_decay is None:
        log_decay = jnp.zeros((B, T, 1, 1), dtype)
    else:
        check_floating(log_decay=log_decay)
        if log_decay.shape not in ((B, T, H), (B, T, H, D)):
            raise ValueError(
                f"log_decay must be [B, T, H] = {(B, T, H)} or [B, T, H, D] = {(B, T, H, D)}, "
                f"got shape {log_decay.shape}"
            )
        log_decay = log_decay.reshape(B, T, H, *log_decay.shape[3:] or (1,)).astype(dtype)
    initial_state = check_state(initial_state, (B, H, D, P), "B, H, D, P", dtype)
    scale = D**-0.5 if scale is None else scale
    log_decay = forget_at_starts(log_decay, segment_ids)
    q = q * jnp.asarray(scale, q.dtype)
    return chunked_scan(
        q, k, v, log_decay, initial_state, chunk=chunk, implementation=implementation
    )
