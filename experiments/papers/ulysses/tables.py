"""Ulysses' published numbers, and the tables and figures of its records."""

from tilescan.experiments.harness.figures import line_chart
from tilescan.experiments.harness.records import Record, Records
from tilescan.experiments.harness.statistics import ratio
from tilescan.experiments.harness.tables import MEASURED, PUBLISHED, STATIC, Column, Table
from tilescan.experiments.measurements import devices as cells

WAYS = {
    "ulysses": "Ulysses",
    "megatron_sp": "Megatron-SP",
    "ring_self_attention": "RSA",
    "ring": "ring attention",
}
ATTENTION = {
    "full": "all to all",
    "causal": "causal",
    "gqa": "causal, 4 queries a key-value head",
    "alibi": "causal with ALiBi",
    "window": "sliding window",
    "sparse": "block-sparse",
    "ssd": "none: SSD (Mamba-2)",
}
# Tables 2 and 3: milliseconds of an iteration and TFLOPs a GPU, by GPUs and length (recalled).
PUBLISHED_SCALING = {
    (64, 65536): (9676.8, 161.4),
    (64, 131072): (32432.1, 165.5),
    (128, 131072): (17052.5, 157.4),
    (256, 131072): (9886.7, 136.1),
    (256, 262144): (33486.5, 147.4),
}
# Figure 2: the longest text of GPT-1.2B by GPUs (A100).
PUBLISHED_LONGEST = {1: 8192, 64: 1_048_576}
BYTES = 4


def tables(records: Records) -> list[Table]:
    """Exactness, bytes, longest texts, training, and what only many GPUs can show."""
    return [
        _exactness_table(records),
        _traffic_table(records),
        _longest_table(records),
        _training_table(records),
        _scaling_table(),
    ]


def traffic(records: Records) -> list[Record]:
    """By devices and length."""
    found = records.select(kind="traffic")
    return sorted(found, key=lambda r: (r.settings["devices"], r.settings["length"]))


def sent(record: Record, way: str, passes: str = "forward") -> float | None:
    """Bytes that a device sends."""
    found = record.result.get(way)
    return None if found is None else cells.total_bytes(found[passes])


def formula(record: Record, way: str) -> float | None:
    """Bytes that a device sends in a forward pass: the paper's volumes, sent once."""
    s = record.settings
    P, whole = s["devices"], BYTES * s["length"] * s["width"]
    return {
        "ulysses": 4 * whole * (P - 1) / P**2,
        "megatron_sp": 4 * whole * (P - 1) / P,
        "ring_self_attention": 2 * whole * (P - 1) / P,
        "ring": 2 * whole * (P - 1) / P,
    }.get(way)


def longest(records: Records, way: str) -> dict[int, int]:
    """{devices: tokens}."""
    found = records.select(kind="longest", way=way)
    pairs = {r.settings["devices"]: r.result["length"] for r in found}
    return dict(sorted(pairs.items()))


def parity(records: Records, dtype: str) -> dict[int, float]:
    """{devices: largest distance of the loss curve from one device's}."""
    found = records.select(kind="training", dtype=dtype)
    alone = found.one(parts=1)
    if alone is None:
        return {}
    pairs = {
        r.settings["parts"]: cells.apart(r.result["losses"], alone.result["losses"])
        for r in found
        if r is not alone
    }
    return dict(sorted(pairs.items()))


def _exactness_table(records: Records) -> Table:
    found, rows, about = records.select(kind="exactness"), [], ""
    for kind in [k for k in ATTENTION if len(found.select(attention=k))]:
        for n in found.values("devices"):
            record = found.one(attention=kind, devices=n)
            if record:
                s, r = record.settings, record.result
                about = f"{s['length']} tokens, {s['heads']} heads of {s['dim']}, float32."
                rows.append([ATTENTION[kind], str(n), r["output"], r["gradients"]])
    return Table(
        "exactness",
        "Any attention between two all-to-alls, against one device",
        [
            Column("attention"),
            Column("devices"),
            Column("output", MEASURED),
            Column("gradients", MEASURED),
        ],
        rows,
        note=f"Largest difference as a part of the largest value. {about} Key-value heads are "
        "repeated where they are fewer than devices.",
    )


def _traffic_table(records: Records) -> Table:
    rows, about = [], ""
    for record in traffic(records):
        s = record.settings
        about = f"Width {s['width']:,}, {s['heads']} heads, batch 1, float32."
        row = [str(s["devices"]), f"{s['length']:,}"]
        for way in WAYS:
            count, want = sent(record, way), formula(record, way)
            row += [None if count is None else count / 2**20, ratio(count, want)]
        pair = [sent(record, way) for way in ("megatron_sp", "ulysses")]
        both = [ratio(sent(record, way, "both"), sent(record, way)) for way in WAYS]
        rows.append([*row, ratio(*pair), *both])
    columns = [Column("devices P"), Column("tokens N")]
    for name in WAYS.values():
        columns += [Column(name, STATIC, "MiB"), Column(f"{name} / formula", STATIC)]
    columns.append(Column("Megatron-SP / Ulysses", STATIC))
    columns += [Column(f"{name}, both passes / forward", STATIC) for name in WAYS.values()]
    return Table(
        "traffic",
        "What a device sends in the forward pass of a layer",
        columns,
        rows,
        note=f"{about} Counts of the compiled programs of attention and MLP, none was run. "
        "Formulas, of bytes sent: Ulysses 4 N h (P - 1) / P², Megatron-SP 4 N h (P - 1) / P, rings "
        "2 N h (P - 1) / P; the paper's 4 N h / P and 4 N h are those without the part that stays. "
        "Both passes: without gradients of weights. RSA as published, with all-reduces; its "
        "gradients pass N h (P - 1) / P four times more than its keys.",
    )


