"""StreamBP's published numbers, and the tables and figures of its records."""

from tilescan.experiments.harness.figures import line_chart
from tilescan.experiments.harness.records import Record, Records
from tilescan.experiments.harness.statistics import Spread, ratio, spread
from tilescan.experiments.harness.tables import MEASURED, PUBLISHED, STATIC, Column, Table
from tilescan.experiments.measurements.timing import speed_up
from tilescan.experiments.papers.stream_bp.losses import (
    CHECKPOINT,
    DPO,
    GRPO,
    LOSSES,
    METHODS,
    MST,
    NONE,
    SFT,
    STREAM,
)
from tilescan.experiments.papers.stream_bp.training import BASE16, STREAM16, STREAM32

NAMES = {
    NONE: "no checkpointing",
    CHECKPOINT: "checkpointing",
    MST: "and chunks of logits (MsT)",
    STREAM: "StreamBP",
}
LOSS_NAMES = {SFT: "SFT", GRPO: "GRPO", DPO: "DPO"}
# Table 3: thousands of tokens of Qwen3-4B, all parameters trained, on one A800 of 80 GB.
PUBLISHED_LENGTHS = {
    SFT: {NONE: 7.0, CHECKPOINT: 28.5, STREAM: 200.0},
    GRPO: {CHECKPOINT: 8.5, STREAM: 18.2},
    DPO: {CHECKPOINT: 18.7, STREAM: 57.2},
}
# Table 1: seconds of a backward pass of Qwen3-4B by thousands of tokens.
PUBLISHED_SECONDS = {
    6: (2.0, 2.5, 2.6, 2.6),
    9: (None, 4.7, 4.9, 4.7),
    12: (None, 7.4, 7.6, 7.0),
    15: (None, 10.8, 11.2, 10.0),
    18: (None, 14.7, 15.2, 13.2),
    21: (None, 19.3, 20.3, 17.2),
    24: (None, 24.3, 25.2, 21.2),
    27: (None, None, 31.8, 25.8),
}
# Table 6: mean error of gradients against float32, absolute and in percent.
PUBLISHED_ERRORS = {
    "head": {
        STREAM32: (6.66e-9, 0.04),
        BASE16: (2.56e-7, 1.43),
        STREAM16: (2.64e-7, 1.47),
    },
    "layers": {
        STREAM32: (1.75e-7, 0.04),
        BASE16: (2.46e-5, 6.63),
        STREAM16: (2.47e-5, 6.59),
    },
}
VARIANTS = {
    STREAM32: "StreamBP, float32",
    BASE16: "checkpointing, bfloat16",
    STREAM16: "StreamBP, bfloat16",
}
PUBLISHED_DIFFERENCE = 0.004  # table 7, of losses


def tables(records: Records) -> list[Table]:
    """The tables that the records suffice for."""
    made = [
        _memory_table(records),
        _time_table(records),
        _count_table(records),
        _precision_table(records),
        _parity_table(records),
    ]
    return [table for table in made if table.rows]


def by_length(records: Records) -> list[Record]:
    """Records of times, the shortest sequence first."""
    return sorted(records.select(kind="times"), key=lambda r: r.settings["length"])


def length(records: Records, loss: str, method: str) -> int | None:
    """The longest sequence."""
    record = records.one(kind="memory", loss=loss, method=method)
    return None if record is None else record.result["length"]


def gain(records: Records, loss: str, over: str) -> float | None:
    """Longest sequence of StreamBP / of another method."""
    return ratio(length(records, loss, STREAM), length(records, loss, over))


def time_ratio(record: Record, method: str, other: str = CHECKPOINT) -> Spread | None:
    """Time of a method / of another."""
    found = record.result
    return speed_up(found[method], found[other]) if {method, other} <= set(found) else None


def error(records: Records, variant: str, part: str, kind: str = "relative") -> Spread | None:
    """Of gradients, over seeds."""
    found = records.select(kind="precision")
    return spread(r.result[variant][part][kind] for r in found)


def shape(settings) -> str:
    """A model in words."""
    m = settings["model"]
    return (
        f"{m['repeats']} layers of width {m['d_model']}, {m['vocab_size']:,} tokens of vocabulary, "
        f"{m['dtype']}"
    )


