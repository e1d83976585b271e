"""Block sizes of the Mosaic GPU attention kernels by head dim."""

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
# shared memory within 227 KiB, nothing spilled, few issue cycles. With 128 wide heads the dK/dV
# kernel holds two 64 x 128 accumulators and needs every register there is; wider ones come from two
# runs of it, each with one accumulator of 64 x 256.
_WIDE = {"compute_registers": 240, "producer_registers": 24}
_TABLE = {
    ("forward", 64): BlockSizes(128, 128, 2),
    ("forward", 128): BlockSizes(128, 128, 2),
    ("forward", 256): BlockSizes(128, 64, 2, **_WIDE),
    ("dkv", 64): BlockSizes(64, 128, 2),
    ("dkv", 128): BlockSizes(64, 128, 2, **_WIDE),
    ("dk", 192): BlockSizes(64, 128, 2, **_WIDE),
    ("dk", 256): BlockSizes(32, 128, 2, **_WIDE),
    ("dv", 256): BlockSizes(64, 128, 2, **_WIDE),
    ("dq", 64): BlockSizes(128, 128, 2),
    ("dq", 128): BlockSizes(128, 64, 2),
    ("dq", 192): BlockSizes(128, 64, 2, **_WIDE),
    ("dq", 256): BlockSizes(128, 32, 2, **_WIDE),
}
# More values a tile element than a position: those of a soft cap's slope, of segment ids.
_HEAVY = {
    ("dq", 64): BlockSizes(128, 64, 2),
    ("dq", 192): BlockSizes(128, 32, 2, **_WIDE),
}
# For a float32 bias, whose tiles take as much shared memory as those of keys 256 wide.
_BIASED = {
    ("dkv", 128): BlockSizes(32, 128, 2, **_WIDE),
    ("forward", 128): BlockSizes(128, 64, 2),
    ("forward", 256): BlockSizes(128, 32, 2, **_WIDE),
    ("dk", 192): BlockSizes(32, 128, 2, **_WIDE),
    ("dv", 256): BlockSizes(32, 128, 2, **_WIDE),
}
MAX_HEAD_DIM = 256


def default_blocks(
    kernel: str, head_dim: int, value_dim: int, *, heavy: bool = False, bias: bool = False
) -> BlockSizes:
    """Returns the block sizes of `kernel` ("forward", "dkv", "dk", "dv" or "dq") for head dims up
    to MAX_HEAD_DIM, "dkv" up to 128.

    Args:
        heavy: the logits are capped, or the mask holds segments.
        bias: a bias is added to the logits.

    Raises:
        ValueError: a head dim above that.
    """
    widest = max(head_dim, value_dim)
    # Where the dims differ the result has a buffer of its own, for which the widest have no room.
    crowded = bias or (head_dim != value_dim and head_dim + value_dim >= 448)
    table = _TABLE | (_HEAVY if heavy or bias else {}) | (_BIASED if crowded else {})
    limits = [limit for name, limit in table if name == kernel and widest <= limit]
    if limits:
        return table[kernel, min(limits)]
    raise ValueError(f"the {kernel} kernel takes head dims up to {MAX_HEAD_DIM}, got {widest}")
