"""Block sizes of the Mosaic GPU attention kernels by head dim."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Tile sizes of one kernel.

    block_q, block_k: queries and keys of a tile as the thread block sees it. The side that the
        thread block owns is 128: 64 rows for each of two compute warpgroups.
    stages: slots of the shared-memory ring that the producer fills ahead.
    compute_registers, producer_registers: registers a thread after `setmaxnreg`; twice the first
        plus the second must stay within 504, what 65536 registers allow 3 warpgroups.
    """

    block_q: int
    block_k: int
    stages: int
    compute_registers: int = 232
    producer_registers: int = 40


# (kernel, largest head dim) -> tiles. Chosen by the static report of benchmarks/gpu_static.py:
# shared memory within 227 KiB, nothing spilled in the loop over full tiles, few issue cycles. With
# 128 wide heads the dK/dV kernel holds two 64 x 128 accumulators and needs every register there is.
_TABLE = {
    ("forward", 64): BlockSizes(128, 128, 2),
    ("forward", 128): BlockSizes(128, 128, 2),
    ("dkv", 64): BlockSizes(64, 128, 2),
    ("dkv", 128): BlockSizes(64, 128, 2, compute_registers=240, producer_registers=24),
    ("dq", 64): BlockSizes(128, 128, 2),
    ("dq", 128): BlockSizes(128, 64, 2),
}
MAX_HEAD_DIM = 128


def default_blocks(kernel: str, head_dim: int, value_dim: int) -> BlockSizes:
    """Block sizes of `kernel` ("forward", "dkv" or "dq") for head dims up to MAX_HEAD_DIM.

    Raises:
        ValueError: a head dim above that.
    """
    widest = max(head_dim, value_dim)
    for (name, limit), blocks in _TABLE.items():
        if name == kernel and widest <= limit:
            return blocks
    raise ValueError(f"the {kernel} kernel takes head dims up to {MAX_HEAD_DIM}, got {widest}")
