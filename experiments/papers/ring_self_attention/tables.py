"""RSA's published numbers, and the tables and figures of its records."""

from tilescan.experiments.harness.figures import line_chart
from tilescan.experiments.harness.records import Record, Records
from tilescan.experiments.harness.statistics import ratio
from tilescan.experiments.harness.tables import MEASURED, PUBLISHED, STATIC, Column, Table
from tilescan.experiments.measurements import devices as cells
from tilescan.experiments.papers.ring_self_attention.measure import TRAFFIC

WAYS = {
    "tensor": "tensor parallelism",
    "ring_self_attention": "RSA",
    "ring": "ring attention",
    "ulysses": "Ulysses",
    "linformer": "Linformer, time cut",
}
# Table 4, BERT-Base on P100s of 16 GB: MB and tokens/s a device of tensor parallelism, and of RSA;
# batches of 64 N at 512 tokens, and 64 texts of 256 N tokens (the latter and the speeds recalled).
PUBLISHED_WEAK = {
    ("batch", 1): (8477.28, 9946.15, 8477.53, 9261.04),
    ("batch", 2): (9520.47, 15510.19, 8478.76, 13938.22),
    ("batch", 4): (12232.52, 20701.96, 8481.26, 21269.91),
    ("batch", 8): (None, None, 8490.75, 26401.64),
    ("length", 1): (3707.39, 9752.61, 3707.01, 9340.13),
    ("length", 2): (4993.43, 14195.17, 4670.64, 13144.16),
    ("length", 4): (8175.93, 19879.27, 6601.88, 18243.82),
    ("length", 8): (14862.09, 22330.5, 10536.38, 21625.51),
}
# RSA on 64 devices over tensor parallelism on 12, as many as BERT-Base has heads.
PUBLISHED_LARGEST = {"batch": 13.7, "length": 3.0}
PUBLISHED_SPARSE = 27.0  # the longest text with sparse attention, 32 devices over one
BYTES = 4


def tables(records: Records) -> list[Table]:
    """Table 4, the largest batches and texts, the crossover, bytes, exactness, training."""
    return [
        _weak_table(records, "batch"),
        _weak_table(records, "length"),
        _largest_table(records),
        _sparse_table(records),
        _crossover_table(records),
        _traffic_table(records),
        _exactness_table(records),
        _training_table(records),
    ]


def weak(records: Records, grows: str, way: str) -> dict[int, int]:
    """{devices: bytes of a device}."""
    found = records.select(kind="weak", grows=grows, way=way)
    return _sorted({r.settings["devices"]: r.result["total"] for r in found})


def largest(records: Records, vary: str, way: str, kind: str = "largest") -> dict[int, int]:
    """{devices: the largest batch or length}."""
    found = records.select(kind=kind, vary=vary, way=way)
    return _sorted({r.settings["devices"]: r.result["value"] for r in found})


def _sorted(pairs: dict) -> dict:
    return dict(sorted(pairs.items()))


def crossings(records: Records, what: str) -> dict[int, float | None]:
    """{devices: B L / H from which sequence parallelism needs less}, between measured ones."""
    found = {}
    for n in records.select(kind="crossover").values("devices"):
        points = sorted(
            (r.settings["tokens"], r.result["tensor"][what] - r.result["sequence"][what])
            for r in records.select(kind="crossover", devices=n)
        )
        found[n] = None
        for (x, y), (x2, y2) in zip(points, points[1:], strict=False):
            if y <= 0 < y2:
                found[n] = x + (x2 - x) * -y / (y2 - y)
    return found


def traffic(records: Records) -> list[Record]:
    return sorted(records.select(kind="traffic"), key=lambda r: r.settings["devices"])


def sent(record: Record, name: str, passes: str = "both") -> float | None:
    """Bytes that a device sends."""
    found = record.result.get(name)
    return None if found is None else cells.total_bytes(found[passes])


def formula(record: Record, name: str) -> float:
    """Bytes of both passes; the paper's 8 (N - 1) B Z (L / N) A elements, and those of others."""
    s = record.settings
    N = s["devices"]
    part = BYTES * s["batch"] * s["length"] // N * s["width"]
    return {
        "tensor": 8 * (N - 1) * part,
        "RSA, all-reduce": 8 * (N - 1) * part,
        "RSA, reduce-scatter": 6 * (N - 1) * part,
        "ring": (4 * (N - 1) + 2 * N) * part,
        "ulysses": 8 * (N - 1) / N * part,
    }[name]


def parity(records: Records, dtype: str) -> float | None:
    """The largest distance of the two loss curves."""
    found = list(records.select(kind="training", dtype=dtype))
    if len(found) < 2:
        return None
    return cells.apart(*(r.result["losses"] for r in found[:2]))


