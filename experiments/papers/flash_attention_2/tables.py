"""FlashAttention-2's tables and figures."""

from collections.abc import Mapping
from typing import Any

from tilescan.benchmarks.attention_flops import attention_flops
from tilescan.experiments.harness.figures import line_chart
from tilescan.experiments.harness.groups import Group, by, first
from tilescan.experiments.harness.records import Record, Records
from tilescan.experiments.harness.statistics import ratio
from tilescan.experiments.harness.tables import (
    MEASURED,
    PUBLISHED,
    STATIC,
    Column,
    Table,
    columns,
    table,
)
from tilescan.experiments.measurements import static_kernels
from tilescan.experiments.measurements.attention import (
    DIRECTIONS,
    FORWARD,
    FORWARD_BACKWARD,
    STANDARD,
    TILED,
)
from tilescan.experiments.measurements.timing import gain
from tilescan.experiments.papers.flash_attention_2 import published

BACKWARD = "backward"
MASKS = ("full", "causal")
TITLES = {**DIRECTIONS, BACKWARD: "backward"}
# {direction: (figure, its name among those of `attention_flops`)}
FIGURES = {
    FORWARD_BACKWARD: ("Figure 4", "fwd+bwd"),
    FORWARD: ("Figure 5", "fwd"),
    BACKWARD: ("Figure 6", "bwd"),
}
RANGE = "{:g}–{:g}".format


def tables(records: Records) -> list[Table]:
    """Returns all tables that the records can fill."""
    speed = records.select(kind="speed")
    made = [
        counts_table(records.select(kind="counts")),
        tiles_table(records.select(kind="tiles")),
        causal_table(speed),
        *(rate_table(speed.select(head_dim=head_dim)) for head_dim in speed.values("head_dim")),
        *static_kernels.tables(records),
        training_table(records.select(kind="training")),
    ]
    return [table for table in made if table.rows]


def flops(settings: Mapping[str, Any], direction: str, causal: bool) -> float:
    """Returns the paper's count: 4 N² d a head forward, 2.5 times that backward, half if causal."""
    batch, length, heads, head_dim = (settings[k] for k in ("batch", "length", "heads", "head_dim"))
    name = FIGURES[direction][1]
    return attention_flops(batch, length, length, heads, head_dim, causal=causal, direction=name)


def milliseconds(record: Record, variant: str, mask: str, direction: str) -> float | None:
    """Returns the median; of backward the difference of the two others."""
    one = lambda direction: record.result[f"{variant} {mask} {direction}"].get("median_ms")
    if direction != BACKWARD:
        return one(direction)
    both, forward = one(FORWARD_BACKWARD), one(FORWARD)
    return None if both is None or forward is None or both <= forward else both - forward


def rate(record: Record, variant: str, mask: str, direction: str) -> float | None:
    """Returns the achieved GFLOP/s by the paper's count."""
    ms = milliseconds(record, variant, mask, direction)
    return None if ms is None else flops(record.settings, direction, mask == "causal") / ms / 1e6


def per_output(group: Group, loop: str, key: str) -> float:
    """Returns a count of one loop over the elements of the output."""
    s = group.first.settings
    return group.first.result[loop][key] / (s["length"] * s["head_dim"])


def counts_table(counts: Records) -> Table:
    """Returns the FLOPs outside matrix products of both papers' loops."""
    names = {"exps": "exponentials", "rescales": "rescalings", "divisions": "divisions"}
    papers = {"fa1": "FA-1", "fa2": "FA-2"}
    shown = {
        f"{name}, {paper}": lambda g, loop=loop, key=key: per_output(g, loop, key)
        for key, name in names.items()
        for loop, paper in papers.items()
    }
    total = lambda g: [g.first.result[loop]["other_ops"] for loop in papers]
    return table(
        "counts",
        "FLOPs outside matrix products per element of the output, by the loops of both papers",
        by(counts, "causal", "length"),
        [
            Column("mask", of=lambda g: MASKS[g.key[0]]),
            Column("length", of=lambda g: str(g.key[1])),
            Column("tile visits", STATIC, of=lambda g: g.first.result["fa2"]["visits"]),
            *columns(STATIC, shown),
            Column("all three, FA-1 / FA-2", STATIC, of=lambda g: ratio(*total(g))),
        ],
        "Counted while both loops compute the same attention, "
        + first(counts, "tiles of {block_q} x {block_k}, d {head_dim}")
        + "; exact and the same on every machine. Tile visits and FLOPs in matrix products are "
        "equal.",
    )


