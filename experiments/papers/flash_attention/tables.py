"""FlashAttention's tables: time and memory of a call, exactness, counted traffic, training."""

import dataclasses
from collections.abc import Callable, Mapping

from tilescan.experiments.harness.groups import Group, by, first
from tilescan.experiments.harness.records import Record, Records
from tilescan.experiments.harness.statistics import Spread, log_slope, ratio
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
from tilescan.experiments.measurements.attention import DIRECTIONS, FORWARD, FORWARD_BACKWARD
from tilescan.experiments.measurements.timing import speed_up
from tilescan.experiments.measurements.training import STANDARD, TILED
from tilescan.experiments.papers.flash_attention import published
from tilescan.experiments.papers.flash_attention.exactness import OUTPUTS

TITLES = {FORWARD: "forward", FORWARD_BACKWARD: "forward + backward"}
NUMBERS = {FORWARD: "Table 9", FORWARD_BACKWARD: "Table 11"}
NAMES = {v: v.replace("_", "-") for v in ("standard", "tiled", "block_sparse", "windowed")}
PAPER_IO = {"length": 1024, "head_dim": 64, "on_chip": 98304}  # of figure 2, an A100's memory
IO_HEADS = 16 * 64  # of all sequences of the batch
CONTEXTS = ("context", "context_compared")  # kinds of records


def tables(records: Records) -> list[Table]:
    """Returns all tables that the records can fill."""
    made = [
        *(runtime_table(records, direction) for direction in DIRECTIONS),
        *(memory_table(records, direction) for direction in DIRECTIONS),
        exactness_table(records.select(kind="exactness")),
        *traffic_tables(records),
        curve_table(records.select(kind="curves")),
        context_table(records),
        document_table(records.select(kind="documents")),
        *static_kernels.tables(records),
    ]
    # The pages of this paper do not link rows with records.
    return [dataclasses.replace(t, sources=()) for t in made if t.rows]


def outcome(group: Group, variant: str, metric: str) -> float | str | None:
    """Returns "median_ms" or "temp_bytes", OUT_OF_MEMORY, None where it was not measured."""
    result = group.first.result.get(variant, {})
    return result.get(metric, result.get("error"))


def gain(group: Group, slow: str, fast: str) -> Spread | None:
    """Returns slow / fast, None where one of them was not timed."""
    result = group.first.result
    return speed_up(result.get(slow, {}), result.get(fast, {}))


def runtime_table(records: Records, direction: str) -> Table:
    """Returns published and measured times against length, and their ratios."""
    has = published.MS[direction]
    paper = lambda g, name: published.ms(direction, name, g.key)
    shown = [Column("length", of=lambda g: str(g.key))]
    for v, name in NAMES.items():
        if v in has:
            shown.append(Column(name, PUBLISHED, "ms", of=lambda g, v=v: paper(g, v)))
        shown.append(Column(name, MEASURED, "ms", of=lambda g, v=v: outcome(g, v, "median_ms")))
    for pair in (("standard", "tiled"), ("tiled", "block_sparse")):
        title = " / ".join(NAMES[v] for v in pair)
        if set(pair) <= set(has):
            of = lambda g, pair=pair: ratio(*(paper(g, v) for v in pair))
            shown.append(Column(title, PUBLISHED, of=of))
        shown.append(Column(title, MEASURED, of=lambda g, pair=pair: gain(g, *pair)))
    runtime = records.select(kind="runtime")
    shape = first(runtime, "batch {batch}, {heads} heads of {head_dim}, {dtype}")
    return table(
        f"runtime-{direction}",
        f"{NUMBERS[direction]}: time of one attention call against length, {TITLES[direction]}",
        by(runtime.select(direction=direction), "length"),
        shown,
        note="Published: A100 40 GB, batch 16, 8 heads of 64, 16 bit, with dropout and padding. "
        f"Measured: {shape}, no dropout; medians of interleaved rounds; "
        "ratios are of medians, ± their standard deviation over rounds. Times of different "
        "machines and batches are not comparable. Standard is jax.nn.dot_product_attention; "
        "windowed and block-sparse are the tiled op with a mask.",
    )


def growth(memory: Records, variant: str) -> float | None:
    """Returns the power of the length in the memory of one direction, from length 1024 on."""
    groups = by(memory, "length")
    groups = [g for g in groups if g.key >= 1024] or groups
    points = [(g.key, outcome(g, variant, "temp_bytes")) for g in groups]
    points = [(n, b) for n, b in points if b and isinstance(b, int)]
    return log_slope([n for n, _ in points], [b for _, b in points])