def _weak_table(records: Records, grows: str) -> Table:
    rows, about = [], ""
    found = {way: weak(records, grows, way) for way in WAYS}
    found = {way: sizes for way, sizes in found.items() if sizes}
    for record in list(records.select(kind="weak", grows=grows))[:1]:
        s = record.settings
        about = (
            f"{s['layers']} layers of width {s['width']}, {s['heads']} heads, {s['vocab_size']:,} "
            "tokens in the vocabulary, float32."
        )
    for n in sorted({n for sizes in found.values() for n in sizes}):
        record = next(r for r in records.select(kind="weak", grows=grows, devices=n))
        s = record.settings
        row = [str(n), s["batch"], s["length"]]
        one = PUBLISHED_WEAK[grows, 1]
        for i in (0, 2):
            row += [PUBLISHED_WEAK.get((grows, n), (None,) * 4)[i]]
            row += [ratio(row[-1], one[i])]
        for sizes in found.values():
            row += [sizes[n] / 2**20 if n in sizes else None, ratio(sizes.get(n), sizes.get(1))]
        rows.append(row)
    columns = [Column("devices N"), Column("batch"), Column("tokens")]
    for name in ("tensor parallelism", "RSA"):
        columns += [
            Column(name, PUBLISHED, "MB", digits=6),
            Column(f"{name}, over N = 1", PUBLISHED),
        ]
    for way in found:
        columns += [Column(WAYS[way], STATIC, "MiB", digits=6)]
        columns += [Column(f"{WAYS[way]}, over N = 1", STATIC)]
    what = "batches" if grows == "batch" else "texts"
    return Table(
        f"weak-{grows}",
        f"Table 4: memory of a device when {what} grow with the devices",
        columns,
        rows,
        note=f"A training step, planned by the compiler for CPUs and Adam's moments added; nothing "
        f"was run. {about} Tensor parallelism and RSA keep all weights of attention, the other two "
        "work in tiles. Published on P100s, half precision: growth compares, not megabytes. Heads "
        "limit tensor parallelism and Ulysses to divisors of 12.",
    )


def _largest_table(records: Records) -> Table:
    rows, about = [], ""
    for vary in ("batch", "length"):
        tensor, ours = (largest(records, vary, way) for way in ("tensor", "ring_self_attention"))
        most = max(tensor, default=None)
        for record in list(records.select(kind="largest", vary=vary))[:1]:
            s = record.settings
            given = f"{s['length']} tokens" if vary == "batch" else f"batch {s['batch']}"
            about += f" {s['gib']:g} GiB a device, {given}, to {s['tolerance']:.0%}."
        for n in sorted({*tensor, *ours}):
            is_published = n == 64 and most == 12
            rows.append(
                [
                    vary,
                    str(n),
                    tensor.get(n),
                    ours.get(n),
                    ratio(ours.get(n), tensor.get(n)),
                    ratio(ours.get(n), tensor.get(most)),
                    PUBLISHED_LARGEST[vary] if is_published else None,
                ]
            )
    return Table(
        "largest",
        "Figures 3 and 4: the largest batch and the longest text of BERT-Base",
        [
            Column("what"),
            Column("devices"),
            Column("tensor parallelism", STATIC),
            Column("RSA", STATIC),
            Column("RSA / tensor, as many devices", STATIC),
            Column("RSA / tensor on its most devices", STATIC),
            Column("RSA / tensor on its most devices", PUBLISHED),
        ],
        rows,
        note=f"By the compiler's plan of a training step's buffers; nothing was run.{about} Tensor "
        "parallelism takes as many devices as divide 12 heads. RSA as published makes gradients "
        "of the keys of all tokens, B L H, on each device before it sums them: they do not shrink "
        "with N.",
    )


def _sparse_table(records: Records) -> Table:
    sparse, dense = (
        largest(records, "length", way, "sparse") for way in ("linformer", "ring_self_attention")
    )
    rows = [
        [
            str(n),
            sparse[n],
            ratio(sparse[n], sparse.get(1)),
            PUBLISHED_SPARSE if n == 32 else None,
            dense.get(n),
            ratio(dense.get(n), dense.get(1)),
        ]
        for n in sparse
    ]
    about = ""
    for record in list(records.select(kind="sparse"))[:1]:
        s = record.settings
        about = f"Batch {s['batch']}, {s['gib']:g} GiB a device, {s['rows']} rows."
    return Table(
        "sparse",
        "Figure 5: the longest text with attention to a few projected rows",
        [
            Column("devices N"),
            Column("Linformer", STATIC, "tokens"),
            Column("over N = 1", STATIC),
            Column("over N = 1", PUBLISHED),
            Column("RSA", STATIC, "tokens"),
            Column("RSA over N = 1", STATIC),
        ],
        rows,
        note=f"{about} By the compiler's plan of a training step's buffers. Published: more than "
        "114,000 tokens on 32 P100s. The projections, as long as the text, are cut with it.",
    )


def _crossover_table(records: Records) -> Table:
    rows = []
    for n in records.select(kind="crossover").values("devices"):
        found = records.select(kind="crossover", devices=n)
        for record in sorted(found, key=lambda r: r.settings["tokens"]):
            s, r = record.settings, record.result
            unit = BYTES * s["width"] ** 2 * (1 - 1 / n)
            gap = [(r["tensor"][k] - r["sequence"][k]) / unit for k in ("kept", "total")]
            rows.append([str(n), str(s["tokens"]), s["tokens"] - 32, *gap])
    return Table(
        "crossover",
        "An MLP alone: tensor parallelism's memory beyond sequence parallelism's",
        [
            Column("devices N"),
            Column("B L / H"),
            Column("B L / H - 32", PUBLISHED),
            Column("kept between the passes", STATIC),
            Column("planned in all", STATIC),
        ],
        rows,
        note="In units of (1 - 1/N) H² elements, in which the paper's formulas differ by "
        "B L / H - 32: above 0, sequence parallelism needs less. Kept: four times the weights, and "
        "what the traced program reads again in its backward pass. Planned: by the compiler, with "
        "the gradient of the input and what lives in passing.",
    )


