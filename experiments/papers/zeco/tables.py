"""ZeCO's published numbers, and the tables and figures of its records."""

from tilescan.experiments.harness.figures import line_chart
from tilescan.experiments.harness.records import Record, Records
from tilescan.experiments.harness.statistics import ratio
from tilescan.experiments.harness.tables import LABEL, MEASURED, PUBLISHED, STATIC, Column, Table
from tilescan.experiments.measurements import devices as cells

KINDS = {
    "all_scan": "ZeCO (all_scan)",
    "chain": "LASP-1 (chain)",
    "all_gather": "LASP-2 (all_gather)",
    "log_step": "log-step scan",
}
SOFTMAX = {"ring": "ring attention", "ulysses": "Ulysses"}
# Milliseconds of the primitives by devices: 8K tokens a device, width 4,096, 32 heads; H100s.
PUBLISHED_PRIMITIVE = {
    "all_gather": {8: 0.375, 16: 0.658, 32: 1.616, 64: 2.543, 128: 4.350, 256: 8.514},
    "all_scan": {8: 0.226, 16: 0.297, 32: 0.448, 64: 0.739, 128: 1.272, 256: 2.165},
}
# Milliseconds of the operator of a 1B GLA, 16K tokens a device, 16 heads.
PUBLISHED_OPERATOR = {
    "chain": {8: 22.59, 32: 39.03, 128: 113.71},
    "all_gather": {8: 19.39, 32: 25.72, 128: 35.72},
    "all_scan": {8: 7.32, 32: 7.65, 128: 9.88},
}
PUBLISHED_ALONE = {8: 6.39, 32: 6.44, 128: 6.12}  # data parallelism: nothing is sent
# Tokens per second and GPU, training a 1B GLA with 32K tokens a device.
PUBLISHED_TRAINING = {
    8: (27014, 42946, 47369, 49633),
    64: (12268, 37485, 44468, 48230),
    128: (None, 33327, 43278, 47848),
    256: (None, 25402, 40967, 46588),
}
# Steps before rounding has grown much.
EARLY = 20


def tables(records: Records) -> list[Table]:
    """Exactness, bytes and steps, modelled seconds, training."""
    return [
        _exactness_table(records),
        _traffic_table(records),
        _blocks_table(records),
        _time_table(
            records,
            PUBLISHED_PRIMITIVE,
            "primitive",
            "Communication alone: all-gather of states against All-Scan",
            "8,192 tokens a device, width 4,096, 32 heads, H100s.",
        ),
        _time_table(
            records,
            PUBLISHED_OPERATOR,
            "operator",
            "The operator of a 1B GLA with 16,384 tokens a device",
            "H100s. With nothing to send (data parallelism) it takes "
            + ", ".join(f"{ms:g} ms on {n}" for n, ms in PUBLISHED_ALONE.items())
            + ".",
        ),
        _throughput_table(),
        _training_table(records),
    ]


def by_devices(records: Records, kind: str) -> list[Record]:
    """Records of a kind, the fewest devices first."""
    return sorted(records.select(kind=kind), key=lambda r: r.settings["devices"])


def state_bytes(record: Record) -> int:
    """Of one layer's float32 states."""
    return 4 * record.settings["heads"] * record.settings["dim"] ** 2


def sent_states(record: Record, way: str, passes: str = "forward") -> float | None:
    """What a device sends, in states."""
    if way not in record.result:
        return None
    return cells.total_bytes(record.result[way][passes]) / state_bytes(record)


def finest(records: Records) -> list[Record]:
    """The records of All-Scan with the most blocks."""
    found = by_devices(records, "blocks")
    most = max((r.settings["blocks"] for r in found), default=0)
    return [r for r in found if r.settings["blocks"] == most]


def steps(records: Records, kind: str) -> dict[int, float]:
    """{devices: how many equal messages follow each other}, counted in compiled programs.

    Blocks of All-Scan at the most blocks, states of the others. A ring gathers in P - 1 steps.
    """
    if kind == "all_scan":
        return {r.settings["devices"]: r.result["messages"] for r in finest(records)}
    found = {}
    for r in by_devices(records, "traffic"):
        P = r.settings["devices"]
        chain = kind == "chain"
        found[P] = r.result[kind]["messages"] if chain else round(sent_states(r, kind))
    return found