def memory_table(records: Records, direction: str) -> Table:
    """Returns temporaries against length, and in a last row how they grow."""
    memory = records.select(kind="memory")
    found = memory.select(direction=direction)
    rows = by(found, "length")
    if len(rows) > 1:
        rows.append(Group("growth: power of length", found))

    def value(group: Group, variant: str) -> float | str | None:
        if len(group) > 1:
            return growth(group.records, variant)
        size = outcome(group, variant, "temp_bytes")
        return size / 2**20 if isinstance(size, int) else size

    shown = {name: lambda g, v=v: value(g, v) for v, name in NAMES.items()}
    backends = sorted({r.environment["backend"] for r in memory})
    return table(
        f"memory-{direction}",
        f"Memory of one attention call against length, {TITLES[direction]}",
        rows,
        [Column("length", of=lambda g: str(g.key)), *columns(STATIC, shown, "MiB")],
        note="Temporaries beside arguments and results, by XLA's own buffer assignment for "
        f"{', '.join(backends)}; compiled, not run. The last row is the slope of log memory over "
        "log length from length 1024 on: 2 is quadratic, 1 linear.",
    )


def by_implementation(record: Record) -> dict[str, dict[str, Mapping[str, float]]]:
    """Returns {implementation: {tile: errors}}."""
    found = {}
    for name, error in record.result.items():
        implementation, _, tile = name.rpartition(", ")
        found.setdefault(implementation, {})[tile] = error
    return found


def exactness_table(found: Records) -> Table:
    """Returns errors by mask, dtype and implementation, the worst over its tiles."""
    ranked = sorted(found, key=lambda r: r.settings["dtype"], reverse=True)
    worst = {o: lambda row, o=o: max(e[o] for e in row[2].values()) for o in OUTPUTS}
    shape = "{length} queries and keys, {heads} heads of {head_dim}. "
    return table(
        "exactness",
        "Exactness of outputs and gradients",
        [(r, *tiled) for r in ranked for tiled in by_implementation(r).items()],
        [
            Column("dtype", of=lambda row: row[0].settings["dtype"]),
            Column("mask", of=lambda row: row[0].settings["mask"]),
            Column("attention", of=lambda row: row[1]),
            Column("tiles", of=lambda row: ", ".join(row[2])),
            *columns(MEASURED, worst, digits=2),
        ],
        note=first(found, shape) + "Largest error over largest value, against dense attention in "
        "float64, of the worst tile. Tiles are queries x keys; by itself the op takes one for so "
        "short a sequence.",
    )


def gigabytes(elements: int) -> float:
    """Returns the size of what one head moves, for all heads of figure 2, 2 bytes an element."""
    return elements * IO_HEADS * 2 / 1e9


def over_bound(group: Group) -> float:
    """Returns the forward pass's traffic over N²d²/M."""
    s = group.first.settings
    return group.first.result["forward"] / ((s["length"] * s["head_dim"]) ** 2 / s["on_chip"])


def numbers(*names: str) -> list[Callable[[Group], float]]:
    """Returns functions of a group that give these numbers of its result."""
    return [lambda group, name=name: group.first.result[name] for name in names]