def _traffic_table(records: Records) -> Table:
    rows, about = [], ""
    for record in traffic(records):
        s = record.settings
        about = f"Batch {s['batch']}, {s['length']} tokens, width {s['width']}, float32."
        for name in TRAFFIC:
            if name in record.result:
                both, want = sent(record, name), formula(record, name)
                forward = sent(record, name, "forward")
                rows.append(
                    [str(s["devices"]), WAYS.get(name, name), forward / 2**20, both / 2**20,
                     want / 2**20, both / want]
                )  # fmt: skip
    return Table(
        "traffic",
        "What a device sends for a layer",
        [
            Column("devices N"),
            Column("way"),
            Column("forward", STATIC, "MiB"),
            Column("forward and backward", STATIC, "MiB"),
            Column("formula", STATIC, "MiB"),
            Column("counted / formula", STATIC),
        ],
        rows,
        note=f"{about} Counts of compiled programs without gradients of weights; none was run. The "
        "paper's formula, for tensor parallelism and RSA, is 8 (N - 1) B Z (L / N) A elements. A "
        "reduce-scatter in place of the paper's all-reduce takes 6. Ring attention takes "
        "4 (N - 1) + 2 N, Ulysses 8 (N - 1) / N.",
    )


def _exactness_table(records: Records) -> Table:
    rows = []
    for record in sorted(records.select(kind="exactness"), key=lambda r: r.settings["devices"]):
        n = str(record.settings["devices"])
        rows += [[n, way, e["output"], e["gradients"]] for way, e in record.result.items()]
    return Table(
        "exactness",
        "Attention over devices against dense attention of one",
        [
            Column("devices"),
            Column("way"),
            Column("output", MEASURED),
            Column("gradients", MEASURED),
        ],
        rows,
        note="Float64, bidirectional; the largest difference as a part of the largest value.",
    )


def _training_table(records: Records) -> Table:
    rows, about = [], ""
    for record in records.select(kind="training"):
        s, losses = record.settings, record.result["losses"]
        m = s["model"]
        about = (
            f"{m['repeats']} layers, width {m['d_model']}, {s['batch']} texts of {s['length']} "
            f"tokens of a Markov chain, 15% hidden, {s['steps']} steps."
        )
        apart = parity(records, s["dtype"]) if s["parts"] > 1 else None
        rows.append([str(s["parts"]), s["dtype"], losses[0], losses[-1], apart])
    return Table(
        "training",
        "Convergence: guessing hidden tokens with time cut over devices by RSA",
        [
            Column("devices"),
            Column("numbers"),
            Column("first loss", MEASURED, digits=5),
            Column("last loss", MEASURED, digits=5),
            Column("farthest from one device", MEASURED),
        ],
        rows,
        note=f"{about} The largest distance of the two curves; in float32 it is rounding that "
        "training lets grow. Published: curves of BERT-Large over 50,000 steps, beside tensor "
        "parallelism's.",
    )


def figures(records: Records) -> dict[str, str]:
    """Table 4's memory over that of one device, and the largest batches and texts."""
    made, panels, dashed = {}, {}, []
    for grows in ("batch", "length"):
        lines = {}
        for way in ("tensor", "ring_self_attention", "ring", "ulysses"):
            sizes = weak(records, grows, way)
            if sizes:
                lines[WAYS[way]] = (list(sizes), [n / sizes[min(sizes)] for n in sizes.values()])
        if lines:
            for i, way in ((0, "tensor"), (2, "ring_self_attention")):
                found = {n: PUBLISHED_WEAK[grows, n][i] for n in (1, 2, 4, 8)}
                dashed.append(f"{WAYS[way]}, published")
                ratios = [ratio(x, found[1]) for x in found.values()]
                lines[dashed[-1]] = (list(found), ratios)
            panels["batches grow" if grows == "batch" else "texts grow"] = lines
    if panels:
        made["memory-when-work-grows"] = line_chart(
            panels, x_label="devices", y_label="memory of a device, over one device's",
            log_x=True, dashed=dashed,
        )  # fmt: skip
    panels = {}
    for vary, title in (("batch", "largest batch"), ("length", "longest text")):
        found = {way: largest(records, vary, way) for way in ("tensor", "ring_self_attention")}
        lines = {WAYS[w]: (list(x), list(x.values())) for w, x in found.items() if x}
        if lines:
            panels[title] = lines
    if panels:
        made["largest"] = line_chart(
            panels, x_label="devices", y_label="rows, or tokens", log_x=True, log_y=True,
            share_y=False,
        )  # fmt: skip
    return made
