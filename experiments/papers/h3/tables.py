"""H3's tables and figures."""

from collections.abc import Callable, Mapping
from typing import Any

from tilescan.experiments.harness.figures import line_figure
from tilescan.experiments.harness.groups import Group, by, first
from tilescan.experiments.harness.records import Records
from tilescan.experiments.harness.statistics import Spread, ratio
from tilescan.experiments.harness.tables import MEASURED, SECONDARY, Column, Table, columns, table
from tilescan.experiments.papers.h3.published import PERPLEXITY, RECALL

NAMES = {"attention": "attention", "s4d": "S4D", "h3": "H3", "hybrid": "H3 + attention"}
TASKS = {"induction": "induction head", "associative_recall": "associative recall"}
PROTOCOLS = {"answer": "the answer", "all": "all tokens"}
OPS = OURS, FFT, ATTENTION = "long convolution", "FFT of JAX", "attention"


def accuracy(**settings: Any) -> Callable[[Group], Spread | None]:
    """Returns the function of a group: test accuracy in percent of its records with settings."""
    return lambda group: group.select(**settings).mean_std("test_accuracy", 100)


def epochs(settings: Mapping[str, Any]) -> int:
    """Returns how often a training goes through its examples."""
    seen = settings["train.steps"] * settings["data.batch_size"]
    return round(seen / settings["train_examples"])


def ms(op: str) -> Callable[[Group], float | None]:
    """Returns the function of a group that gives the median time of one of OPS."""
    return lambda group: group.first.result[op].get("median_ms")


def over_ours(op: str) -> Callable[[Group], float | None]:
    """Returns the function of a group that gives the time of an op over the long convolution's."""
    return lambda group: ratio(ms(op)(group), ms(OURS)(group))


def trial(rate: float) -> Callable[[Group], Spread | None]:
    """Returns the function of a group: validation loss of its trials of one learning rate."""
    return lambda group: group.select(rate=rate).mean_std("validation_loss")


def tables(records: Records) -> list[Table]:
    """Returns tables 2 and 3, multi-query recall, and time against length."""
    kinds = "language", "mqar", "text", "final", "speed"
    languages, mqar, text, rates, speed = map(records.kind, kinds)
    parameters = lambda g: g.first.result.get("params")
    rate = lambda g: g.first.settings["train"]["optimizer.learning_rate"]
    of_pairs = {f"{n} pairs": accuracy(pairs=n) for n in mqar.values("pairs")}
    of_rates = {f"at rate {r:g}": trial(r) for r in rates.values("rate")}
    mixer = Column("mixer", of=lambda g: NAMES[g.key])
    params = Column("parameters", MEASURED, of=parameters)
    return [
        table(
            "languages",
            "Table 2: synthetic languages",
            by(languages, "task", "model", order=(TASKS, NAMES)),
            [
                Column("language", of=lambda g: TASKS[g.key[0]]),
                Column("mixer", of=lambda g: NAMES[g.key[1]]),
                params,
                Column("trained on", of=lambda g: PROTOCOLS[g.first.settings["protocol"]]),
                Column("accuracy", SECONDARY, "%", of=lambda g: RECALL[g.key[0]].get(g.key[1])),
                Column("accuracy", MEASURED, "%", of=accuracy()),
                Column("seeds", MEASURED, of=len),
            ],
            first(
                languages,
                "{train_examples} examples, {epochs} epochs (the paper: 400 and 200), learning "
                "rate {optimizer.learning_rate:g}; two layers of width {model.d_model}. ",
                epochs=epochs,
            )
            + "The test is on the last token. Not as in the paper: it trains on all tokens in "
            "both languages; here S4D is S4D-Lin with B = 1 (the paper's: another A, random B), "
            "and there is no dropout.",
        ),
        table(
            "mqar",
            "Multi-query associative recall",
            by(mqar, "model", order=(NAMES,)),
            [mixer, params, *columns(MEASURED, of_pairs, "%"), Column("seeds", MEASURED, of=len)],
            first(
                mqar,
                "Sequences of {options[length]}, two layers of width {model.d_model}, "
                "{train.steps} steps of {data.batch_size}, attention with rotary positions. ",
            )
            + "Not in the paper: the task on which gaps in recall are robust (Arora et al. 2023). "
            "Answers right, new examples at every step.",
        ),
        table(
            "text",
            "Table 3: perplexity on held-out text",
            by(text, "model", order=(NAMES,)),
            [
                mixer,
                params,
                Column("rate", MEASURED, of=rate),
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
            "the hybrid (one here), learned positions in attention (rotary here); only the order "
            "compares.",
        ),
        table(
            "rates",
            "Trials of learning rates for text: validation loss",
            by(rates, "model", order=(NAMES,)),
            [mixer, *columns(MEASURED, of_rates, "nats")],
            "As long as in Table 3, whose rates they choose; their seed is none of Table 3's. A "
            "third rate was worst in pilots of 300 steps: 0.01 of attention, 0.001 of the others.",
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
