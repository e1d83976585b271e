"""How far tiled attention is from the dense result in float64: outputs and gradients.

Letters: B batch, T time, H heads, G key-value heads, D head dim.
"""

from collections.abc import Mapping
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from tilescan.ops import attention_tpu, attention_xla, masks
from tilescan.ops.attention import attention
from tilescan.pallas_kernels.tpu.block_sizes import Tile

STANDARD, XLA, KERNELS = "standard", "tiled (XLA)", "tiled (Pallas TPU, interpreted)"
CHOSEN = "as chosen"  # tiles that the op takes by itself
OUTPUTS = ("o", "dq", "dk", "dv")


def make_mask(name: str, length: int) -> masks.Mask:
    """One of the masks of the table, for self-attention of this length.

    Raises:
      ValueError: unknown name.
    """
    if name == "full":
        return masks.Full()
    if name in ("causal", "grouped heads"):
        return masks.Causal()
    if name == "window":
        return masks.SlidingWindow(length // 4, length // 8)
    if name == "butterfly":
        block = max(1, length // 8)
        return masks.BlockSparse(masks.butterfly(-(-length // block), 2), block)
    if name == "segments":
        ids = jnp.asarray(np.arange(length)[None, :] * 3 // length, jnp.int32) + 1
        return masks.Causal() & masks.Segments(ids)
    raise ValueError(f"mask={name!r} is unknown")


def errors(settings: Mapping[str, Any], seed: int) -> dict:
    """Largest error of each output over the largest value of that output, per implementation.

    Settings: length, heads, head_dim, mask (a name of `make_mask`; "grouped heads" is causal with
    half as many key-value heads), dtype, tiles and kernel_tiles (sizes such as "64x128", queries x
    keys, for the XLA implementation and for the Pallas kernels, which are interpreted).

    Returns:
      {"implementation, tile": {"o", "dq", "dk", "dv"}}; "standard, none" is
      jax.nn.dot_product_attention in the same dtype. All are measured against the dense computation
      in float64 of the rounded inputs.
    """
    length, heads, dtype = settings["length"], settings["heads"], settings["dtype"]
    groups = heads // 2 if settings["mask"] == "grouped heads" else heads
    mask = make_mask(settings["mask"], length)
    shapes = [(1, length, n, settings["head_dim"]) for n in (heads, groups, groups, heads)]
    rng = np.random.default_rng(seed)
    q, k, v, do = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    visible = np.array(masks.as_array(mask, length, length)).reshape(1, 1, length, length)
    truth = dense_float64(q, k, v, do, visible)

    def standard(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, mask=jnp.asarray(visible))

    def chosen(q, k, v):
        return attention(q, k, v, mask=mask, implementation="xla")

    found = {
        f"{STANDARD}, none": _with_gradients(standard, q, k, v, do),
        f"{XLA}, {CHOSEN}": _with_gradients(chosen, q, k, v, do),
    }
    for tile in settings["tiles"]:
        found[f"{XLA}, {tile}"] = _by_xla(q, k, v, do, mask, sides(tile))
    for tile in settings["kernel_tiles"]:
        found[f"{KERNELS}, {tile}"] = _interpreted(q, k, v, do, mask, sides(tile))
    return {
        name: {
            output: float(np.max(np.abs(np.asarray(x, np.float64) - y)) / np.max(np.abs(y)))
            for output, x, y in zip(OUTPUTS, result, truth, strict=True)
        }
        for name, result in found.items()
    }


def dense_float64(q, k, v, do, visible) -> tuple[np.ndarray, ...]:
    """(o, dq, dk, dv) by the textbook formulas in float64; `visible` is bool [B, 1, T, T]."""
    q, k, v, do = (np.asarray(x.astype(jnp.float32), np.float64) for x in (q, k, v, do))
    repeats, scale = q.shape[2] // k.shape[2], q.shape[3] ** -0.5
    full_k, full_v = (np.repeat(x, repeats, axis=2) for x in (k, v))
    scores = np.where(visible, scale * np.einsum("bthd,bshd->bhts", q, full_k), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    o = np.einsum("bhts,bshd->bthd", weights, full_v)
    dweights = np.einsum("bthd,bshd->bhts", do, full_v)
    dscores = weights * (dweights - (weights * dweights).sum(-1, keepdims=True)) * scale
    dq = np.einsum("bhts,bshd->bthd", dscores, full_k)
    dk = np.einsum("bhts,bthd->bshd", dscores, q)
    dv = np.einsum("bhts,bthd->bshd", weights, do)
    grouped = (*k.shape[:3], repeats, k.shape[3])
    return o, dq, *(x.reshape(grouped).sum(3) for x in (dk, dv))


def _with_gradients(function, q, k, v, do):
    @jax.jit
    def run(q, k, v, do):
        o, pull = jax.vjp(function, q, k, v)
        return o, *pull(do)

    return run(q, k, v, do)


def sides(tile: str) -> tuple[int, int]:
    """(queries, keys) of a tile such as "64x128".

    Raises:
      ValueError: it is not two positive numbers with an x between them.
    """
    try:
        queries, keys = (int(side) for side in tile.split("x"))
    except ValueError:
        queries = keys = 0
    if min(queries, keys) < 1:
        raise ValueError(f"tile={tile!r} must be queries x keys, e.g. '64x128'")
    return queries, keys


def _by_xla(q, k, v, do, mask, tile):
    """The XLA implementation in tiles of one size, whatever it would choose."""
    scale = q.shape[3] ** -0.5

    @jax.jit
    def run(q, k, v, do):
        problem = (q, k, v, None, mask, 0)
        o, lse = attention_xla.forward(*problem, scale=scale, logit_cap=None)
        residuals = (*problem, o, lse, do, jnp.zeros_like(lse))
        return o, *attention_xla.backward(*residuals, scale=scale, logit_cap=None)[:3]

    with mock.patch.object(attention_xla, "tile_sizes", lambda *_: tile):
        return run(q, k, v, do)


def _interpreted(q, k, v, do, mask, tile):
    """The TPU kernels in tiles of one size, run step by step on this machine."""
    queries, keys = tile
    options = dict(scale=q.shape[3] ** -0.5, logit_cap=None, interpret=True)
    # The compute step divides the inner axis of the kernel: keys, or queries for dK and dV.
    size = lambda kernel, *_: Tile(queries, keys, queries if kernel == "dkv" else keys)
    with mock.patch.object(attention_tpu, "tile_for", size):
        o, lse = attention_tpu.forward(q, k, v, None, mask, 0, **options)
        gradients = attention_tpu.backward(
            q, k, v, None, mask, 0, o, lse, do, jnp.zeros_like(lse), **options
        )
    return o, *gradients[:3]