def _memory_table(records: Records) -> Table:
    rows, note = [], ""
    for loss in LOSSES:
        published = PUBLISHED_LENGTHS[loss]
        for method in METHODS:
            found = length(records, loss, method)
            if found is None:
                continue
            record = records.one(kind="memory", loss=loss, method=method)
            note = _about_memory(record)
            rows.append(
                [
                    LOSS_NAMES[loss],
                    NAMES[method],
                    published.get(method),
                    ratio(published.get(method), published[CHECKPOINT]),
                    found / 1000,
                    ratio(found, length(records, loss, CHECKPOINT)),
                    _bytes_per_token(record),
                ]
            )
    return Table(
        "longest",
        "Table 3: the longest sequence that fits",
        [
            Column("loss"),
            Column("method"),
            Column("longest", PUBLISHED, "thousands"),
            Column("/ checkpointing", PUBLISHED),
            Column("longest", STATIC, "thousands"),
            Column("/ checkpointing", STATIC),
            Column("a token more", STATIC, "kB"),
        ],
        rows,
        note=note,
    )


def _about_memory(record: Record) -> str:
    s = record.settings
    return (
        f"Published: Qwen3-4B on an A800 of 80 GB, trained in bfloat16. Static: the compiler's "
        f"temporary bytes of a gradient, of at most {s['budget_gb']:g} GB, which parameters, "
        f"gradients and optimizer are not part of; {shape(s)} and "
        f"{record.result['parameters'] / 1e9:.2g}B parameters; {s['chunks']} chunks, logits of "
        f"{s['logit_chunk']} tokens at once; steps of {s['step']} tokens or 2%. One text, one "
        "answer (GRPO) or one pair of that length each (DPO). Attention is tiled in all of them. "
        "A token more: the slope between the shortest and the longest length that was compiled."
    )


def _bytes_per_token(record: Record) -> float | None:
    tried = record.result["tried"]
    (n0, bytes0), (n1, bytes1) = tried[0], tried[-1]
    return ratio((bytes1 - bytes0) / 1e3, n1 - n0)


def _time_table(records: Records) -> Table:
    rows, note = [], ""
    for record in by_length(records):
        r = record.result
        times = [r.get(m, {}).get("median_ms") for m in METHODS]
        rows.append(
            [str(record.settings["length"]), *[None] * 5, *times, time_ratio(record, STREAM)]
        )
        note = (
            "Published: seconds of a backward pass of Qwen3-4B, one A800. Measured: milliseconds "
            f"of a gradient, forward pass included, of {shape(record.settings)}, one text, "
            f"{record.settings['chunks']} chunks. Ratio of median times ± its standard deviation "
            "over rounds. Here checkpointing does not compute the masked half of the scores "
            "either, which is where the published times differ."
        )
    if rows:
        published = [
            [f"{n}k, Qwen3-4B", *times, ratio(times[3], times[1]), *[None] * 5]
            for n, times in PUBLISHED_SECONDS.items()
        ]
        rows = published + rows
    return Table(
        "times",
        "Table 1: time of a gradient",
        [
            Column("tokens"),
            *(Column(NAMES[m], PUBLISHED, "s") for m in METHODS),
            Column("StreamBP / checkpointing", PUBLISHED),
            *(Column(NAMES[m], MEASURED, "ms") for m in METHODS),
            Column("StreamBP / checkpointing", MEASURED),
        ],
        rows,
        note=note,
    )


def _count_table(records: Records) -> Table:
    record, rows, note = records.one(kind="counts"), [], ""
    if record is not None:
        s, r = record.settings, record.result
        for name in (CHECKPOINT, *map(str, s["counts"])):
            found = r[name]
            label = NAMES[CHECKPOINT] if name == CHECKPOINT else f"{name} chunks"
            rows.append(
                [
                    label,
                    _mb(found),
                    ratio(found.get("temp_bytes"), r[CHECKPOINT].get("temp_bytes")),
                    found.get("median_ms"),
                    time_ratio(record, name),
                ]
            )
        note = f"{s['length']:,} tokens, {shape(s)}. The paper's figure has no numbers to copy."
    return Table(
        "chunks",
        "Figure 5: memory and time by the number of chunks",
        [
            Column("method"),
            Column("temporary memory", STATIC, "MB"),
            Column("/ checkpointing", STATIC),
            Column("time", MEASURED, "ms"),
            Column("/ checkpointing", MEASURED),
        ],
        rows,
        note=note,
    )


