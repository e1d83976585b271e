"""FlashAttention-2: the measurements, and the published numbers beside which they are shown.

Dao: FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning. ICLR 2024,
arXiv 2307.08691.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from tilescan.experiments.harness.cells import Cell, Paper
from tilescan.experiments.measurements import attention as attention_cells
from tilescan.experiments.measurements import attention_counts, timing
from tilescan.experiments.measurements import static_kernels as static_figures
from tilescan.experiments.measurements.attention import DIRECTIONS
from tilescan.experiments.papers.flash_attention_2 import (
    tables as flash_attention_2_tables,
)
from tilescan.experiments.papers.flash_attention_2 import (
    training as flash_attention_2_training,
)
from tilescan.ops import masks

VARIANTS = ("standard", "tiled")


def cells(config) -> list[Cell]:
    """All measurements of the config."""
    return [
        *count_cells(config),
        *tile_cells(config),
        *static_figures.cells(),
        *speed_cells(config),
        *flash_attention_2_training.cells(config),
    ]


def count_cells(config) -> list[Cell]:
    """Operations of FlashAttention's and FlashAttention-2's loops, full and causal."""
    c = config.counts
    base = {"kind": "counts", **{k: c[k] for k in ("head_dim", "block_q", "block_k")}}
    return [
        Cell(
            f"counts-{'causal' if causal else 'full'}-T{length}",
            count_operations,
            {**base, "length": length, "causal": causal},
            seconds=2,
        )
        for causal in (False, True)
        for length in c.lengths
    ]


def tile_cells(config) -> list[Cell]:
    """Tiles that a causal mask leaves, for several numbers of tiles a side."""
    block = config.counts.block_q
    return [
        Cell(f"tiles-{side}", count_tiles, {"kind": "tiles", "side": side, "block": block})
        for side in config.counts.tiles_a_side
    ]


def speed_cells(config) -> list[Cell]:
    """Time of standard and tiled attention at a fixed number of tokens."""
    s = config.speed
    return [
        Cell(
            f"speed-d{head_dim}-T{length}",
            speed,
            {
                "kind": "speed",
                "length": length,
                "head_dim": head_dim,
                "heads": s.hidden // head_dim,
                "batch": max(1, s.tokens // length),
                "dtype": s.dtype,
                "repeats": s.repeats,
            },
            seconds=12 + 40 * length / 4096,
        )
        for head_dim in s.head_dims
        for length in s.lengths
    ]


def count_operations(settings: Mapping[str, Any], seed: int) -> dict:
    """Counts of both loops on one head of random numbers, by the paper's name."""
    shape = (3, settings["length"], settings["head_dim"])
    q, k, v = np.random.default_rng(seed).normal(size=shape)
    mask = masks.Causal() if settings["causal"] else masks.Full()
    blocks = settings["block_q"], settings["block_k"]
    results = {}
    for name, loop in (("fa1", attention_counts.flash_1), ("fa2", attention_counts.flash_2)):
        count = loop(q, k, v, mask, *blocks)[2]
        fields = vars(count) | {"other_ops": count.other_ops, "traffic": count.traffic}
        results[name] = {name: int(value) for name, value in fields.items()}
    return results


def count_tiles(settings: Mapping[str, Any], seed: int) -> dict:
    """Tiles of a causal mask, as the op's mask algebra tells them apart.

    Settings: side (tiles a side), block (queries and keys of a tile). Returns {"all", "live",
    "partial"}; a partial tile is live and needs the mask of its elements.
    """
    side, block = settings["side"], settings["block"]
    kinds = masks.tile_kinds(masks.Causal(), side * block, side * block, block, block)
    return {
        "all": kinds.size,
        "live": int(masks.live_tiles(kinds)),
        "partial": int(np.sum(kinds == masks.PARTIAL)),
    }


def speed(settings: Mapping[str, Any], seed: int) -> dict:
    """Times standard and tiled attention, full and causal, forward and with backward, interleaved.

    Settings: batch, length, heads, head_dim, dtype, repeats. Returns what `timing.compare` returns,
    by "variant mask direction", e.g. "tiled causal forward".
    """
    functions = {
        f"{name} {mask} {direction}": attention_cells.in_direction(
            attention_cells.variant(name, {**settings, "causal": mask == "causal"}), direction
        )
        for name in VARIANTS
        for mask in ("full", "causal")
        for direction in DIRECTIONS
    }
    shape = tuple(settings[k] for k in ("batch", "length", "heads", "head_dim"))
    keys = jax.random.split(jax.random.key(seed), 4)
    arguments = tuple(jax.random.normal(key, shape, settings["dtype"]) for key in keys)
    return timing.compare(functions, arguments, repeats=settings["repeats"])


PAPER = Paper(
    name="flash_attention_2",
    title="FlashAttention-2: faster attention with better parallelism and work partitioning "
    "(arXiv 2307.08691)",
    summary="The same exact attention with queries in the outer loop: the output stays on chip, is "
    "divided once, and tiles above the diagonal are skipped.",
    cells=cells,
    tables=flash_attention_2_tables.tables,
    claims=flash_attention_2_tables.claims,
    figures=flash_attention_2_tables.figures,
)