def traffic_tables(records: Records) -> list[Table]:
    """Returns figure 2, and traffic against on-chip memory, length and sparsity."""
    on_chip, lengths = (records.select(kind=kind) for kind in ("io", "io_length"))
    sparse = by(records.select(kind="io_sparse"), "factors")
    visits, forward, both = numbers("visits", "forward", "forward_backward")
    standard, standard_both = numbers("standard_forward", "standard_forward_backward")
    live, flops = numbers("live_fraction", "matmul_flops")
    dense = max((visits(g) / live(g) for g in sparse), default=0)
    return [
        _figure_2(on_chip.one(**PAPER_IO)),
        table(
            "io-on-chip",
            "Figure 2, middle: memory traffic against the size of on-chip memory",
            by(on_chip, "on_chip"),
            [
                Column("on-chip elements", of=lambda g: f"{g.key:,}"),
                Column("tiles", of=lambda g: "{block_q} x {block_k}".format(**g.first.result)),
                Column("visits a head", STATIC, of=visits),
                *columns(
                    STATIC,
                    {
                        "tiled, forward + backward": lambda g: gigabytes(both(g)),
                        "standard, forward + backward": lambda g: gigabytes(standard_both(g)),
                    },
                    "GB",
                ),
                Column("standard / tiled", STATIC, of=lambda g: standard_both(g) / both(g)),
                Column("forward / (N²d²/M)", STATIC, of=over_bound),
            ],
            note="Counted by the same replay, "
            + first(on_chip, "N {length}, d {head_dim}")
            + ", 16 heads, batch 64. Theorem 2, Θ(N²d²/M), says that the last column stays "
            "constant as long as M is at most Nd; what grows are the keys and values, read once "
            "however large the memory is, and tiles that do not divide N.",
        ),
        table(
            "io-length",
            "Theorem 2: memory traffic against length",
            by(lengths, "length"),
            [
                Column("length", of=lambda g: str(g.key)),
                Column("visits", STATIC, of=visits),
                Column("elements moved, tiled", STATIC, of=forward),
                Column("elements moved, standard", STATIC, of=standard),
                Column("standard / tiled", STATIC, of=lambda g: standard(g) / forward(g)),
                Column("tiled / (N²d²/M)", STATIC, of=over_bound),
            ],
            note="One head, forward, "
            + first(lengths, "{on_chip:,} on-chip elements, d {head_dim}")
            + "; counted by the same replay. Both grow with the square of the length: tiling saves "
            "a factor, M/d² by the theorem.",
        ),
        table(
            "io-sparse",
            "Figure 2, right: block-sparse attention's traffic against sparsity",
            sparse,
            [
                Column("butterfly factors", of=lambda g: str(g.key)),
                Column("live fraction s", STATIC, of=live),
                Column("tiles visited", STATIC, of=visits),
                Column("of all tiles", STATIC, of=lambda g: visits(g) / dense),
                Column("elements moved, forward", STATIC, of=forward),
                Column("operations in matmuls", STATIC, "10⁶", of=lambda g: flops(g) / 1e6),
            ],
            note="Counted for one head by the same replay. Traffic is Θ(Nd + N²d²s/M): "
            "proportional to s beside a constant.",
        ),
    ]


def _figure_2(record: Record | None) -> Table:
    """Returns the table of the figure's left; a row has a title, published and counted pairs."""
    rows = []
    if record:
        products = (6, 7)  # of matrices, forward and backward: standard, tiled
        flops = 2 * PAPER_IO["length"] ** 2 * PAPER_IO["head_dim"] * IO_HEADS  # of a product
        moved = (record.result[k] for k in ("standard_forward_backward", "forward_backward"))
        rows = [
            ("operations (10⁹)", published.GFLOPS, [n * flops / 1e9 for n in products]),
            ("traffic (GB)", published.GIGABYTES, [gigabytes(n) for n in moved]),
            ("time on an A100 (ms)", published.A100_MS, (None, None)),
        ]
    shown = [Column("forward + backward", of=lambda row: row[0])]
    for i, kind in enumerate((PUBLISHED, STATIC), 1):
        values = {
            "standard": lambda row, i=i: row[i][0],
            "tiled": lambda row, i=i: row[i][1],
            "standard / tiled": lambda row, i=i: ratio(*row[i]),
        }
        shown += columns(kind, values)
    return table(
        "io",
        "Figure 2, left: operations and memory traffic of attention",
        rows,
        shown,
        note="N 1024, d 64, 16 heads, batch 64, 2 bytes an element. Static: traffic counted by "
        "replaying the loops tile by tile with the on-chip memory of an A100, operations by "
        "formula (6 products of matrices, and one more to compute the scores again); no device. "
        "Published: a profiler on an A100, where standard attention masked and dropped out in "
        "kernels of their own. Its operations are not those of this shape; their ratio compares.",
    )


def curve_pairs(curves: Records) -> list[tuple[Record, Record]]:
    """Returns the (standard, tiled) runs of each seed."""
    tiled = {r.seed: r for r in curves.select(attention=TILED)}
    return [(r, tiled[r.seed]) for r in curves.select(attention=STANDARD) if r.seed in tiled]


def curve_difference(pair: tuple[Record, Record]) -> float:
    """Returns the largest difference of a step's losses."""
    one, two = (r.result["train_loss"] for r in pair)
    return max(abs(a - b) for a, b in zip(one, two, strict=True))


