"""FlashAttention's tables: time and memory of a call, exactness, counted traffic, training."""

from collections.abc import Callable, Mapping

from tilescan.experiments.harness import tables as t
from tilescan.experiments.harness.groups import Group, by, first
from tilescan.experiments.harness.records import Record, Records
from tilescan.experiments.harness.statistics import ratio
from tilescan.experiments.harness.tables import Column, Table, columns, table
from tilescan.experiments.measurements import attention, static_kernels
from tilescan.experiments.measurements.attention import DIRECTIONS, OVER_SPARSE, OVER_STANDARD
from tilescan.experiments.measurements.attention_exactness import exactness_table
from tilescan.experiments.measurements.timing import gain
from tilescan.experiments.measurements.training import attention_pairs, curve_difference
from tilescan.experiments.papers.flash_attention import published

NAMES = {v: v.replace("_", "-") for v in (*OVER_STANDARD, attention.SPARSE, "windowed")}
PAPER_IO = {"length": 1024, "head_dim": 64, "on_chip": 98304}  # of figure 2, an A100's memory
IO_HEADS = 16 * 64  # of all sequences of the batch
CONTEXTS = ("context", "context_compared")  # kinds of records


def tables(records: Records) -> list[Table]:
    """Returns all tables that the records can fill."""
    made = [
        *(runtime_table(records, direction) for direction in DIRECTIONS),
        *(memory_table(records, direction) for direction in DIRECTIONS),
        exactness_table(records.select(kind="exactness")),
        figure_2(records.select(kind="io").one(**PAPER_IO)),
        on_chip_table(records.select(kind="io")),
        length_table(records.select(kind="io_length")),
        sparse_table(records.select(kind="io_sparse")),
        curve_table(records.select(kind="curves")),
        context_table(*(records.select(kind=kind) for kind in CONTEXTS)),
        document_table(records.select(kind="documents")),
        *static_kernels.tables(records),
    ]
    return [table for table in made if table.rows]


def beside(
    of_paper: Mapping[str, Mapping[str, tuple[float | str, ...]]],
    paper_unit: str,
    kind: str,
    unit: str,
    value: Callable[[Group, str], float | str | None],
) -> list[Column]:
    """Returns the length and, for each variant, what is published of it and our value.

    Of the paper are {what is added to the title: {variant: numbers}}.
    """
    shown = [Column("length", of=lambda g: str(g.key))]
    for v, name in NAMES.items():
        for about, rows in of_paper.items():
            if v in rows:
                of = lambda g, row=rows[v]: published.at(g.key, row)
                shown.append(Column(f"{name}{about}", t.PUBLISHED, paper_unit, of=of))
        shown.append(Column(name, kind, unit, of=lambda g, v=v: value(g, v)))
    return shown


def runtime_table(records: Records, direction: str) -> Table:
    """Returns published and measured times against length, and their ratios."""
    runtime, (number, plain) = records.select(kind="runtime"), published.TABLES[direction]
    dropout = f", {number} with dropout and padding"
    of_paper = {"": published.PLAIN_MS[direction], dropout: published.MS[direction]}
    shown = beside(of_paper, "ms", t.MEASURED, "ms", attention.median_ms)
    for pair in (OVER_STANDARD, OVER_SPARSE):
        title = " / ".join(NAMES[v] for v in pair)
        paper = lambda rows, pair=pair: lambda g: published.over(g.key, rows, *pair)
        ratios = {f"{title}{about}": paper(rows) for about, rows in of_paper.items()}
        shown += columns(t.PUBLISHED, ratios)
        shown.append(Column(title, t.MEASURED, of=lambda g, pair=pair: gain(g.first, *pair)))
    return table(
        f"runtime-{direction}",
        f"{plain}: time of one attention call against length, {DIRECTIONS[direction]}",
        by(runtime.select(direction=direction), "length"),
        shown,
        "Published: A100 40 GB, batch 16, 8 heads of 64, 16 bit, without dropout and mask, as "
        f"here, but for {number}, which has both. Measured: "
        + first(runtime, "batch {batch}, {heads} heads of {head_dim}, {dtype}, no dropout; ")
        + "medians of interleaved rounds; ratios are of medians, ± their standard deviation over "
        "rounds. Times of different machines and batches are not comparable. Standard is "
        "jax.nn.dot_product_attention; windowed and block-sparse are the tiled op with a mask.",
    )


