"""Cells that count: memory traffic of standard, tiled and block-sparse attention for one head."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from tilescan.experiments.measurements import attention_counts as counts
from tilescan.ops import masks


def traffic(settings: Mapping[str, Any], seed: int) -> dict:
    """Elements that FlashAttention moves with `on_chip` elements of memory, and standard attention.

    Settings: length, head_dim, on_chip. The forward pass is replayed tile by tile.
    """
    length, head_dim = settings["length"], settings["head_dim"]
    block_q, block_k = counts.block_sizes(settings["on_chip"], head_dim)
    q, k, v = np.random.default_rng(seed).normal(size=(3, length, head_dim))
    count = counts.flash_1(q, k, v, masks.Full(), block_q, block_k)[2]
    backward = counts.flash_backward_traffic(length, head_dim, block_k)
    return {
        "block_q": block_q,
        "block_k": block_k,
        "visits": count.visits,
        "forward": count.traffic,
        "forward_backward": count.traffic + backward,
        "standard_forward": counts.standard_traffic(length, head_dim),
        "standard_forward_backward": counts.standard_traffic(length, head_dim, backward=True),
    }


def sparse_traffic(settings: Mapping[str, Any], seed: int) -> dict:
    """Elements moved by block-sparse FlashAttention's forward pass, one butterfly after another.

    Settings: length, head_dim, block (side of the layout's blocks and of the tiles), factors (of
    the butterfly).
    """
    length, head_dim, block = settings["length"], settings["head_dim"], settings["block"]
    layout = masks.butterfly(-(-length // block), settings["factors"])
    q, k, v = np.random.default_rng(seed).normal(size=(3, length, head_dim))
    mask = masks.BlockSparse(layout, block)
    count = counts.flash_1(q, k, v, mask, block, block)[2]
    return {
        "live_fraction": float(layout.mean()),
        "visits": count.visits,
        "forward": count.traffic,
        "matmul_flops": count.matmul_flops,
    }
