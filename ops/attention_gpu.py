"""Attention on Hopper GPUs: translates `ops.attention`'s arguments to pallas_kernels.gpu.

Decided here: which tiles a mask leaves, how it is evaluated inside them, padding of the head dim,
and what the kernels can't do.

Dimensions: B batch, T query time, S key time, H heads, G key-value heads, D head dim, P value dim.
"""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from tilescan.ops import attention_xla, masks
from tilescan.ops.attention_operands import Offset, backward_operands, forward_operands
from tilescan.pallas_kernels.dropout import Dropout

# pallas_kernels.gpu is imported where it is called: it takes 17 MB, and most programs on CPUs are
# of a dtype that it doesn't take.

DTYPES = (jnp.bfloat16, jnp.float16)
MAX_HEAD_DIM = 256
# Wider heads leave registers for one accumulator: dK and dV come from two runs.
MAX_HEAD_DIM_OF_BOTH = 128
XLA = 'implementation="xla" or None takes any'
# Tables of live tiles lie in global memory; beyond this they would outweigh the activations.
TABLE_LIMIT = 256 * 2**20


def is_hopper() -> bool:
    """Returns whether the GPU that the program is lowered for has the kernels' instructions.

    That is the abstract device of the mesh in use, if it is a GPU, or else the attached GPU.
    Without a CUDA backend a program is lowered for a GPU elsewhere, which is taken to be a Hopper.
    """
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if device is not None and not re.match(r"cpu|TPU", device.device_kind):
        return re.search(r"\bG?H\d+", device.device_kind) is not None  # H100, H200, H20, GH200
    if jax.default_backend() not in ("gpu", "cuda"):
        return True
    capability = jax.devices()[0].compute_capability
    # wgmma is Hopper's own: Blackwell has other matrix instructions.
    return str(capability).startswith("9.")


