"""S4's tables and figures."""

from collections.abc import Mapping
from typing import Any

from tilescan.experiments.harness import tables as t
from tilescan.experiments.harness.figures import line_figure, panel_figure
from tilescan.experiments.harness.groups import Group, by, first
from tilescan.experiments.harness.records import Record, Records
from tilescan.experiments.harness.statistics import Spread, ratio, spread
from tilescan.experiments.harness.tables import Column, Table, columns, table
from tilescan.experiments.measurements.state_space_kernels import CAUCHY, DENSE, POWERS, VANDERMONDE
from tilescan.experiments.measurements.timing import measured
from tilescan.experiments.papers.s4.published import ACCURACY, COST, SPEED

NAMES = {"s4": "S4", "s4d": "S4D", "attention": "Transformer"}
ARENA = {"listops": "ListOps", "image": "Image", "pathfinder": "Pathfinder"}
TASKS = {"digits": "sequential MNIST", **ARENA}
# What they are called in `data.tasks`: of others, nothing is published here.
SOURCES = {**{name: name for name in ARENA}, "digits": "sequential_mnist", "image": "lra_image"}
INITS = {
    "hippo": "HiPPO-LegS (S4)",
    "random_nplr": "random NPLR",
    "dense_hippo": "HiPPO-LegS, dense",
    "dense_random": "random Gaussian, dense",
    "random_diagonal": "random diagonal",
}
STRATEGIES = {DENSE: "dense", CAUCHY: "DPLR", POWERS: "DPLR in blocks", VANDERMONDE: "S4D"}


def tables(records: Records) -> list[Table]:
    """Returns exactness, tables 2, 6, 4 and 8, and the ablation of figures 3 and 4a."""
    tasks = records.kind("task")
    return [
        exactness_table(records.kind("exactness")),
        cost_table(records.kind("cost")),
        task_table(tasks, ("digits",), "digits", "Table 6: sequential images"),
        task_table(tasks, tuple(ARENA), "arena", "Table 4: Long Range Arena, at reduced sizes"),
        generation_table(records.kind("generation")),
        init_table(records.kind("init")),
    ]


def accuracy(group: Group | Records, split: str = "test", **settings: Any) -> Spread | None:
    """Returns the accuracy in percent over seeds; of validation, at the end."""
    records = group.records if isinstance(group, Group) else group
    found = [r.result[f"{split}_accuracy"] for r in records.select(**settings)]
    return spread(100 * (x[-1] if isinstance(x, list) else x) for x in found)


def dense_over_dplr(group: Group, field: str) -> float | None:
    """Returns how many times the DPLR kernel's time or memory the dense one takes."""
    return ratio(*(measured(group.first, strategy, field) for strategy in (DENSE, CAUCHY)))


def token_ms(group: Group, model: str) -> float | None:
    """Returns the milliseconds of a generated token of each sequence of the batch."""
    return ratio(measured(group.first, model), group.first.settings["tokens"])


def speed_up(group: Group) -> float | None:
    """Returns the time of a token, Transformer / S4."""
    return ratio(token_ms(group, "attention"), token_ms(group, "s4"))


def exactness_table(records: Records) -> Table:
    """Returns errors of kernels and of layers by length."""
    parts = {"kernel": "{}".format, "mixer": lambda m: f"{NAMES[m]}: convolution - recurrence"}
    errors = {
        title(name): lambda g, part=part, name=name: g.first.result[part][name]
        for record in list(records)[:1]
        for part, title in parts.items()
        for name in record.result[part]
    }
    return table(
        "exactness",
        "Kernels against powers of the HiPPO matrix; convolution against recurrence",
        by(records, "length"),
        [Column("length", of=lambda g: str(g.key)), *columns(t.MEASURED, errors, digits=2)],
        "Largest difference over the largest value. The kernels' truth is C A^l B of the "
        "dense real matrix in float64. Layers are in float32, up to the map behind their GELU, one "
        "token at a time against all at once.",
    )


