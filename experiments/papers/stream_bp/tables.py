"""StreamBP's tables and figures."""

import statistics
from collections.abc import Callable, Mapping
from typing import Any

from tilescan.experiments.harness import tables as t
from tilescan.experiments.harness.figures import line_chart, line_figure
from tilescan.experiments.harness.groups import Group, by, first
from tilescan.experiments.harness.records import Record, Records
from tilescan.experiments.harness.statistics import Spread, ratio, scaled, spread
from tilescan.experiments.harness.tables import Column, Table, columns, table
from tilescan.experiments.measurements import timing
from tilescan.experiments.papers.stream_bp import published
from tilescan.experiments.papers.stream_bp.losses import CHECKPOINT, LOSSES, METHODS, STREAM
from tilescan.experiments.papers.stream_bp.training import BASE16, STREAM16, STREAM32

TITLES = ("no checkpointing", "checkpointing", "and chunks of logits (MsT)", "StreamBP")
NAMES = dict(zip(METHODS, TITLES, strict=True))
LOSS_NAMES = {loss: loss.upper() for loss in LOSSES}
VARIANTS = {
    STREAM32: "StreamBP, float32",
    BASE16: "checkpointing, bfloat16",
    STREAM16: "StreamBP, bfloat16",
}
PARTS = ("head", "layers")
# Columns that stand twice, published and computed here.
OVER_CHECKPOINT, SPEED = "/ checkpointing", "StreamBP / checkpointing"


def tables(records: Records) -> list[Table]:
    """Returns tables 3 and 1, figure 5, and tables 6 and 7."""
    return [made(records) for made in (_longest, _times, _chunks, _precision, _parity)]


def length(records: Records, loss: str, method: str) -> int | None:
    """Returns the longest sequence."""
    record = records.one(kind="memory", loss=loss, method=method)
    return None if record is None else record.result["length"]


def gain(records: Records, loss: str, over: str, method: str = STREAM) -> float | None:
    """Returns the longest sequence of a method / of another."""
    return ratio(length(records, loss, method), length(records, loss, over))


def error(records: Records, variant: str, part: str, kind: str = "relative") -> Spread | None:
    """Returns the error of gradients over seeds."""
    return spread(r.result[variant][part][kind] for r in records.kind("precision"))


def shape(settings: Mapping[str, Any]) -> str:
    """Returns a model in words."""
    text = "{repeats} layers of width {d_model}, {vocab_size:,} tokens of vocabulary, {dtype}"
    return text.format(**settings["model"])


def memory_groups(records: Records) -> list[Group]:
    """Returns what was searched, by loss and method."""
    return by(records.kind("memory"), "loss", "method", order=(LOSSES, METHODS))


def _longest(records: Records) -> Table:
    groups = memory_groups(records)
    size = groups[-1].first.result["parameters"] / 1e9 if groups else 0.0

    def of_paper(group: Group, over: str | None = None) -> float | None:
        found = published.LENGTHS[group.key[0]]
        return found.get(group.key[1]) if over is None else ratio(of_paper(group), found[over])

    # The slope between the shortest and the longest length that was compiled.
    def kilobytes_per_token(group: Group) -> float | None:
        (n0, bytes0), *_, (n1, bytes1) = group.first.result["tried"]
        return ratio((bytes1 - bytes0) / 1e3, n1 - n0)

    over = lambda g: gain(records, g.key[0], CHECKPOINT, g.key[1])
    return table(
        "longest",
        "Table 3: the longest sequence that fits",
        groups,
        [
            Column("loss", of=lambda g: LOSS_NAMES[g.key[0]]),
            Column("method", of=lambda g: NAMES[g.key[1]]),
            Column("longest", t.PUBLISHED, "thousands", of=of_paper),
            Column(OVER_CHECKPOINT, t.PUBLISHED, of=lambda g: of_paper(g, CHECKPOINT)),
            Column("longest", t.STATIC, "thousands", of=lambda g: length(records, *g.key) / 1000),
            Column(OVER_CHECKPOINT, t.STATIC, of=over),
            Column("a token more", t.STATIC, "kB", of=kilobytes_per_token),
        ],
        first(
            records.kind("memory"),
            "Published: Qwen3-4B on an A800 of 80 GB, trained in bfloat16. Static: the compiler's "
            "temporary bytes of a gradient, of at most {budget_gb:g} GB, which parameters, "
            f"gradients and optimizer are not part of; {{shape}} and {size:.2g}B parameters; "
            "{chunks} chunks, logits of {logit_chunk} tokens at once; steps of {step} tokens or "
            "2%. One sequence, one answer (GRPO) or one pair of that length each (DPO). Attention "
            "is tiled in all of them. A token more: the slope between the shortest and the longest "
            "length that was compiled.",
            shape=shape,
        ),
    )


