"""FlashAttention's figures: calls and traffic against length and memory, curves of training."""

from tilescan.experiments.harness.figures import line_chart, line_figure
from tilescan.experiments.harness.groups import by
from tilescan.experiments.harness.records import Records
from tilescan.experiments.measurements.attention import DIRECTIONS
from tilescan.experiments.papers.flash_attention import tables


def figures(records: Records) -> dict[str, str]:
    """Returns SVG by name, of what the records can draw."""
    made = {
        "runtime-against-length": _calls(records, "runtime", "median_ms", 1, "ms a call"),
        "memory-against-length": _calls(
            records, "memory", "temp_bytes", 2**20, "MiB of temporaries"
        ),
        "traffic-against-on-chip-memory": _traffic(records.select(kind="io")),
        "traffic-against-sparsity": _sparsity(records.select(kind="io_sparse")),
        "training-curves": _curves(records.select(kind="curves")),
        "test-perplexity-against-context": _trained(
            records, "context", "context", "test_perplexity", 1, "test perplexity"
        ),
        "test-accuracy-against-length": _trained(
            records, "documents", "length", "test_accuracy", 100, "test micro-F1 (%)"
        ),
    }
    return {name: svg for name, svg in made.items() if svg}


def _calls(records: Records, kind: str, metric: str, unit: float, label: str) -> str:
    """Returns time or memory of a call against length, a panel for each direction."""
    panels = {}
    for direction, title in DIRECTIONS.items():
        groups = by(records.select(kind=kind, direction=direction), "length")
        lines = {}
        for variant, name in tables.NAMES.items():
            found = [(g.key, tables.outcome(g, variant, metric)) for g in groups]
            points = [(n, v / unit) for n, v in found if isinstance(v, int | float) and v > 0]
            if points:
                lines[name] = tuple(zip(*points, strict=True))
        if lines:
            panels[title] = lines
    if not panels:
        return ""
    return line_chart(panels, x_label="length (tokens)", y_label=label, log_x=True, log_y=True)


def _traffic(on_chip: Records) -> str:
    """Returns traffic against the size of on-chip memory."""
    keys = {"standard": "standard_forward_backward", "tiled": "forward_backward"}
    lines = {
        name: lambda g, key=key: tables.gigabytes(g.first.result[key]) for name, key in keys.items()
    }
    labels = {"x": "on-chip elements", "y": "GB moved, forward + backward"}
    return line_figure(by(on_chip, "on_chip"), lines, log=True, **labels) if on_chip else ""


def _sparsity(sparse: Records) -> str:
    """Returns traffic against the live fraction of the tiles."""
    found = [g.first.result for g in by(sparse, "factors")]
    if not found:
        return ""
    line = [r["live_fraction"] for r in found], [r["forward"] / 1e6 for r in found]
    return line_chart(
        {"": {"block-sparse": line}},
        x_label="live fraction of the tiles",
        y_label="10⁶ elements moved, forward",
    )


def _curves(curves: Records) -> str:
    """Returns the first seed's two training curves, and their difference."""
    pairs = tables.curve_pairs(curves)
    if not pairs:
        return ""
    steps = pairs[0][0].result["steps"]
    one, two = (r.result["train_loss"] for r in pairs[0])
    gap = [abs(a - b) for a, b in zip(one, two, strict=True)]
    return line_chart(
        {
            "training loss": {"standard": (steps, one), "tiled": (steps, two)},
            "|standard - tiled|": {"difference": (steps, gap)},
        },
        x_label="step",
        y_label="nats a token",
        dashed=("tiled",),
        markers=False,
        share_y=False,
    )


def _trained(
    records: Records, kind: str, setting: str, metric: str, unit: float, label: str
) -> str:
    """Returns test perplexity or accuracy against what is read, a line for each seed."""
    lines = {}
    for group in by(records.select(kind=kind), setting):
        for record in group.records:
            x, y = lines.setdefault(f"seed {record.seed}", ([], []))
            x.append(group.key)
            y.append(unit * record.result[metric])
    if not lines:
        return ""
    return line_chart({"": lines}, x_label="tokens read", y_label=label, log_x=True)