def cost_table(records: Records) -> Table:
    """Returns time and memory of kernels by state dim and length."""
    known = [s for s in STRATEGIES if any(s in r.result for r in records)]
    times = {STRATEGIES[s]: lambda g, s=s: measured(g.first, s) for s in known}
    megabytes = lambda s: lambda g: ratio(measured(g.first, s, "temp_bytes"), 1e6)
    memory = {STRATEGIES[s]: megabytes(s) for s in known}
    longest, none = max(records.values("length"), default=None), (None, None)
    published = lambda i: lambda g: (COST.get(g.key[0], none) if g.key[1] == longest else none)[i]
    over = lambda field: lambda g: dense_over_dplr(g, field)
    return table(
        "cost",
        "Table 2: a kernel and its gradient",
        by(records, "state_dim", "length"),
        [
            Column("states", of=lambda g: str(g.key[0])),
            Column("length", of=lambda g: str(g.key[1])),
            *columns(t.MEASURED, times, "ms"),
            *columns(t.STATIC, memory, "MB"),
            Column("dense / DPLR, time", t.PUBLISHED, of=published(0)),
            Column("dense / DPLR, memory", t.PUBLISHED, of=published(1)),
            Column("dense / DPLR, time", t.MEASURED, of=over("median_ms")),
            Column("dense / DPLR, memory", t.STATIC, of=over("temp_bytes")),
        ],
        first(records, "{channels} channels, float32; ")
        + "medians of interleaved rounds; memory is XLA's temporaries. Dense: all A^l B by "
        "doubling, of a matrix per channel. DPLR: Cauchy products, C as trained. In blocks: what "
        "this project's layer does, root L powers on each side. Published are steps of a whole "
        "layer, LSSL over S4, with as many channels as the row has states, which are the LSSL's "
        "(S4 has half of them): one pair for each number of channels, beside the longest kernel.",
    )


def task_table(records: Records, tasks: tuple[str, ...], name: str, title: str) -> Table:
    """Returns accuracies of all models on some tasks."""
    own = lambda s: s["task"] == SOURCES[s["name"]]
    called = lambda s: TASKS[s["name"]] if own(s) else _task(s)
    published = lambda s: ACCURACY[s["name"]].get(s["model"]) if own(s) else None
    about = " ".join(_about(g.first) for g in by(records, "name", order=(tasks,)))
    return table(
        name,
        title,
        by(records, "name", "model", order=(tasks, NAMES)),
        [
            Column("task", of=lambda g: called(g.first.settings)),
            Column("model", of=lambda g: NAMES[g.key[1]]),
            Column("parameters", t.MEASURED, of=lambda g: g.first.result["params"]),
            Column("accuracy", t.PUBLISHED, "%", 4, lambda g: published(g.first.settings)),
            *_accuracies(),
            Column("seeds", t.MEASURED, of=len),
        ],
        f"{about} All models see the same batches. Training: the last batches that "
        "were logged. S4 reads forward on MNIST and in both directions elsewhere, the Transformer "
        "always in both, with rotary positions. Learning rates were chosen on MNIST alone. Not as "
        "published: layer norm for batch norm, no "
        "dropout, and widths, depths, lengths and epochs as above.",
    )


