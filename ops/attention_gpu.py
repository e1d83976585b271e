"""Attention on Hopper GPUs: translates `ops.attention`'s arguments to pallas_kernels.gpu.

What is decided here: which tiles a mask leaves, how it is asked inside them, padding of the head
dim, and what the kernels can't do.

Letters: B batch, T query time, S key time, H heads, G key-value heads, D head dim, P value dim.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from ops import masks

# pallas_kernels.gpu is imported where it is called: it takes 17 MB, and most programs on CPUs are
# of a dtype that it doesn't take.

DTYPES = (jnp.bfloat16, jnp.float16)
MAX_HEAD_DIM = 128
# Tables of live tiles lie in global memory; beyond this they would outweigh the activations.
TABLE_LIMIT = 256 * 2**20


def is_hopper_or_newer() -> bool:
    """Whether the kernels' instructions (wgmma, TMA) exist on the GPU at hand.

    Without a CUDA backend a program is lowered for a GPU elsewhere, which is taken to be a Hopper.
    """
    if jax.default_backend() not in ("gpu", "cuda"):
        return True
    capability = jax.devices()[0].compute_capability
    # wgmma is Hopper's own: Blackwell has other matrix instructions.
    return str(capability).startswith("9.")


def unsupported(q, k, v, bias, mask, q_offset):
    """Why the kernels can't take these arguments, in words that say what would work; or None."""
    if q.dtype not in DTYPES:
        return f"q, k and v are {q.dtype}; bfloat16 and float16 have a kernel"
    for name, size in (("D", q.shape[3]), ("P", v.shape[3])):
        if size > MAX_HEAD_DIM:
            return f"head dim {name}={size}; up to {MAX_HEAD_DIM} has a kernel"
    if bias is not None:
        return "a bias has no kernel on GPUs; leave it out, or express it as a mask"
    if not is_hopper_or_newer():
        return (
            "this GPU is not a Hopper (compute capability 9.0), whose instructions the kernels use"
        )
    static = isinstance(q_offset, (int, np.integer))
    if _interior(mask, q_offset if static else None) is None:
        return (
            "BlockSparse has a kernel if its block is a multiple of 128, q_offset a static "
            "multiple of 128, and it is combined with other masks by one & or |"
        )
    if _window(mask) is None:
        rows = 1 if masks.segments_of(mask) is None else q.shape[0]
        size = rows * 4 * -(-q.shape[1] // 64) * -(-k.shape[1] // 64)
        if size > TABLE_LIMIT:
            return (
                f"the mask's table of live tiles may take {size} bytes, of which {TABLE_LIMIT} are "
                "allowed; shorten the sequences or lower the batch"
            )
    return None


def forward(q, k, v, bias, mask, q_offset, *, scale, logit_cap, interpret=False):
    """(o [B, T, H, P], lse [B, T, H] float32); arguments as in `ops.attention`."""
    from pallas_kernels import gpu

    T, P = q.shape[1], v.shape[3]
    options = _options("forward", q, k, v, mask, q_offset)
    o, lse = gpu.flash_attention_forward(
        *map(_pad, (q, k, v)),
        **options,
        k_length=k.shape[1],
        scale=scale,
        logit_cap=logit_cap,
        interpret=interpret,
    )
    return o[:, :T, :, :P], lse[:, :, :T].swapaxes(1, 2)


def backward(q, k, v, bias, mask, q_offset, o, lse, do, dlse, *, scale, logit_cap, interpret=False):
    """(dq, dk, dv, None) in the dtypes and shapes of (q, k, v)."""
    from pallas_kernels import gpu

    T, D = q.shape[1], q.shape[3]
    S, P = k.shape[1], v.shape[3]
    delta = jnp.sum(o.astype(jnp.float32) * do.astype(jnp.float32), axis=-1) - dlse
    lse2 = jnp.where(jnp.isneginf(lse), jnp.inf, lse * math.log2(math.e))
    args = (*map(_pad, (q, k, v, do.astype(q.dtype))), lse2.swapaxes(1, 2), delta.swapaxes(1, 2))
    common = {"scale": scale, "logit_cap": logit_cap, "interpret": interpret}
    options = _options("dkv", q, k, v, mask, q_offset)
    dk, dv = gpu.flash_attention_dkv(*args, **options, **common)
    options = _options("dq", q, k, v, mask, q_offset)
    dq = gpu.flash_attention_dq(*args, **options, **common, k_length=S)
    return dq[:, :T, :, :D], dk[:, :S, :, :D], dv[:, :S, :, :P], None


def _pad(x):
    """x with time padded to a multiple of 8 and the head dim to one of 16, what TMA and wgmma
    take."""
    time, dim = -x.shape[1] % 8, -x.shape[3] % 16
    return jnp.pad(x, ((0, 0), (0, time), (0, 0), (0, dim))) if time or dim else x


def _window(mask):
    """(before, after) if query i sees keys i - before .. i + after, None if it isn't so simple."""
    band = mask.band()
    if band is None or band.prefix > 0 or band.limit is not None:
        return None
    return band.left, band.right


def _interior(mask, q_offset):
    """The mask as it can be asked inside its partial tiles; None if it can't be."""
    if q_offset is None:
        q_offset = 1  # unknown: no layout is known to lie on the tiles' grid
    return masks.within_live_tiles(mask, 128, 128, q_offset)


def _options(kernel, q, k, v, mask, q_offset):
    """Schedule, mask and block sizes of one kernel."""
    from pallas_kernels import gpu

    T, S = q.shape[1], k.shape[1]
    blocks = gpu.default_blocks(kernel, q.shape[3], v.shape[3])
    static = isinstance(q_offset, (int, np.integer))
    interior = _interior(mask, q_offset if static else None)
    window, transposed = _window(mask), kernel == "dkv"
    if window is not None:
        schedule = gpu.attention_schedule(
            T, S, blocks, before=window[0], after=window[1], offset=q_offset, transposed=transposed
        )
    else:
        kinds = masks.tile_kinds(mask, T, S, blocks.block_q, blocks.block_k, q_offset)
        schedule = gpu.list_schedule(kinds.swapaxes(1, 2) if transposed else kinds)
    segments = masks.segments_of(mask)
    ids = None
    if segments is not None:
        ids = tuple(jnp.asarray(x, jnp.int32) for x in segments.both(T, S))
    return {
        "schedule": schedule,
        "visible": None if isinstance(interior, masks.Full) else interior.visible,
        "q_offset": q_offset,
        "segments": ids,
        "blocks": blocks,
    }
