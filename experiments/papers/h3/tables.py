"""H3's tables and figures."""

from collections.abc import Callable

from tilescan.experiments.harness.figures import line_figure
from tilescan.experiments.harness.groups import Group, by, first
from tilescan.experiments.harness.records import Records
from tilescan.experiments.harness.statistics import Spread, ratio
from tilescan.experiments.harness.tables import MEASURED, PUBLISHED, Column, Table, table
from tilescan.experiments.papers.h3.published import PERPLEXITY, RECALL

NAMES = {"attention": "attention", "s4d": "S4D", "h3": "H3", "hybrid": "H3 + attention"}
TASKS = {"induction": "induction head", "associative_recall": "associative recall"}
PROTOCOLS = {"answer": "on the answer", "all": "on all tokens"}
OURS, FFT, ATTENTION = "long convolution", "FFT of JAX", "attention"


def accuracy(group: Group, **settings) -> Spread | None:
    """Returns the test accuracy in percent of those records that have the settings."""
    return group.select(**settings).mean_std("test_accuracy", 100)


def ms(name: str) -> Callable[[Group], float | None]:
    """Returns the function of a group that gives the median time of one of the three ops."""
    return lambda group: group.first.result[name].get("median_ms")


def tables(records: Records) -> list[Table]:
    """Returns tables 2 and 3, multi-query recall, and time against length."""
    languages, mqar, text, speed = (
        records.select(kind=kind) for kind in ("language", "mqar", "text", "speed")
    )
    return [
        table(
            "languages",
            "Table 2: synthetic languages",
            by(languages, "task", "model", order=(TASKS, NAMES)),
            [
                Column("language", of=lambda g: TASKS[g.key[0]]),
                Column("mixer", of=lambda g: NAMES[g.key[1]]),
                Column("accuracy", PUBLISHED, "%", of=lambda g: RECALL[g.key[0]].get(g.key[1])),
                *(
                    Column(
                        f"accuracy, loss {name}",
                        MEASURED,
                        "%",
                        of=lambda g, p=p: accuracy(g, protocol=p),
                    )
                    for p, name in PROTOCOLS.items()
                ),
            ],
            note=first(
                languages,
                "{train_examples} examples, {epochs} epochs (the paper: 400 and 200), learning "
                "rate {optimizer.learning_rate:g}; two layers of width {model.d_model}. ",
                epochs=lambda t: t["train.steps"] * t["data.batch_size"] // t["train_examples"],
            )
            + "The test is on the last token; the paper trains on all of them.",
        ),
        table(
            "mqar",
            "Multi-query associative recall",
            by(mqar, "model", order=(NAMES,)),
            [
                Column("mixer", of=lambda g: NAMES[g.key]),
                *(
                    Column(f"{n} pairs", MEASURED, "%", of=lambda g, n=n: accuracy(g, pairs=n))
                    for n in mqar.values("pairs")
                ),
            ],
            note=first(
                mqar,
                "Sequences of {options[length]}, two layers of width {model.d_model}. ",
            )
            + "Not in the paper: the task on which gaps in recall are robust (Arora et al. 2023). "
            "Answers right, new examples at every step.",
        ),
        table(
            "text",
            "Table 3: perplexity on held-out text",
            by(text, "model", order=(NAMES,)),
            [
                Column("mixer", of=lambda g: NAMES[g.key]),
                Column("perplexity", PUBLISHED, of=lambda g: PERPLEXITY.get(g.key)),
                Column("perplexity", MEASURED, of=lambda g: g.mean_std("test_perplexity")),
                Column("seeds", MEASURED, of=len),
            ],
            note=first(
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
                *(Column(name, MEASURED, "ms", of=ms(name)) for name in (OURS, FFT, ATTENTION)),
                Column("FFT / ours", MEASURED, of=lambda g: ratio(ms(FFT)(g), ms(OURS)(g))),
                Column(
                    "attention / ours", MEASURED, of=lambda g: ratio(ms(ATTENTION)(g), ms(OURS)(g))
                ),
            ],
            note=first(speed, "{channels} channels, float32; ")
            + "medians of interleaved rounds. Attention is this project's tiled op, causal.",
        ),
    ]


def figures(records: Records) -> dict[str, str]:
    """Returns time against length, and recall against the number of pairs."""
    speed, mqar = by(records.select(kind="speed"), "length"), records.select(kind="mqar")
    return {
        "time-against-length": line_figure(
            speed, {n: ms(n) for n in (OURS, FFT, ATTENTION)}, x="length (tokens)", y="ms", log=True
        ),
        "recall-against-pairs": line_figure(
            by(mqar, "pairs"),
            {name: lambda g, m=m: accuracy(g, model=m) for m, name in NAMES.items()},
            x="pairs",
            y="answers right (%)",
        ),
    }