def tiles_table(tiles: Records) -> Table:
    """Returns how many tiles a causal mask leaves; the last row is the published speed-up."""
    rows = by(tiles, "side")
    found = lambda of: lambda g: of(g.first.result) if len(g) else None
    return table(
        "tiles",
        "Section 3.1.1: tiles that a causal mask skips",
        [*rows, Group("long sequences", Records([]))] if rows else [],
        [
            Column("tiles a side", of=lambda g: str(g.key)),
            Column("live tiles", STATIC, of=found(lambda r: r["live"])),
            Column("of these on the diagonal", STATIC, of=found(lambda r: r["partial"])),
            Column("skipped, of all", STATIC, of=found(lambda r: 1 - r["live"] / r["all"])),
            Column("all / live", STATIC, of=found(lambda r: r["all"] / r["live"])),
            Column(
                "speed-up", PUBLISHED, of=lambda g: None if len(g) else RANGE(*published.CAUSAL)
            ),
        ],
        "Counted by the op's own mask algebra. Tiles below the diagonal need no mask of their "
        "elements. All / live is the speed-up if a tile's cost is all there is.",
    )


def causal_table(speed: Records) -> Table:
    """Returns the speed-up of a causal mask, beside what skipped tiles predict."""

    def predicted(group: Group, tile: int) -> float:
        side = -(-group.key[1] // tile)
        return 2 * side / (side + 1)

    measured = {
        f"{variant}, {DIRECTIONS[d]}": lambda g, v=variant, d=d: gain(
            g.first, f"{v} full {d}", f"{v} causal {d}"
        )
        for variant in (TILED, STANDARD)
        for d in DIRECTIONS
    }
    return table(
        "causal",
        "Speed-up of a causal mask: time of full over causal attention",
        by(speed, "head_dim", "length"),
        [
            Column("head dim", of=lambda g: str(g.key[0])),
            Column("length", of=lambda g: str(g.key[1])),
            Column("all / live tiles of 512", STATIC, of=lambda g: predicted(g, 512)),
            Column("all / live tiles of 128", STATIC, of=lambda g: predicted(g, 128)),
            Column("FA-2", PUBLISHED, of=lambda g: RANGE(*published.CAUSAL)),
            *columns(MEASURED, measured),
        ],
        "With n tiles a side, n(n+1)/2 of n² are live: 2n/(n+1) is what skipping can give. "
        "Published for long sequences (section 3.1.1). Measured: ratio of medians ± its standard "
        "deviation over rounds. The op chooses tiles for each mask: the ratio is not of skipping "
        "alone and may pass 2.",
    )


def rate_table(speed: Records) -> Table:
    """Returns the speeds of one head dim; a row has a mask and the record of a length."""
    over = ("tiled over standard, forward + backward", PUBLISHED, MEASURED)
    speeds = {
        f"{figure}, {TITLES[d]}: {v}": lambda row, v=v, d=d: rate(row[1].first, v, row[0], d)
        for d, (figure, _) in FIGURES.items()
        for v in (STANDARD, TILED)
    }
    head_dim = first(speed, "{head_dim}")
    shape = first(
        speed,
        "{tokens} tokens, hidden size {hidden}, {dtype}",
        tokens=lambda s: s["batch"] * s["length"],
        hidden=lambda s: s["heads"] * s["head_dim"],
    )
    return table(
        f"speed-d{head_dim}",
        f"Figures 4 to 6: speed against length, head dim {head_dim}",
        [(mask, group) for mask in MASKS for group in by(speed, "length")],
        [
            Column("mask", of=lambda row: row[0]),
            Column("length", of=lambda row: str(row[1].key)),
            *columns(MEASURED, speeds, "GFLOP/s"),
            Column(over[0], PUBLISHED, of=lambda row: RANGE(*published.OVER_STANDARD)),
            Column(over[0], MEASURED, of=lambda row: gain(row[1].first, *compared(row[0]))),
        ],
        f"Measured with {shape} (the paper: 16k tokens, hidden size 2048, 16 bit, A100). "
        "FLOPs by the paper's formula, 4N²d a head forward, 2.5 times that backward, half "
        "if causal, for standard attention too, which computes the masked half as well. Backward "
        "is the difference of the two others. Times are medians of interleaved rounds, ratios "
        "of them ± their standard deviation over rounds.",
    )


def compared(mask: str) -> list[str]:
    """Returns the names of standard and tiled attention, forward and backward, in a record."""
    return [f"{variant} {mask} {FORWARD_BACKWARD}" for variant in (STANDARD, TILED)]


def in_order(training: Records) -> list[Record]:
    """Returns the records of training steps by their context."""
    return sorted(training, key=context)


def context(record: Record) -> int:
    """Returns the length of the sequences of a training step."""
    return record.settings["train"]["data.seq_len"]


def training_rate(record: Record, variant: str) -> float | str | None:
    """Returns GFLOP/s of training by the paper's count, or why there are none.

    The count: 6 a token and parameter, 12 x layers x hidden x N² a sequence.
    """
    train, result = record.settings["train"], record.result[variant]
    length = context(record)
    scores = 12 * train["model.repeats"] * train["model.d_model"] * length**2
    step = train["data.batch_size"] * (6.0 * length * record.result["parameters"] + scores)
    ms = result.get("median_ms")
    return result.get("error") if ms is None else step / ms / 1e6


def training_table(training: Records) -> Table:
    """Returns table 1; a row has a name, published speeds and the record, where there are any."""
    size = lambda r: f"{r.result['parameters'] / 1e6:.1f}M parameters, {context(r)}"
    rows = [(size(r), None, r) for r in in_order(training)]
    if rows:
        rows = [(name, speeds, None) for name, speeds in published.TRAINING.items()] + rows
    of_paper = {
        name: lambda row, i=i: row[1] and row[1][i]
        for i, name in enumerate(("without FlashAttention", "FlashAttention", "FlashAttention-2"))
    }
    measured = {
        f"{v} attention": lambda row, v=v: row[2] and training_rate(row[2], v)
        for v in (STANDARD, TILED)
    }
    gained = lambda row: row[2] and gain(row[2], STANDARD, TILED)
    return table(
        "training",
        "Table 1: speed of training GPTs",
        rows,
        [
            Column("model, context", of=lambda row: row[0]),
            *columns(PUBLISHED, of_paper, "TFLOP/s"),
            Column(
                "FlashAttention-2 / without", PUBLISHED, of=lambda r: r[1] and r[1][2] / r[1][0]
            ),
            *columns(MEASURED, measured, "GFLOP/s"),
            Column("tiled / standard", MEASURED, of=gained),
        ],
        "Published: each of 8 A100s. Measured: one device, "
        + first(training, "{model.repeats} layers of width {model.d_model}")
        + ", forward, backward and update. FLOPs by the paper's formula, 6 a token and parameter "
        "and 12 x layers x hidden x N² a sequence, not halved for the causal mask. Ratio of median "
        "times ± its standard deviation over rounds.",
    )


def figures(records: Records) -> dict[str, str]:
    """Returns SVG by name: speed against length, as in figures 4 and 5."""
    made, speed = {}, records.select(kind="speed")
    for direction in (FORWARD_BACKWARD, FORWARD):
        panels = {}
        for head_dim in speed.values("head_dim"):
            groups = by(speed.select(head_dim=head_dim), "length")
            for mask in MASKS:
                panels[f"head dim {head_dim}, {mask}"] = {
                    v: (
                        [g.key for g in groups],
                        [rate(g.first, v, mask, direction) for g in groups],
                    )
                    for v in (STANDARD, TILED)
                }
        if panels:
            made[f"speed-{direction.replace('_', '-')}"] = line_chart(
                panels,
                x_label="length (tokens)",
                y_label=f"GFLOP/s, {TITLES[direction]}",
                log_x=True,
            )
    return made
