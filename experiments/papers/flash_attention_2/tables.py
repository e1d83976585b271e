"""FlashAttention-2's tables and figures."""

from tilescan.experiments.harness import tables as t
from tilescan.experiments.harness.figures import panel_figure
from tilescan.experiments.harness.groups import Group, by, first
from tilescan.experiments.harness.records import Records
from tilescan.experiments.harness.statistics import ratio
from tilescan.experiments.harness.tables import Column, Table, columns, table
from tilescan.experiments.measurements import attention, static_kernels, training_steps
from tilescan.experiments.measurements.attention import DIRECTIONS, FORWARD, FORWARD_BACKWARD, rate
from tilescan.experiments.measurements.timing import gain
from tilescan.experiments.papers.flash_attention_2 import published

VARIANTS = attention.OVER_STANDARD
TITLES = {**DIRECTIONS, attention.BACKWARD: "backward"}
FIGURES = {FORWARD_BACKWARD: "Figure 4", FORWARD: "Figure 5", attention.BACKWARD: "Figure 6"}
FASTER, OVER = ("{:g}–{:g}".format(*x) for x in (published.CAUSAL, published.OVER_STANDARD))


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
            Column("mask", of=lambda g: attention.MASKS[g.key[0]]),
            Column("length", of=lambda g: str(g.key[1])),
            Column("tile visits", t.STATIC, of=lambda g: g.first.result["fa2"]["visits"]),
            *columns(t.STATIC, shown),
            Column("all three, FA-1 / FA-2", t.STATIC, of=lambda g: ratio(*total(g))),
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
            Column("live tiles", t.STATIC, of=found(lambda r: r["live"])),
            Column("of these on the diagonal", t.STATIC, of=found(lambda r: r["partial"])),
            Column("skipped, of all", t.STATIC, of=found(lambda r: 1 - r["live"] / r["all"])),
            Column("all / live", t.STATIC, of=found(lambda r: r["all"] / r["live"])),
            Column("speed-up", t.PUBLISHED, of=lambda g: None if len(g) else FASTER),
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
        for variant in reversed(VARIANTS)
        for d in DIRECTIONS
    }
    return table(
        "causal",
        "Speed-up of a causal mask: time of full over causal attention",
        by(speed, "head_dim", "length"),
        [
            Column("head dim", of=lambda g: str(g.key[0])),
            Column("length", of=lambda g: str(g.key[1])),
            Column("all / live tiles of 512", t.STATIC, of=lambda g: predicted(g, 512)),
            Column("all / live tiles of 128", t.STATIC, of=lambda g: predicted(g, 128)),
            Column("FA-2", t.PUBLISHED, of=lambda g: FASTER),
            *columns(t.MEASURED, measured),
        ],
        "With n tiles a side, n(n+1)/2 of n² are live: 2n/(n+1) is what skipping can give. "
        "Published for long sequences (section 3.1.1). Measured: ratio of medians ± its standard "
        "deviation over rounds. The op chooses tiles for each mask: the ratio is not of skipping "
        "alone and may pass 2.",
    )


def rate_table(speed: Records) -> Table:
    """Returns the speeds of one head dim; a row has a mask and the record of a length."""
    over = ("tiled over standard, forward + backward", t.PUBLISHED, t.MEASURED)
    speeds = {
        f"{figure}, {TITLES[d]}: {v}": lambda row, v=v, d=d: rate(row[1].first, v, row[0], d)
        for d, figure in FIGURES.items()
        for v in VARIANTS
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
        [(mask, group) for mask in attention.MASKS for group in by(speed, "length")],
        [
            Column("mask", of=lambda row: row[0]),
            Column("length", of=lambda row: str(row[1].key)),
            *columns(t.MEASURED, speeds, "GFLOP/s"),
            Column(over[0], t.PUBLISHED, of=lambda row: OVER),
            Column(over[0], t.MEASURED, of=lambda row: gain(row[1].first, *compared(row[0]))),
        ],
        f"Measured with {shape} (the paper: 16k tokens, hidden size 2048, 16 bit, A100). "
        "FLOPs by the paper's formula, 4N²d a head forward, 2.5 times that backward, half "
        "if causal, for standard attention too, which computes the masked half as well. Backward "
        "is the difference of the two others. Times are medians of interleaved rounds, ratios "
        "of them ± their standard deviation over rounds.",
    )


def compared(mask: str) -> list[str]:
    """Returns the names of standard and tiled attention, forward and backward, in a record."""
    return [f"{variant} {mask} {FORWARD_BACKWARD}" for variant in VARIANTS]


def training_gain(speeds: tuple[float, float, float]) -> float:
    """Returns the speed with FlashAttention-2 over that without."""
    return speeds[2] / speeds[0]


def training_table(training: Records) -> Table:
    """Returns table 1; rows without records are the published ones."""
    rows = training_steps.by_context(training)
    if rows:
        rows = [*(Group(name, Records([])) for name in published.TRAINING), *rows]
    of_paper = lambda of: lambda g: None if len(g) else of(published.TRAINING[g.key])
    names = ("without FlashAttention", "FlashAttention", "FlashAttention-2")
    speeds = {name: of_paper(lambda x, i=i: x[i]) for i, name in enumerate(names)}
    of_ours = lambda of: lambda g: of(g.first) if len(g) else None
    measured = {
        f"{v} attention": of_ours(lambda r, v=v: training_steps.rate(r, v)) for v in VARIANTS
    }
    size = lambda r: f"{r.result['parameters'] / 1e6:.1f}M parameters, "
    return table(
        "training",
        "Table 1: speed of training GPTs",
        rows,
        [
            Column("model, context", of=lambda g: (of_ours(size)(g) or "") + str(g.key)),
            *columns(t.PUBLISHED, speeds, "TFLOP/s"),
            Column("FlashAttention-2 / without", t.PUBLISHED, of=of_paper(training_gain)),
            *columns(t.MEASURED, measured, "GFLOP/s"),
            Column("tiled / standard", t.MEASURED, of=of_ours(lambda r: gain(r, *VARIANTS))),
        ],
        "Published: each of 8 A100s. Measured: one device, "
        + first(training, "{model.repeats} layers of width {model.d_model}")
        + ", forward, backward and update. FLOPs by the paper's formula, 6 a token and parameter "
        "and 12 x layers x hidden x N² a sequence, not halved for the causal mask. Ratio of median "
        "times ± its standard deviation over rounds.",
    )


def figures(records: Records) -> dict[str, str]:
    """Returns SVG by name: speed against length, as in figures 4 and 5."""
    speed = records.select(kind="speed")
    speeds = lambda mask, d: {v: lambda g, v=v: rate(g.first, v, mask, d) for v in VARIANTS}
    return {
        f"speed-{direction.replace('_', '-')}": panel_figure(
            {
                f"head dim {head_dim}, {mask}": (
                    by(speed.select(head_dim=head_dim), "length"),
                    speeds(mask, direction),
                )
                for head_dim in speed.values("head_dim")
                for mask in attention.MASKS
            },
            x="length (tokens)",
            y=f"speed, {TITLES[direction]} (GFLOP/s)",
        )
        for direction in (FORWARD_BACKWARD, FORWARD)
    }
