"""ZeCO's tables and figures."""

import functools
from collections.abc import Mapping
from typing import NamedTuple

from tilescan.experiments.harness.figures import line_chart
from tilescan.experiments.harness.groups import by, first
from tilescan.experiments.harness.records import Record, Records
from tilescan.experiments.harness.statistics import ratio
from tilescan.experiments.harness.tables import SECONDARY, STATIC, Column, Table, columns, table
from tilescan.experiments.measurements.exactness import PARTS, exactness_table
from tilescan.experiments.measurements.sharded_training import DEVICES, DTYPE, training_table
from tilescan.experiments.measurements.traffic import sent_bytes
from tilescan.experiments.papers.zeco.published import ALONE, OPERATOR, PRIMITIVE, TRAINING

KINDS = {
    "all_scan": "ZeCO (all_scan)",
    "chain": "LASP-1 (chain)",
    "all_gather": "LASP-2 (all_gather)",
    "log_step": "log-step scan",
}
SOFTMAX = {"ring": "ring attention", "ulysses": "Ulysses"}
TIMES = {"primitive": PRIMITIVE, "operator": OPERATOR}
SCHEDULE = Column(
    "schedule", of=lambda group: KINDS.get(group.first.settings["schedule"], "one device")
)
EARLY = 20  # steps before rounding has grown much


def tables(records: Records) -> list[Table]:
    """Returns exactness, bytes and steps, modelled seconds, throughput, and training."""
    alone = ", ".join(f"{ms:g} ms on {n}" for n, ms in ALONE.items())
    return [
        exactness_table(
            "Gated linear attention over devices against one device",
            ("devices", "dtype, decay", "of"),
            [
                ((str(P), name, part), {kind: found[kind][part] for kind in KINDS}, r)
                for P, r in by_devices(records, "exactness").items()
                for name, found in r.result.items()
                for part in PARTS
            ],
            "Max abs. difference, relative to the largest value. "
            + first(
                records.select(kind="exactness"),
                "{length} tokens a device, {heads} heads of {dim}. ",
            )
            + "Decays reach over several devices; gradients are of queries, keys, values and "
            "decays.",
            KINDS,
        ),
        traffic_table(records),
        blocks_table(records),
        time_table(
            records,
            "primitive",
            "Communication alone: all-gather of states against All-Scan",
            "8,192 tokens a device, width 4,096, 32 heads, H100s.",
        ),
        time_table(
            records,
            "operator",
            "The operator of a 1B GLA with 16,384 tokens a device",
            f"H100s. With nothing to send (data parallelism) it takes {alone}.",
        ),
        throughput_table(),
        training_table(
            records,
            "The same training with time sharded over devices",
            ", GLA and MLP",
            "The first difference is rounding, also under float64 layers, whose norms, logits and "
            "gradients are float32; training multiplies it about tenfold every 12 steps, alike for "
            "all schedules.",
            labels=(SCHEDULE, DTYPE, DEVICES),
            differences={
                f"from one device, {EARLY} steps": EARLY,
                "from one device, all steps": None,
            },
            setting="schedule",
        ),
    ]


def by_devices(records: Records, kind: str) -> dict[int, Record]:
    """Returns {devices: the record} of a kind, the fewest devices first."""
    return {g.key: g.first for g in by(records.select(kind=kind), "devices")}


def sent_states(record: Record, strategy: str, passes: str = "forward") -> float | None:
    """Returns what a device sends, in float32 states of a layer."""
    state = 4 * record.settings["heads"] * record.settings["dim"] ** 2
    return ratio(sent_bytes(record, strategy, passes), state)


class Scan(NamedTuple):
    """All-Scan alone on P devices in K blocks: its ticks, and states of a device."""

    P: int
    K: int
    ticks: int
    needed: float
    moved: float
    record: Record

    @property
    def path(self) -> float:
        """The critical path, in states, as published."""
        return 1 + (self.P - 1) / self.K


def scans(records: Records) -> list[Scan]:
    """Returns the programs of All-Scan alone, the fewest devices first."""
    found = []
    for r in (r for g in by(records.select(kind="blocks"), "devices") for r in g.records):
        states = (r.result[key] / r.result["state_bytes"] for key in ("useful_bytes", "bytes"))
        P, K = r.settings["devices"], r.settings["blocks"]
        found.append(Scan(P, K, r.result["messages"], *states, record=r))
    return found


def finest(records: Records) -> dict[int, Scan]:
    """Returns {devices: All-Scan with the most blocks}."""
    most = max(records.values("blocks"), default=0)
    return {scan.P: scan for scan in scans(records) if scan.K == most}


def steps(records: Records, kind: str) -> dict[int, float]:
    """Returns {devices: how many equal messages follow each other}, counted in programs.

    Blocks of All-Scan at the most blocks, states of the others. A ring gathers in P - 1 steps.
    """
    if kind == "all_scan":
        return {P: scan.ticks for P, scan in finest(records).items()}
    count = lambda r: r.result[kind]["messages"] if kind == "chain" else round(sent_states(r, kind))
    return {P: count(r) for P, r in by_devices(records, "traffic").items()}


def modelled(published: Mapping[int, float], counted: Mapping[int, float]) -> dict[int, float]:
    """Returns times by a line in the counted steps through the first and last published one."""
    known = sorted(P for P in published if P in counted)
    if len(known) < 2:
        return {}
    first, last = known[0], known[-1]
    slope = (published[last] - published[first]) / (counted[last] - counted[first])
    return {P: published[first] + slope * (counted[P] - counted[first]) for P in known}


