"""Checks that the ops along time share; the errors name the argument. None is never checked."""

import math

import jax.numpy as jnp

from tilescan.ops.chunked_scan import SUBCHUNK
from tilescan.ops.diagonal_scan import resets
from tilescan.ops.sizes import check_sizes


def check_implementation(op, implementation):
    if implementation not in ("xla", None):
        raise ValueError(
            f'{op} has implementation="xla" or None, which runs everywhere, '
            f"got implementation={implementation!r}"
        )


def check_floating(**arrays):
    for name, x in arrays.items():
        if x is not None and not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{name} must be floating, got {x.dtype}")


def check_one_dtype(**arrays):
    """All of one floating dtype."""
    check_floating(**arrays)
    dtypes = {name: x.dtype.name for name, x in arrays.items()}
    if len(set(dtypes.values())) > 1:
        raise TypeError(f"{', '.join(dtypes)} must have one dtype, got {dtypes}")


def check_shape(name, x, letters, shape):
    if x is not None and x.shape != shape:
        raise ValueError(f"{name} must be [{letters}] = {shape}, got shape {x.shape}")


def check_time(**arrays):
    """Arrays [B, T, ...] have no step that an offset of 32 bits cannot reach."""
    for name, x in arrays.items():
        count = math.prod(x.shape[1:])
        if count >= 2**31:
            raise ValueError(
                f"{name} {x.shape} has {count} elements in a sequence, offsets of 32 bits reach "
                "2^31 - 1: cut the time, and hand final_state on as the next part's initial_state"
            )


def check_heads(q, k, v):
    """(B, T, H, D, P) of queries [B, T, H, D], keys [B, T, G, D] and values [B, T, G, P]."""
    check_one_dtype(q=q, k=k, v=v)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} must be [B, T, heads, features], got shape {x.shape}")
    B, T, H, D = q.shape
    G, P = v.shape[2:]
    if k.shape != (B, T, G, D) or v.shape[:2] != (B, T):
        raise ValueError(
            "q [B, T, H, D], k [B, T, G, D] and v [B, T, G, P] must agree in B, T, G and D, "
            f"got {q.shape}, {k.shape} and {v.shape}"
        )
    check_sizes(q=(q, "B, T, H, D"), v=(v, "B, T, G, P"))
    check_groups("q's heads", H, "k's and v's", G)
    check_time(q=q, k=k, v=v)
    return B, T, H, D, P


def check_groups(heads, H, groups, G):
    if H % G:
        raise ValueError(f"{heads} must be a multiple of {groups}, got {H} and {G}")


def check_chunk(chunk):
    if chunk is not None and (not isinstance(chunk, int) or chunk <= 0 or chunk % SUBCHUNK):
        raise ValueError(f"chunk must be a positive multiple of {SUBCHUNK}, got {chunk}")


def check_state(state, shape, letters, dtype):
    """The state in its dtype, zeros for None."""
    if state is None:
        return jnp.zeros(shape, dtype)
    check_shape("initial_state", state, letters, shape)
    check_floating(initial_state=state)
    return state.astype(dtype)


def state_dtype(x):
    return jnp.promote_types(x.dtype, jnp.float32)


def forget_at_starts(log_decay, segment_ids):
    """log_decay [B, T, ...] with -inf where a segment starts, by ids as of `resets`."""
    if segment_ids is None:
        return log_decay
    starts = resets(segment_ids, *log_decay.shape[:2])
    starts = starts.reshape(*starts.shape, *(1,) * (log_decay.ndim - 2))
    return jnp.where(starts, -jnp.inf, log_decay)
