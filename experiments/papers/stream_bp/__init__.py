"""StreamBP: exact backpropagation along the sequence in chunks: the measurements.

Luo, Huang, Zhang, Li, Wang: StreamBP: Memory-Efficient Exact Backpropagation for Long Sequence
Training of LLMs. NeurIPS 2025, arXiv 2506.03077.
"""

from tilescan.experiments.harness.cells import Cell, Paper
from tilescan.experiments.papers.stream_bp import claims as stream_bp_claims
from tilescan.experiments.papers.stream_bp import memory as stream_bp_memory
from tilescan.experiments.papers.stream_bp import tables as stream_bp_tables
from tilescan.experiments.papers.stream_bp import training as stream_bp_training


def cells(config) -> list[Cell]:
    """All measurements of the config."""
    return [
        *memory_cells(config),
        *time_cells(config),
        *count_cells(config),
        *precision_cells(config),
        *parity_cells(config),
    ]


def memory_cells(config) -> list[Cell]:
    """Table 3: the longest sequence of each method, for each loss."""
    c = config.memory
    made = []
    for loss in c.losses:
        for method, start in zip(c.methods, c.starts, strict=True):
            settings = {
                "kind": "memory",
                "loss": loss,
                "method": method,
                "model": _model(c, head_dim=c.head_dim, qk_norm=True),
                "chunks": c.chunks,
                "logit_chunk": c.logit_chunk,
                "budget_gb": c.budget_gb,
                "start": start,
                "step": c.step,
            }
            seconds = 45 if method == "stream" else 12
            cell_id = f"memory-{loss}-{method}"
            made.append(Cell(cell_id, stream_bp_memory.longest, settings, seconds=seconds))
    return made


def time_cells(config) -> list[Cell]:
    """Table 1: time of a gradient by length."""
    c = config.times
    return [
        Cell(
            f"times-T{length}",
            stream_bp_memory.times,
            {
                "kind": "times",
                "model": _model(c),
                "methods": list(c.methods),
                "length": length,
                "chunks": c.chunks,
                "logit_chunk": c.logit_chunk,
                "repeats": c.repeats,
            },
            seconds=15 + length / 60,
        )
        for length in c.lengths
    ]


def count_cells(config) -> list[Cell]:
    """Figure 5: time and memory by the number of chunks."""
    c = config.counts
    settings = {
        "kind": "counts",
        "model": _model(c),
        "length": c.length,
        "counts": list(c.counts),
        "logit_chunk": c.logit_chunk,
        "repeats": c.repeats,
    }
    return [Cell("counts", stream_bp_memory.chunk_counts, settings, seconds=120)]


def precision_cells(config) -> list[Cell]:
    """Table 6: errors of gradients in float32 and bfloat16."""
    c = config.precision
    settings = {
        "kind": "precision",
        "model": _model(c, tie_embeddings=False),
        "length": c.length,
        "chunks": c.chunks,
        "logit_chunk": c.logit_chunk,
    }
    return [
        Cell(f"precision-seed{s}", stream_bp_training.precision, settings, seed=s, seconds=25)
        for s in c.seeds
    ]


def parity_cells(config) -> list[Cell]:
    """Table 7: losses of trainings by plain and by streamed gradients."""
    c = config.parity
    made = []
    for loss, rate in zip(c.losses, c.learning_rates, strict=True):
        settings = {
            "kind": "parity",
            "loss": loss,
            "model": _model(c),
            "learning_rate": rate,
            **{k: c[k] for k in ("length", "batch_size", "steps", "chunks", "logit_chunk")},
            **{k: c[k] for k in ("sft_steps", "sft_learning_rate")},
        }
        made.append(Cell(f"parity-{loss}", stream_bp_training.parity, settings, seconds=30))
    return made


def _model(section, **more) -> dict:
    """Fields of LanguageModelConfig."""
    return {
        "repeats": section.layers,
        **{k: section[k] for k in ("vocab_size", "d_model", "n_heads", "n_kv_heads")},
        **{k: section[k] for k in ("mlp_dim", "dtype")},
        **more,
    }


PAPER = Paper(
    name="stream_bp",
    title="StreamBP: memory-efficient exact backpropagation for long sequence training of LLMs "
    "(arXiv 2506.03077)",
    summary="A layer is differentiated by chunks of its output, and the head by chunks of its "
    "logits, so that little but the inputs of layers grows with the sequence. The gradients are "
    "exact, and take no longer than with checkpointing.",
    cells=cells,
    tables=stream_bp_tables.tables,
    claims=stream_bp_claims.claims,
    figures=stream_bp_tables.figures,
    family="sequence parallelism",
)
