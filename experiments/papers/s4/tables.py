"""S4's published numbers, and the tables and figures of its records."""

from tilescan.experiments.harness.figures import line_chart
from tilescan.experiments.harness.records import Record, Records
from tilescan.experiments.harness.statistics import Spread, ratio, spread
from tilescan.experiments.harness.tables import MEASURED, PUBLISHED, STATIC, Column, Table
from tilescan.experiments.papers.s4.kernels import CAUCHY, DENSE, POWERS, VANDERMONDE

NAMES = {"s4": "S4", "s4d": "S4D", "attention": "Transformer"}
TASKS = {
    "digits": "sequential MNIST",
    "listops": "ListOps",
    "image": "Image",
    "pathfinder": "Pathfinder",
}
# What they are called in `data.tasks`: of others, nothing is published here.
SOURCES = {
    "digits": "sequential_mnist",
    "listops": "listops",
    "image": "lra_image",
    "pathfinder": "pathfinder",
}
# Tables 6 and 4, accuracy in percent.
PUBLISHED_ACCURACY = {
    "digits": {"s4": 99.63, "attention": 98.9},
    "listops": {"s4": 59.60, "attention": 36.37},
    "image": {"s4": 88.65, "attention": 42.44},
    "pathfinder": {"s4": 94.20, "attention": 71.40},
}
# Table 2, dense (LSSL) over S4 by the paper's dimension: time of a step, memory.
PUBLISHED_COST = {128: (9.32 / 4.77, 222 / 5.3), 256: (20.6 / 3.07, 1685 / 12.6)}
PUBLISHED_COST[512] = (140.7 / 4.75, 13140 / 33.5)
PUBLISHED_SPEED = 60.0  # table 8: 48K tokens a second against 0.8K
INITS = {
    "hippo": "HiPPO-LegS (S4)",
    "lin": "S4D-Lin",
    "random_nplr": "random NPLR",
    "random_diagonal": "random diagonal",
}
# A random initialisation and its HiPPO: the same mixer.
PAIRS = {"random_nplr": "hippo", "random_diagonal": "lin"}
WAYS = {DENSE: "dense", CAUCHY: "DPLR", POWERS: "DPLR in blocks", VANDERMONDE: "S4D"}


def tables(records: Records) -> list[Table]:
    """Exactness, tables 2, 6, 4 and 8, and figure 3's ablation; those that have rows."""
    made = [
        _exactness_table(records),
        _cost_table(records),
        _task_table(records, ("digits",), "digits", "Table 6: sequential images"),
        _task_table(
            records,
            ("listops", "image", "pathfinder"),
            "arena",
            "Table 4: Long Range Arena, at reduced sizes",
        ),
        _generation_table(records),
        _init_table(records),
    ]
    return [table for table in made if table.rows]


def by(records: Records, kind: str, *keys: str) -> list[Record]:
    """The records of a kind in the order of some of their settings."""
    return sorted(records.select(kind=kind), key=lambda r: [r.settings[k] for k in keys])


def accuracy(records: Records, split: str = "test", **settings) -> Spread | None:
    """Percent, over seeds; of validation, at the end."""
    found = [r.result[f"{split}_accuracy"] for r in records.select(**settings)]
    return spread(100 * (x[-1] if isinstance(x, list) else x) for x in found)


def token_ms(record: Record, model: str) -> float | None:
    """Milliseconds of a generated token of each text of the batch."""
    whole = record.result[model].get("median_ms")
    return None if whole is None else whole / record.settings["tokens"]


def _exactness_table(records: Records) -> Table:
    rows, columns = [], []
    for record in by(records, "exactness", "length"):
        kernel, mixer = record.result["kernel"], record.result["mixer"]
        columns = [*kernel, *(f"{NAMES[m]}: convolution - recurrence" for m in mixer)]
        rows.append([str(record.settings["length"]), *kernel.values(), *mixer.values()])
    return Table(
        "exactness",
        "Kernels against powers of the HiPPO matrix; convolution against recurrence",
        [Column("length"), *(Column(title, MEASURED, digits=2) for title in columns)],
        rows,
        note="Largest difference over the largest value. The kernels' truth is C A^l B of the "
        "dense real matrix in float64. Layers are in float32, up to the map behind their GELU, one "
        "token at a time against all at once.",
    )


