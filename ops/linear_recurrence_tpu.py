"""The diagonal recurrence on TPUs: translates `ops.diagonal_scan`'s arguments to
pallas_kernels.tpu.linear_scan, and says what the kernels can't do.

Dimensions: B batch, T time, D any number of axes of channels.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact

from tilescan.pallas_kernels.tpu import linear_scan as kernels

DTYPES = (jnp.bfloat16, jnp.float32, jnp.complex64)
# Fewer channels leave most lanes idle, in HBM as well: arrays are padded to 128 of them there.
LEAST_CHANNELS = 64


def unsupported(
    a: Inexact[Array, "..."],
    b: Inexact[Array, "B T *D"],
    state: Inexact[Array, "B *D"],
    *cotangents: Inexact[Array, "..."],
) -> str | None:
    """Returns why the kernels can't take these arguments and what would work; None if they can."""
    del cotangents
    for name, x in (("a", a), ("b", b)):
        if x.dtype not in DTYPES:
            return f"{name} is {x.dtype}; bfloat16, float32 and complex64 have a kernel"
    if state.dtype not in (jnp.float32, jnp.complex64):
        return f"the state is {state.dtype}; float32 and complex64 have a kernel"
    channels = math.prod(b.shape[2:])
    if channels < LEAST_CHANNELS:
        return f"{channels} channels; {LEAST_CHANNELS} and more have a kernel"
    return None


def scan(
    a: Inexact[Array, "..."],
    b: Inexact[Array, "B T *D"],
    state: Inexact[Array, "B *D"],
    *,
    reverse: bool,
    after: bool,
    interpret: Any = False,
) -> tuple[Inexact[Array, "B T *D"], Inexact[Array, "B *D"]]:
    """Returns (o in b's dtype, the last state); arguments as of `diagonal_scan`."""
    arrays = _decays(a, b.shape), _flat(b), _state(state)
    o, last = kernels.scan(
        *(_planes(x, state) for x in arrays), reverse=reverse, after=after, interpret=interpret
    )
    return _whole(o).reshape(b.shape), _whole(last).reshape(state.shape)


def gradient(
    a: Inexact[Array, "..."],
    h: Inexact[Array, "B T *D"],
    state: Inexact[Array, "B *D"],
    dh: Inexact[Array, "B T *D"],
    dlast: Inexact[Array, "B *D"],
    *,
    reverse: bool,
    interpret: Any = False,
) -> tuple[Inexact[Array, "..."], Inexact[Array, "B T *D"], Inexact[Array, "B *D"]]:
    """Returns (da, db, dstate) in the shapes and dtypes of a, h and state."""
    arrays = _decays(a, h.shape), _flat(h), _state(state), _flat(dh), _state(dlast)
    da, db, dstate = kernels.gradient(
        *(_planes(x, state) for x in arrays), reverse=reverse, interpret=interpret
    )
    da = _whole(da)
    da = da.reshape(*da.shape[:2], *h.shape[2:])
    # The sum over what decays share is float32, as the state is.
    axes = tuple(i for i, n in enumerate(a.shape) if n == 1 and da.shape[i] > 1)
    da = jnp.sum(da.astype(state.dtype), axes, keepdims=True) if axes else da
    return da.astype(a.dtype), _whole(db).reshape(h.shape), _whole(dstate).reshape(state.shape)


def _decays(a, shape):
    """Returns decays as [B or 1, T or 1, prod D]."""
    a = jnp.broadcast_to(a, (*a.shape[:2], *shape[2:]))
    return _flat(a)


def _flat(x):
    return x.reshape(*x.shape[:2], -1)


def _state(x):
    return x.reshape(x.shape[0], -1)


def _planes(x, state):
    if not jnp.issubdtype(state.dtype, jnp.complexfloating):
        return (x,)
    return jnp.real(x), jnp.imag(x)


def _whole(planes):
    return planes[0] if len(planes) == 1 else jax.lax.complex(*planes)