def memory_table(records: Records, direction: str) -> Table:
    """Returns temporaries against length, and in a last row how they grow."""
    memory = records.select(kind="memory")
    found = memory.select(direction=direction)
    value = lambda g, v: attention.growth(found, v) if len(g) > 1 else attention.mebibytes(g, v)
    rows = by(found, "length")
    if len(rows) > 1:
        rows.append(Group("growth: power of length", found))
    of_paper = published.MEGABYTES.get(direction, {})
    backends = ", ".join(sorted({r.environment["backend"] for r in memory}))
    return table(
        f"memory-{direction}",
        f"Memory of one attention call against length, {DIRECTIONS[direction]}",
        rows,
        beside({"": of_paper}, "MB", t.STATIC, "MiB", value),
        "Temporaries beside arguments and results, by XLA's own buffer assignment for "
        f"{backends}; compiled, not run. The last row is the slope of log memory over "
        "log length from length 1024 on: 2 is quadratic, 1 linear."
        + (" Published (Table 21): all memory in use, batch 16, 16 bit." if of_paper else ""),
    )


def gigabytes(elements: int) -> float:
    """Returns the size of what one head moves, for all heads of figure 2, 2 bytes an element."""
    return elements * IO_HEADS * 2 / 1e9


def number(name: str) -> Callable[[Group], float]:
    """Returns the function of a group that gives a number of its result."""
    return lambda group: group.first.result[name]


def over(one: str, other: str) -> Callable[[Group], float]:
    """Returns the function of a group that gives the ratio of two numbers of its result."""
    return lambda group: group.first.result[one] / group.first.result[other]


def over_bound(group: Group) -> float:
    """Returns the forward pass's traffic over N²d²/M."""
    s = group.first.settings
    return group.first.result["forward"] / ((s["length"] * s["head_dim"]) ** 2 / s["on_chip"])


def figure_2(record: Record | None) -> Table:
    """Returns the figure's left; a row has a title, published and counted pairs, and its record."""
    rows = []
    if record:
        products = (6, 7)  # of matrices, forward and backward: standard, tiled
        flops = 2 * PAPER_IO["length"] ** 2 * PAPER_IO["head_dim"] * IO_HEADS  # of a product
        moved = (record.result[k] for k in ("standard_forward_backward", "forward_backward"))
        rows = [
            ("FLOPs (10⁹)", published.GFLOPS, [n * flops / 1e9 for n in products]),
            ("traffic (GB)", published.GIGABYTES, [gigabytes(n) for n in moved], record),
            ("time on an A100 (ms)", published.A100_MS, (None, None)),
        ]
    shown = [Column("forward + backward", of=lambda row: row[0])]
    for i, kind in enumerate((t.PUBLISHED, t.STATIC), 1):
        values = {name: lambda row, i=i, j=j: row[i][j] for j, name in enumerate(OVER_STANDARD)}
        shown += columns(kind, values | {"standard / tiled": lambda row, i=i: ratio(*row[i])})
    return table(
        "io",
        "Figure 2, left: FLOPs and memory traffic of attention",
        rows,
        shown,
        "N 1024, d 64, 16 heads, batch 64, 2 bytes an element. Static: traffic counted by "
        "replaying the loops tile by tile with the on-chip memory of an A100, FLOPs by "
        "formula (6 products of matrices, and one more to compute the scores again); no device. "
        "Published: a profiler on an A100, where standard attention masked and dropped out in "
        "kernels of their own. Its FLOPs are not those of this shape; their ratio compares.",
    )