def _cost_table(records: Records) -> Table:
    found = by(records, "cost", "state_dim", "length")
    ways = [way for way in WAYS if any(way in r.result for r in found)]
    rows = []
    for record in found:
        N, results = record.settings["state_dim"], record.result
        times = {way: results.get(way, {}).get("median_ms") for way in ways}
        memory = {way: results.get(way, {}).get("temp_bytes") for way in ways}
        rows.append(
            [
                str(N),
                str(record.settings["length"]),
                *times.values(),
                *(None if b is None else b / 1e6 for b in memory.values()),
                *PUBLISHED_COST.get(N, (None, None)),
                ratio(times.get(DENSE), times.get(CAUCHY)),
                ratio(memory.get(DENSE), memory.get(CAUCHY)),
            ]
        )
    channels = found[0].settings["channels"] if found else 0
    return Table(
        "cost",
        "Table 2: a kernel and its gradient",
        [
            Column("states"),
            Column("length"),
            *(Column(WAYS[way], MEASURED, "ms") for way in ways),
            *(Column(WAYS[way], STATIC, "MB") for way in ways),
            Column("dense / DPLR, time", PUBLISHED),
            Column("dense / DPLR, memory", PUBLISHED),
            Column("dense / DPLR, time", MEASURED),
            Column("dense / DPLR, memory", STATIC),
        ],
        rows,
        note=f"{channels} channels, float32; medians of interleaved rounds; memory is XLA's "
        "temporaries. Dense: all A^l B by doubling, of a matrix per channel. DPLR: Cauchy "
        "products, C as trained. In blocks: what this project's layer does, root L powers on each "
        "side. Published are steps of a whole layer, LSSL over S4, with channels and states of "
        "the row's number.",
    )


def _task_table(records: Records, tasks, name: str, title: str) -> Table:
    rows, about = [], []
    for task in tasks:
        found = records.select(kind="task", name=task)
        for model in [m for m in NAMES if len(found.select(model=m))]:
            record = next(iter(found.select(model=model)))
            rows.append(
                [
                    _task_title(record),
                    NAMES[model],
                    record.result["params"],
                    PUBLISHED_ACCURACY[task].get(model) if _is_own(record) else None,
                    accuracy(found, model=model),
                    accuracy(found, "validation", model=model),
                    accuracy(found, "train", model=model),
                    len(found.select(model=model)),
                ]
            )
        about += [_about(record) for record in list(found)[:1]]
    return Table(
        name,
        title,
        [
            Column("task"),
            Column("model"),
            Column("parameters", MEASURED),
            Column("accuracy", PUBLISHED, "%", digits=4),
            Column("accuracy", MEASURED, "%"),
            Column("validation", MEASURED, "%"),
            Column("training", MEASURED, "%"),
            Column("seeds", MEASURED),
        ],
        rows,
        note=f"{' '.join(about)} All models see the same batches. Training: the last batches that "
        "were logged. S4 reads forwards on MNIST and both ways elsewhere, the Transformer always "
        "both ways, with rotary positions. Not as published: layer norm for batch norm, no "
        "dropout, and widths, depths, lengths and epochs as above.",
    )


def _is_own(record: Record) -> bool:
    return record.settings["task"] == SOURCES[record.settings["name"]]


def _task_title(record: Record) -> str:
    return TASKS[record.settings["name"]] if _is_own(record) else _title(record.settings)


def _about(record: Record) -> str:
    """A sentence on the data and the training of a record."""
    s, t = record.settings, record.settings["train"]
    options = ", ".join(f"{key} {value}" for key, value in s["options"].items())
    pooled = f", {s['pool']} x {s['pool']} pixels averaged" if s["pool"] > 1 else ""
    return (
        f"{_title(s)}{f' ({options})' if options else ''}{pooled}: {t['train.steps']} steps of "
        f"{t['data.batch_size']}, {t['model.repeats']} layers, tested on "
        f"{record.result['test_examples']:,} examples."
    )


