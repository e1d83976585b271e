"""RSA's tables and figures."""

from tilescan.experiments.harness.figures import line_chart
from tilescan.experiments.harness.groups import Group, by, first
from tilescan.experiments.harness.records import Record, Records
from tilescan.experiments.harness.statistics import ratio
from tilescan.experiments.harness.tables import (
    LABEL,
    PUBLISHED,
    STATIC,
    Column,
    Table,
    columns,
    table,
)
from tilescan.experiments.measurements.exactness import exactness_table
from tilescan.experiments.measurements.sharded_training import training_table
from tilescan.experiments.measurements.traffic import MIB, sent_bytes
from tilescan.experiments.papers.ring_self_attention.cells import TRAFFIC
from tilescan.experiments.papers.ring_self_attention.published import LARGEST, MEMORY, SPARSE

TENSOR, RSA = "tensor", "ring_self_attention"
NAMES = {
    TENSOR: "tensor parallelism",
    RSA: "RSA",
    "rsa_all_reduce": "RSA, all-reduce",
    "rsa_reduce_scatter": "RSA, reduce-scatter",
    "ulysses": "Ulysses",
    "ring": "ring attention",
}
STEPS = (TENSOR, RSA, "ring", "ulysses")  # as Table 4 lists them
BYTES = 4


def tables(records: Records) -> list[Table]:
    """Returns Table 4, the largest sizes, the crossover, bytes, exactness, and training."""
    return [
        weak_table(records, "batch"),
        weak_table(records, "length"),
        largest_table(records),
        sparse_table(records),
        crossover_table(records),
        traffic_table(records),
        exactness_table(
            "Attention over devices against dense attention of one",
            ("devices", "way"),
            [
                ((str(g.key), NAMES[name]), g.first.result[name], g)
                for g in by(records.select(kind="exactness"), "devices")
                for name in NAMES
                if name in g.first.result
            ],
            "Float64, bidirectional; the largest difference as a part of the largest value.",
        ),
        training_table(
            records,
            "Convergence: guessing hidden tokens with time cut over devices by RSA",
            first(
                records.select(kind="training"),
                "{model[repeats]} layers, width {model[d_model]}, {batch} texts of {length} tokens "
                "of a Markov chain, 15% hidden, {steps} steps. ",
            )
            + "The largest distance of the two curves; in float32 it is rounding that training "
            "lets grow. Published: curves of BERT-Large over 50,000 steps, beside tensor "
            "parallelism's.",
            differences={"farthest from one device": None},
        ),
    ]


def weak(records: Records, grows: str, strategy: str) -> dict[int, int]:
    """Returns {devices: bytes of a device} where the batch or the length grows with them."""
    found = records.select(kind="weak", grows=grows, way=strategy)
    return {g.key: g.first.result["total"] for g in by(found, "devices")}


def over_one_device(sizes: dict[int, float]) -> dict[int, float]:
    """Returns {devices: a size over that of the fewest}."""
    return {n: size / sizes[min(sizes)] for n, size in sizes.items()}


def largest(records: Records, vary: str, strategy: str, kind: str = "largest") -> dict[int, int]:
    """Returns {devices: the largest batch or length}."""
    found = records.select(kind=kind, vary=vary, way=strategy)
    return {g.key: g.first.result["value"] for g in by(found, "devices")}


def crossings(records: Records, what: str) -> dict[int, float | None]:
    """Returns {devices: B L / H from which sequence parallelism needs less}, interpolated."""
    found = {}
    for group in by(records.select(kind="crossover"), "devices"):
        points = sorted(
            (r.settings["tokens"], r.result["tensor"][what] - r.result["sequence"][what])
            for r in group.records
        )
        found[group.key] = None
        for (x, y), (x2, y2) in zip(points, points[1:], strict=False):
            if y <= 0 < y2:
                found[group.key] = x + (x2 - x) * -y / (y2 - y)
    return found


def formula(record: Record, name: str) -> float:
    """Returns bytes of both passes: the paper's 8 (N - 1) B Z (L / N) A elements, and others'."""
    s = record.settings
    N = s["devices"]
    shard = BYTES * s["batch"] * s["length"] // N * s["width"]
    return {
        "tensor": 8 * (N - 1) * shard,
        "rsa_all_reduce": 8 * (N - 1) * shard,
        "rsa_reduce_scatter": 6 * (N - 1) * shard,
        "ring": (4 * (N - 1) + 2 * N) * shard,
        "ulysses": 8 * (N - 1) / N * shard,
    }[name]


