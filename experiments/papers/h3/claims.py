"""What H3's paper says of recall, perplexity and speed."""

import statistics

from tilescan.experiments.harness.claims import (
    Claim,
    Verdict,
    claim,
    higher_by,
    lower_every_seed,
    not_run,
)
from tilescan.experiments.harness.groups import Group, by
from tilescan.experiments.harness.records import Records
from tilescan.experiments.harness.statistics import Spread
from tilescan.experiments.harness.tables import percent
from tilescan.experiments.papers.h3.tables import ATTENTION, NAMES, OURS, PROTOCOLS, TASKS, ms

SOLVED = 97.0  # percent


def claims(records: Records) -> list[Claim]:
    """Returns what the paper says of recall, of text, and of speed."""
    mqar, text, speed = (records.select(kind=kind) for kind in ("mqar", "text", "speed"))

    def order(worse: str, better: str, says: str) -> Claim:
        verdict = lower_every_seed(
            text,
            "test_perplexity",
            "test perplexity",
            NAMES,
            worse={"model": worse},
            better={"model": better},
        )
        return claim(f"{NAMES[better]} models text better than {NAMES[worse]}", says, verdict)

    return [
        *(
            claim(
                f"{NAMES[model]} recalls",
                f"{NAMES[model]} solves both synthetic languages (Table 2).",
                solves(records, model),
            )
            for model in ("h3", "attention")
        ),
        claim(
            "S4D cannot find the induction head",
            "S4D reaches 35.6% on the induction head (Table 2).",
            fails(records),
        ),
        claim(
            "H3 recalls more than S4D",
            "The shift state space and the gates give H3 what S4D lacks: recall.",
            gap(mqar),
        ),
        order("s4d", "h3", "S4D falls behind H3 on text (Table 3: 24.9 against 21.0)."),
        order(
            "h3",
            "hybrid",
            "A layer of attention makes H3 better on text (Table 3: 21.0 against 19.6).",
        ),
        order(
            "attention",
            "hybrid",
            "The hybrid is better than a Transformer on text (Table 3: 20.6 against 19.6).",
        ),
        claim(
            "long convolutions outrun attention",
            "FlashConv's advantage over attention grows with the length (section 6.3).",
            scales(speed),
        ),
        not_run(
            "2.7B parameters",
            "H3 hybrids up to 2.7B parameters reach a lower perplexity than GPT-Neo on the Pile "
            "(Table 4).",
            "perplexity on the Pile",
            needs="accelerator, and the Pile",
        ),
    ]


def best_protocol(records: Records, model: str) -> dict[str, Spread]:
    """Returns {language: test accuracy in the protocol with the better validation}."""
    validation = lambda g: statistics.fmean(r.result["validation_accuracy"][-1] for r in g.records)
    found = {}
    for task in TASKS:
        chosen = records.select(kind="language", task=task, model=model)
        groups = by(chosen, "protocol", order=(PROTOCOLS,))
        if groups:
            found[task] = max(groups, key=validation).mean_std("test_accuracy", 100)
    return found


def solves(records: Records, model: str) -> Verdict:
    """Returns whether a model solves both languages."""
    found = best_protocol(records, model)
    return Verdict(
        f"accuracy of at least {SOLVED:g}% in both, mean over seeds, in the protocol with the "
        "better validation",
        min(s.mean for s in found.values()) >= SOLVED if len(found) == len(TASKS) else None,
        _listed(found),
    )


def fails(records: Records) -> Verdict:
    """Returns whether S4D stays far from solving the induction head."""
    found = best_protocol(records, "s4d")
    return Verdict(
        "at most 60%, mean over seeds, in its protocol with the better validation",
        found["induction"].mean <= 60 if "induction" in found else None,
        _listed(found),
    )


def gap(mqar: Records) -> Verdict:
    """Returns whether H3 recalls more than S4D at the most pairs."""
    most = max(mqar.values("pairs"), default=None)
    h3, s4d = (
        Group(m, mqar.select(model=m, pairs=most)).mean_std("test_accuracy", 100)
        for m in ("h3", "s4d")
    )
    return Verdict(
        "multi-query recall at the most pairs: H3's accuracy is above S4D's by more than 10 "
        "points and twice the larger standard deviation over seeds",
        higher_by(h3, s4d, 10.0),
        f"{most} pairs: H3 {percent(h3)}, S4D {percent(s4d)}" if h3 and s4d else "",
    )


def scales(speed: Records) -> Verdict:
    """Returns whether the advantage over attention grows with the length."""
    points = [(g.key, ms(ATTENTION)(g) / ms(OURS)(g)) for g in by(speed, "length")]
    return Verdict(
        "attention / long convolution grows from the shortest to the longest length and ends "
        "above 1",
        points[-1][1] > max(points[0][1], 1) if len(points) > 1 else None,
        ", ".join(f"{value:.2f} at {n}" for n, value in points),
    )


def _listed(found: dict[str, Spread]) -> str:
    return ", ".join(f"{TASKS[task]} {percent(value)}" for task, value in found.items())