def on_chip_table(on_chip: Records) -> Table:
    """Returns traffic against the size of on-chip memory."""
    both = ("standard_forward_backward", "forward_backward")
    moved = {
        f"{name}, forward + backward": lambda g, key=key: gigabytes(g.first.result[key])
        for name, key in zip(OVER_STANDARD[::-1], both[::-1], strict=True)
    }
    return table(
        "io-on-chip",
        "Figure 2, middle: memory traffic against the size of on-chip memory",
        by(on_chip, "on_chip"),
        [
            Column("on-chip elements", of=lambda g: f"{g.key:,}"),
            Column("tiles", of=lambda g: "{block_q} x {block_k}".format(**g.first.result)),
            Column("visits a head", t.STATIC, of=number("visits")),
            *columns(t.STATIC, moved, "GB"),
            Column("standard / tiled", t.STATIC, of=over(*both)),
            Column("forward / (N²d²/M)", t.STATIC, of=over_bound),
        ],
        "Counted by the same replay, "
        + first(on_chip, "N {length}, d {head_dim}")
        + ", 16 heads, batch 64. Theorem 2, Θ(N²d²/M), says that the last column stays constant as "
        "long as M is at most Nd; what grows are the keys and values, read once however large the "
        "memory is, and tiles that do not divide N.",
    )


def length_table(lengths: Records) -> Table:
    """Returns the forward pass's traffic against length."""
    return table(
        "io-length",
        "Theorem 2: memory traffic against length",
        by(lengths, "length"),
        [
            Column("length", of=lambda g: str(g.key)),
            Column("visits", t.STATIC, of=number("visits")),
            Column("elements moved, tiled", t.STATIC, of=number("forward")),
            Column("elements moved, standard", t.STATIC, of=number("standard_forward")),
            Column("standard / tiled", t.STATIC, of=over("standard_forward", "forward")),
            Column("tiled / (N²d²/M)", t.STATIC, of=over_bound),
        ],
        "One head, forward, "
        + first(lengths, "{on_chip:,} on-chip elements, d {head_dim}")
        + "; counted by the same replay. Both grow with the square of the length: tiling saves a "
        "factor, M/d² by the theorem.",
    )


def sparse_table(sparse: Records) -> Table:
    """Returns the forward pass's traffic against sparsity."""
    rows = by(sparse, "factors")
    visits, flops = number("visits"), number("matmul_flops")
    dense = max(map(over("visits", "live_fraction"), rows), default=0)
    return table(
        "io-sparse",
        "Figure 2, right: block-sparse attention's traffic against sparsity",
        rows,
        [
            Column("butterfly factors", of=lambda g: str(g.key)),
            Column("live fraction s", t.STATIC, of=number("live_fraction")),
            Column("tiles visited", t.STATIC, of=visits),
            Column("of all tiles", t.STATIC, of=lambda g: visits(g) / dense),
            Column("elements moved, forward", t.STATIC, of=number("forward")),
            Column("FLOPs in matmuls", t.STATIC, "10⁶", of=lambda g: flops(g) / 1e6),
        ],
        "Counted for one head by the same replay. Traffic is Θ(Nd + N²d²s/M): proportional to s "
        "beside a constant.",
    )


