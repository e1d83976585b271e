"""All-Scan on TPUs: shapes states for pallas_kernels.tpu.all_scan, and says what it can't take.

Dimensions: V value dim, the last of a state.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact

from tilescan.pallas_kernels.tpu import all_scan as kernels

# Lanes of a row of VMEM: decays that differ by value are flattened into rows of it.
LANES = 128
VMEM_LIMIT = 40 * 2**20
# Of more blocks each message would be short, and the kernel long: its blocks are unrolled.
MAX_BLOCKS = 64


def unsupported(
    A: Array | tuple[Array, Array], S: Inexact[Array, "*S"], schedule: Any
) -> str | None:
    """Returns why the kernel can't take these states; None if it can.

    schedule: a `schedules.Schedule`.
    """
    if schedule.matrix or isinstance(A, tuple):
        return "transitions that are matrices, or the same on all devices, have no kernel"
    if S.dtype != jnp.float32 or A.dtype != jnp.float32:
        return f"states are {S.dtype}; float32 has a kernel"
    rows, V, decays = _layout(A, S)
    need = kernels.vmem(rows + kernels.SUBLANES * _blocks(rows, schedule), V, decays)
    if need > VMEM_LIMIT:
        return f"the state takes {need} bytes of VMEM, of which {VMEM_LIMIT} are allowed"
    return None


def scan(
    A: Array, S: Inexact[Array, "*S"], *, schedule: Any, interpret: Any = False
) -> Inexact[Array, "*S"]:
    """Returns S_in of `affine_scan`'s recurrence from zeros, by a `schedules.Schedule`."""
    rows, V, decays = _layout(A, S)
    if decays == 1:
        flat = jnp.broadcast_to(A, (*S.shape[:-1], 1)).reshape(-1, 1)
    else:
        flat = _rows(jnp.broadcast_to(A, S.shape), rows, V)
    blocks = _blocks(rows, schedule)
    more = -rows % (kernels.SUBLANES * blocks)
    pad = lambda x: jnp.pad(x, ((0, more), (0, 0)))
    S_in = kernels.all_scan(
        pad(flat), pad(_rows(S, rows, V)),
        axis_name=schedule.axis_name, blocks=blocks, reverse=schedule.reverse, interpret=interpret,
    )  # fmt: skip
    return S_in.reshape(-1)[: math.prod(S.shape)].reshape(S.shape)


def _blocks(rows: int, schedule) -> int:
    most = min(schedule.devices, rows // kernels.SUBLANES, MAX_BLOCKS)
    return schedule.blocks or max(1, most)


def _layout(A, S) -> tuple[int, int, int]:
    """Returns (rows, values of a row, decays of a row), of the state if its rows share decays."""
    if A.shape[-1] == 1 and S.shape[-1] >= LANES // 2:
        return math.prod(S.shape[:-1]), S.shape[-1], 1
    return -(-math.prod(S.shape) // LANES), LANES, LANES


def _rows(x: jax.Array, rows: int, V: int) -> jax.Array:
    flat = x.reshape(-1)
    return jnp.pad(flat, (0, rows * V - flat.size)).reshape(rows, V)
