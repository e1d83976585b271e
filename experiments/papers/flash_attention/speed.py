"""FlashAttention's tables 9 and 11: time and memory against length."""

from tilescan.experiments.harness.claims import Claim, judge
from tilescan.experiments.harness.figures import line_chart
from tilescan.experiments.harness.records import Records
from tilescan.experiments.harness.statistics import Spread, log_slope, ratio
from tilescan.experiments.harness.tables import (
    MEASURED,
    PUBLISHED,
    STATIC,
    Column,
    Table,
    format_value,
)
from tilescan.experiments.measurements.attention import (
    DIRECTIONS,
    FORWARD,
    FORWARD_BACKWARD,
    live_fraction,
)
from tilescan.experiments.measurements.timing import OUT_OF_MEMORY, speed_up

# Tables 9 and 11 of the paper: milliseconds on an A100 with 40 GB, 8 heads of 64, batch 16, with
# dropout and masking, by length.
_LENGTHS = tuple(2**k for k in range(7, 17))
PUBLISHED_MS = {
    FORWARD: {
        "tiled": (0.04, 0.06, 0.21, 0.82, 2.85, 10.41, 41.74, 167.19, 670.76, 2682.35),
    },
    FORWARD_BACKWARD: {
        "standard": (0.84, 0.86, 2.35, 8.29, 31.75, 124.19, OUT_OF_MEMORY),
        "tiled": (0.43, 0.41, 0.95, 2.55, 9.56, 37.49, 147.75, 586.61, 2339.11, 9341.3),
        "block_sparse": (0.44, 0.44, 0.45, 0.89, 1.95, 4.12, 7.64, 16.60, 32.73, 64.11),
    },
}
_TITLES = {FORWARD: "forward", FORWARD_BACKWARD: "forward + backward"}
_NAMES = {
    "standard": "standard",
    "tiled": "tiled",
    "block_sparse": "block-sparse",
    "windowed": "windowed",
}


def published_ms(direction: str, variant: str, length: int) -> float | str | None:
    """The published time in ms, OUT_OF_MEMORY, or None where the paper has none."""
    row = PUBLISHED_MS[direction].get(variant, ())
    index = _LENGTHS.index(length) if length in _LENGTHS else len(row)
    return row[index] if index < len(row) else None


def median_ms(records: Records, direction: str, variant: str, length: int) -> float | str | None:
    """The measured median in ms, OUT_OF_MEMORY, or None where it was not measured."""
    record = records.one(kind="runtime", direction=direction, length=length)
    result = record.result.get(variant) if record else None
    return None if result is None else result.get("median_ms", result.get("error"))


def _gain(records: Records, direction: str, slow: str, fast: str, length: int) -> Spread | None:
    """slow / fast, None where one of them was not timed."""
    result = records.one(kind="runtime", direction=direction, length=length).result
    return speed_up(result.get(slow, {}), result.get(fast, {}))


def temp_bytes(records: Records, direction: str, variant: str, length: int) -> int | str | None:
    """Bytes of temporaries by the compiler, OUT_OF_MEMORY, None where they were not asked for."""
    record = records.one(kind="memory", direction=direction, length=length)
    result = record.result.get(variant, {}) if record else {}
    return result.get("temp_bytes", result.get("error"))


def tables(records: Records) -> list[Table]:
    """Time and memory, each forward and with backward."""
    made = [_runtime_table(records, direction) for direction in DIRECTIONS]
    return made + [_memory_table(records, direction) for direction in DIRECTIONS]


def claims(records: Records) -> list[Claim]:
    """Faster, faster with sparsity, and linear in memory."""
    return [
        *(_faster(records, direction, bar) for direction, bar in _FASTER.items()),
        _sparse_faster(records),
        *(_linear_memory(records, direction) for direction in DIRECTIONS),
    ]


def _runtime_table(records: Records, direction: str) -> Table:
    shown = [name for name in _NAMES if name in PUBLISHED_MS[direction] or name != "windowed"]
    shown.append("windowed")
    columns = [Column("length")]
    for name in shown:
        if name in PUBLISHED_MS[direction]:
            columns.append(Column(_NAMES[name], PUBLISHED, "ms"))
        columns.append(Column(_NAMES[name], MEASURED, "ms"))
    pairs = (("standard", "tiled"), ("tiled", "block_sparse"))
    for slow, fast in pairs:
        if {slow, fast} <= set(PUBLISHED_MS[direction]):
            columns.append(Column(f"{_NAMES[slow]} / {_NAMES[fast]}", PUBLISHED))
        columns.append(Column(f"{_NAMES[slow]} / {_NAMES[fast]}", MEASURED))
    rows = []
    for length in records.select(kind="runtime", direction=direction).values("length"):
        paper = {name: published_ms(direction, name, length) for name in _NAMES}
        ours = {name: median_ms(records, direction, name, length) for name in _NAMES}
        row = [str(length)]
        for name in shown:
            row += [paper[name]] if name in PUBLISHED_MS[direction] else []
            row.append(ours[name])
        for slow, fast in pairs:
            if {slow, fast} <= set(PUBLISHED_MS[direction]):
                row.append(ratio(paper[slow], paper[fast]))
            row.append(_gain(records, direction, slow, fast, length))
        rows.append(row)
    number = {FORWARD: "Table 9", FORWARD_BACKWARD: "Table 11"}[direction]
    return Table(
        f"runtime-{direction}",
        f"{number}: time of one attention call against length, {_TITLES[direction]}",
        columns,
        rows,
        note="Published: A100 40 GB, batch 16, 8 heads of 64, 16 bit, with dropout and padding. "
        f"Measured: {_shape_note(records)}, no dropout; medians of interleaved rounds; "
        "ratios are of medians, ± their standard deviation over rounds. Times of different "
        "machines and batches are not comparable. Standard is jax.nn.dot_product_attention; "
        "windowed and block-sparse are the tiled op with a mask.",
    )