def weak_table(records: Records, grows: str) -> Table:
    """Returns Table 4 for batches, or lengths, that grow with the devices."""
    records = records.select(kind="weak", grows=grows)
    shown = [
        Column("devices N", of=lambda g: str(g.key)),
        Column("batch", of=lambda g: g.first.settings["batch"]),
        Column("tokens", of=lambda g: g.first.settings["length"]),
    ]

    def add(strategy: str, kind: str, unit: str, sizes: dict[int, float]) -> None:
        name = NAMES[strategy]
        shown.append(Column(name, kind, unit, 6, lambda g: sizes.get(g.key)))
        one = lambda g: ratio(sizes.get(g.key), sizes.get(1))
        shown.append(Column(f"{name}, over N = 1", kind, of=one))

    for strategy, sizes in MEMORY[grows].items():
        add(strategy, PUBLISHED, "MB", sizes)
    for strategy in STEPS:
        if sizes := weak(records, grows, strategy):
            add(strategy, STATIC, "MiB", {n: size / MIB for n, size in sizes.items()})
    about = first(
        records,
        "{layers} layers of width {width}, {heads} heads, {vocab_size:,} tokens in the vocabulary, "
        "float32. ",
    )
    what = "batches" if grows == "batch" else "texts"
    return table(
        f"weak-{grows}",
        f"Table 4: memory of a device when {what} grow with the devices",
        by(records, "devices"),
        shown,
        f"A training step, planned by the compiler for CPUs and Adam's moments added; nothing was "
        f"run. {about}Tensor parallelism and RSA keep all weights of attention, the other two work "
        "in tiles. Published on P100s, half precision: growth compares, not megabytes. Heads limit "
        "tensor parallelism and Ulysses to divisors of 12.",
    )


def largest_table(records: Records) -> Table:
    """Returns figures 3 and 4: a row for what varies and the devices."""
    sizes = {(v, s): largest(records, v, s) for v in LARGEST for s in (TENSOR, RSA)}
    most = {vary: max(sizes[vary, TENSOR], default=None) for vary in LARGEST}
    given = {"batch": "{length} tokens", "length": "batch {batch}"}
    about = "".join(
        first(
            records.select(kind="largest", vary=vary),
            " {gib:g} GiB a device, " + given[vary] + ", to {tolerance:.0%}.",
        )
        for vary in LARGEST
    )

    def size(g: Group, strategy: str) -> int | None:
        return sizes[g.key[0], strategy].get(g.key[1])

    def over_most(g: Group) -> float | None:
        return ratio(size(g, RSA), sizes[g.key[0], TENSOR].get(most[g.key[0]]))

    def published(g: Group) -> float | None:
        return LARGEST[g.key[0]] if g.key[1] == 64 and most[g.key[0]] == 12 else None

    static = {
        NAMES[TENSOR]: lambda g: size(g, TENSOR),
        NAMES[RSA]: lambda g: size(g, RSA),
        "RSA / tensor, as many devices": lambda g: ratio(size(g, RSA), size(g, TENSOR)),
        "RSA / tensor on its most devices": over_most,
    }
    return table(
        "largest",
        "Figures 3 and 4: the largest batch and the longest text of BERT-Base",
        by(records.select(kind="largest"), "vary", "devices"),
        [
            *columns(LABEL, {"what": lambda g: g.key[0], "devices": lambda g: str(g.key[1])}),
            *columns(STATIC, static),
            Column("RSA / tensor on its most devices", PUBLISHED, of=published),
        ],
        f"By the compiler's plan of a training step's buffers; nothing was run.{about} Tensor "
        "parallelism takes as many devices as divide 12 heads. RSA as published makes gradients "
        "of the keys of all tokens, B L H, on each device before it sums them: they do not shrink "
        "with N.",
    )


def sparse_table(records: Records) -> Table:
    """Returns figure 5: lengths with Linformer's attention, and with RSA beside it."""
    sparse, dense = (largest(records, "length", s, "sparse") for s in ("linformer", RSA))
    records = records.select(kind="sparse")
    over_one = lambda g, sizes: ratio(sizes.get(g.key), sizes.get(1))
    return table(
        "sparse",
        "Figure 5: the longest text with attention to a few projected rows",
        by(records, "devices"),
        [
            Column("devices N", of=lambda g: str(g.key)),
            Column("Linformer", STATIC, "tokens", of=lambda g: sparse.get(g.key)),
            Column("over N = 1", STATIC, of=lambda g: over_one(g, sparse)),
            Column("over N = 1", PUBLISHED, of=lambda g: SPARSE if g.key == 32 else None),
            Column("RSA", STATIC, "tokens", of=lambda g: dense.get(g.key)),
            Column("RSA over N = 1", STATIC, of=lambda g: over_one(g, dense)),
        ],
        first(records, "Batch {batch}, {gib:g} GiB a device, {rows} rows. ")
        + "By the compiler's plan of a training step's buffers. Published: more than 114,000 "
        "tokens on 32 P100s. The projections, as long as the text, are cut with it.",
    )