def modelled(published: dict[int, float], counted: dict[int, float]) -> dict[int, float]:
    """Published times by a line in the counted steps through the first and last of them."""
    known = sorted(P for P in published if P in counted)
    if len(known) < 2:
        return {}
    first, last = known[0], known[-1]
    slope = (published[last] - published[first]) / (counted[last] - counted[first])
    return {P: published[first] + slope * (counted[P] - counted[first]) for P in known}


def parity(records: Records, dtype: str, steps: int | None = None) -> dict[str, float]:
    """{schedule: largest distance of its loss curve from one device's}, over `steps` or all."""
    found = records.select(kind="training", dtype=dtype)
    alone = found.one(schedule="one device")
    if alone is None:
        return {}
    return {
        r.settings["schedule"]: cells.apart(
            r.result["losses"][:steps], alone.result["losses"][:steps]
        )
        for r in found
        if r is not alone
    }


def _exactness_table(records: Records) -> Table:
    rows, about = [], ""
    for record in by_devices(records, "exactness"):
        s = record.settings
        about = f"{s['length']} tokens a device, {s['heads']} heads of {s['dim']}."
        for name, found in record.result.items():
            for part in ("output", "gradients"):
                errors = [found[kind][part] for kind in KINDS]
                rows.append([str(s["devices"]), name, part, *errors])
    return Table(
        "exactness",
        "Gated linear attention over devices against one device",
        [
            Column("devices"),
            Column("numbers, decay"),
            Column("of"),
            *(Column(name, MEASURED) for name in KINDS.values()),
        ],
        rows,
        note=f"Largest difference as a part of the largest value. {about} Decays reach over "
        "several devices; gradients are of queries, keys, values and decays.",
    )


def _traffic_table(records: Records) -> Table:
    rows, about = [], ""
    for record in by_devices(records, "traffic"):
        s = record.settings
        about = (
            f"{s['length']:,} tokens a device, {s['heads']} heads of {s['dim']}, float32: a state "
            f"is {state_bytes(record) / 2**20:g} MiB."
        )
        rows.append(
            [
                str(s["devices"]),
                *(sent_states(record, kind) for kind in (*KINDS, *SOFTMAX)),
                *(record.result[kind]["messages"] for kind in KINDS),
                *(sent_states(record, kind, "both") for kind in ("all_scan", "all_gather")),
            ]
        )
    sent = "sent"
    return Table(
        "traffic",
        "What a device sends in a layer, and messages one after the other",
        [
            Column("devices"),
            *(Column(f"{name} {sent}", STATIC, "states") for name in (KINDS | SOFTMAX).values()),
            *(Column(f"{name} messages", STATIC) for name in KINDS.values()),
            Column("ZeCO sent, with gradient", STATIC, "states"),
            Column("LASP-2 sent, with gradient", STATIC, "states"),
        ],
        rows,
        note=f"{about} Counts of the compiled programs, loops included; none was run. All-Scan's "
        "messages are blocks, here as many as devices, at most as many as a head has key "
        "dimensions. All devices run one program and send in every tick: of what All-Scan and "
        "LASP-1 move, one state a device is needed. LASP-2 and the log-step scan send decays too. "
        "A gathered state passes every link of a ring: P - 1 steps in one collective. Ulysses "
        "needs a head for each device.",
    )


def _blocks_table(records: Records) -> Table:
    rows = []
    for record in by_devices(records, "blocks"):
        s, r = record.settings, record.result
        P, K = s["devices"], s["blocks"]
        rows.append(
            [
                str(P),
                str(K),
                r["messages"],
                1 + (P - 1) / K,
                r["messages"] / K,
                r["useful_bytes"] / r["state_bytes"],
                r["bytes"] / r["state_bytes"],
                ratio(r["bytes"], r["useful_bytes"]),
            ]
        )
    return Table(
        "blocks",
        "All-Scan by the number of blocks K",
        [
            Column("devices P"),
            Column("blocks K"),
            Column("ticks", STATIC),
            Column("critical path, 1 + (P - 1) / K", PUBLISHED, "states"),
            Column("critical path, ticks / K", STATIC, "states"),
            Column("needed of a device", STATIC, "states"),
            Column("moved by a device", STATIC, "states"),
            Column("moved / needed", STATIC),
        ],
        rows,
        note="Ticks and moved bytes are counts of compiled programs: P + K - 2 ticks, of a block "
        "each. Needed: by a replay of the schedule, the blocks that a device has to send. Devices "
        "that have none move a dummy, since all of them run one program.",
    )


