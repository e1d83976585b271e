"""FlashAttention's figure 2: memory traffic by counting, its tables, claims and figures."""

from tilescan.experiments.harness.claims import Claim, judge
from tilescan.experiments.harness.figures import line_chart
from tilescan.experiments.harness.records import Record, Records
from tilescan.experiments.harness.statistics import log_slope, ratio
from tilescan.experiments.harness.tables import PUBLISHED, STATIC, Column, Table

# Figure 2, left: GPT-2 medium's attention forward + backward (N 1024, d 64, 16 heads, batch 64).
PUBLISHED_IO = {
    "standard": {"gflops": 66.6, "gb": 35.3, "ms": 35.1},
    "tiled": {"gflops": 75.2, "gb": 4.4, "ms": 11.7},
}
_PAPER = {"length": 1024, "head_dim": 64, "on_chip": 98304}  # the figure's shape, an A100's memory
_HEADS = 16 * 64  # of all sequences of the batch
_BYTES = 2  # of an element
_SLOPE_ERROR = 0.1  # largest accepted distance of a measured power from that of the bound


def tables(records: Records) -> list[Table]:
    """Figure 2, and traffic against on-chip memory, length and sparsity."""
    return [
        _paper_table(records),
        _on_chip_table(records),
        _length_table(records),
        _sparse_table(records),
    ]


def claims(records: Records) -> list[Claim]:
    """What the counts say of figure 2 and of theorem 2."""
    return [_less_traffic(records), _follows_the_bound(records)]


def _gigabytes(elements: int) -> float:
    return elements * _HEADS * _BYTES / 1e9


def _paper_table(records: Records) -> Table:
    rows = []
    record = records.one(kind="io", **_PAPER)
    if record:
        r, square = record.result, _PAPER["length"] ** 2 * _PAPER["head_dim"]
        products = {"standard": 6, "tiled": 7}  # of matrices, forward and backward
        flops = {name: n * 2 * square * _HEADS / 1e9 for name, n in products.items()}
        moved = [_gigabytes(r[key]) for key in ("standard_forward_backward", "forward_backward")]
        for title, key, ours in (
            ("operations (10⁹)", "gflops", (flops["standard"], flops["tiled"])),
            ("traffic (GB)", "gb", moved),
            ("time on an A100 (ms)", "ms", (None, None)),
        ):
            paper = [PUBLISHED_IO[name][key] for name in ("standard", "tiled")]
            rows.append([title, *paper, ratio(*paper), *ours, ratio(*ours)])
    columns = [Column("forward + backward")]
    for kind in (PUBLISHED, STATIC):
        columns += [Column(name, kind) for name in ("standard", "tiled", "standard / tiled")]
    return Table(
        "io",
        "Figure 2, left: operations and memory traffic of attention",
        columns,
        rows,
        note="N 1024, d 64, 16 heads, batch 64, 2 bytes an element. Static: traffic counted by "
        "replaying the loops tile by tile with the on-chip memory of an A100, operations by "
        "formula (6 products of matrices, and one more to compute the scores again); no device. "
        "Published: a profiler on an A100, where standard attention masked and dropped out in "
        "kernels of their own. Its operations are not those of this shape; their ratio compares.",
    )


def _on_chip(records: Records) -> list[Record]:
    return sorted(records.select(kind="io"), key=lambda r: r.settings["on_chip"])


def _by_length(records: Records) -> list[Record]:
    return sorted(records.select(kind="io_length"), key=lambda r: r.settings["length"])


def _by_sparsity(records: Records) -> list[Record]:
    return sorted(records.select(kind="io_sparse"), key=lambda r: r.settings["factors"])


def _bound(record: Record) -> float:
    """N²d²/M."""
    s = record.settings
    return (s["length"] * s["head_dim"]) ** 2 / s["on_chip"]


def _on_chip_table(records: Records) -> Table:
    rows, about = [], ""
    for record in _on_chip(records):
        s, r = record.settings, record.result
        about = f"N {s['length']}, d {s['head_dim']}"
        rows.append([
            f"{s['on_chip']:,}", f"{r['block_q']} x {r['block_k']}", r["visits"],
            _gigabytes(r["forward_backward"]), _gigabytes(r["standard_forward_backward"]),
            ratio(r["standard_forward_backward"], r["forward_backward"]),
            r["forward"] / _bound(record),
        ])  # fmt: skip
    return Table(
        "io-on-chip",
        "Figure 2, middle: memory traffic against the size of on-chip memory",
        [
            Column("on-chip elements"),
            Column("tiles"),
            Column("visits a head", STATIC),
            Column("tiled, forward + backward", STATIC, "GB"),
            Column("standard, forward + backward", STATIC, "GB"),
            Column("standard / tiled", STATIC),
            Column("forward / (N²d²/M)", STATIC),
        ],
        rows,
        note=f"Counted by the same replay, {about}, 16 heads, batch 64. Theorem 2, Θ(N²d²/M), says "
        "that the last column stays constant as long as M is at most Nd; what grows are the keys "
        "and values, read once however large the memory is, and tiles that do not divide N.",
    )


