"""Tiles of the TPU attention kernels, by bucket of shape.

Static data, from `python -m tilescan.benchmarks.tpu_static --sweep` (T = 4096, H = 2, D = 128, Full
and Causal, on v5e, v5p and v6e): cycles of libtpu's static profile, with nothing run on a device.
One table serves all generations: the best tile of one was within a few per cent of the best of the
others. Wide heads and float32 take half the tile, for VMEM. Shorter sequences take smaller ones."""

from tilescan.pallas_kernels.tpu.flash_attention import Tile

# (kernel, narrow): queries, keys, compute step. Narrow: 2-byte elements and heads of at most 128.
_TILES = {
    ("forward", True): Tile(1024, 2048, 512),
    ("forward", False): Tile(512, 1024, 512),
    ("dq", True): Tile(1024, 2048, 512),
    ("dq", False): Tile(512, 512, 512),
    ("dkv", True): Tile(2048, 512, 512),
    ("dkv", False): Tile(512, 512, 512),
}


def tile_for(kernel: str, head_dim: int, itemsize: int, width: int | None = None) -> Tile:
    """Returns the tile of "forward", "dq" or "dkv".

    Args:
      head_dim: the larger of D and P.
      itemsize: bytes of an element.
      width: how many keys a query sees at most, if that is known; tiles much larger than a narrow
        window would consist of hidden scores.
    """
    tile = _TILES[kernel, itemsize == 2 and head_dim <= 128]
    if width is None:
        return tile
    limit = max(256, -(-width // 256) * 256)
    return Tile(min(tile.queries, limit), min(tile.keys, limit), min(tile.compute, limit))
