"""Ulysses' tables and figures."""

import functools

from tilescan.experiments.harness.figures import line_chart
from tilescan.experiments.harness.groups import Group, at, by, first, series
from tilescan.experiments.harness.records import Record, Records
from tilescan.experiments.harness.statistics import over, ratio
from tilescan.experiments.harness.tables import RECALLED, STATIC, Column, Table, columns, table
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
    order = (ATTENTION, exact.values("devices"))
    return [
        exactness_table(
            "Any attention between two all-to-alls, against one device",
            ("attention", "devices"),
            [
                ((ATTENTION[g.key[0]], str(g.key[1])), g.first.result, g)
                for g in by(exact, "attention", "devices", order=order)
            ],
            "Max abs. difference, relative to the largest value. "
            + first(exact, "{length} tokens, {heads} heads of {dim}, float32. ")
            + "Key-value heads are repeated where they are fewer than devices.",
        ),
        traffic_table(records),
        longest_table(records),
        training_table(
            records,
            "Figure 7: the same training with time sharded over devices",
            " and {model[n_heads]} heads",
            "In float32 it is rounding that training lets grow. Published: curves of a GPT-1.3B "
            "with 32K tokens coincide.",
        ),
        table(
            "scaling",
            "Tables 2 and 3: time of an iteration",
            SCALING.items(),
            [
                Column("GPUs", of=lambda row: str(row[0][0])),
                Column("tokens", of=lambda row: f"{row[0][1]:,}"),
                Column("iteration", RECALLED, "ms", digits=6, of=lambda row: row[1][0]),
                Column("TFLOPs a GPU", RECALLED, of=lambda row: row[1][1]),
            ],
            "The paper's alone: it takes as many GPUs.",
        ),
    ]


def traffic(records: Records) -> list[Group]:
    """Returns the record of each number of devices and length."""
    return by(records.select(kind="traffic"), "devices", "length")


def weak(records: Records) -> dict[int, Record]:
    """Returns {devices: the record} with the most common length of a device."""
    found = traffic(records)
    each = [length // devices for devices, length in (g.key for g in found)]
    common = max(set(each), key=lambda n: (each.count(n), n), default=0)
    return {g.key[0]: g.first for g, n in zip(found, each, strict=True) if n == common}


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
    return series(records.select(kind="longest", way=strategy), "devices", "length")


def traffic_table(records: Records) -> Table:
    """Returns what a device sends, by devices and length."""
    sent = lambda s: lambda g: ratio(sent_bytes(g.first, s), MIB)
    share = lambda s: lambda g: ratio(sent_bytes(g.first, s), formula(g.first, s))
    both = lambda s: lambda g: over_forward(g.first, s)
    shown = [
        Column("devices P", of=lambda g: str(g.key[0])),
        Column("tokens N", of=lambda g: f"{g.key[1]:,}"),
    ]
    for s, name in NAMES.items():
        shown.append(Column(name, STATIC, "MiB", of=sent(s)))
        shown.append(Column(f"{name} / formula", STATIC, of=share(s)))
    shown.append(Column("Megatron-SP / Ulysses", STATIC, of=lambda g: over_ulysses(g.first)))
    shown += columns(STATIC, {f"{n}, both passes / forward": both(s) for s, n in NAMES.items()})
    return table(
        "traffic",
        "What a device sends in the forward pass of a layer",
        traffic(records),
        shown,
        first(records.select(kind="traffic"), "Width {width:,}, {heads} heads, batch 1, float32. ")
        + "Counts of the compiled programs of attention and MLP, none was run. Formulas, of bytes "
        "sent: Ulysses 4 N h (P - 1) / P², Megatron-SP 4 N h (P - 1) / P, rings 2 N h (P - 1) / P; "
        "the paper's 4 N h / P and 4 N h are those without the share that stays. Both passes: "
        "without gradients of weights. RSA as published, with all-reduces; its gradients pass "
        "N h (P - 1) / P four times more than its keys.",
    )


def longest_table(records: Records) -> Table:
    """Returns the longest sequences that fit, by devices."""
    ours, theirs = (longest(records, strategy) for strategy in (ULYSSES, MEGATRON))
    each = lambda sizes: at({n: length / n for n, length in sizes.items()})
    records = records.select(kind="longest")
    return table(
        "longest",
        "The longest sequence that a training step has room for",
        by(records, "devices"),
        [
            Column("devices", of=lambda g: str(g.key)),
            Column("Ulysses with GPT-1.2B on A100s", RECALLED, "tokens", of=at(LONGEST)),
            Column("Ulysses with ZeRO-3", STATIC, "tokens", of=at(ours)),
            Column("of a device", STATIC, "tokens", of=each(ours)),
            Column("Megatron-SP", STATIC, "tokens", of=at(theirs)),
            Column("of a device", STATIC, "tokens", of=each(theirs)),
            Column("Ulysses / Megatron-SP", STATIC, of=at(over(ours, theirs))),
        ],
        "By the compiler's plan of buffers for CPUs, Adam's moments added; nothing was run. "
        + first(
            records,
            "{layers} layers of width {width:,}, {heads} heads, a vocabulary of {vocab_size:,}, "
            "float32, {gib:g} GiB a device, to {tolerance:.0%}; batch 1, causal, attention in "
            "tiles. ",
        )
        + "Layers are computed again in the backward pass, logits exist for 1,024 tokens of a "
        "device at once. Heads are as many as 64 devices divide. The paper's: the one GPU's is "
        "read off a figure. Compare growth: buffers of other compilers differ.",
    )


def figures(records: Records) -> dict[str, str]:
    """Returns bytes when sequences grow with the devices, and the longest sequences."""
    found, published = weak(records), "Ulysses, published"
    sent = lambda s: {P: ratio(sent_bytes(r, s), MIB) for P, r in found.items()}
    bytes_ = {name: sent(s) for s, name in NAMES.items() if found}
    if sizes := {NAMES[s]: x for s in (ULYSSES, MEGATRON) if (x := longest(records, s))}:
        sizes[published] = LONGEST
    chart = functools.partial(line_chart, log_x=True, log_y=True)
    x, y = "devices (tokens grow with them)", "sent by a device, forward (MiB)"
    return {
        "traffic": chart({"": bytes_}, x_label=x, y_label=y),
        "longest": chart(
            {"": sizes}, x_label="devices", y_label="longest sequence (tokens)", dashed=(published,)
        ),
    }