def _longest_table(records: Records) -> Table:
    rows, about = [], ""
    found = {way: longest(records, way) for way in ("ulysses", "megatron_sp")}
    for record in list(records.select(kind="longest"))[:1]:
        s = record.settings
        about = (
            f"{s['layers']} layers of width {s['width']:,}, {s['heads']} heads, a vocabulary of "
            f"{s['vocab_size']:,}, float32, {s['gib']:g} GiB a device, to "
            f"{s['tolerance']:.0%}; batch 1, causal, attention in tiles."
        )
    for n in sorted({n for lengths in found.values() for n in lengths}):
        ours, theirs = (found[way].get(n) for way in found)
        each = [None if length is None else length / n for length in (ours, theirs)]
        rows.append(
            [str(n), PUBLISHED_LONGEST.get(n), ours, each[0], theirs, each[1], ratio(ours, theirs)]
        )
    return Table(
        "longest",
        "The longest text that a training step has room for",
        [
            Column("devices"),
            Column("Ulysses with GPT-1.2B on A100s", PUBLISHED, "tokens"),
            Column("Ulysses with ZeRO-3", STATIC, "tokens"),
            Column("of a device", STATIC, "tokens"),
            Column("Megatron-SP", STATIC, "tokens"),
            Column("of a device", STATIC, "tokens"),
            Column("Ulysses / Megatron-SP", STATIC),
        ],
        rows,
        note=f"By the compiler's plan of buffers for CPUs, Adam's moments added; nothing was run. "
        f"{about} Layers are computed again in the backward pass, logits exist for 1,024 tokens "
        "of a device at once. Compare growth: buffers of other compilers differ.",
    )


def _training_table(records: Records) -> Table:
    rows, about = [], ""
    for record in records.select(kind="training"):
        s, losses = record.settings, record.result["losses"]
        m = s["model"]
        about = (
            f"{m['repeats']} layers, width {m['d_model']}, {m['n_heads']} heads, {s['batch']} "
            f"texts of {s['length']} tokens of a Markov chain, {s['steps']} steps."
        )
        apart = parity(records, s["dtype"]).get(s["parts"])
        rows.append([str(s["parts"]), s["dtype"], losses[0], losses[-1], apart])
    return Table(
        "training",
        "Figure 7: the same training with time cut over devices",
        [
            Column("devices"),
            Column("numbers"),
            Column("first loss", MEASURED, digits=5),
            Column("last loss", MEASURED, digits=5),
            Column("farthest from one device", MEASURED),
        ],
        rows,
        note=f"{about} The largest distance of two curves over all steps; in float32 it is "
        "rounding that training lets grow. Published: curves of a GPT-1.3B with 32K tokens "
        "coincide.",
    )


def _scaling_table() -> Table:
    rows = [
        [str(n), f"{length:,}", ms, tflops]
        for (n, length), (ms, tflops) in PUBLISHED_SCALING.items()
    ]
    return Table(
        "scaling",
        "Tables 2 and 3: time of an iteration",
        [
            Column("GPUs"),
            Column("tokens"),
            Column("iteration", PUBLISHED, "ms", digits=6),
            Column("TFLOPs a GPU", PUBLISHED),
        ],
        rows,
        note="Published only, recalled: it takes as many GPUs.",
    )


def figures(records: Records) -> dict[str, str]:
    """Bytes when texts grow with the devices, and the longest texts."""
    made = {}
    found = weak(records)
    if found:
        P = [r.settings["devices"] for r in found]
        lines = {
            name: (P, [(sent(r, way) or 0) / 2**20 or None for r in found])
            for way, name in WAYS.items()
        }
        made["sent-when-texts-grow"] = line_chart(
            {"": lines},
            x_label="devices, and tokens with them",
            y_label="MiB that a device sends, forward",
            log_x=True,
            log_y=True,
        )
    lines = {}
    for way in ("ulysses", "megatron_sp"):
        lengths = longest(records, way)
        if lengths:
            lines[WAYS[way]] = (list(lengths), list(lengths.values()))
    if lines:
        lines["Ulysses, published"] = (list(PUBLISHED_LONGEST), list(PUBLISHED_LONGEST.values()))
        made["longest-text"] = line_chart(
            {"": lines},
            x_label="devices",
            y_label="tokens",
            log_x=True,
            log_y=True,
            dashed=("Ulysses, published",),
        )
    return made


def weak(records: Records) -> list[Record]:
    """The records with the most common length of a device, by devices."""
    found = traffic(records)
    each = [r.settings["length"] // r.settings["devices"] for r in found]
    common = max(set(each), key=lambda n: (each.count(n), n), default=0)
    return [r for r, n in zip(found, each, strict=True) if n == common]