def traffic_table(records: Records) -> Table:
    """Returns what a device sends, by devices."""
    sent = lambda s, passes="forward": lambda r: sent_states(r, s, passes)
    messages = lambda s: lambda r: r.result[s]["messages"]
    both = {
        "ZeCO sent, with gradient": sent("all_scan", "both"),
        "LASP-2 sent, with gradient": sent("all_gather", "both"),
    }
    sizes = {f"{n} sent": sent(s) for s, n in (KINDS | SOFTMAX).items()}
    return table(
        "traffic",
        "What a device sends in a layer, and messages one after the other",
        by_devices(records, "traffic").values(),
        [
            Column("devices", of=lambda r: str(r.settings["devices"])),
            *columns(STATIC, sizes, "states"),
            *columns(STATIC, {f"{n} messages": messages(s) for s, n in KINDS.items()}),
            *columns(STATIC, both, "states"),
        ],
        first(
            records.select(kind="traffic"),
            "{length:,} tokens a device, {heads} heads of {dim}, float32: a state is {mib:g} MiB. ",
            mib=lambda s: 4 * s["heads"] * s["dim"] ** 2 / 2**20,
        )
        + "Counts of the compiled programs, loops included; none was run. All-Scan's messages are "
        "blocks, here as many as devices, at most as many as a head has key dimensions. All "
        "devices run one program and send in every tick: of what All-Scan and LASP-1 move, one "
        "state a device is needed. LASP-2 and the log-step scan send decays too. A gathered state "
        "passes every link of a ring: P - 1 steps in one collective. Ulysses needs a head for each "
        "device.",
    )


def blocks_table(records: Records) -> Table:
    """Returns All-Scan's critical path and volume, by devices and blocks."""
    return table(
        "blocks",
        "All-Scan by the number of blocks K",
        scans(records),
        [
            Column("devices P", of=lambda s: str(s.P)),
            Column("blocks K", of=lambda s: str(s.K)),
            Column("ticks", STATIC, of=lambda s: s.ticks),
            Column("critical path, 1 + (P - 1) / K", SECONDARY, "states", of=lambda s: s.path),
            Column("critical path, ticks / K", STATIC, "states", of=lambda s: s.ticks / s.K),
            Column("needed of a device", STATIC, "states", of=lambda s: s.needed),
            Column("moved by a device", STATIC, "states", of=lambda s: s.moved),
            Column("moved / needed", STATIC, of=lambda s: ratio(s.moved, s.needed)),
        ],
        "Ticks and moved bytes are counts of compiled programs: P + K - 2 ticks, of a block each. "
        "Needed: by a replay of the schedule, the blocks that a device has to send. Devices that "
        "have none move a dummy, since all of them run one program.",
    )


def time_table(records: Records, name: str, title: str, about: str) -> Table:
    """Returns published times beside times modelled from counted steps."""
    shown = [Column("GPUs", of=str)]
    for kind, times in TIMES[name].items():
        model = modelled(times, steps(records, kind))
        shown.append(Column(KINDS[kind], SECONDARY, "ms", of=times.get))
        shown.append(Column(f"{KINDS[kind]}, modelled", STATIC, "ms", of=model.get))
    return table(
        name,
        title,
        sorted({P for times in TIMES[name].values() for P in times}),
        shown,
        f"{about} No time of ours. Modelled: a line through the first and the last published time, "
        "in the steps counted in compiled programs (P - 1 states; of All-Scan, blocks); what lies "
        "between is predicted.",
    )


def throughput_table() -> Table:
    """Returns published tokens per second."""
    speed = lambda kind: lambda P: TRAINING[P].get(kind)
    over = lambda kind: lambda P: TRAINING[P]["all_scan"] / TRAINING[P][kind]
    speeds = {KINDS.get(kind, "data parallelism"): speed(kind) for kind in TRAINING[8]}
    shares = {"ZeCO / LASP-2": over("all_gather"), "ZeCO / data parallelism": over("data")}
    return table(
        "throughput",
        "Training a 1B GLA with 32,768 tokens a GPU",
        TRAINING,
        [
            Column("GPUs", of=str),
            *columns(SECONDARY, speeds, "tokens/s a GPU"),
            *columns(SECONDARY, shares),
        ],
        "Published only: it takes as many GPUs.",
    )


def figures(records: Records) -> dict[str, str]:
    """Returns bytes against devices, and the published times beside the modelled ones."""
    found = by_devices(records, "traffic")
    sent = lambda s: {P: sent_states(r, s) for P, r in found.items()}
    states = {name: sent(s) for s, name in (KINDS | SOFTMAX).items() if found}
    panels = {title: {} for title in TIMES}
    for title, published in TIMES.items():
        for kind, times in published.items():
            panels[title][f"{KINDS[kind]}, published"] = times
            panels[title][f"{KINDS[kind]}, modelled"] = modelled(times, steps(records, kind))
    chart = functools.partial(line_chart, log_x=True, log_y=True)
    y, dashed = "states sent by a device, forward", [f"{n}, modelled" for n in KINDS.values()]
    return {
        "traffic": chart({"": states}, x_label="devices", y_label=y),
        "primitive": chart(
            panels, x_label="GPUs", y_label="time (ms)", dashed=dashed, share_y=False
        ),
    }