def _times(records: Records) -> Table:
    # A row: tokens, published seconds by method, what was measured; one of the two is None.
    times = records.kind("times")
    rows = [(f"{k}k, Qwen3-4B", seconds, None) for k, seconds in published.SECONDS.items()]
    rows += [(str(g.key), None, g.first) for g in by(times, "length")]

    def of_paper(of: Callable[[Mapping[str, float]], Any]) -> Callable[[Any], Any]:
        return lambda row: of(dict(zip(METHODS, row[1], strict=True))) if row[1] else None

    def measured(of: Callable[[Record], Any]) -> Callable[[Any], Any]:
        return lambda row: of(row[2]) if row[2] else None

    seconds = {NAMES[m]: of_paper(lambda s, m=m: s[m]) for m in METHODS}
    medians = {NAMES[m]: measured(lambda r, m=m: timing.measured(r, m)) for m in METHODS}
    faster = of_paper(lambda s: ratio(s[STREAM], s[CHECKPOINT]))
    return table(
        "times",
        "Table 1: time of a gradient",
        rows if len(times) else (),
        [
            Column("tokens", of=lambda row: row[0]),
            *columns(t.PUBLISHED, seconds, "s"),
            Column(SPEED, t.PUBLISHED, of=faster),
            *columns(t.MEASURED, medians, "ms"),
            Column(SPEED, t.MEASURED, of=measured(lambda r: timing.gain(r, STREAM, CHECKPOINT))),
        ],
        first(
            times,
            "Published: seconds of a backward pass of Qwen3-4B, one A800. Measured: milliseconds "
            "of a gradient, forward pass included, of {shape}, one sequence, {chunks} chunks. "
            "Ratio of median times ± its standard deviation over rounds. Here checkpointing does "
            "not compute the masked half of the scores either, which is where the published times "
            "differ.",
            shape=shape,
        ),
    )


def _chunks(records: Records) -> Table:
    counts = records.kind("counts")
    rows = [(str(n), r) for r in counts for n in (CHECKPOINT, *r.settings["counts"])]
    needs = lambda row, name=None: timing.measured(row[1], name or row[0], "temp_bytes")
    over = lambda row: ratio(needs(row), needs(row, CHECKPOINT))
    slower = lambda row: timing.gain(row[1], row[0], CHECKPOINT)
    return table(
        "chunks",
        "Figure 5: memory and time by the number of chunks",
        rows,
        [
            Column("method", of=lambda row: NAMES.get(row[0], f"{row[0]} chunks")),
            Column("temporary memory", t.STATIC, "MB", of=lambda row: ratio(needs(row), 1e6)),
            Column(OVER_CHECKPOINT, t.STATIC, of=over),
            Column("time", t.MEASURED, "ms", of=lambda row: timing.measured(row[1], row[0])),
            Column(OVER_CHECKPOINT, t.MEASURED, of=slower),
        ],
        first(
            counts,
            "{length:,} tokens, {shape}. The paper's figure has no numbers to copy.",
            shape=shape,
        ),
    )


