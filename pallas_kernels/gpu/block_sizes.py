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