def curve_table(curves: Records) -> Table:
    """Returns losses and perplexities of both attentions, a row for each seed."""
    loss = lambda i: lambda pair: pair[i].result["train_loss"][-1]
    perplexity = lambda i: lambda pair: pair[i].result["test_perplexity"]
    return table(
        "curves",
        "Section 4.1: training with standard and with tiled attention",
        curve_pairs(curves),
        [
            Column("seed", of=lambda pair: str(pair[0].seed)),
            Column("steps", MEASURED, of=lambda pair: len(pair[0].result["train_loss"])),
            Column("last loss, standard", MEASURED, "nats", 5, loss(0)),
            Column("last loss, tiled", MEASURED, "nats", 5, loss(1)),
            Column("largest difference of a step", MEASURED, "nats", 2, curve_difference),
            Column("test perplexity, standard", MEASURED, digits=5, of=perplexity(0)),
            Column("test perplexity, tiled", MEASURED, digits=5, of=perplexity(1)),
        ],
        note=f"{_about(curves)}. Same seed, same batches, same program but for the attention. The "
        "paper reports the same perplexity 18.2 for GPT-2 small with both (Table 2).",
    )


def _about(found: Records) -> str:
    return first(
        found,
        "{data.tokenizer} tokens of {sources}; {model.repeats} layers, width {model.d_model}, "
        "{train.steps} steps",
        sources=lambda known: ", ".join(known["data.sources"]),
    )


def context_table(records: Records) -> Table:
    """Returns perplexity against context; a row has a label, published numbers, and a context."""
    measured, compared = (records.select(kind=kind) for kind in CONTEXTS)
    rows = [(str(n), (None, None), n) for n in measured.values("context")]
    if rows:
        rows += [(f"{n} (GPT-2 small)", found, None) for n, found in published.PERPLEXITY.items()]
    perplexity = {
        f"perplexity, {position(found)}": lambda row, found=found: Group(
            row[2], found.select(context=row[2])
        ).mean_std("test_perplexity")
        for found in (measured, compared)
        if found
    }
    note = (
        f"{_about(measured)}. Every context trains on the same tokens in the same batches: long "
        "rows are cut into shorter ones. Held-out whole documents, scored with the same context. "
        "Published: tokens of a BPE vocabulary, so only the direction compares."
    )
    if compared:
        note += (
            " ALiBi was chosen after a pilot of seed 0, where longer contexts lost with rotary "
            "positions and whose test documents may have been the same; the seeds here are others. "
            "Rotary positions are shown for the shortest and the longest context. "
            f"{_best(measured, compared)}"
        )
    return table(
        "context",
        "Table 4: perplexity against the length of the context",
        rows,
        [
            Column("context", of=lambda row: row[0]),
            Column("perplexity", PUBLISHED, of=lambda row: row[1][0]),
            Column("training on 8 A100s", PUBLISHED, "days", of=lambda row: row[1][1]),
            *columns(MEASURED, perplexity),
            Column("seeds", MEASURED, of=lambda row: len(measured.select(context=row[2])) or None),
        ],
        note=note,
    )


def _best(*kinds: Records) -> str:
    """Returns which context and positions have the lowest mean perplexity of all."""
    groups = [(g, found) for found in kinds for g in by(found, "context")]
    best, found = min(groups, key=lambda pair: pair[0].mean_std("test_perplexity").mean)
    return f"Lowest of all is context {best.key} with {position(found)}."


def position(found: Records) -> str:
    """Returns what the positions of some models are called."""
    names = {"alibi": "ALiBi", "rope": "rotary"}
    return first(
        found,
        "{name} positions",
        name=lambda k: names.get(k["model.position"], k["model.position"]),
    )


def document_table(documents: Records) -> Table:
    """Returns scores against what is read; a row has a label, published scores, and a length."""
    rows = [(str(n), {}, n) for n in documents.values("length")]
    if rows:
        for n in published.F1["MIMIC-III"]:
            rows.append((str(n), {name: scores[n] for name, scores in published.F1.items()}, None))
    score = lambda n: Group(n, documents.select(length=n)).mean_std("test_accuracy", 100)
    return table(
        "documents",
        "Table 5: classification against how much of a document is read",
        rows,
        [
            Column("tokens read", of=lambda row: row[0]),
            *(
                Column(f"{name}, micro-F1", PUBLISHED, "%", of=lambda row, n=name: row[1].get(n))
                for name in published.F1
            ),
            Column("sections of BBC news, micro-F1", MEASURED, "%", of=lambda row: score(row[2])),
            Column("seeds", MEASURED, of=lambda row: len(documents.select(length=row[2])) or None),
        ],
        note=f"{_about(documents)}. With one label a document micro-F1 is accuracy. The paper "
        "fine-tunes RoBERTa on medical notes and court cases, which may not be passed on; here a "
        "small encoder learns the section of news articles from scratch. Only the direction "
        "compares.",
    )
