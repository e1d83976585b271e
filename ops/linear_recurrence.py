"""The diagonal linear recurrence h_t = a_t h_{t-1} + b_t, real or complex, over any length.

The recurrence of S4D, S5 (arXiv 2208.04933) and the RG-LRU (2402.19427). It is computed by steps
on CPUs, by a kernel on TPUs, and by associative scans of chunks elsewhere; memory is linear in the
length, forward and backward (`ops.diagonal_scan`).

Dimensions: B batch, T time, D any number of axes of channels.
"""

import jax.numpy as jnp
from jaxtyping import Array, Inexact

from tilescan.ops import diagonal_scan
from tilescan.ops.arrays import AnyArray
from tilescan.ops.explicit_axes import partitioned_by_dimensions
from tilescan.ops.recurrence_arguments import SegmentIds, check_shape, check_time
from tilescan.ops.sizes import check_sizes


def _with_rank(arrays):
    """Returns the arrays with a constant `a` [*D] as [1, 1, *D], of b's rank."""
    a, b = (arrays.get(name) for name in "ab")
    return arrays | {"a": a[None, None]} if a is not None and a.ndim == b.ndim - 2 else arrays


@partitioned_by_dimensions(
    ("BTE", "BE"), prepare=_with_rank, a="BTE", b="BTE", initial_state="BE", segment_ids="BT"
)
def linear_recurrence(
    a: Inexact[AnyArray, "*aD"],
    b: Inexact[AnyArray, "B T *D"],
    *,
    initial_state: Inexact[AnyArray, "B *D"] | None = None,
    segment_ids: SegmentIds | None = None,
    reverse: bool = False,
    implementation: str | None = None,
) -> tuple[Inexact[Array, "B T *D"], Inexact[Array, "B *D"]]:
    """Computes h_t = a_t h_{t-1} + b_t by elements.

    Args:
      a: decays, [B, T, *D] with 1 wherever they are shared, or [*D] if constant. Any value: 0
        forgets, and nothing is divided by a decay.
      b: inputs [B, T, *D]; any number of axes D, also none.
      initial_state: h before the first step, [B, *D]; zeros when None.
      segment_ids: integers [B, T], or [B, 1 + T] with the segment of initial_state first. Where
        neighbours differ a segment starts, and the state before it counts as 0. By [B, T] ids the
        first step goes on with initial_state's segment.
      reverse: run from the last step to the first, h_t = a_t h_{t+1} + b_t: initial_state then
        is after the last step (its segment last among [B, T + 1] ids), and final_state is
        h at the first.
      implementation: "xla", "pallas" (TPU), or None, which takes the Pallas kernel where the
        platform that the program is lowered for has one for these shapes and dtypes, and "xla"
        elsewhere.

    Returns:
      h [B, T, *D] in b's dtype (complex if a is), and final_state [B, *D], to be given as
      the next call's initial_state, in the dtype of the computation: float32 or complex64 at
      least.

    Of bfloat16 inputs "xla" computes the state as exactly as of float32 ones: on CPUs its largest
    error is below 1e-5 of its largest entry.

    Gradients reach a, b and initial_state from both results, to any order of reverse mode.

    Raises:
      ValueError: shapes or an implementation that do not fit, or, when the program is lowered,
        "pallas" on a platform without a kernel for them.
      TypeError: dtypes that are neither floating nor complex, ids that are not integers.
    """
    # Arguments.
    for name, x in (("a", a), ("b", b), ("initial_state", initial_state)):
        if x is not None and not jnp.issubdtype(x.dtype, jnp.inexact):
            raise TypeError(f"{name} must be floating or complex, got {x.dtype}")
    if b.ndim < 2:
        raise ValueError(f"b must be [B, T, *D], got shape {b.shape}")
    B, T, *D = b.shape
    check_sizes(b=(b, "B, T, *D"))
    check_time(b=b)

    # In one dtype if complex; real `a` and b may stay narrower than the state.
    a = _aligned(a, b.shape)
    dtype = jnp.promote_types(jnp.promote_types(a.dtype, b.dtype), jnp.float32)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        a, b = a.astype(dtype), b.astype(dtype)
    if initial_state is None:
        initial_state = jnp.zeros((B, *D), dtype)
    check_shape("initial_state", initial_state, "B, *D", (B, *D))
    if jnp.promote_types(initial_state.dtype, dtype) != dtype:
        raise TypeError(
            f"initial_state is {initial_state.dtype}, a and b are computed in {dtype}: "
            "cast one of them"
        )

    # A decay of 0 where a segment starts.
    if segment_ids is not None:
        first = diagonal_scan.resets(segment_ids, B, T, reverse)
        first = first.reshape(B, T, *(1 for _ in D))
        a = jnp.where(first, jnp.zeros((), a.dtype), a)
    state = initial_state.astype(dtype)
    return diagonal_scan.scan(a, b, state, reverse=reverse, implementation=implementation)


def _aligned(a, shape):
    """Returns `a` with the rank of b: [*D] becomes [1, 1, *D]."""
    full = a.reshape(1, 1, *a.shape) if a.ndim == len(shape) - 2 else a
    if full.ndim != len(shape) or any(
        n not in (1, m) for n, m in zip(full.shape, shape, strict=True)
    ):
        raise ValueError(
            f"a {a.shape} must be [B, T, *D], or [*D], with 1 where it is shared, for b {shape}"
        )
    return full
