"""FlashAttention-2's published numbers, and the tables, claims and figures of its records."""

from tilescan.benchmarks.attention_flops import attention_flops
from tilescan.experiments.harness.claims import Claim, judge
from tilescan.experiments.harness.figures import line_chart
from tilescan.experiments.harness.records import Record, Records
from tilescan.experiments.harness.statistics import Spread, ratio
from tilescan.experiments.harness.tables import (
    MEASURED,
    PUBLISHED,
    STATIC,
    Column,
    Table,
    format_value,
)
from tilescan.experiments.measurements import static_kernels as static_figures
from tilescan.experiments.measurements.attention import FORWARD, FORWARD_BACKWARD
from tilescan.experiments.measurements.timing import speed_up
from tilescan.experiments.papers.flash_attention_2 import (
    training as flash_attention_2_training,
)

# Section 4.1 of the paper, A100 80 GB SXM: ranges in the text (the figures' points are not in it).
PUBLISHED_OVER_STANDARD = "3–10"
PUBLISHED_CAUSAL = "1.7–1.8"  # section 3.1.1: speed-up of skipping tiles above the diagonal
BACKWARD = "backward"
_FIGURES = {FORWARD_BACKWARD: "Figure 4", FORWARD: "Figure 5", BACKWARD: "Figure 6"}
_TITLES = {FORWARD_BACKWARD: "forward + backward", FORWARD: "forward", BACKWARD: "backward"}


def flops(settings, direction: str, causal: bool) -> float:
    """The paper's count: 4 N² d per head forward, 2.5 times that backward, half if causal."""
    batch, length, heads, head_dim = (
        settings[name] for name in ("batch", "length", "heads", "head_dim")
    )
    name = {FORWARD: "fwd", BACKWARD: "bwd", FORWARD_BACKWARD: "fwd+bwd"}[direction]
    return attention_flops(batch, length, length, heads, head_dim, causal=causal, direction=name)


def milliseconds(record: Record, variant: str, mask: str, direction: str) -> float | None:
    """The measured median; backward is the difference of the two others."""

    def one(direction):
        return record.result[f"{variant} {mask} {direction}"].get("median_ms")

    if direction != BACKWARD:
        return one(direction)
    both, forward = one(FORWARD_BACKWARD), one(FORWARD)
    return None if both is None or forward is None or both <= forward else both - forward


def gain(record: Record, slow: str, fast: str) -> Spread | None:
    """slow / fast, of names such as "tiled causal forward"."""
    return speed_up(record.result[slow], record.result[fast])


def rate(record: Record, variant: str, mask: str, direction: str) -> float | None:
    """Achieved GFLOP/s by the paper's count."""
    ms = milliseconds(record, variant, mask, direction)
    return None if ms is None else flops(record.settings, direction, mask == "causal") / ms / 1e6


def tables(records: Records) -> list[Table]:
    """All tables that the records can fill."""
    made = [_counts_table(records), _tiles_table(records), _causal_table(records)]
    made += [_rate_table(records, head_dim) for head_dim in _speed(records).values("head_dim")]
    made += static_figures.tables(records)
    made.append(flash_attention_2_training.table(records))
    return [table for table in made if table.rows]


def _speed(records: Records) -> Records:
    return records.select(kind="speed")


def _counts_table(records: Records) -> Table:
    rows, blocks = [], ""
    for record in _counts(records):
        s, one, two = record.settings, record.result["fa1"], record.result["fa2"]
        blocks = f"tiles of {s['block_q']} x {s['block_k']}, d {s['head_dim']}"
        outputs = s["length"] * s["head_dim"]
        row = ["causal" if s["causal"] else "full", str(s["length"]), two["visits"]]
        for key in ("exps", "rescales", "divisions"):
            row += [one[key] / outputs, two[key] / outputs]
        rows.append([*row, ratio(one["other_ops"], two["other_ops"])])
    names = ("exponentials", "rescalings", "divisions")
    columns = [Column("mask"), Column("length"), Column("tile visits", STATIC)]
    for name in names:
        columns += [Column(f"{name}, {paper}", STATIC) for paper in ("FA-1", "FA-2")]
    return Table(
        "counts",
        "Operations outside matrix products per element of the output, by the loops of both papers",
        [*columns, Column("all three, FA-1 / FA-2", STATIC)],
        rows,
        note=f"Counted while both loops compute the same attention, {blocks}; exact and the same "
        "on every machine. Tile visits and operations in matrix products are equal.",
    )


def _counts(records: Records) -> list[Record]:
    found = records.select(kind="counts")
    return sorted(found, key=lambda r: (r.settings["causal"], r.settings["length"]))