def _length_table(records: Records) -> Table:
    rows, about = [], ""
    for record in _by_length(records):
        s, r = record.settings, record.result
        about = f"{s['on_chip']:,} on-chip elements, d {s['head_dim']}"
        rows.append([
            str(s["length"]), r["visits"], r["forward"], r["standard_forward"],
            ratio(r["standard_forward"], r["forward"]), r["forward"] / _bound(record),
        ])  # fmt: skip
    return Table(
        "io-length",
        "Theorem 2: memory traffic against length",
        [
            Column("length"),
            Column("visits", STATIC),
            Column("elements moved, tiled", STATIC),
            Column("elements moved, standard", STATIC),
            Column("standard / tiled", STATIC),
            Column("tiled / (N²d²/M)", STATIC),
        ],
        rows,
        note=f"One head, forward, {about}; counted by the same replay. Both grow with the square "
        "of the length: tiling saves a factor, M/d² by the theorem.",
    )


def _sparse_table(records: Records) -> Table:
    rows = []
    found = _by_sparsity(records)
    dense = max((r.result["visits"] / r.result["live_fraction"] for r in found), default=None)
    for record in found:
        r = record.result
        rows.append([
            str(record.settings["factors"]), r["live_fraction"], r["visits"], r["visits"] / dense,
            r["forward"], r["matmul_flops"] / 1e6,
        ])  # fmt: skip
    return Table(
        "io-sparse",
        "Figure 2, right: block-sparse attention's traffic against sparsity",
        [
            Column("butterfly factors"),
            Column("live fraction s", STATIC),
            Column("tiles visited", STATIC),
            Column("of all tiles", STATIC),
            Column("elements moved, forward", STATIC),
            Column("operations in matmuls", STATIC, "10⁶"),
        ],
        rows,
        note="Counted for one head by the same replay. Traffic is Θ(Nd + N²d²s/M): proportional to "
        "s beside a constant.",
    )


def _less_traffic(records: Records) -> Claim:
    paper = PUBLISHED_IO["standard"]["gb"] / PUBLISHED_IO["tiled"]["gb"]
    record = records.one(kind="io", **_PAPER)
    gain = None
    if record:
        gain = record.result["standard_forward_backward"] / record.result["forward_backward"]
    return judge(
        "less traffic",
        f"Tiling moves {paper:.1f} times fewer bytes between HBM and chip (Figure 2).",
        "counted with the A100's on-chip memory, standard / tiled is at least half of that",
        None if gain is None else gain >= paper / 2,
        "" if gain is None else f"counted {gain:.2f}, published {paper:.2f}",
    )


def _powers(records: Records) -> list[float | None]:
    """Measured powers of M (up to Nd), N and s in the forward traffic."""
    in_range = [
        r for r in _on_chip(records)
        if r.settings["on_chip"] <= r.settings["length"] * r.settings["head_dim"]
    ]  # fmt: skip
    by_length, sparse = _by_length(records), _by_sparsity(records)
    once = [2 * r.settings["length"] * r.settings["head_dim"] for r in sparse]  # K and V
    moved = [r.result["forward"] - n for r, n in zip(sparse, once, strict=True)]
    forward = [[r.result["forward"] for r in found] for found in (in_range, by_length)]
    return [
        log_slope([r.settings["on_chip"] for r in in_range], forward[0]),
        log_slope([r.settings["length"] for r in by_length], forward[1]),
        log_slope([r.result["live_fraction"] for r in sparse], moved),
    ]


def _follows_the_bound(records: Records) -> Claim:
    powers = _powers(records)
    holds, evidence = None, ""
    if None not in powers:
        pairs = zip(powers, (-1, 2, 1), strict=True)
        holds = all(abs(power - bound) <= _SLOPE_ERROR for power, bound in pairs)
        evidence = "M to the {:.2f}, N to the {:.2f}, s to the {:.2f}".format(*powers)
    return judge(
        "traffic follows the bound",
        "Tiled attention's traffic is Θ(N²d²/M), block-sparse attention's Θ(Nd + N²d²s/M) "
        "(theorem 2, proposition 4).",
        f"powers of counted forward traffic within {_SLOPE_ERROR:g} of -1 in M (up to Nd), of 2 in "
        "N, of 1 in s (without K and V, which are read once)",
        holds,
        evidence,
    )


def figures(records: Records) -> dict[str, str]:
    """SVG by name: traffic against on-chip memory and against sparsity."""
    made = {}
    found = _on_chip(records)
    if found:
        x = [r.settings["on_chip"] for r in found]
        lines = {
            name: (x, [_gigabytes(r.result[key]) for r in found])
            for name, key in (
                ("standard", "standard_forward_backward"), ("tiled", "forward_backward"),
            )
        }  # fmt: skip
        label = "GB moved, forward + backward"
        made["traffic-against-on-chip-memory"] = line_chart(
            {"": lines}, x_label="on-chip elements", y_label=label, log_x=True, log_y=True
        )
    found = _by_sparsity(records)
    if found:
        x = [r.result["live_fraction"] for r in found]
        y = [r.result["forward"] / 1e6 for r in found]
        made["traffic-against-sparsity"] = line_chart(
            {"": {"block-sparse": (x, y)}},
            x_label="live fraction of the tiles",
            y_label="10⁶ elements moved, forward",
        )
    return made