def init_table(records: Records) -> Table:
    """Returns accuracies by what A starts from, and whether it is trained."""
    about = "".join(_about(record) for record in list(records)[:1])
    return table(
        "inits",
        "Figures 3 and 4a: initializations of the state matrix",
        by(records, "init", "frozen", order=(INITS, (False, True))),
        [
            Column("A at the start", of=lambda g: INITS[g.key[0]]),
            Column("A, B", of=lambda g: "frozen" if g.key[1] else "trained"),
            Column("parameters", t.MEASURED, of=lambda g: g.first.result["params"]),
            *_accuracies(),
            Column("training loss", t.MEASURED, of=lambda g: g.mean_std("train_loss")),
            Column("seeds", t.MEASURED, of=len),
        ],
        f"{about} No weight decay, no dropout. All channels share A and B; steps of time are "
        "trained in all. S4 and random NPLR train Lambda, P and B, dense ones all of a real A and "
        "B. Random: a Gaussian A over its size, as in the reference code; NPLR and diagonal have "
        "decays of 1/2 and standard normal frequencies, NPLR normal P and B, too. Published, on "
        "CIFAR in color: when A is trained all fit the training data, and validation accuracies "
        "are more than 15 points apart (Figure 3); random NPLR does not perform well (Figure 4a).",
    )


def _accuracies() -> list[Column]:
    splits = {"accuracy": "test", "validation": "validation", "training": "train"}
    found = {title: lambda g, s=s: accuracy(g, s) for title, s in splits.items()}
    return columns(t.MEASURED, found, "%")


def _about(record: Record) -> str:
    """Returns a sentence on the data and the training of a record."""
    s, train = record.settings, record.settings["train"]
    options = ", ".join(f"{key} {value}" for key, value in s["options"].items())
    options = options and f" ({options})"
    pooled = f", {s['pool']} x {s['pool']} pixels averaged" if s["pool"] > 1 else ""
    few = f", {s['train_examples']:,} examples again and again" if s["train_examples"] else ""
    return (
        f"{_task(s)}{options}{pooled}{few}: {train['train.steps']} steps of "
        f"{train['data.batch_size']}, {train['model.repeats']} layers, tested on "
        f"{record.result['test_examples']:,} examples."
    )


def _task(settings: Mapping[str, Any]) -> str:
    return settings["task"].replace("_", " ")


def generation_table(records: Records) -> Table:
    """Returns time of a token, and size of the state, by context."""
    ms = lambda model: lambda g: token_ms(g, model)
    size = lambda model: lambda g: g.first.result[model]["state_bytes"] / 1e6
    layers = lambda s: s["models"]["s4"]["model.repeats"]
    params = [[r.result[m]["params"] for m in ("s4", "attention")] for r in records][:1]
    return table(
        "generation",
        "Table 8: a generated token against the context before it",
        by(records, "context"),
        [
            Column("context", of=lambda g: str(g.key)),
            Column("Transformer with a cache", t.MEASURED, "ms", of=ms("attention")),
            Column("S4 as a recurrence", t.MEASURED, "ms", of=ms("s4")),
            Column("Transformer / S4", t.MEASURED, of=speed_up),
            Column("cache", t.MEASURED, "MB", of=size("attention")),
            Column("state", t.MEASURED, "MB", of=size("s4")),
        ],
        first(records, "{batch} sequences at once, {layers} layers, ", layers=layers)
        + "".join(f"{s4:,} (S4) and {attention:,} parameters" for s4, attention in params)
        + first(records, " (random, float32); greedy, {tokens} tokens by one program, median. ")
        + f"Published (249M parameters, Table 8): S4 is {SPEED:g} times faster, 48K against "
        "0.8K tokens/s.",
    )


def figures(records: Records) -> dict[str, str]:
    """Returns time of a token against the context, and of a kernel against the length."""
    contexts = by(records.kind("generation"), "context")
    tokens = {NAMES[m]: lambda g, m=m: token_ms(g, m) for m in ("attention", "s4")}
    kernels = {title: lambda g, s=s: measured(g.first, s) for s, title in STRATEGIES.items()}
    panels = {
        f"{states.key} states": (by(states.records, "length"), kernels)
        for states in by(records.kind("cost"), "state_dim")
    }
    labels = dict(x="context (tokens)", y="time of a token (ms)")
    return {
        "generation": line_figure(contexts, tokens, log=True, **labels),
        "cost": panel_figure(panels, x="length", y="a kernel and its gradient (ms)", log=True),
    }
