"""FlashAttention's figures: calls and traffic against length and memory, curves of training."""

from collections.abc import Callable

from tilescan.experiments.harness.figures import line_chart, line_figure, panel_figure
from tilescan.experiments.harness.groups import by
from tilescan.experiments.harness.records import Records
from tilescan.experiments.measurements import attention
from tilescan.experiments.measurements.training import attention_pairs
from tilescan.experiments.papers.flash_attention import tables


def figures(records: Records) -> dict[str, str]:
    """Returns SVG by name, "" where the records have nothing to draw."""
    runtime, memory, on_chip, sparse, curves, context, documents = (
        records.select(kind=kind)
        for kind in ("runtime", "memory", "io", "io_sparse", "curves", "context", "documents")
    )
    return {
        "runtime-against-length": _calls(runtime, attention.median_ms, "time of a call (ms)"),
        "memory-against-length": _calls(memory, attention.mebibytes, "temporaries of a call (MiB)"),
        "io-on-chip": _traffic(on_chip),
        "io-sparse": _sparsity(sparse),
        "curves": _curves(curves),
        "context": _trained(context, "context", "test_perplexity", "perplexity of held-out text"),
        "documents": _trained(documents, "length", "test_accuracy", "test micro-F1 (%)", unit=100),
    }


def _calls(found: Records, value: Callable[..., object], label: str) -> str:
    """Returns time or memory of a call against length, a panel for each direction."""
    lines = {name: lambda g, v=v: value(g, v) for v, name in tables.NAMES.items()}
    panels = {
        title: (by(found.select(direction=direction), "length"), lines)
        for direction, title in attention.DIRECTIONS.items()
    }
    return panel_figure(panels, x="length (tokens)", y=label, log=True)


def _traffic(on_chip: Records) -> str:
    """Returns traffic against the size of on-chip memory."""
    moved = lambda key: lambda g: tables.gigabytes(g.first.result[key])
    lines = {"standard": moved("standard_forward_backward"), "tiled": moved("forward_backward")}
    labels = {"x": "on-chip elements", "y": "traffic, forward + backward (GB)"}
    return line_figure(by(on_chip, "on_chip"), lines, log=True, **labels)


def _sparsity(sparse: Records) -> str:
    """Returns traffic against the live fraction of the tiles."""
    found = [g.first.result for g in by(sparse, "factors")]
    line = [r["live_fraction"] for r in found], [r["forward"] / 1e6 for r in found]
    labels = {"x_label": "live fraction of the tiles", "y_label": "traffic, forward (10⁶ elements)"}
    return line_chart({"": {"block-sparse": line}}, **labels) if found else ""


def _curves(curves: Records) -> str:
    """Returns the first seed's two training curves, and their difference."""
    pairs = attention_pairs(curves)
    if not pairs:
        return ""
    steps = pairs[0][0].result["steps"]
    one, two = (r.result["train_loss"] for r in pairs[0])
    gap = [abs(a - b) for a, b in zip(one, two, strict=True)]
    panels = {
        "training loss": {"standard": (steps, one), "tiled": (steps, two)},
        "|standard - tiled|": {"difference": (steps, gap)},
    }
    labels = {"x_label": "step", "y_label": "loss (nats a token)"}
    return line_chart(panels, dashed=("tiled",), markers=False, share_y=False, **labels)


def _trained(found: Records, setting: str, metric: str, label: str, unit: float = 1) -> str:
    """Returns test perplexity or accuracy against what is read, a line for each seed."""
    lines = {
        f"seed {seed}": lambda g, seed=seed: next(
            (unit * r.result[metric] for r in g.records if r.seed == seed), None
        )
        for seed in sorted({r.seed for r in found})
    }
    return line_figure(by(found, setting), lines, x="tokens read", y=label)
