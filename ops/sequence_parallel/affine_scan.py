"""States from device to device: an exclusive scan of (decay, state) pairs along a mesh axis.

A recurrence that is affine in its state maps the state before a device's shard of time to the state
after it by one pair: the decay of the former, and the state that the shard adds, from zeros. With
device p after devices 0 ... p - 1,

    S_in(0) = S_0,    S_in(p + 1) = A(p) S_in(p) + S(p)

by elements, or with a matrix A(p). Four schedules compute S_in exactly:

    "chain"       P - 1 messages, each of a state, one after the other (LASP, arXiv 2404.02882)
    "all_gather"  every device gathers all pairs and folds those before it (LASP-2, 2502.07563)
    "all_scan"    a chain of K blocks of the state, in a pipeline: P + K - 2 messages
                  of a block. What is sent does not depend on P (ZeCO, 2507.01004)
    "log_step"    1 + ceil(log2(P - 1)) messages of a pair (Hillis and Steele)

Where the shards of all devices have the same matrix, but for columns that are forgotten, every
device computes its powers by itself, and a pair is (which columns, state).

A cotangent of S_in travels in the other direction by the same recurrence,
dS(p) = A(p+1)^T dS(p+1) + dS_in(p+1), so the backward pass is the same scan, reversed. Only A and
S_in are kept for it.

All functions are called inside `jax.shard_map`. Every device runs the same program, so devices also
send messages that no device needs: in "all_scan" (P + K - 2) / K states in all, not one, except on
TPUs, where a kernel sends by remote copies.

Dimensions: p of P devices, K blocks, D decayed dim, V value dim.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact

from tilescan.ops.attention_xla import varying
from tilescan.ops.sequence_parallel.kinds import SCAN_KINDS
from tilescan.ops.sequence_parallel.schedules import Schedule, scan

__all__ = ["affine_scan", "factor_scan", "from_last_device", "matrix_scan", "power_scan"]


def affine_scan(
    log_decay: Float[Array, "*#S"],
    state: Float[Array, "*S"],
    axis_name: str = "sequence",
    **options: Any,
) -> tuple[Float[Array, "*S"], Float[Array, "*S"]]:
    """Computes (S_in, final state) of S -> exp(log_decay) S + state over the devices.

    Args:
      log_decay: of a device's whole shard, at most 0; -inf forgets. Its shape is the state's, or
        has 1 where the decay is shared.
      state: the state after the shard, from zeros before it.
      axis_name: of the mesh, in the order of time.
      **options: as of `factor_scan`, as are results and errors.
    """
    return factor_scan(jnp.exp(_wide(log_decay)), state, axis_name, **options)


def factor_scan(
    decay: Inexact[Array, "*#S"],
    state: Inexact[Array, "*S"],
    axis_name: str = "sequence",
    *,
    kind: str = "all_scan",
    blocks: int | None = None,
    split: int = -2,
    initial_state: Inexact[Array, "*S"] | None = None,
    reverse: bool = False,
) -> tuple[Inexact[Array, "*S"], Inexact[Array, "*S"]]:
    """Computes (S_in, final state) of S -> decay S + state for any factors, real or complex.

    Args:
      decay, state, axis_name: as of `affine_scan`, the decay itself in place of its logarithm.
      kind: a name of `SCAN_KINDS`.
      blocks: K of "all_scan", a divisor of the dimension that is split; by default the least one
        that is at least P, or all of the dimension.
      split: the dimension that "all_scan" splits into blocks.
      initial_state: the state before the whole sequence, the same on all devices; zeros when None.
      reverse: from the last device to the first.

    Returns:
      The state that enters each device, and the state after the whole sequence, the same on every
      device; float32 (float64, complex) at least. Both are differentiable, to any order.

    Raises:
      ValueError: shapes, kind or blocks that do not fit.
    """
    if decay.ndim != state.ndim or any(
        n not in (1, m) for n, m in zip(decay.shape, state.shape, strict=True)
    ):
        raise ValueError(
            f"the decay {decay.shape} must have the state's shape {state.shape}, or 1 where it is "
            "shared"
        )
    return _affine(decay, state, initial_state, axis_name, False, kind, blocks, split, reverse)


def matrix_scan(
    transition: Float[Array, "*#B D D"],
    state: Float[Array, "*B D V"],
    axis_name: str = "sequence",
    *,
    kind: str = "all_scan",
    blocks: int | None = None,
    initial_state: Float[Array, "*B D V"] | None = None,
    reverse: bool = False,
) -> tuple[Float[Array, "*B D V"], Float[Array, "*B D V"]]:
    """Computes (S_in, final state) of S -> transition @ S + state, as `factor_scan`.

    Only the columns of a state are independent then, so "all_scan" splits V into blocks.
    "all_gather" and "log_step" send the transitions too.

    Args:
      transition: of a device's whole shard [..., D, D]; 1 where it is shared.
      state: [..., D, V].
      axis_name, kind, blocks, initial_state, reverse: as of `factor_scan`.

    Raises:
      ValueError: shapes, kind or blocks that do not fit.
    """
    D = state.shape[-2]
    if transition.shape[-2:] != (D, D) or transition.ndim != state.ndim:
        raise ValueError(
            f"transition must be [..., D, D] for a state [..., D, V] = {state.shape}, got shape "
            f"{transition.shape}"
        )
    return _affine(transition, state, initial_state, axis_name, True, kind, blocks, -1, reverse)


def power_scan(
    transition: Inexact[Array, "H D D"] | Inexact[Array, "H D 1"],
    keep: Float[Array, "1 1 #V"],
    state: Inexact[Array, "H D V"],
    axis_name: str = "sequence",
    *,
    kind: str = "all_scan",
    blocks: int | None = None,
    initial_state: Inexact[Array, "H D V"] | None = None,
    reverse: bool = False,
) -> tuple[Inexact[Array, "H D V"], Inexact[Array, "H D V"]]:
    """Computes (S_in, final state) of S -> transition @ (keep S) + state, as `factor_scan`.

    The transition is the same on all devices, so each computes the powers that it needs, and only
    `keep` and states are sent. "all_scan" splits H into blocks.

    Args:
      transition: of a shard on any device, [H, D, D]; or [H, D, 1], the diagonals of matrices.
      keep: of this device's shard, for each column: 0 where it forgets, else 1.
      state: [H, D, V].
      axis_name, kind, blocks, initial_state, reverse: as of `factor_scan`.

    Raises:
      ValueError: shapes, kind or blocks that do not fit.
    """
    H, D, V = state.shape
    if transition.shape not in ((H, D, D), (H, D, 1)) or keep.shape not in ((1, 1, 1), (1, 1, V)):
        raise ValueError(
            f"transition must be [H, D, D] or [H, D, 1] and keep [1, 1, V] or [1, 1, 1] for a "
            f"state [H, D, V] = {state.shape}, got shapes {transition.shape} and {keep.shape}"
        )
    A, matrix = (keep, transition), transition.shape[2] == D
    return _affine(A, state, initial_state, axis_name, matrix, kind, blocks, 0, reverse)


def from_last_device(x: Array, axis_name: str = "sequence", *, reverse: bool = False) -> Array:
    """Returns x of the device at the end of time (at its start, if reverse) on every device."""
    return jax.lax.psum(jnp.where(_place(axis_name, reverse)[1], x, 0), axis_name)


def _affine(A, S, initial, axis_name, matrix, kind, blocks, split, reverse):
    if kind not in SCAN_KINDS:
        raise ValueError(f"kind={kind!r} is unknown; it must be one of {', '.join(SCAN_KINDS)}")
    if initial is not None and initial.shape != S.shape:
        raise ValueError(f"initial_state {initial.shape} must have the state's shape {S.shape}")
    size = S.shape[split]
    if blocks is not None and (blocks < 1 or size % blocks):
        raise ValueError(f"blocks={blocks} must divide the {size} rows or columns of the state")
    dtype = jnp.result_type(*jax.tree.leaves(A), S, jnp.float32)
    A, S = jax.tree.map(lambda x: x.astype(dtype), (A, S))
    first, last = _place(axis_name, reverse)
    A, S = varying((A, S), (A, S, first))
    schedule = Schedule(axis_name, matrix, kind, blocks, split, reverse)
    # The first device's shard starts from the initial state; the scan then is one from zeros.
    if initial is not None:
        initial = jnp.where(first, initial.astype(dtype), 0)
        S = S + schedule.apply(A, initial)
    S_in = scan(A, S, schedule)
    S_out = schedule.apply(A, S_in) + S
    if initial is not None:
        S_in = S_in + initial
    return S_in, from_last_device(S_out, axis_name, reverse=reverse)


def _wide(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _place(axis_name, reverse):
    """Returns whether this device is the first, and the last, in time."""
    p, end = jax.lax.axis_index(axis_name), jax.lax.axis_size(axis_name) - 1
    return (p == end, p == 0) if reverse else (p == 0, p == end)
