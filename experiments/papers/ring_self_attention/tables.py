"""RSA's tables and figures."""

import functools

from tilescan.experiments.harness.figures import line_chart
from tilescan.experiments.harness.groups import Group, at, by, first, series
from tilescan.experiments.harness.records import Record, Records
from tilescan.experiments.harness.statistics import ratio
from tilescan.experiments.harness.tables import (
    PUBLISHED,
    RECALLED,
    STATIC,
    Column,
    Table,
    columns,
    table,
)
from tilescan.experiments.measurements.exactness import exactness_table
from tilescan.experiments.measurements.sharded_training import training_table
from tilescan.experiments.measurements.traffic import MIB, sent_bytes
from tilescan.experiments.papers.ring_self_attention.cells import TRAFFIC, VARY
from tilescan.experiments.papers.ring_self_attention.published import (
    LARGEST,
    MEMORY,
    MEMORY_KINDS,
    SPARSE,
)

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
WORDS = {"batch": "batches", "length": "sequences"}
GREATEST = {"batch": "largest batch", "length": "longest sequence"}
BYTES = 4
DEVICES = Column("devices N", of=lambda g: str(g.key))


def tables(records: Records) -> list[Table]:
    """Returns Table 4, the largest sizes, the crossover, bytes, exactness, and training."""
    exact = by(records.select(kind="exactness"), "devices")
    return [
        weak_table(records, "batch"),
        weak_table(records, "length"),
        largest_table(records),
        sparse_table(records),
        crossover_table(records),
        traffic_table(records),
        exactness_table(
            "Attention over devices against dense attention of one",
            ("devices", "strategy"),
            [
                ((str(g.key), name), g.first.result[s], g)
                for g in exact
                for s, name in NAMES.items()
                if s in g.first.result
            ],
            "Float64, bidirectional; max abs. difference, relative to the largest value.",
        ),
        training_table(
            records,
            "Convergence: guessing hidden tokens with time sharded over devices by RSA",
            ", 15% of the tokens hidden",
            "In float32 it is rounding that training lets grow. Published: curves of BERT-Large "
            "over 50,000 steps, beside tensor parallelism's.",
        ),
    ]


def weak(records: Records, grows: str, strategy: str) -> dict[int, int]:
    """Returns {devices: bytes of a device} where the batch or the length grows with them."""
    return series(records.select(kind="weak", grows=grows, way=strategy), "devices", "total")


def over_one_device(sizes: dict[int, float]) -> dict[int, float]:
    """Returns {devices: a size over that of the fewest}."""
    return {n: size / sizes[min(sizes)] for n, size in sizes.items()}


