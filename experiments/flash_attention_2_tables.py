"""FlashAttention-2's published numbers, and the tables, claims and figures of its records."""

from benchmarks.attention_flops import attention_flops
from experiments import static_figures
from experiments.attention_cells import FORWARD, FORWARD_BACKWARD
from experiments.claims import Claim, judge
from experiments.figures import line_chart
from experiments.records import Record, Records
from experiments.tables import MEASURED, PUBLISHED, STATIC, Column, Table, ratio

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


def rate(record: Record, variant: str, mask: str, direction: str) -> float | None:
    """Achieved GFLOP/s by the paper's count."""
    ms = milliseconds(record, variant, mask, direction)
    return None if ms is None else flops(record.settings, direction, mask == "causal") / ms / 1e6


def tables(records: Records) -> list[Table]:
    """All tables that the records can fill."""
    made = [_counts_table(records), _causal_table(records)]
    made += [_rate_table(records, head_dim) for head_dim in _speed(records).values("head_dim")]
    made += static_figures.tables(records)
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


def _causal_table(records: Records) -> Table:
    rows = []
    for record in sorted(_speed(records), key=_order):
        s = record.settings
        gains = [
            ratio(
                milliseconds(record, variant, "full", direction),
                milliseconds(record, variant, "causal", direction),
            )
            for variant in ("tiled", "standard")
            for direction in (FORWARD, FORWARD_BACKWARD)
        ]
        predicted = [2 * n / (n + 1) for n in (s["length"] / 512, s["length"] / 128)]
        rows.append([str(s["head_dim"]), str(s["length"]), *predicted, PUBLISHED_CAUSAL, *gains])
    return Table(
        "causal",
        "Speed-up of a causal mask: time of full over causal attention",
        [
            Column("head dim"),
            Column("length"),
            Column("tiles skipped, side 512", STATIC),
            Column("tiles skipped, side 128", STATIC),
            Column("FA-2", PUBLISHED),
            Column("tiled, forward", MEASURED),
            Column("tiled, forward + backward", MEASURED),
            Column("standard, forward", MEASURED),
            Column("standard, forward + backward", MEASURED),
        ],
        rows,
        note="With n tiles a side, n(n+1)/2 of n² are live: 2n/(n+1) is what skipping can give. "
        "Published for long sequences (section 3.1.1).",
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
            standard = milliseconds(record, "standard", mask, FORWARD_BACKWARD)
            tiled = milliseconds(record, "tiled", mask, FORWARD_BACKWARD)
            rows.append([*row, PUBLISHED_OVER_STANDARD, ratio(standard, tiled)])
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
        "is the difference of the two others.",
    )


def claims(records: Records) -> list[Claim]:
    """The paper's statements that these records can decide."""
    return [
        _fewer_operations(records),
        _causal_gain(records),
        _over_standard(records),
        *static_figures.claims(records),
        judge(
            "twice FlashAttention",
            "FlashAttention-2 is about twice as fast as FlashAttention (section 4.1).",
            "time of both kernels on one GPU",
            None,
            "not run",
            needs="a GPU with both kernels",
        ),
        judge(
            "end to end",
            "Training GPT-style models reaches 225 TFLOP/s per A100 (Table 1).",
            "6 operations per token and parameter and 12 x layers x hidden x N², per second",
            None,
            "not run",
            needs="8 GPUs",
        ),
    ]


def _fewer_operations(records: Records) -> Claim:
    found = _counts(records)
    holds, evidence = None, ""
    if found:
        pairs = [(r.settings, r.result["fa1"], r.result["fa2"]) for r in found]
        holds = all(
            two["divisions"] == s["length"] * s["head_dim"]
            and one["rescales"] >= 2 * two["rescales"]
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
        "in every count: one division per output element, at most half the rescalings, the same "
        "tile visits and matrix products",
        holds,
        evidence,
    )


def _longest(records: Records) -> Record | None:
    return max(_speed(records), key=lambda r: (r.settings["length"], -_order(r)[0]), default=None)


def _causal_gain(records: Records) -> Claim:
    record = _longest(records)
    gain = record and ratio(
        milliseconds(record, "tiled", "full", FORWARD),
        milliseconds(record, "tiled", "causal", FORWARD),
    )
    return judge(
        "causal masks",
        "Skipping the tiles above the diagonal makes causal attention 1.7 to 1.8 times faster "
        "(section 3.1.1).",
        "full / causal between 1.5 and 2 at the longest length, forward, smallest head dim",
        None if gain is None else 1.5 <= gain <= 2.0,
        "" if gain is None else f"{gain:.3f} at length {record.settings['length']}",
    )


def _over_standard(records: Records) -> Claim:
    record = _longest(records)
    gain = record and ratio(
        milliseconds(record, "standard", "causal", FORWARD_BACKWARD),
        milliseconds(record, "tiled", "causal", FORWARD_BACKWARD),
    )
    return judge(
        "over standard attention",
        "3 to 10 times faster than standard attention (section 4.1).",
        "standard / tiled >= 3, forward + backward, causal, longest length, smallest head dim",
        None if gain is None else gain >= 3,
        "" if gain is None else f"{gain:.2f} at length {record.settings['length']}",
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
                panels, x_label="length", y_label=f"GFLOP/s, {_TITLES[direction]}", log_x=True
            )
    return made