def _title(settings) -> str:
    return settings["task"].replace("_", " ")


def _generation_table(records: Records) -> Table:
    found = by(records, "generation", "context")
    rows, note = [], ""
    for record in found:
        s4, attention = (token_ms(record, m) for m in ("s4", "attention"))
        state, cache = (record.result[m]["state_bytes"] / 1e6 for m in ("s4", "attention"))
        context = str(record.settings["context"])
        rows.append([context, attention, s4, ratio(attention, s4), cache, state])
    for record in found[:1]:
        params = {m: record.result[m]["params"] for m in ("s4", "attention")}
        train = record.settings["models"]["s4"]
        note = (
            f"{record.settings['batch']} texts at once, {train['model.repeats']} layers, "
            f"{params['s4']:,} (S4) and {params['attention']:,} parameters (random, float32); "
            f"greedy, {record.settings['tokens']} tokens by one program, median. Published "
            f"(249M parameters, Table 8): S4 is {PUBLISHED_SPEED:g} times faster, 48K against "
            "0.8K tokens/s."
        )
    return Table(
        "generation",
        "Table 8: a generated token against the context before it",
        [
            Column("context"),
            Column("Transformer with a cache", MEASURED, "ms"),
            Column("S4 as a recurrence", MEASURED, "ms"),
            Column("Transformer / S4", MEASURED),
            Column("cache", MEASURED, "MB"),
            Column("state", MEASURED, "MB"),
        ],
        rows,
        note=note,
    )


def _init_table(records: Records) -> Table:
    found = records.select(kind="init")
    rows = []
    for init in INITS:
        for frozen in (False, True):
            chosen = found.select(init=init, frozen=frozen)
            if not len(chosen):
                continue
            rows.append(
                [
                    INITS[init],
                    "frozen" if frozen else "trained",
                    accuracy(chosen),
                    accuracy(chosen, "validation"),
                    accuracy(chosen, "train"),
                    spread(r.result["train_loss"] for r in chosen),
                    len(chosen),
                ]
            )
    about = "".join(_about(record) for record in list(found)[:1])
    return Table(
        "inits",
        "Figure 3: initialisations of the state matrix",
        [
            Column("A at the start"),
            Column("A, B"),
            Column("accuracy", MEASURED, "%"),
            Column("validation", MEASURED, "%"),
            Column("training", MEASURED, "%"),
            Column("training loss", MEASURED),
            Column("seeds", MEASURED),
        ],
        rows,
        note=f"{about} Steps of time are trained in all. Random: normal frequencies of S4D-Lin's "
        "mean square and decays about 1/2, stable, where the paper draws all of a dense matrix; "
        "NPLR has normal P and B too. Published, on CIFAR: HiPPO is more than 15 points above "
        "random in validation, random NPLR no better than random.",
    )


def figures(records: Records) -> dict[str, str]:
    """Time of a token against the context, and of a kernel against the length."""
    made = {}
    found = by(records, "generation", "context")
    if found:
        contexts = [r.settings["context"] for r in found]
        lines = {NAMES[m]: (contexts, [token_ms(r, m) for r in found]) for m in ("attention", "s4")}
        made["token-against-context"] = line_chart(
            {"": lines}, x_label="context (tokens)", y_label="ms a token", log_x=True, log_y=True
        )
    panels = {}
    for N in records.select(kind="cost").values("state_dim"):
        found = [r for r in by(records, "cost", "length") if r.settings["state_dim"] == N]
        lengths = [r.settings["length"] for r in found]
        panels[f"{N} states"] = {
            title: (lengths, [r.result.get(way, {}).get("median_ms") for r in found])
            for way, title in WAYS.items()
        }
    if panels:
        made["kernel-against-length"] = line_chart(
            panels, x_label="length", y_label="ms", log_x=True, log_y=True
        )
    return made