def _tiles(records: Records) -> list[Record]:
    return sorted(records.select(kind="tiles"), key=lambda r: r.settings["side"])


def _tiles_table(records: Records) -> Table:
    rows = []
    for record in _tiles(records):
        n, r = record.settings["side"], record.result
        skipped = 1 - r["live"] / r["all"]
        rows.append([str(n), r["live"], r["partial"], skipped, r["all"] / r["live"], None])
    if rows:
        rows.append(["long sequences", None, None, None, None, PUBLISHED_CAUSAL])
    return Table(
        "tiles",
        "Section 3.1.1: tiles that a causal mask skips",
        [
            Column("tiles a side"),
            Column("live tiles", STATIC),
            Column("of these on the diagonal", STATIC),
            Column("skipped, of all", STATIC),
            Column("all / live", STATIC),
            Column("speed-up", PUBLISHED),
        ],
        rows,
        note="Counted by the op's own mask algebra. Tiles below the diagonal need no mask of their "
        "elements. All / live is the speed-up if a tile's cost is all there is.",
    )


def _causal_table(records: Records) -> Table:
    rows = []
    for record in sorted(_speed(records), key=_order):
        s = record.settings
        gains = [
            gain(record, f"{variant} full {direction}", f"{variant} causal {direction}")
            for variant in ("tiled", "standard")
            for direction in (FORWARD, FORWARD_BACKWARD)
        ]
        sides = [-(-s["length"] // tile) for tile in (512, 128)]
        predicted = [2 * n / (n + 1) for n in sides]
        rows.append([str(s["head_dim"]), str(s["length"]), *predicted, PUBLISHED_CAUSAL, *gains])
    return Table(
        "causal",
        "Speed-up of a causal mask: time of full over causal attention",
        [
            Column("head dim"),
            Column("length"),
            Column("all / live tiles of 512", STATIC),
            Column("all / live tiles of 128", STATIC),
            Column("FA-2", PUBLISHED),
            Column("tiled, forward", MEASURED),
            Column("tiled, forward + backward", MEASURED),
            Column("standard, forward", MEASURED),
            Column("standard, forward + backward", MEASURED),
        ],
        rows,
        note="With n tiles a side, n(n+1)/2 of n² are live: 2n/(n+1) is what skipping can give. "
        "Published for long sequences (section 3.1.1). Measured: ratio of medians ± its standard "
        "deviation over rounds. The op chooses tiles for each mask: the ratio is not of skipping "
        "alone and may pass 2.",
    )


def _order(record: Record) -> tuple[int, int]:
    return record.settings["head_dim"], record.settings["length"]


def _rate_table(records: Records, head_dim: int) -> Table:
    rows, shape = [], ""
    for record in sorted(_speed(records).select(head_dim=head_dim), key=_order):
        s = record.settings
        tokens, hidden = s["batch"] * s["length"], s["heads"] * s["head_dim"]
        shape = f"{tokens} tokens, hidden size {hidden}, {s['dtype']}"
        for mask in ("full", "causal"):
            row = [mask, str(s["length"])]
            for direction in _FIGURES:
                for variant in ("standard", "tiled"):
                    row.append(rate(record, variant, mask, direction))
            names = (f"{variant} {mask} {FORWARD_BACKWARD}" for variant in ("standard", "tiled"))
            rows.append([*row, PUBLISHED_OVER_STANDARD, gain(record, *names)])
    rows.sort(key=lambda row: (row[0] == "causal", int(row[1])))
    columns = [Column("mask"), Column("length")]
    for direction, figure in _FIGURES.items():
        for variant in ("standard", "tiled"):
            title = f"{figure}, {_TITLES[direction]}: {variant}"
            columns.append(Column(title, MEASURED, "GFLOP/s"))
    columns += [Column("tiled over standard, forward + backward", k) for k in (PUBLISHED, MEASURED)]
    return Table(
        f"speed-d{head_dim}",
        f"Figures 4 to 6: speed against length, head dim {head_dim}",
        columns,
        rows,
        note=f"Measured with {shape} (the paper: 16k tokens, hidden size 2048, 16 bit, A100). "
        "Operations by the paper's formula, 4N²d a head forward, 2.5 times that backward, half "
        "if causal, for standard attention too, which computes the masked half as well. Backward "
        "is the difference of the two others. Times are medians of interleaved rounds, ratios "
        "of them ± their standard deviation over rounds.",
    )


def claims(records: Records) -> list[Claim]:
    """The paper's statements that these records can decide."""
    return [
        _fewer_operations(records),
        _skipped_tiles(records),
        _causal_gain(records),
        *(_over_standard(records, mask) for mask in ("full", "causal")),
        *static_figures.claims(records),
        judge(
            "twice FlashAttention",
            "FlashAttention-2 is about twice as fast as FlashAttention (section 4.1).",
            "time of both kernels on one GPU",
            None,
            "not run",
            needs="a GPU with both kernels",
        ),
        *flash_attention_2_training.claims(records),
    ]


def _fewer_operations(records: Records) -> Claim:
    found = _counts(records)
    holds, evidence = None, ""
    if found:
        pairs = [(r.settings, r.result["fa1"], r.result["fa2"]) for r in found]
        holds = all(
            two["divisions"] == s["length"] * s["head_dim"]
            and one["rescales"] >= 2 * two["rescales"]
            and one["exps"] >= two["exps"]
            and one["visits"] == two["visits"]
            and one["matmul_flops"] == two["matmul_flops"]
            for s, one, two in pairs
        )
        _, one, two = max(pairs, key=lambda pair: pair[0]["length"])
        evidence = (
            f"rescalings {one['rescales']:,} against {two['rescales']:,}, "
            f"divisions {one['divisions']:,} against {two['divisions']:,} at the longest length"
        )
    return judge(
        "fewer operations",
        "The new loop order does less work outside matrix products (section 3.1).",
        "in every count: one division per output element, at most half the rescalings, no more "
        "exponentials, the same tile visits and matrix products",
        holds,
        evidence,
    )


def _skipped_tiles(records: Records) -> Claim:
    found = _tiles(records)
    holds, evidence = None, ""
    if found:
        pairs = [(r.settings["side"], r.result) for r in found]
        holds = all(r["live"] == n * (n + 1) // 2 and r["partial"] == n for n, r in pairs)
        listed = (f"{r['all'] / r['live']:.2f} at {n}" for n, r in pairs if n >= 8)
        evidence = f"all / live {', '.join(listed)} tiles a side"
    return judge(
        "skipped tiles",
        "Causal attention leaves out the tiles above the diagonal, about half of them, and masks "
        "the elements of one tile a row (section 3.1.1).",
        "of n² tiles the op visits n(n+1)/2 and masks n, for every n",
        holds,
        evidence,
    )


def _longest(records: Records) -> list[Record]:
    """The records of the longest length, by head dim."""
    found = sorted(_speed(records), key=_order)
    longest = max((r.settings["length"] for r in found), default=None)
    return [r for r in found if r.settings["length"] == longest]


def _causal_gain(records: Records) -> Claim:
    found = _longest(records)[:1]
    gains = [gain(r, f"tiled full {FORWARD}", f"tiled causal {FORWARD}") for r in found]
    known = bool(gains) and None not in gains
    return judge(
        "causal masks",
        "Skipping the tiles above the diagonal makes causal attention 1.7 to 1.8 times faster "
        "(section 3.1.1).",
        "full / causal between 1.5 and 2 at the longest length, forward, smallest head dim",
        1.5 <= gains[0].mean <= 2.0 if known else None,
        f"{format_value(gains[0], 4)} at length {found[0].settings['length']}" if known else "",
    )


def _over_standard(records: Records, mask: str) -> Claim:
    found = _longest(records)
    names = [f"{variant} {mask} {FORWARD_BACKWARD}" for variant in ("standard", "tiled")]
    gains = [gain(record, *names) for record in found]
    known = bool(gains) and None not in gains
    listed = [
        f"{format_value(g)} for head dim {r.settings['head_dim']}"
        for r, g in zip(found, gains, strict=True)
        if known
    ]
    return judge(
        f"over standard attention, {mask}",
        "3 to 10 times faster than standard attention (section 4.1).",
        "standard / tiled >= 3, forward + backward, longest length, every head dim",
        all(g.mean >= 3 for g in gains) if known else None,
        f"{', '.join(listed)} at length {found[0].settings['length']}" if known else "",
    )


def figures(records: Records) -> dict[str, str]:
    """SVG by name: speed against length, as in figures 4 and 5."""
    made = {}
    for direction in (FORWARD_BACKWARD, FORWARD):
        panels = {}
        for head_dim in _speed(records).values("head_dim"):
            found = sorted(_speed(records).select(head_dim=head_dim), key=_order)
            for mask in ("full", "causal"):
                panels[f"head dim {head_dim}, {mask}"] = {
                    variant: (
                        [r.settings["length"] for r in found],
                        [rate(r, variant, mask, direction) for r in found],
                    )
                    for variant in ("standard", "tiled")
                }
        if panels:
            name = f"speed-{direction.replace('_', '-')}"
            made[name] = line_chart(
                panels,
                x_label="length (tokens)",
                y_label=f"GFLOP/s, {_TITLES[direction]}",
                log_x=True,
            )
    return made
