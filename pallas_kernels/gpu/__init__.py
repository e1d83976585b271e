"""Kernels for Hopper GPUs (sm_90a) in Pallas Mosaic GPU."""

from tilescan.pallas_kernels.gpu.block_sizes import BlockSizes, default_blocks
from tilescan.pallas_kernels.gpu.flash_attention import flash_attention_forward
from tilescan.pallas_kernels.gpu.flash_attention_backward import (
    flash_attention_dkv,
    flash_attention_dq,
)
from tilescan.pallas_kernels.gpu.tiles import (
    TileSchedule,
    attention_schedule,
    list_schedule,
    window_schedule,
)

__all__ = [
    "BlockSizes",
    "TileSchedule",
    "attention_schedule",
    "default_blocks",
    "flash_attention_dkv",
    "flash_attention_dq",
    "flash_attention_forward",
    "list_schedule",
    "window_schedule",
]
