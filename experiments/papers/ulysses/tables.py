"""Ulysses' tables and figures."""

from tilescan.experiments.harness.figures import line_chart
from tilescan.experiments.harness.groups import Group, by, first
from tilescan.experiments.harness.records import Record, Records
from tilescan.experiments.harness.statistics import ratio
from tilescan.experiments.harness.tables import (
    PUBLISHED,
    STATIC,
    Column,
    Table,
    columns,
    table,
)
from tilescan.experiments.measurements.exactness import exactness_table
from tilescan.experiments.measurements.sharded_training import training_table
from tilescan.experiments.measurements.traffic import MIB, over_forward, sent_bytes
from tilescan.experiments.papers.ulysses.published import LONGEST, SCALING

ULYSSES, MEGATRON = "ulysses", "megatron_sp"
NAMES = {
    ULYSSES: "Ulysses",
    MEGATRON: "Megatron-SP",
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
BYTES = 4


def tables(records: Records) -> list[Table]:
    """Returns exactness, bytes, longest sequences, training, and what only many GPUs can show."""
    exact = records.select(kind="exactness")
    return [
        exactness_table(
            "Any attention between two all-to-alls, against one device",
            ("attention", "devices"),
            [
                ((ATTENTION[g.key[0]], str(g.key[1])), g.first.result, g)
                for g in by(
                    exact, "attention", "devices", order=(ATTENTION, exact.values("devices"))
                )
            ],
            "Largest difference as a part of the largest value. "
            + first(exact, "{length} tokens, {heads} heads of {dim}, float32. ")
            + "Key-value heads are repeated where they are fewer than devices.",
        ),
        traffic_table(records),
        longest_table(records),
        training_table(
            records,
            "Figure 7: the same training with time cut over devices",
            first(
                records.select(kind="training"),
                "{model[repeats]} layers, width {model[d_model]}, {model[n_heads]} heads, {batch} "
                "texts of {length} tokens of a Markov chain, {steps} steps. ",
            )
            + "The largest distance of two curves over all steps; in float32 it is rounding that "
            "training lets grow. Published: curves of a GPT-1.3B with 32K tokens coincide.",
            differences={"farthest from one device": None},
        ),
        table(
            "scaling",
            "Tables 2 and 3: time of an iteration",
            SCALING.items(),
            [
                Column("GPUs", of=lambda row: str(row[0][0])),
                Column("tokens", of=lambda row: f"{row[0][1]:,}"),
                Column("iteration", PUBLISHED, "ms", digits=6, of=lambda row: row[1][0]),
                Column("TFLOPs a GPU", PUBLISHED, of=lambda row: row[1][1]),
            ],
            "Published only, recalled: it takes as many GPUs.",
        ),
    ]


def traffic(records: Records) -> list[Group]:
    """Returns the record of each number of devices and length."""
    return by(records.select(kind="traffic"), "devices", "length")


def weak(records: Records) -> list[Record]:
    """Returns the records with the most common length of a device, by devices."""
    found = traffic(records)
    each = [length // devices for devices, length in (g.key for g in found)]
    common = max(set(each), key=lambda n: (each.count(n), n), default=0)
    return [g.first for g, n in zip(found, each, strict=True) if n == common]


def formula(record: Record, strategy: str) -> float:
    """Returns bytes that a device sends in a forward pass: the paper's volumes, sent once."""
    s = record.settings
    P, whole = s["devices"], BYTES * s["length"] * s["width"]
    return {
        ULYSSES: 4 * whole * (P - 1) / P**2,
        MEGATRON: 4 * whole * (P - 1) / P,
        "ring_self_attention": 2 * whole * (P - 1) / P,
        "ring": 2 * whole * (P - 1) / P,
    }[strategy]


def over_ulysses(record: Record) -> float | None:
    """Returns what Megatron-SP sends over what Ulysses sends, forward."""
    return ratio(*(sent_bytes(record, strategy) for strategy in (MEGATRON, ULYSSES)))


def longest(records: Records, strategy: str) -> dict[int, int]:
    """Returns {devices: tokens of the longest sequence}."""
    found = records.select(kind="longest", way=strategy)
    return {g.key: g.first.result["length"] for g in by(found, "devices")}


def traffic_table(records: Records) -> Table:
    """Returns what a device sends, by devices and length."""
    shown = [
        Column("devices P", of=lambda g: str(g.key[0])),
        Column("tokens N", of=lambda g: f"{g.key[1]:,}"),
    ]
    for s, name in NAMES.items():
        count = lambda g, s=s: sent_bytes(g.first, s)
        share = lambda g, s=s: ratio(sent_bytes(g.first, s), formula(g.first, s))
        shown.append(Column(name, STATIC, "MiB", of=lambda g, count=count: ratio(count(g), MIB)))
        shown.append(Column(f"{name} / formula", STATIC, of=share))
    shown.append(Column("Megatron-SP / Ulysses", STATIC, of=lambda g: over_ulysses(g.first)))
    both = lambda s: lambda g: over_forward(g.first, s)
    shown += columns(STATIC, {f"{n}, both passes / forward": both(s) for s, n in NAMES.items()})
    return table(
        "traffic",
        "What a device sends in the forward pass of a layer",
        traffic(records),
        shown,
        first(records.select(kind="traffic"), "Width {width:,}, {heads} heads, batch 1, float32. ")
        + "Counts of the compiled programs of attention and MLP, none was run. Formulas, of bytes "
        "sent: Ulysses 4 N h (P - 1) / P², Megatron-SP 4 N h (P - 1) / P, rings 2 N h (P - 1) / P; "
        "the paper's 4 N h / P and 4 N h are those without the part that stays. Both passes: "
        "without gradients of weights. RSA as published, with all-reduces; its gradients pass "
        "N h (P - 1) / P four times more than its keys.",
    )


def longest_table(records: Records) -> Table:
    """Returns the longest sequences that fit, by devices."""
    ours, theirs = (longest(records, strategy) for strategy in (ULYSSES, MEGATRON))
    records = records.select(kind="longest")
    each = lambda sizes: lambda g: ratio(sizes.get(g.key), g.key)
    static = {
        "Ulysses with ZeRO-3": lambda g: ours.get(g.key),
        "of a device": each(ours),
        "Megatron-SP": lambda g: theirs.get(g.key),
    }
    share = lambda g: ratio(ours.get(g.key), theirs.get(g.key))
    return table(
        "longest",
        "The longest text that a training step has room for",
        by(records, "devices"),
        [
            Column("devices", of=lambda g: str(g.key)),
            Column(
                "Ulysses with GPT-1.2B on A100s",
                PUBLISHED,
                "tokens",
                of=lambda g: LONGEST.get(g.key),
            ),
            *columns(STATIC, static, "tokens"),
            Column("of a device", STATIC, "tokens", of=each(theirs)),
            Column("Ulysses / Megatron-SP", STATIC, of=share),
        ],
        "By the compiler's plan of buffers for CPUs, Adam's moments added; nothing was run. "
        + first(
            records,
            "{layers} layers of width {width:,}, {heads} heads, a vocabulary of {vocab_size:,}, "
            "float32, {gib:g} GiB a device, to {tolerance:.0%}; batch 1, causal, attention in "
            "tiles. ",
        )
        + "Layers are computed again in the backward pass, logits exist for 1,024 tokens of a "
        "device at once. Compare growth: buffers of other compilers differ.",
    )


def figures(records: Records) -> dict[str, str]:
    """Returns bytes when sequences grow with the devices, and the longest sequences."""
    made, found = {}, weak(records)
    if found:
        P = [r.settings["devices"] for r in found]
        made["sent-when-texts-grow"] = line_chart(
            {"": {n: (P, [ratio(sent_bytes(r, s), MIB) for r in found]) for s, n in NAMES.items()}},
            x_label="devices, and tokens with them",
            y_label="MiB that a device sends, forward",
            log_x=True,
            log_y=True,
        )
    lines = {NAMES[s]: x for s in (ULYSSES, MEGATRON) if (x := longest(records, s))}
    if lines:
        lines["Ulysses, published"] = LONGEST
        made["longest-text"] = line_chart(
            {"": {name: (list(x), list(x.values())) for name, x in lines.items()}},
            x_label="devices",
            y_label="tokens",
            log_x=True,
            log_y=True,
            dashed=("Ulysses, published",),
        )
    return made
