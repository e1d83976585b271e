"""FlashAttention's figures: calls and traffic against length and memory, curves of training."""

from tilescan.experiments.harness.figures import line_chart, line_figure
from tilescan.experiments.harness.groups import by
from tilescan.experiments.harness.records import Records
from tilescan.experiments.measurements.attention import DIRECTIONS
from tilescan.experiments.papers.flash_attention import tables


def figures(records: Records) -> dict[str, str]:
    """Returns SVG by name, of what the records can draw."""
    made = {
        "runtime-against-length": _calls(records, "runtime"),
        "memory-against-length": _calls(records, "memory"),
        **_traffic(records),
        "training-curves": _curves(records),
        "test-perplexity-against-context": _trained(records, "context"),
        "test-accuracy-against-length": _trained(records, "documents"),
    }
    return {name: svg for name, svg in made.items() if svg}


def _calls(records: Records, kind: str) -> str:
    """Returns time or memory of a call against length, a panel for each direction."""
    metric, unit, label = {
        "runtime": ("median_ms", 1, "ms a call"),
        "memory": ("temp_bytes", 2**20, "MiB of temporaries"),
    }[kind]
    panels = {}
    for direction in DIRECTIONS:
        groups = by(records.select(kind=kind, direction=direction), "length")
        lines = {}
        for variant, name in tables.NAMES.items():
            found = {g.key: tables.outcome(g, variant, metric) for g in groups}
            y = {n: v / unit for n, v in found.items() if isinstance(v, int | float) and v > 0}
            if y:
                lines[name] = (list(y), list(y.values()))
        if lines:
            panels[tables.TITLES[direction]] = lines
    if not panels:
        return ""
    return line_chart(panels, x_label="length (tokens)", y_label=label, log_x=True, log_y=True)


def _traffic(records: Records) -> dict[str, str]:
    """Returns traffic against on-chip memory and against sparsity."""
    made = {}
    on_chip = by(records.select(kind="io"), "on_chip")
    if on_chip:
        made["traffic-against-on-chip-memory"] = line_figure(
            on_chip,
            {
                "standard": lambda g: tables.gigabytes(g.first.result["standard_forward_backward"]),
                "tiled": lambda g: tables.gigabytes(g.first.result["forward_backward"]),
            },
            x="on-chip elements",
            y="GB moved, forward + backward",
            log=True,
        )
    sparse = [g.first.result for g in by(records.select(kind="io_sparse"), "factors")]
    if sparse:
        x, y = [r["live_fraction"] for r in sparse], [r["forward"] / 1e6 for r in sparse]
        made["traffic-against-sparsity"] = line_chart(
            {"": {"block-sparse": (x, y)}},
            x_label="live fraction of the tiles",
            y_label="10⁶ elements moved, forward",
        )
    return made


def _curves(records: Records) -> str:
    """Returns the first seed's two training curves, and their difference."""
    for pair in tables.curve_pairs(records.select(kind="curves"))[:1]:
        steps = pair[0].result["steps"]
        one, two = (r.result["train_loss"] for r in pair)
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
    return ""


def _trained(records: Records, kind: str) -> str:
    """Returns test perplexity or accuracy against what is read, a line for each seed."""
    setting, metric, unit, label = {
        "context": ("context", "test_perplexity", 1, "test perplexity"),
        "documents": ("length", "test_accuracy", 100, "test micro-F1 (%)"),
    }[kind]
    lines = {}
    for r in sorted(records.select(kind=kind), key=lambda r: (r.seed, r.settings[setting])):
        x, y = lines.setdefault(f"seed {r.seed}", ([], []))
        x.append(r.settings[setting])
        y.append(unit * r.result[metric])
    if not lines:
        return ""
    return line_chart({"": lines}, x_label="tokens read", y_label=label, log_x=True)
