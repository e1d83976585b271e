"""Tiles of the TPU kernels (first values; the sweep replaces them)."""

from pallas_kernels.tpu.flash_attention import Tile


def tile_for(kernel, queries, keys, head_dim, itemsize):
    return {
        "forward": Tile(1024, 1024, 512),
        "dq": Tile(512, 1024, 512),
        "dkv": Tile(1024, 512, 512),
    }[kernel]