def largest(records: Records, vary: str, strategy: str, kind: str = "largest") -> dict[int, int]:
    """Returns {devices: the largest batch or length}."""
    return series(records.select(kind=kind, vary=vary, way=strategy), "devices", "value")


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
    shards = {
        "tensor": 8 * (N - 1),
        "rsa_all_reduce": 8 * (N - 1),
        "rsa_reduce_scatter": 6 * (N - 1),
        "ring": 4 * (N - 1) + 2 * N,
        "ulysses": 8 * (N - 1) / N,
    }
    return shards[name] * (BYTES * s["batch"] * s["length"] // N * s["width"])


def weak_table(records: Records, grows: str) -> Table:
    """Returns Table 4 for batches, or lengths, that grow with the devices."""
    shown = [
        DEVICES,
        Column("batch", of=lambda g: g.first.settings["batch"]),
        Column("tokens", of=lambda g: g.first.settings["length"]),
    ]
    known = [(s, MEMORY_KINDS[grows], "MB", 1, sizes) for s, sizes in MEMORY[grows].items()]
    known += [(s, STATIC, "MiB", MIB, weak(records, grows, s)) for s in STEPS]
    for strategy, kind, unit, size, found in known:
        if found:
            name, sizes = NAMES[strategy], {n: x / size for n, x in found.items()}
            shown.append(Column(name, kind, unit, 6, at(sizes)))
            shown.append(Column(f"{name}, over N = 1", kind, of=at(over_one_device(sizes))))
    records = records.select(kind="weak", grows=grows)
    about = first(
        records,
        "{layers} layers of width {width}, {heads} heads, {vocab_size:,} tokens in the vocabulary, "
        "float32. ",
    )
    return table(
        f"weak-{grows}",
        f"Table 4: memory of a device when {WORDS[grows]} grow with the devices",
        by(records, "devices"),
        shown,
        f"A training step, planned by the compiler for CPUs and Adam's moments added; nothing was "
        f"run. {about}Tensor parallelism and RSA keep all weights of attention, the other two work "
        "in tiles. The paper's are of P100s of 16 GB: growth compares, not megabytes. Heads limit "
        "tensor parallelism and Ulysses to divisors of 12.",
    )


def largest_table(records: Records) -> Table:
    """Returns figures 3 and 4: a row for what varies and the devices."""
    sizes = {
        s: {(v, n): x for v in VARY for n, x in largest(records, v, s).items()}
        for s in (TENSOR, RSA)
    }
    tensor, ours = (at(sizes[s]) for s in (TENSOR, RSA))
    # Heads bound the devices of tensor parallelism: its largest size on the most of them.
    most = {v: max((n for vary, n in sizes[TENSOR] if vary == v), default=None) for v in VARY}
    over_most = lambda g: ratio(ours(g), sizes[TENSOR].get((g.key[0], most[g.key[0]])))
    published = {(v, 64): LARGEST[v] for v in VARY if most[v] == 12}
    records = records.select(kind="largest")
    given = {"batch": "{length} tokens", "length": "batch {batch}"}
    about = "".join(
        first(
            records.select(vary=v), " {gib:g} GiB a device, " + given[v] + ", to {tolerance:.0%}."
        )
        for v in VARY
    )
    return table(
        "largest",
        "Figures 3 and 4: the largest batch and the longest sequence of BERT-Base",
        by(records, "vary", "devices"),
        [
            Column("what", of=lambda g: g.key[0]),
            Column("devices", of=lambda g: str(g.key[1])),
            Column(NAMES[TENSOR], STATIC, of=tensor),
            Column(NAMES[RSA], STATIC, of=ours),
            Column("RSA / tensor, as many devices", STATIC, of=lambda g: ratio(ours(g), tensor(g))),
            Column("RSA / tensor on its most devices", STATIC, of=over_most),
            Column("RSA / tensor on its most devices", PUBLISHED, of=at(published)),
        ],
        f"By the compiler's plan of a training step's buffers; nothing was run.{about} That is "
        "float32 where the paper has P100s of 16 GB. Tensor parallelism takes as many devices as "
        "divide 12 heads. RSA as published makes gradients of the keys of all tokens, B L H, on "
        "each device before it sums them: they do not shrink with N.",
    )


def sparse_table(records: Records) -> Table:
    """Returns figure 5: lengths with Linformer's attention, and with RSA beside it."""
    sparse, dense = (largest(records, "length", s, "sparse") for s in ("linformer", RSA))
    records = records.select(kind="sparse")
    return table(
        "sparse",
        "Figure 5: the longest sequence with attention to a few projected rows",
        by(records, "devices"),
        [
            DEVICES,
            Column("Linformer", STATIC, "tokens", of=at(sparse)),
            Column("over N = 1", STATIC, of=at(over_one_device(sparse))),
            Column("over N = 1", PUBLISHED, of=at({32: SPARSE})),
            Column("RSA", STATIC, "tokens", of=at(dense)),
            Column("RSA over N = 1", STATIC, of=at(over_one_device(dense))),
        ],
        first(records, "Batch {batch}, {gib:g} GiB a device, {rows} rows. ")
        + "By the compiler's plan of a training step's buffers. Published: more than 114,000 "
        "tokens on 32 P100s. The projections, as long as the sequence, are sharded with it.",
    )


def crossover_table(records: Records) -> Table:
    """Returns by how much an MLP needs more memory under tensor parallelism."""

    def gap(what: str, g: Group) -> float:
        unit = BYTES * g.first.settings["width"] ** 2 * (1 - 1 / g.key[0])
        return (g.first.result["tensor"][what] - g.first.result["sequence"][what]) / unit

    return table(
        "crossover",
        "An MLP alone: tensor parallelism's memory beyond sequence parallelism's",
        by(records.select(kind="crossover"), "devices", "tokens"),
        [
            Column("devices N", of=lambda g: str(g.key[0])),
            Column("B L / H", of=lambda g: str(g.key[1])),
            Column("B L / H - 32", RECALLED, of=lambda g: g.key[1] - 32),
            Column("kept between the passes", STATIC, of=lambda g: gap("kept", g)),
            Column("planned in all", STATIC, of=lambda g: gap("total", g)),
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
            Column("strategy", of=lambda row: NAMES[row[1]]),
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
    memory, sizes = {}, {}
    for vary, words in WORDS.items():
        if found := {NAMES[s]: x for s in STEPS if (x := weak(records, vary, s))}:
            found |= {f"{NAMES[s]}, published": x for s, x in MEMORY[vary].items()}
            memory[f"{words} grow"] = {name: over_one_device(x) for name, x in found.items()}
        if found := {NAMES[s]: x for s in (TENSOR, RSA) if (x := largest(records, vary, s))}:
            sizes[GREATEST[vary]] = found
    chart = functools.partial(line_chart, x_label="devices", log_x=True)
    dashed = [f"{NAMES[s]}, published" for s in (TENSOR, RSA)]
    label = "memory of a device / of one device alone"
    return {
        "weak": chart(memory, y_label=label, dashed=dashed),
        "largest": chart(sizes, y_label="rows of a batch, or tokens", log_y=True, share_y=False),
    }