def crossover_table(records: Records) -> Table:
    """Returns by how much an MLP needs more memory under tensor parallelism."""

    def gap(g: Group, what: str) -> float:
        unit = BYTES * g.first.settings["width"] ** 2 * (1 - 1 / g.key[0])
        return (g.first.result["tensor"][what] - g.first.result["sequence"][what]) / unit

    return table(
        "crossover",
        "An MLP alone: tensor parallelism's memory beyond sequence parallelism's",
        by(records.select(kind="crossover"), "devices", "tokens"),
        [
            Column("devices N", of=lambda g: str(g.key[0])),
            Column("B L / H", of=lambda g: str(g.key[1])),
            Column("B L / H - 32", PUBLISHED, of=lambda g: g.key[1] - 32),
            Column("kept between the passes", STATIC, of=lambda g: gap(g, "kept")),
            Column("planned in all", STATIC, of=lambda g: gap(g, "total")),
        ],
        "In units of (1 - 1/N) H² elements, in which the paper's formulas differ by "
        "B L / H - 32: above 0, sequence parallelism needs less. Kept: four times the weights, and "
        "what the traced program reads again in its backward pass. Planned: by the compiler, with "
        "the gradient of the input and what lives in passing.",
    )


def traffic_table(records: Records) -> Table:
    """Returns what a device sends: a row for the devices and the strategy."""
    records = records.select(kind="traffic")
    counted = {
        "forward": lambda row: sent_bytes(*row) / MIB,
        "forward and backward": lambda row: sent_bytes(*row, "both") / MIB,
        "formula": lambda row: formula(*row) / MIB,
    }
    share = lambda row: sent_bytes(*row, "both") / formula(*row)
    return table(
        "traffic",
        "What a device sends for a layer",
        [(g.first, s) for g in by(records, "devices") for s in TRAFFIC if s in g.first.result],
        [
            Column("devices N", of=lambda row: str(row[0].settings["devices"])),
            Column("way", of=lambda row: NAMES[row[1]]),
            *columns(STATIC, counted, "MiB"),
            Column("counted / formula", STATIC, of=share),
        ],
        first(records, "Batch {batch}, {length} tokens, width {width}, float32. ")
        + "Counts of compiled programs without gradients of weights; none was run. The paper's "
        "formula, for tensor parallelism and RSA, is 8 (N - 1) B Z (L / N) A elements. A "
        "reduce-scatter in place of the paper's all-reduce takes 6. Ring attention takes "
        "4 (N - 1) + 2 N, Ulysses 8 (N - 1) / N.",
    )


def figures(records: Records) -> dict[str, str]:
    """Returns Table 4's memory over that of one device, and the largest batches and lengths."""
    memory, sizes, made = {}, {}, {}
    for grows, title in (("batch", "batches grow"), ("length", "texts grow")):
        found = {NAMES[s]: x for s in STEPS if (x := weak(records, grows, s))}
        if found:
            found |= {f"{NAMES[s]}, published": x for s, x in MEMORY[grows].items()}
            memory[title] = {name: _line(over_one_device(x)) for name, x in found.items()}
    for vary, title in (("batch", "largest batch"), ("length", "longest text")):
        found = {NAMES[s]: x for s in (TENSOR, RSA) if (x := largest(records, vary, s))}
        if found:
            sizes[title] = {name: _line(x) for name, x in found.items()}
    if memory:
        made["memory-when-work-grows"] = line_chart(
            memory,
            x_label="devices",
            y_label="memory of a device, over one device's",
            log_x=True,
            dashed=[f"{NAMES[s]}, published" for s in (TENSOR, RSA)],
        )
    if sizes:
        made["largest"] = line_chart(
            sizes,
            x_label="devices",
            y_label="rows, or tokens",
            log_x=True,
            log_y=True,
            share_y=False,
        )
    return made


def _line(values: dict[int, float]) -> tuple[list[int], list[float]]:
    return list(values), list(values.values())