def curve_table(curves: Records) -> Table:
    """Returns losses and perplexities of both attentions, a row for each seed."""
    loss = lambda i: lambda pair: pair[i].result["train_loss"][-1]
    perplexity = lambda i: lambda pair: pair[i].result["test_perplexity"]
    return table(
        "curves",
        "Section 4.1: training with standard and with tiled attention",
        attention_pairs(curves),
        [
            Column("seed", of=lambda pair: str(pair[0].seed)),
            Column("steps", t.MEASURED, of=lambda pair: len(pair[0].result["train_loss"])),
            Column("last loss, standard", t.MEASURED, "nats", 5, loss(0)),
            Column("last loss, tiled", t.MEASURED, "nats", 5, loss(1)),
            Column("largest difference of a step", t.MEASURED, "nats", 2, curve_difference),
            Column("test perplexity, standard", t.MEASURED, digits=5, of=perplexity(0)),
            Column("test perplexity, tiled", t.MEASURED, digits=5, of=perplexity(1)),
        ],
        f"{_about(curves)}. Same seed, same batches, same program but for the attention. The "
        "paper reports the same perplexity 18.2 for GPT-2 small with both (Table 2).",
    )


def _about(found: Records) -> str:
    """Returns the data and the training that all records agree on, in words."""
    return first(
        found,
        "{data.tokenizer} tokens of {sources}; {model.repeats} layers, width {model.d_model}, "
        "{train.steps} steps",
        sources=lambda known: ", ".join(known["data.sources"]),
    )


def context_table(measured: Records, compared: Records) -> Table:
    """Returns perplexity by context; rows without records are the published ones."""
    rows = by(Records([*measured, *compared]), "context")
    if rows:
        rows += [Group(context, Records([])) for context in published.PERPLEXITY]
    of_paper = lambda i: lambda g: None if len(g) else published.PERPLEXITY[g.key][i]
    score = lambda kind: lambda g: g.select(kind=kind).mean_std("test_perplexity")
    shown = {
        f"perplexity, {position(found)}": score(kind)
        for kind, found in zip(CONTEXTS, (measured, compared), strict=True)
        if found
    }
    note = (
        f"{_about(measured)}. Every context trains on the same tokens in the same batches: long "
        "rows are split into shorter ones. Held-out whole documents, scored with the same context. "
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
            Column("context", of=lambda g: str(g.key) if len(g) else f"{g.key} (GPT-2 small)"),
            Column("perplexity", t.PUBLISHED, of=of_paper(0)),
            Column("training on 8 A100s", t.PUBLISHED, "days", of=of_paper(1)),
            *columns(t.MEASURED, shown),
            Column("seeds", t.MEASURED, of=lambda g: len(g.select(kind="context")) or None),
        ],
        note,
    )


def _best(*kinds: Records) -> str:
    """Returns which context and positions have the lowest mean perplexity of all."""
    groups = [(g, found) for found in kinds for g in by(found, "context")]
    best, found = min(groups, key=lambda pair: pair[0].mean_std("test_perplexity").mean)
    return f"Lowest of all is context {best.key} with {position(found)}."


def position(found: Records) -> str:
    """Returns what the positions of some models are called."""
    names = {"alibi": "ALiBi", "rope": "rotary"}
    name = lambda known: names.get(known["model.position"], known["model.position"])
    return first(found, "{name} positions", name=name)


def document_table(documents: Records) -> Table:
    """Returns scores by what is read; rows without records are the published ones."""
    rows = by(documents, "length")
    if rows:
        rows += [Group(length, Records([])) for length in published.F1["MIMIC-III"]]
    of_paper = {
        f"{name}, micro-F1": lambda g, scores=scores: None if len(g) else scores[g.key]
        for name, scores in published.F1.items()
    }
    score = lambda g: g.mean_std("test_accuracy", 100)
    return table(
        "documents",
        "Table 5: classification against how much of a document is read",
        rows,
        [
            Column("tokens read", of=lambda g: str(g.key)),
            *columns(t.PUBLISHED, of_paper, "%"),
            Column("sections of BBC news, micro-F1", t.MEASURED, "%", of=score),
            Column("seeds", t.MEASURED, of=lambda g: len(g) or None),
        ],
        f"{_about(documents)}. With one label a document micro-F1 is accuracy. The paper "
        "fine-tunes RoBERTa on medical notes and court cases, which may not be redistributed; here "
        "a small encoder learns the section of news articles from scratch. Only the direction "
        "compares.",
    )
