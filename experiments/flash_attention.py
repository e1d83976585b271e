"""FlashAttention: the measurements, and the published numbers beside which they are shown.

Dao, Fu, Ermon, Rudra, Re: FlashAttention: Fast and Memory-Efficient Exact Attention with
IO-Awareness. NeurIPS 2022, arXiv 2205.14135.
"""

from experiments import attention_cells, attention_io, flash_attention_tables
from experiments.harness import Cell, Paper


def cells(config) -> list[Cell]:
    """All measurements of the config, cheap ones first."""
    return [*io_cells(config), *memory_cells(config), *runtime_cells(config)]


def io_cells(config) -> list[Cell]:
    """Memory traffic by counting, over sizes of on-chip memory and over sparsity."""
    io = config.io
    base = {"kind": "io", "length": io.length, "head_dim": io.head_dim}
    made = [
        Cell(f"io-M{size}", attention_io.traffic, {**base, "on_chip": size}) for size in io.on_chip
    ]
    blocks = -(-io.length // io.block)
    for factors in range((blocks - 1).bit_length() + 1):
        settings = {**base, "kind": "io_sparse", "block": io.block, "factors": factors}
        made.append(Cell(f"io-butterfly{factors}", attention_io.sparse_traffic, settings))
    return made


def memory_cells(config) -> list[Cell]:
    """Temporaries of standard, tiled, windowed and block-sparse attention, compiled only."""
    return [
        Cell(
            f"memory-{direction}-T{length}",
            attention_cells.memory,
            {
                "kind": "memory",
                "length": length,
                "direction": direction,
                "variants": attention_cells.VARIANTS,
                **_shape(config.runtime),
            },
            seconds=4,
        )
        for direction in attention_cells.DIRECTIONS
        for length in config.memory.lengths
    ]


def runtime_cells(config) -> list[Cell]:
    """Times of the same four, interleaved per length."""
    made = []
    for direction in attention_cells.DIRECTIONS:
        for length in config.runtime.lengths:
            variants = list(attention_cells.VARIANTS)
            if length > config.runtime.standard_up_to:
                variants.remove("standard")
            settings = {
                "kind": "runtime",
                "length": length,
                "direction": direction,
                "variants": variants,
                "repeats": config.runtime.repeats,
                **_shape(config.runtime),
            }
            seconds = 4 + 15 * (length / 4096) ** 2
            cell_id = f"runtime-{direction}-T{length}"
            made.append(Cell(cell_id, attention_cells.runtime, settings, seconds=seconds))
    return made


def _shape(runtime) -> dict:
    names = ("batch", "heads", "head_dim", "dtype", "window", "block")
    return {name: runtime[name] for name in names}


PAPER = Paper(
    name="flash_attention",
    title="FlashAttention: fast and memory-efficient exact attention with IO-awareness "
    "(arXiv 2205.14135)",
    summary="Softmax attention computed tile by tile, so that the matrix of scores is never "
    "stored: exact, linear in memory, and faster the longer the sequence.",
    cells=cells,
    tables=flash_attention_tables.tables,
    claims=flash_attention_tables.claims,
    figures=flash_attention_tables.figures,
)
