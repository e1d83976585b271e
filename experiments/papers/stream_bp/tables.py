"""StreamBP's tables and figures."""

import statistics
from collections.abc import Callable
from typing import Any

from tilescan.experiments.harness.figures import line_chart, line_figure
from tilescan.experiments.harness.groups import Group, by, first
from tilescan.experiments.harness.records import Record, Records
from tilescan.experiments.harness.statistics import Spread, ratio, scaled, spread
from tilescan.experiments.harness.tables import (
    MEASURED,
    PUBLISHED,
    STATIC,
    Column,
    Table,
    columns,
    table,
)
from tilescan.experiments.measurements.timing import speed_up
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


def tables(records: Records) -> list[Table]:
    """Returns the tables that the records suffice for."""
    made = [
        _longest(records),
        _times(records),
        _chunks(records),
        _precision(records),
        _parity(records),
    ]
    return [one for one in made if one.rows]


def length(records: Records, loss: str, method: str) -> int | None:
    """Returns the longest sequence."""
    record = records.one(kind="memory", loss=loss, method=method)
    return None if record is None else record.result["length"]


def gain(records: Records, loss: str, over: str) -> float | None:
    """Returns the longest sequence of StreamBP / of another method."""
    return ratio(length(records, loss, STREAM), length(records, loss, over))


def time_ratio(record: Record, method: str, other: str = CHECKPOINT) -> Spread | None:
    """Returns the time of a method / of another."""
    found = record.result
    return speed_up(found[method], found[other]) if {method, other} <= set(found) else None


def error(records: Records, variant: str, part: str, kind: str = "relative") -> Spread | None:
    """Returns the error of gradients over seeds."""
    found = records.select(kind="precision")
    return spread(r.result[variant][part][kind] for r in found)


def shape(settings: dict[str, Any]) -> str:
    """Returns a model in words."""
    m = settings["model"]
    return (
        f"{m['repeats']} layers of width {m['d_model']}, {m['vocab_size']:,} tokens of vocabulary, "
        f"{m['dtype']}"
    )


def memory_groups(records: Records) -> list[Group]:
    """Returns what was searched, by loss and method."""
    return by(records.select(kind="memory"), "loss", "method", order=(LOSSES, METHODS))


def _longest(records: Records) -> Table:
    groups = memory_groups(records)
    published_length = lambda g: published.LENGTHS[g.key[0]].get(g.key[1])
    size = groups[-1].first.result["parameters"] / 1e9 if groups else 0.0

    # The slope between the shortest and the longest length that was compiled.
    def kilobytes_per_token(group: Group) -> float | None:
        tried = group.first.result["tried"]
        (n0, bytes0), (n1, bytes1) = tried[0], tried[-1]
        return ratio((bytes1 - bytes0) / 1e3, n1 - n0)

    return table(
        "longest",
        "Table 3: the longest sequence that fits",
        groups,
        [
            Column("loss", of=lambda g: LOSS_NAMES[g.key[0]]),
            Column("method", of=lambda g: NAMES[g.key[1]]),
            Column("longest", PUBLISHED, "thousands", of=published_length),
            Column(
                "/ checkpointing",
                PUBLISHED,
                of=lambda g: ratio(published_length(g), published.LENGTHS[g.key[0]][CHECKPOINT]),
            ),
            Column("longest", STATIC, "thousands", of=lambda g: length(records, *g.key) / 1000),
            Column(
                "/ checkpointing",
                STATIC,
                of=lambda g: ratio(length(records, *g.key), length(records, g.key[0], CHECKPOINT)),
            ),
            Column("a token more", STATIC, "kB", of=kilobytes_per_token),
        ],
        note=first(
            records.select(kind="memory"),
            "Published: Qwen3-4B on an A800 of 80 GB, trained in bfloat16. Static: the compiler's "
            "temporary bytes of a gradient, of at most {budget_gb:g} GB, which parameters, "
            f"gradients and optimizer are not part of; {{shape}} and {size:.2g}B parameters; "
            "{chunks} chunks, logits of {logit_chunk} tokens at once; steps of {step} tokens or "
            "2%. One text, one answer (GRPO) or one pair of that length each (DPO). Attention is "
            "tiled in all of them. A token more: the slope between the shortest and the longest "
            "length that was compiled.",
            shape=shape,
        ),
    )


