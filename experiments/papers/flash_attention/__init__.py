"""FlashAttention: the measurements, and the published numbers beside which they are shown.

Dao, Fu, Ermon, Rudra, Re: FlashAttention: Fast and Memory-Efficient Exact Attention with
IO-Awareness. NeurIPS 2022, arXiv 2205.14135.
"""

from tilescan.experiments.harness.cells import Cell, Paper
from tilescan.experiments.harness.claims import Claim, judge
from tilescan.experiments.harness.records import Records
from tilescan.experiments.harness.tables import Table
from tilescan.experiments.measurements import attention as attention_cells
from tilescan.experiments.measurements import static_kernels as static_figures
from tilescan.experiments.papers.flash_attention import exactness as attention_exactness
from tilescan.experiments.papers.flash_attention import io as flash_attention_io
from tilescan.experiments.papers.flash_attention import memory_traffic as attention_io
from tilescan.experiments.papers.flash_attention import speed as flash_attention_speed
from tilescan.experiments.papers.flash_attention import text as flash_attention_text


def cells(config) -> list[Cell]:
    """All measurements of the config, cheap ones first."""
    return [
        *io_cells(config),
        *static_figures.cells(),
        *exactness_cells(config),
        *memory_cells(config),
        *runtime_cells(config),
        *flash_attention_text.cells(config),
    ]


def exactness_cells(config) -> list[Cell]:
    """Errors of outputs and gradients against float64, per mask and dtype."""
    e = config.exactness
    return [
        Cell(
            f"exactness-{mask.replace(' ', '-')}-{dtype}",
            attention_exactness.errors,
            {
                "kind": "exactness",
                "mask": mask,
                "dtype": dtype,
                **{k: e[k] for k in ("length", "heads", "head_dim", "tiles", "kernel_tiles")},
            },
            seconds=12,
        )
        for mask in e.masks
        for dtype in e.dtypes
    ]


def io_cells(config) -> list[Cell]:
    """Memory traffic by counting, over sizes of on-chip memory, lengths and sparsity."""
    io = config.io
    base = {"kind": "io", "length": io.length, "head_dim": io.head_dim}
    made = [
        Cell(f"io-M{size}", attention_io.traffic, {**base, "on_chip": size}) for size in io.on_chip
    ]
    for length in io.lengths:
        settings = {**base, "kind": "io_length", "length": length, "on_chip": io.lengths_on_chip}
        made.append(Cell(f"io-N{length}", attention_io.traffic, settings))
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


# Parts of the paper, each with its tables(records), claims(records) and figures(records).
_PARTS = (flash_attention_speed, attention_exactness, flash_attention_io, flash_attention_text)


# Name, statement, criterion and what it takes, of the tables that no single machine decides.
_AT_SCALE = (
    (
        "BERT training time",
        "BERT-large trains to 72.0% masked accuracy in 17.4 ± 1.4 minutes, the MLPerf 1.1 record "
        "took 20.0 ± 1.5 (Table 1).",
        "time to 72.0% on 8 A100s",
        "8 A100s and MLPerf's Wikipedia",
    ),
    (
        "GPT-2 training time",
        "GPT-2 small trains 3.5 times faster than with HuggingFace's attention at the same "
        "perplexity 18.2, GPT-2 medium 3.0 times at 14.2 (Table 2).",
        "time to 400k steps on OpenWebText, 8 GPUs",
        "8 GPUs and OpenWebText",
    ),
    (
        "Long-Range Arena",
        "2.4 times faster than the Transformer at an average of 59.8 against 59.3, 2.8 times at "
        "59.6 if block-sparse (Table 3).",
        "accuracy on the five tasks and training time on one GPU",
        "a GPU and the five tasks' data",
    ),
    (
        "Path-X and Path-256",
        "First Transformer above chance: 61.4% on Path-X; block-sparse 56.0% there and 63.1% on "
        "Path-256 (Table 6).",
        "accuracy above 50% at lengths of 16k and 64k",
        "weeks of one GPU and Pathfinder's images",
    ),
)


def tables(records: Records) -> list[Table]:
    """All tables that the records can fill."""
    parts = (*_PARTS, static_figures)
    return [table for part in parts for table in part.tables(records) if table.rows]


def claims(records: Records) -> list[Claim]:
    """The paper's statements, and those that need more than one machine."""
    at_scale = [judge(*words, None, "not run", needs=needs) for *words, needs in _AT_SCALE]
    return [*(claim for part in _PARTS for claim in part.claims(records)), *at_scale]


def figures(records: Records) -> dict[str, str]:
    """SVG by name."""
    drawn = (flash_attention_speed, flash_attention_io, flash_attention_text)
    return {name: svg for part in drawn for name, svg in part.figures(records).items()}


PAPER = Paper(
    name="flash_attention",
    title="FlashAttention: fast and memory-efficient exact attention with IO-awareness "
    "(arXiv 2205.14135)",
    summary="Softmax attention computed tile by tile, so that the matrix of scores is never "
    "stored: exact, linear in memory, and faster the longer the sequence.",
    cells=cells,
    tables=tables,
    claims=claims,
    figures=figures,
)