def unsupported(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S G D"],
    v: Float[Array, "B S G P"],
    bias: Float[Array, "#B #H #T #S"] | None,
    mask: masks.Mask,
    q_offset: Offset,
) -> str | None:
    """Returns why the kernels can't take these arguments and what would work; None if they can."""
    if q.dtype not in DTYPES:
        return f"q, k and v are {q.dtype}; bfloat16 and float16 have a kernel, and {XLA}"
    for name, size in (("D", q.shape[3]), ("P", v.shape[3])):
        if size > MAX_HEAD_DIM:
            return f"head dim {name}={size}; up to {MAX_HEAD_DIM} has a kernel, and {XLA}"
    if bias is not None and bias.shape[2:] != (q.shape[1], k.shape[1]):
        return (
            f"bias {bias.shape} is broadcast over queries or keys, which has no kernel; "
            f"one of [B or 1, H or 1, {q.shape[1]}, {k.shape[1]}] has, and {XLA}"
        )
    if not is_hopper():
        return (
            "this GPU is not a Hopper (compute capability 9.0), whose instructions the kernels "
            f"use; {XLA}"
        )
    static = isinstance(q_offset, (int, np.integer))
    if _interior(mask, q_offset if static else None) is None:
        return (
            "BlockSparse has a kernel if its block is a multiple of 128, q_offset a static "
            f"multiple of 128, and it is combined with other masks by one & or |; {XLA}"
        )
    if _window(mask) is None:
        rows = 1 if masks.segments_of(mask) is None else q.shape[0]
        size = rows * 4 * -(-q.shape[1] // 64) * -(-k.shape[1] // 64)
        if size > TABLE_LIMIT:
            return (
                f"the mask's table of live tiles may take {size} bytes, of which {TABLE_LIMIT} are "
                f"allowed; shorten the sequences or lower the batch; {XLA}"
            )
    return None


def no_dropout(dropout: Dropout) -> str:
    """Returns why there is no dropout, as `unsupported` does."""
    del dropout
    return f"dropout_rate above 0 has no kernel for GPUs; {XLA}"


def forward(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S G D"],
    v: Float[Array, "B S G P"],
    bias: Float[Array, "#B #H #T #S"] | None,
    mask: masks.Mask,
    q_offset: Offset,
    *,
    scale: float,
    logit_cap: float | None,
    interpret: Any = False,
) -> tuple[Float[Array, "B T H P"], Float32[Array, "B T H"]]:
    """Returns (o, lse); arguments as in `ops.attention`."""
    from tilescan.pallas_kernels import gpu

    k, v = forward_operands(k, v, mask, bias)
    T, P = q.shape[1], v.shape[3]
    options = _options("forward", q, k, v, bias, mask, q_offset, logit_cap)
    o, lse = gpu.flash_attention_forward(
        *map(_pad, (q, k, v)),
        **options,
        k_length=k.shape[1],
        scale=scale,
        logit_cap=logit_cap,
        interpret=interpret,
    )
    return o[:, :T, :, :P], lse[:, :, :T].swapaxes(1, 2)


def backward(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S G D"],
    v: Float[Array, "B S G P"],
    bias: Float[Array, "#B #H #T #S"] | None,
    mask: masks.Mask,
    q_offset: Offset,
    o: Float[Array, "B T H P"],
    lse: Float[Array, "B T H"],
    do: Float[Array, "B T H P"],
    dlse: Float[Array, "B T H"],
    *,
    scale: float,
    logit_cap: float | None,
    interpret: Any = False,
) -> tuple[
    Float[Array, "B T H D"],
    Float[Array, "B S G D"],
    Float[Array, "B S G P"],
    Float[Array, "#B #H #T #S"] | None,
]:
    """Returns (dq, dk, dv, dbias or None) in the dtypes of (q, k, v, bias).

    dbias comes from the XLA implementation, which the compiler drops where dbias is not used.
    """
    from tilescan.pallas_kernels import gpu

    # delta_i = sum_p dO_ip O_ip - dlse_i; lse in units of log 2, inf for rows without keys.
    T, D = q.shape[1], q.shape[3]
    S, P = k.shape[1], v.shape[3]
    rest = q, k, v, o, lse, do, dlse
    q, k, v, o, lse, do, dlse = backward_operands(*rest, mask, bias)
    delta = jnp.sum(o.astype(jnp.float32) * do.astype(jnp.float32), axis=-1) - dlse
    lse2 = jnp.where(jnp.isneginf(lse), jnp.inf, lse * math.log2(math.e))
    args = (*map(_pad, (q, k, v, do.astype(q.dtype))), lse2.swapaxes(1, 2), delta.swapaxes(1, 2))
    common = {"scale": scale, "logit_cap": logit_cap, "interpret": interpret}

    def dkv(kernel, **wanted):
        options = _options(kernel, q, k, v, bias, mask, q_offset, logit_cap)
        return gpu.flash_attention_dkv(*args, **options, **common, **wanted)

    # dK and dV by one kernel or two, dQ by another.
    if max(D, P) <= MAX_HEAD_DIM_OF_BOTH:
        dk, dv = dkv("dkv")
    else:
        dk, dv = dkv("dk", want_dv=False)[0], dkv("dv", want_dk=False)[1]
    options = _options("dq", q, k, v, bias, mask, q_offset, logit_cap)
    dq = gpu.flash_attention_dq(*args, **options, **common, k_length=S)
    dbias = None
    if bias is not None:
        residuals = (q, k, v, bias, mask, q_offset, o, lse, do, dlse)
        dbias = attention_xla.backward(*residuals, scale=scale, logit_cap=logit_cap)[3]
    return dq[:, :T, :, :D], dk[:, :S, :, :D], dv[:, :S, :, :P], dbias


def _pad(x):
    """Returns x with time padded to a multiple of 8 (TMA), the head dim to one of 16 (wgmma)."""
    time, dim = -x.shape[1] % 8, -x.shape[3] % 16
    return jnp.pad(x, ((0, 0), (0, time), (0, 0), (0, dim))) if time or dim else x


def _pad_bias(bias):
    """Returns bias with both times padded to a multiple of 8, in a dtype that the kernels take."""
    if bias is None:
        return None
    if bias.dtype not in (*DTYPES, jnp.float32):
        bias = bias.astype(jnp.float32)
    times = [(0, -n % 8) for n in bias.shape[2:]]
    return jnp.pad(bias, ((0, 0), (0, 0), *times)) if any(n for _, n in times) else bias


def _window(mask):
    """Returns (left, right) if query i sees exactly the keys i - left .. i + right, else None."""
    band = mask.band()
    if band is None or band.prefix > 0 or band.limit is not None:
        return None
    return band.left, band.right


def _interior(mask, q_offset):
    """Returns the mask as it is evaluated inside its partial tiles; None if it can't be."""
    if q_offset is None:
        q_offset = 1  # unknown: no layout is known to lie on the tiles' grid
    return masks.within_live_tiles(mask, 128, 128, q_offset)


def _options(kernel, q, k, v, bias, mask, q_offset, logit_cap):
    """Returns schedule, mask and block sizes of one kernel."""
    from tilescan.pallas_kernels import gpu

    T, S = q.shape[1], k.shape[1]
    segments = masks.segments_of(mask)
    # A cap and segments need registers, and so smaller blocks.
    heavy = logit_cap is not None or segments is not None
    blocks = gpu.default_blocks(kernel, q.shape[3], v.shape[3], heavy=heavy, bias=bias is not None)
    # Windows are walked by indices, other masks by lists of live tiles.
    static = isinstance(q_offset, (int, np.integer))
    interior = _interior(mask, q_offset if static else None)
    window, transposed = _window(mask), kernel in ("dkv", "dk", "dv")
    if window is not None:
        schedule = gpu.attention_schedule(
            T, S, blocks, before=window[0], after=window[1], offset=q_offset, transposed=transposed
        )
    else:
        kinds = masks.tile_kinds(mask, T, S, blocks.block_q, blocks.block_k, q_offset)
        schedule = gpu.list_schedule(kinds.swapaxes(1, 2) if transposed else kinds)
    ids = None
    if segments is not None:
        ids = tuple(jnp.asarray(x, jnp.int32) for x in segments.both(T, S))
    return {
        "schedule": schedule,
        "visible": None if isinstance(interior, masks.Full) else interior.visible,
        "q_offset": q_offset,
        "segments": ids,
        "bias": _pad_bias(bias),
        "blocks": blocks,
    }