def _times(records: Records) -> Table:
    # Published rows are (thousands of tokens, seconds by method); measured ones are groups.
    times = records.select(kind="times")
    groups = by(times, "length")
    rows = [*published.SECONDS.items(), *groups] if groups else []
    is_published = lambda row: isinstance(row, tuple)

    def of_paper(compute: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return lambda row: compute(row[1]) if is_published(row) else None

    def measured(compute: Callable[[Record], Any]) -> Callable[[Any], Any]:
        return lambda row: None if is_published(row) else compute(row.first)

    names = enumerate(METHODS)
    return table(
        "times",
        "Table 1: time of a gradient",
        rows,
        [
            Column(
                "tokens",
                of=lambda row: f"{row[0]}k, Qwen3-4B" if is_published(row) else str(row.key),
            ),
            *columns(PUBLISHED, {NAMES[m]: of_paper(lambda s, i=i: s[i]) for i, m in names}, "s"),
            Column("StreamBP / checkpointing", PUBLISHED, of=of_paper(lambda s: ratio(s[3], s[1]))),
            *columns(
                MEASURED,
                {
                    NAMES[m]: measured(lambda r, m=m: r.result.get(m, {}).get("median_ms"))
                    for m in METHODS
                },
                "ms",
            ),
            Column(
                "StreamBP / checkpointing", MEASURED, of=measured(lambda r: time_ratio(r, STREAM))
            ),
        ],
        note=first(
            times,
            "Published: seconds of a backward pass of Qwen3-4B, one A800. Measured: milliseconds "
            "of a gradient, forward pass included, of {shape}, one text, {chunks} chunks. Ratio "
            "of median times ± its standard deviation over rounds. Here checkpointing does not "
            "compute the masked half of the scores either, which is where the published times "
            "differ.",
            shape=shape,
        ),
    )


def _chunks(records: Records) -> Table:
    counts = records.select(kind="counts")
    rows = [
        (name, record) for record in counts for name in (CHECKPOINT, *record.settings["counts"])
    ]
    found = lambda row, name=None: row[1].result[name or str(row[0])]
    temp_bytes = lambda row, name=None: found(row, name).get("temp_bytes")
    return table(
        "chunks",
        "Figure 5: memory and time by the number of chunks",
        rows,
        [
            Column("method", of=lambda row: NAMES.get(row[0], f"{row[0]} chunks")),
            Column("temporary memory", STATIC, "MB", of=lambda row: ratio(temp_bytes(row), 1e6)),
            Column(
                "/ checkpointing",
                STATIC,
                of=lambda row: ratio(temp_bytes(row), temp_bytes(row, CHECKPOINT)),
            ),
            Column("time", MEASURED, "ms", of=lambda row: found(row).get("median_ms")),
            Column("/ checkpointing", MEASURED, of=lambda row: time_ratio(row[1], str(row[0]))),
        ],
        note=first(
            counts,
            "{length:,} tokens, {shape}. The paper's figure has no numbers to copy.",
            shape=shape,
        ),
    )


def _precision(records: Records) -> Table:
    found = by(records.select(kind="precision"), "kind")
    rows = [(part, variant, g) for g in found for part in PARTS for variant in VARIANTS]
    of_paper = lambda place: lambda row: published.ERRORS[row[0]][row[1]][place]
    seeds = sum(map(len, found))
    return table(
        "precision",
        "Table 6: errors of gradients against checkpointing in float32",
        rows,
        [
            Column("parameters", of=lambda row: row[0]),
            Column("gradient", of=lambda row: VARIANTS[row[1]]),
            Column("mean error", PUBLISHED, of=of_paper(0)),
            Column("relative", PUBLISHED, "%", of=of_paper(1)),
            Column("mean error", MEASURED, of=lambda r: error(records, r[1], r[0], "absolute")),
            Column("relative", MEASURED, "%", of=lambda r: scaled(error(records, r[1], r[0]), 100)),
        ],
        note=first(
            records.select(kind="precision"),
            "{shape}, parameters as initialised, one text of {length:,} tokens, "
            f"{seeds} seeds. Measured, relative: norm of the error over norm of the gradient. "
            "bfloat16: of activations; parameters are float32.",
            shape=shape,
        ),
    )


def _parity(records: Records) -> Table:
    parity = records.select(kind="parity")
    of = lambda name, part=slice(None): lambda g: statistics.fmean(g.first.result[name][part])
    first_ten, last_ten = slice(10), slice(-10, None)
    ends = {
        "first, plain": of("plain", first_ten),
        "last, plain": of("plain", last_ten),
        "last, streamed": of("streamed", last_ten),
    }
    result = lambda name: lambda g: g.first.result[name]
    return table(
        "parity",
        "Table 7: losses of trainings with plain and with streamed gradients",
        by(parity, "loss", order=(LOSSES,)),
        [
            Column("loss", of=lambda g: LOSS_NAMES[g.key]),
            Column("steps", MEASURED, of=lambda g: len(g.first.result["plain"])),
            Column("largest difference", PUBLISHED, of=lambda g: published.DIFFERENCE),
            Column("largest difference", MEASURED, of=result("largest_difference")),
            Column("mean difference", MEASURED, of=result("mean_difference")),
            *columns(MEASURED, ends, digits=4),
        ],
        note=first(
            parity,
            "{shape}, {batch_size} walks of {length} tokens a step, Adam; the synthetic task of "
            "experiments/stream_bp_training.py. First and last: means of ten steps.",
            shape=shape,
        ),
    )


def figures(records: Records) -> dict[str, str]:
    """Returns memory and time against the length, and losses of both trainings."""
    made, panels = {}, {}
    for group in memory_groups(records):
        loss, method = group.key
        n, need = zip(*group.first.result["tried"], strict=True)
        panels.setdefault(LOSS_NAMES[loss], {})[NAMES[method]] = (n, [x / 1e9 for x in need])
    if panels:
        made["memory-against-length"] = line_chart(
            panels, x_label="tokens", y_label="GB of temporaries", log_x=True, log_y=True
        )
    if times := by(records.select(kind="times"), "length"):
        median = lambda m: lambda g: g.first.result.get(m, {}).get("median_ms")
        lines = {NAMES[m]: median(m) for m in METHODS}
        made["time-against-length"] = line_figure(times, lines, x="tokens", y="ms", log=True)
    panels = {}
    for group in by(records.select(kind="parity"), "loss", order=(LOSSES,)):
        result = group.first.result
        steps = list(range(1, 1 + len(result["plain"])))
        lines = {f"{name} gradients": (steps, result[name]) for name in ("plain", "streamed")}
        panels[LOSS_NAMES[group.key]] = lines
    if panels:
        made["losses"] = line_chart(
            panels,
            x_label="step",
            y_label="loss",
            dashed=("streamed gradients",),
            markers=False,
            share_y=False,
        )
    return made