def _precision(records: Records) -> Table:
    found = by(records.kind("precision"), "kind")
    rows = [(part, variant, g) for g in found for part in PARTS for variant in VARIANTS]
    of_paper = lambda place: lambda row: published.ERRORS[row[0]][row[1]][place]
    relative = lambda row: scaled(error(records, row[1], row[0]), 100)
    seeds = sum(map(len, found))
    return table(
        "precision",
        "Table 6: errors of gradients against checkpointing in float32",
        rows,
        [
            Column("parameters", of=lambda row: row[0]),
            Column("gradient", of=lambda row: VARIANTS[row[1]]),
            Column("mean error", t.PUBLISHED, of=of_paper(0)),
            Column("relative", t.PUBLISHED, "%", of=of_paper(1)),
            Column("mean error", t.MEASURED, of=lambda r: error(records, r[1], r[0], "absolute")),
            Column("relative", t.MEASURED, "%", of=relative),
        ],
        first(
            records.kind("precision"),
            "{shape}, parameters as initialized, one sequence of {length:,} tokens, "
            f"{seeds} seeds. Measured, relative: norm of the error over norm of the gradient. "
            "bfloat16: of activations; parameters are float32.",
            shape=shape,
        ),
    )


def _parity(records: Records) -> Table:
    parity, ten_first, ten_last = records.kind("parity"), slice(10), slice(-10, None)
    mean = lambda name, part: (
        lambda g: spread([statistics.fmean(r.result[name][part]) for r in g.records])
    )
    largest = lambda g: max(g.values("largest_difference"))
    ends = {
        "first, plain": mean("plain", ten_first),
        "last, plain": mean("plain", ten_last),
        "last, streamed": mean("streamed", ten_last),
    }
    return table(
        "parity",
        "Table 7: losses of trainings with plain and with streamed gradients",
        by(parity, "loss", order=(LOSSES,)),
        [
            Column("loss", of=lambda g: LOSS_NAMES[g.key]),
            Column("steps", t.MEASURED, of=lambda g: len(g.first.result["plain"])),
            Column("largest difference", t.PUBLISHED, of=lambda g: published.DIFFERENCE),
            Column("largest difference", t.MEASURED, of=largest),
            Column("mean difference", t.MEASURED, of=lambda g: g.mean_std("mean_difference")),
            *columns(t.MEASURED, ends, digits=4),
        ],
        first(
            parity,
            "{shape}, {batch_size} walks of {length} tokens a step, Adam; the synthetic task of "
            "experiments/papers/stream_bp/training.py. First and last: means of ten steps; the "
            "largest difference: of all seeds.",
            shape=shape,
        ),
    )


def figures(records: Records) -> dict[str, str]:
    """Returns memory and time against the length, and losses of both trainings."""
    memory, losses = {}, {}
    for group in memory_groups(records):
        loss, method = group.key
        n, need = zip(*group.first.result["tried"], strict=True)
        memory.setdefault(LOSS_NAMES[loss], {})[NAMES[method]] = (n, [x / 1e9 for x in need])
    for group in by(records.kind("parity"), "loss", order=(LOSSES,)):
        lines = losses[LOSS_NAMES[group.key]] = {}
        for name in ("plain", "streamed"):
            values = group.first.result[name]
            lines[f"{name} gradients"] = (range(1, 1 + len(values)), values)

    times = by(records.kind("times"), "length")
    medians = {NAMES[m]: lambda g, m=m: timing.measured(g.first, m) for m in METHODS}
    axes = dict(
        x_label="tokens tried", y_label="temporaries of a gradient (GB)", log_x=True, log_y=True
    )
    of_steps = dict(x_label="step", y_label="training loss", markers=False, share_y=False)
    return {
        "longest": line_chart(memory, **axes),
        "times": line_figure(times, medians, x="tokens", y="time of a gradient (ms)", log=True),
        "parity": line_chart(losses, dashed=("streamed gradients",), **of_steps),
    }