def _mb(found) -> float | None:
    return ratio(found.get("temp_bytes"), 1e6)


def _precision_table(records: Records) -> Table:
    found = records.select(kind="precision")
    rows, note = [], ""
    for record in list(found)[:1]:
        note = (
            f"{shape(record.settings)}, parameters as initialised, one text of "
            f"{record.settings['length']:,} tokens, {len(found)} seeds. Measured, relative: norm "
            "of the error over norm of the gradient. bfloat16: of activations; parameters are "
            "float32."
        )
        for part in PUBLISHED_ERRORS:
            for variant, name in VARIANTS.items():
                absolute, percent = PUBLISHED_ERRORS[part][variant]
                relative = error(records, variant, part)
                rows.append(
                    [
                        part,
                        name,
                        absolute,
                        percent,
                        error(records, variant, part, "absolute"),
                        Spread(
                            100 * relative.mean,
                            None if relative.std is None else 100 * relative.std,
                            relative.count,
                        ),
                    ]
                )
    return Table(
        "precision",
        "Table 6: errors of gradients against checkpointing in float32",
        [
            Column("parameters"),
            Column("gradient"),
            Column("mean error", PUBLISHED),
            Column("relative", PUBLISHED, "%"),
            Column("mean error", MEASURED),
            Column("relative", MEASURED, "%"),
        ],
        rows,
        note=note,
    )


def _parity_table(records: Records) -> Table:
    rows, note = [], ""
    for loss in LOSSES:
        record = records.one(kind="parity", loss=loss)
        if record is None:
            continue
        r, s = record.result, record.settings
        rows.append(
            [
                LOSS_NAMES[loss],
                len(r["plain"]),
                PUBLISHED_DIFFERENCE,
                r["largest_difference"],
                r["mean_difference"],
                _mean_of(r["plain"][:10]),
                _mean_of(r["plain"][-10:]),
                _mean_of(r["streamed"][-10:]),
            ]
        )
        note = (
            f"{shape(s)}, {s['batch_size']} walks of {s['length']} tokens a step, Adam; the "
            "synthetic task of experiments/stream_bp_training.py. First and last: means of ten "
            "steps."
        )
    return Table(
        "parity",
        "Table 7: losses of trainings with plain and with streamed gradients",
        [
            Column("loss"),
            Column("steps", MEASURED),
            Column("largest difference", PUBLISHED),
            Column("largest difference", MEASURED),
            Column("mean difference", MEASURED),
            Column("first, plain", MEASURED, digits=4),
            Column("last, plain", MEASURED, digits=4),
            Column("last, streamed", MEASURED, digits=4),
        ],
        rows,
        note=note,
    )


def _mean_of(values) -> float:
    return sum(values) / len(values)


def figures(records: Records) -> dict[str, str]:
    """Memory and time against the length, and losses of both trainings."""
    made = {}
    panels = {}
    for loss in LOSSES:
        lines = {}
        for method in METHODS:
            record = records.one(kind="memory", loss=loss, method=method)
            if record is not None:
                n, need = zip(*record.result["tried"], strict=True)
                lines[NAMES[method]] = (n, [x / 1e9 for x in need])
        if lines:
            panels[LOSS_NAMES[loss]] = lines
    if panels:
        made["memory-against-length"] = line_chart(
            panels, x_label="tokens", y_label="GB of temporaries", log_x=True, log_y=True
        )
    found = by_length(records)
    if found:
        lengths = [r.settings["length"] for r in found]
        lines = {
            NAMES[m]: (lengths, [r.result.get(m, {}).get("median_ms") for r in found])
            for m in METHODS
        }
        made["time-against-length"] = line_chart(
            {"": lines}, x_label="tokens", y_label="ms", log_x=True, log_y=True
        )
    panels = {}
    for loss in LOSSES:
        record = records.one(kind="parity", loss=loss)
        if record is not None:
            steps = list(range(1, 1 + len(record.result["plain"])))
            names = {"plain": "plain gradients", "streamed": "streamed gradients"}
            panels[LOSS_NAMES[loss]] = {
                name: (steps, record.result[key]) for key, name in names.items()
            }
    if panels:
        made["losses"] = line_chart(
            panels, x_label="step", y_label="loss", dashed=("streamed gradients",),
            markers=False, share_y=False,
        )  # fmt: skip
    return made