def _memory_table(records: Records, direction: str) -> Table:
    lengths = records.select(kind="memory", direction=direction).values("length")
    rows: list[list] = []
    for length in lengths:
        row = [temp_bytes(records, direction, name, length) for name in _NAMES]
        rows.append([str(length), *(b / 2**20 if isinstance(b, int) else b for b in row)])
    if len(lengths) > 1:
        slopes = (log_slope(*_memory_points(records, direction, name)) for name in _NAMES)
        rows.append(["growth: power of length", *slopes])
    return Table(
        f"memory-{direction}",
        f"Memory of one attention call against length, {_TITLES[direction]}",
        [Column("length"), *(Column(name, STATIC, "MiB") for name in _NAMES.values())],
        rows,
        note="Temporaries beside arguments and results, by XLA's own buffer assignment for "
        f"{_backend(records)}; compiled, not run. The last row is the slope of log memory over log "
        "length from length 1024 on: 2 is quadratic, 1 linear.",
    )


def _memory_points(records: Records, direction: str, variant: str):
    lengths = records.select(kind="memory", direction=direction).values("length")
    lengths = [n for n in lengths if n >= 1024] or lengths
    points = [(n, temp_bytes(records, direction, variant, n)) for n in lengths]
    points = [(n, b) for n, b in points if b and isinstance(b, int)]
    return [n for n, _ in points], [b for _, b in points]


def _shape_note(records: Records) -> str:
    for r in records.select(kind="runtime"):
        s = r.settings
        return f"batch {s['batch']}, {s['heads']} heads of {s['head_dim']}, {s['dtype']}"
    return "not yet"


def _backend(records: Records) -> str:
    return ", ".join(sorted({r.environment["backend"] for r in records.select(kind="memory")}))


# Smallest accepted standard / tiled at the longest common length. On an A100 it is 3.3.
_FASTER = {FORWARD: 1.5, FORWARD_BACKWARD: 1.2}


def _faster(records: Records, direction: str, bar: float) -> Claim:
    lengths = records.select(kind="runtime", direction=direction).values("length")
    gains = {n: _gain(records, direction, "standard", "tiled", n) for n in lengths}
    gains = {n: gain for n, gain in gains.items() if gain is not None}
    longest = max(gains, default=None)
    holds = None if longest is None else gains[longest].mean >= bar
    return judge(
        f"faster, {_TITLES[direction]}",
        "Tiled attention is faster than standard attention on long sequences (Table 11: 3.3 times "
        "at 4096).",
        f"standard / tiled >= {bar} at the longest length that both ran",
        holds,
        "" if longest is None else f"{format_value(gains[longest])} at length {longest}",
    )


def _sparse_faster(records: Records) -> Claim:
    direction, points = FORWARD_BACKWARD, []
    for record in records.select(kind="runtime", direction=direction):
        n = record.settings["length"]
        gain = _gain(records, direction, "tiled", "block_sparse", n)
        live = live_fraction(n, record.settings["block"])
        if gain is not None and live < 1:
            points.append((n, gain, 1 / live))
    points.sort(key=lambda point: point[0])
    holds = None
    evidence = ""
    if len(points) > 1:
        (short, first, _), (n, last, ideal) = points[0], points[-1]
        holds = last.mean > first.mean and last.mean >= 0.5 * ideal
        evidence = (
            f"{format_value(first)} at {short}, {format_value(last)} at {n} where 1/s is "
            f"{ideal:.2f}"
        )
    return judge(
        "block-sparse",
        "Block-sparse attention's time falls with the live fraction s of its tiles (Table 11: 9.1 "
        "times at 4096, 146 times at 64k).",
        "tiled / block-sparse grows with length and is at least 0.5 / s at the longest one",
        holds,
        evidence,
    )


def _linear_memory(records: Records, direction: str) -> Claim:
    dense = log_slope(*_memory_points(records, direction, "standard"))
    tiled = log_slope(*_memory_points(records, direction, "tiled"))
    known = dense is not None and tiled is not None
    return judge(
        f"linear memory, {_TITLES[direction]}",
        "Tiled attention needs memory linear in the length, standard attention quadratic.",
        "log-log slope over lengths >= 1024: standard >= 1.8 and tiled <= 1.2",
        dense >= 1.8 and tiled <= 1.2 if known else None,
        f"standard {dense:.2f}, tiled {tiled:.2f}" if known else "",
    )


def figures(records: Records) -> dict[str, str]:
    """SVG by name: time and memory against length."""
    made = {}
    value = {"runtime": median_ms, "memory": temp_bytes}
    for kind, label in (("runtime", "ms a call"), ("memory", "MiB of temporaries")):
        panels = {}
        for direction in DIRECTIONS:
            lengths = records.select(kind=kind, direction=direction).values("length")
            lines = {}
            for name, title in _NAMES.items():
                y = {n: value[kind](records, direction, name, n) for n in lengths}
                y = {n: v for n, v in y.items() if isinstance(v, int | float) and v > 0}
                scale = 2**20 if kind == "memory" else 1
                if y:
                    lines[title] = (list(y), [v / scale for v in y.values()])
            if lines:
                panels[_TITLES[direction]] = lines
        if panels:
            made[f"{kind}-against-length"] = line_chart(
                panels, x_label="length (tokens)", y_label=label, log_x=True, log_y=True
            )
    return made
