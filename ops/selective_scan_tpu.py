"""The selective scan on TPUs: translates `ops.selective_scan`'s arguments to
pallas_kernels.tpu.selective_scan, and says what the kernels can't do.

Decided here: padding to blocks, how long chunks are and how many channels a grid step has.

Dimensions: B batch, T time, E channels, N state dim, C chunk.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

from tilescan.pallas_kernels.tpu import selective_scan as kernels

DTYPES = (jnp.bfloat16, jnp.float32)
CHUNK = 64  # as in `ops.selective_scan`: the states that backward starts from are the same
LARGEST_N = 64  # all states of a chunk are in VMEM


def unsupported(
    x: Float[Array, "B T E"],
    dt: Float[Array, "B T E"],
    A: Float[Array, "N E"],
    *rest: Array | None,
) -> str | None:
    """Returns why the kernels can't take these arguments and what would work; None if they can."""
    del rest
    if x.dtype not in DTYPES or dt.dtype != jnp.float32:
        return f"x is {x.dtype}; bfloat16 and float32 have a kernel"
    if A.shape[0] > LARGEST_N:
        return f"state dim N={A.shape[0]}; up to {LARGEST_N} have a kernel"
    return None


def forward(
    x: Float[Array, "B T E"],
    dt: Float[Array, "B T E"],
    A: Float[Array, "N E"],
    B: Float[Array, "B T N"],
    C: Float[Array, "B T N"],
    h: Float[Array, "B N E"],
    first: Bool[Array, "B T"] | None,
    *,
    interpret: Any = False,
) -> tuple[Float32[Array, "B T E"], Float32[Array, "B N E"], Float32[Array, "_ B N E"]]:
    """Returns (y, the last h, h at the start of each chunk [T / C, B, N, E]).

    first: the steps that start a segment; otherwise arguments are those of `selective_scan`, in
    the layout of its scan.
    """
    (b, T, E), N = x.shape, A.shape[0]
    block = block_for(b, T, E, N)
    y, last, starts = kernels.forward(
        *_padded(block, x, dt, A, B, C), _pad(_pad(h, 1, 8), 2, block.channels),
        _keep(first, N, block), block, interpret=interpret,
    )  # fmt: skip
    return y[:, :T, :E], last[:, :N, :E], starts[:, :, :N, :E]


def backward(
    x: Float[Array, "B T E"],
    dt: Float[Array, "B T E"],
    A: Float[Array, "N E"],
    B: Float[Array, "B T N"],
    C: Float[Array, "B T N"],
    first: Bool[Array, "B T"] | None,
    starts: Float[Array, "_ B N E"],
    dy: Float[Array, "B T E"],
    dh: Float[Array, "B N E"],
    *,
    interpret: Any = False,
) -> tuple[
    Float[Array, "B T E"],
    Float[Array, "B T E"],
    Float[Array, "N E"],
    Float[Array, "B T N"],
    Float[Array, "B T N"],
    Float[Array, "B N E"],
]:
    """Returns cotangents of x, dt, A, B, C and the first h; starts as `forward` returns them."""
    (b, T, E), N = x.shape, A.shape[0]
    block = block_for(b, T, E, N)
    dy = _pad(_pad(dy, 1, block.steps), 2, block.channels)
    starts = _pad(_pad(starts, 2, 8), 3, block.channels)
    dx, ddt, dA, dB, dC, dh = kernels.backward(
        *_padded(block, x, dt, A, B, C), _keep(first, N, block), starts, dy,
        _pad(_pad(dh, 1, 8), 2, block.channels), block, interpret=interpret,
    )  # fmt: skip
    dA = jnp.sum(dA, axis=0)[:N, :E]

    def unpack(g, v):
        g = jnp.sum(g, axis=1).swapaxes(2, 3)
        return g.reshape(b, -1, g.shape[3])[:, :T, :N].astype(v.dtype)

    return dx[:, :T, :E], ddt[:, :T, :E], dA, unpack(dB, B), unpack(dC, C), dh[:, :N, :E]


def block_for(batch: int, T: int, E: int, N: int) -> kernels.Block:
    """Returns steps and channels of a grid step.

    The more channels, the better a step's latency is hidden, within VMEM. Where two cores can't
    share the batch, they share the channels.
    """
    E, most = _up(E, kernels.LANES), 512 if N <= 16 else 256 if N <= 32 else 128
    channels = max(c for c in (128, 256, 512) if E % c == 0 and c <= most)
    parts = 2 if batch % 2 and E // channels % 2 == 0 else 1
    return kernels.Block(min(CHUNK, _up(T, 16)), channels, parts)


def _up(n, multiple):
    return -(-n // multiple) * multiple


def _pad(x, axis, multiple):
    extra = -x.shape[axis] % multiple
    if not extra:
        return x
    return jnp.pad(x, [(0, extra if i == axis else 0) for i in range(x.ndim)])


def _padded(block, x, dt, A, B, C):
    """Returns whole chunks, padded with dt = 0, whole blocks of channels, N a multiple of 8."""
    x, dt = (_pad(_pad(v, 1, block.steps), 2, block.channels) for v in (x, dt))
    A = _pad(_pad(A, 0, 8), 1, block.channels)
    return x, dt, A, _packed(B, block), _packed(C, block)


def _packed(v, block):
    """Returns [B, T, N] as [B, T / C, N, C]."""
    v = _pad(_pad(v.astype(jnp.float32), 1, block.steps), 2, 8)
    chunks = v.shape[1] // block.steps
    return v.reshape(v.shape[0], chunks, block.steps, -1).swapaxes(2, 3)


def _keep(first, N, block):
    if first is None:
        return None
    keep = jnp.logical_not(_pad(first, 1, block.steps))[:, :, None]
    return _packed(jnp.broadcast_to(keep, (*keep.shape[:2], _up(N, 8))), block)
