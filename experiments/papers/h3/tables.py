"""H3's tables and figures."""

from collections.abc import Callable
from typing import Any

from tilescan.experiments.harness.figures import line_figure
from tilescan.experiments.harness.groups import Group, by, first
from tilescan.experiments.harness.records import Records
from tilescan.experiments.harness.statistics import Spread, ratio
from tilescan.experiments.harness.tables import MEASURED, SECONDARY, Column, Table, columns, table
from tilescan.experiments.papers.h3.published import PERPLEXITY, RECALL

NAMES = {"attention": "attention", "s4d": "S4D", "h3": "H3", "hybrid": "H3 + attention"}
TASKS = {"induction": "induction head", "associative_recall": "associative recall"}
PROTOCOLS = {"answer": "on the answer", "all": "on all tokens"}
OPS = OURS, FFT, ATTENTION = "long convolution", "FFT of JAX", "attention"


def accuracy(**settings: Any) -> Callable[[Group], Spread | None]:
    """Returns the function of a group: test accuracy in percent of its records with settings."""
    return lambda group: group.select(**settings).mean_std("test_accuracy", 100)


def ms(op: str) -> Callable[[Group], float | None]:
    """Returns the function of a group that gives the median time of one of OPS."""
    return lambda group: group.first.result[op].get("median_ms")


def over_ours(op: str) -> Callable[[Group], float | None]:
    """Returns the function of a group that gives the time of an op over the long convolution's."""
    return lambda group: ratio(ms(op)(group), ms(OURS)(group))


def tables(records: Records) -> list[Table]:
    """Returns tables 2 and 3, multi-query recall, and time against length."""
    languages, mqar, text, speed = map(records.kind, ("language", "mqar", "text", "speed"))
    of_protocols = {f"accuracy, loss {n}": accuracy(protocol=p) for p, n in PROTOCOLS.items()}
    of_pairs = {f"{n} pairs": accuracy(pairs=n) for n in mqar.values("pairs")}
    mixer = Column("mixer", of=lambda g: NAMES[g.key])
    return [
        table(
            "languages",
            "Table 2: synthetic languages",
            by(languages, "task", "model", order=(TASKS, NAMES)),
            [
                Column("language", of=lambda g: TASKS[g.key[0]]),
                Column("mixer", of=lambda g: NAMES[g.key[1]]),
                Column("accuracy", SECONDARY, "%", of=lambda g: RECALL[g.key[0]].get(g.key[1])),
                *columns(MEASURED, of_protocols, "%"),
            ],
            first(
                languages,
                "{train_examples} examples, {epochs} epochs (the paper: 400 and 200), learning "
                "rate {optimizer.learning_rate:g}; two layers of width {model.d_model}. ",
                epochs=lambda t: t["train.steps"] * t["data.batch_size"] // t["train_examples"],
            )
            + "The test is on the last token; the paper trains on all of them. Not as in the "
            "paper: rotary positions for learned ones in attention, S4D from S4D-Lin with B = 1, "
            "no dropout, and state spaces that train at the full rate, with decay of C and of the "
            "shift (the paper: at most 1e-3, none).",
        ),
        table(
            "mqar",
            "Multi-query associative recall",
            by(mqar, "model", order=(NAMES,)),
            [mixer, *columns(MEASURED, of_pairs, "%")],
            first(mqar, "Sequences of {options[length]}, two layers of width {model.d_model}. ")
            + "Not in the paper: the task on which gaps in recall are robust (Arora et al. 2023). "
            "Answers right, new examples at every step.",
        ),
        table(
            "text",
            "Table 3: perplexity on held-out text",
            by(text, "model", order=(NAMES,)),
            [
                mixer,
                Column("perplexity", SECONDARY, of=lambda g: PERPLEXITY.get(g.key)),
                Column("perplexity", MEASURED, of=lambda g: g.mean_std("test_perplexity")),
                Column("seeds", MEASURED, of=len),
            ],
            first(
                text,
                "{data.sources[0]}, {data.tokenizer} tokens, width {model.d_model}, "
                "{train.steps} steps of {data.batch_size} x {data.seq_len}. ",
            )
            + "Published: 125M parameters, 50B tokens of OpenWebText, two layers of attention in "
            "the hybrid (one here); only the order compares.",
        ),
        table(
            "speed",
            "FlashConv: time of one gated long convolution against length, forward",
            by(speed, "length"),
            [
                Column("length", of=lambda g: str(g.key)),
                *columns(MEASURED, {op: ms(op) for op in OPS}, "ms"),
                Column("FFT / ours", MEASURED, of=over_ours(FFT)),
                Column("attention / ours", MEASURED, of=over_ours(ATTENTION)),
            ],
            first(speed, "{channels} channels, float32; ")
            + "medians of interleaved rounds. Attention is this project's tiled op, causal.",
        ),
    ]


def figures(records: Records) -> dict[str, str]:
    """Returns time against length, and recall against the number of pairs."""
    speed, mqar = by(records.kind("speed"), "length"), by(records.kind("mqar"), "pairs")
    times, of_model = {op: ms(op) for op in OPS}, {NAMES[m]: accuracy(model=m) for m in NAMES}
    return {
        "speed": line_figure(speed, times, x="length (tokens)", y="forward (ms)", log=True),
        "mqar": line_figure(mqar, of_model, x="pairs to recall", y="answers right (%)"),
    }