def _time_table(records: Records, published, name: str, title: str, about: str) -> Table:
    models = {kind: modelled(times, steps(records, kind)) for kind, times in published.items()}
    rows = []
    for P in sorted({P for times in published.values() for P in times}):
        row = [str(P)]
        for kind, times in published.items():
            row += [times.get(P), models[kind].get(P)]
        rows.append(row)
    columns = [Column("GPUs")]
    for kind in published:
        columns += [
            Column(KINDS[kind], PUBLISHED, "ms"),
            Column(f"{KINDS[kind]}, modelled", STATIC, "ms"),
        ]
    return Table(
        name,
        title,
        columns,
        rows,
        note=f"{about} No time of ours. Modelled: a line through the first and the last published "
        "time, in the steps counted in compiled programs (P - 1 states; of All-Scan, blocks); what "
        "lies between is predicted.",
    )


def _throughput_table() -> Table:
    rows = []
    for P, (lasp1, lasp2, zeco, alone) in PUBLISHED_TRAINING.items():
        rows.append([str(P), lasp1, lasp2, zeco, alone, ratio(zeco, lasp2), ratio(zeco, alone)])
    names = (KINDS["chain"], KINDS["all_gather"], KINDS["all_scan"], "data parallelism")
    return Table(
        "throughput",
        "Training a 1B GLA with 32,768 tokens a GPU",
        [
            Column("GPUs"),
            *(Column(name, PUBLISHED, "tokens/s a GPU") for name in names),
            Column("ZeCO / LASP-2", PUBLISHED),
            Column("ZeCO / data parallelism", PUBLISHED),
        ],
        rows,
        note="Published only: it takes as many GPUs.",
    )


def _training_table(records: Records) -> Table:
    rows, about = [], ""
    for record in records.select(kind="training"):
        s, losses = record.settings, record.result["losses"]
        m, kind = s["model"], s["schedule"]
        about = (
            f"{m['repeats']} layers of GLA and MLP, width {m['d_model']}, {s['batch']} texts of "
            f"{s['length']} tokens of a Markov chain, {s['steps']} steps."
        )
        early, apart = (parity(records, s["dtype"], n).get(kind) for n in (EARLY, None))
        name = KINDS.get(kind, kind)
        rows.append([name, s["dtype"], str(s["parts"]), losses[0], losses[-1], early, apart])
    return Table(
        "training",
        "The same training with time cut over devices",
        [
            Column("schedule"),
            Column("numbers"),
            Column("devices", LABEL),
            Column("first loss", MEASURED, digits=5),
            Column("last loss", MEASURED, digits=5),
            Column(f"from one device, {EARLY} steps", MEASURED),
            Column("from one device, all steps", MEASURED),
        ],
        rows,
        note=f"{about} The largest distance of the two curves. The first difference is rounding, "
        "also under float64 layers, whose norms, logits and gradients are float32; training "
        "multiplies it about tenfold every 12 steps, alike for all schedules.",
    )


def figures(records: Records) -> dict[str, str]:
    """Bytes against devices, and the published times beside the modelled ones."""
    made = {}
    found = by_devices(records, "traffic")
    if found:
        P = [r.settings["devices"] for r in found]
        lines = {
            name: (P, [sent_states(r, kind) for r in found])
            for kind, name in (KINDS | SOFTMAX).items()
        }
        made["sent-against-devices"] = line_chart(
            {"": lines},
            x_label="devices",
            y_label="states that a device sends, forward",
            log_x=True,
            log_y=True,
        )
    panels, dashed = {}, []
    for title, published in (
        ("primitive", PUBLISHED_PRIMITIVE),
        ("operator", PUBLISHED_OPERATOR),
    ):
        lines = {}
        for kind, times in published.items():
            model = modelled(times, steps(records, kind))
            lines[f"{KINDS[kind]}, published"] = (list(times), list(times.values()))
            dashed.append(f"{KINDS[kind]}, modelled")
            lines[dashed[-1]] = (list(model), list(model.values()))
        panels[title] = lines
    made["published-times"] = line_chart(
        panels,
        x_label="GPUs",
        y_label="ms",
        log_x=True,
        log_y=True,
        dashed=dashed,
        share_y=False,
    )
    return made
