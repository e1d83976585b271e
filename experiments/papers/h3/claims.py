"""What H3's paper says of recall, of text, and of speed."""

import statistics

from tilescan.experiments.harness import claims as c
from tilescan.experiments.harness.claims import Claim, Effect, Verdict, claim
from tilescan.experiments.harness.groups import Group, by, measured
from tilescan.experiments.harness.records import Records
from tilescan.experiments.harness.tables import percent
from tilescan.experiments.measurements.learning_curves import late_gain
from tilescan.experiments.papers.h3.published import PERPLEXITY, RECALL
from tilescan.experiments.papers.h3.tables import NAMES, TASKS, accuracy, over_ours

SOLVED = 97.0  # percent
MOST_OF_S4D = 60.0  # percent
FLAT = 2.0  # points that a flat curve may still gain
SOLVERS = "h3", "attention"
# Why claims are not shown.
WHY_FAILS = (
    "trained on the answer alone for 40 epochs, the most tried, every mixer finds it; the paper "
    "trains on all tokens, for 400 epochs"
)
WHY_RECALLS = (
    "after 40 epochs two of three seeds stay at 94%; 120 epochs, the most tried, with three other "
    "seeds that are not recorded, end at 94.4 +- 1.8%, below what their validation had come to "
    "(96 to 99%): without dropout H3 begins to fit its 5,000 examples by heart"
)
WHY_TEXT = (
    "at half a million parameters and two million bytes, the most tried, the mean perplexities of "
    "all four lie within 2% of each other; after 300 steps, in pilots with another seed that are "
    "not recorded, S4D's was a tenth above H3's: what is ahead early is caught up with"
)
# What the paper says of two models of text, the worse and the better one.
ORDERS = {
    ("s4d", "h3"): "S4D is worse than H3 on text (Table 3: 24.9 against 21.0).",
    ("h3", "hybrid"): "A layer of attention makes H3 better on text (Table 3: 21.0 against 19.6).",
    ("attention", "hybrid"): "The hybrid is better than a Transformer on text (Table 3: 20.6 "
    "against 19.6).",
}


def claims(records: Records) -> list[Claim]:
    """Returns what the paper says of recall, of text, and of speed."""
    return [
        *(
            claim(
                f"{NAMES[model]} recalls",
                f"{NAMES[model]} solves both synthetic languages (Table 2).",
                solves(records, model),
                why=WHY_RECALLS,
            )
            for model in SOLVERS
        ),
        claim(
            "S4D cannot find the induction head",
            "S4D reaches 35.6% on the induction head (Table 2).",
            fails(records),
            why=WHY_FAILS,
        ),
        claim(
            "H3 recalls more than S4D",
            "The shift state space and the gates give H3 what S4D lacks: recall.",
            gap(records.kind("mqar")),
        ),
        *(
            claim(
                f"{NAMES[better]} models text better than {NAMES[worse]}",
                statement,
                c.lower_every_seed(
                    records.kind("text"),
                    "test_perplexity",
                    "test perplexity",
                    NAMES,
                    worse={"model": worse},
                    better={"model": better},
                    published=PERPLEXITY[worse] / PERPLEXITY[better],
                ),
                why=WHY_TEXT,
            )
            for (worse, better), statement in ORDERS.items()
        ),
        claim(
            "long convolutions outrun attention",
            "FlashConv's advantage over attention grows with the length (section 6.3).",
            c.rises(
                "medians over rounds, attention / long convolution: grows from the shortest to the "
                "longest length and ends above 1",
                measured(by(records.kind("speed"), "length"), over_ours("attention")),
            ),
            by_construction=True,
        ),
        c.not_run(
            "2.7B parameters",
            "H3 hybrids up to 2.7B parameters reach a lower perplexity than GPT-Neo on the Pile "
            "(Table 4).",
            "perplexity on the Pile",
            needs="accelerator, and the Pile",
        ),
    ]


def of_languages(records: Records, model: str) -> dict[str, Group]:
    """Returns {language: a model's records}, of the languages that were measured."""
    groups = by(records.select(kind="language", model=model), "task", order=(TASKS,))
    return {group.key: group for group in groups}


def solves(records: Records, model: str) -> Verdict:
    """Returns whether a model solves both languages; the effect is what it has above guesses."""
    found, effect = of_languages(records, model), None
    if both := len(found) == len(TASKS):
        above = statistics.fmean(RECALL[t][model] - RECALL[t]["guess"] for t in TASKS)
        guess = statistics.fmean(RECALL[t]["guess"] for t in TASKS)
        seeds = zip(*(g.values("test_accuracy", 100) for g in found.values()), strict=False)
        effect = Effect(above, [statistics.fmean(s) - guess for s in seeds], "difference")
    return Verdict(
        f"accuracy of at least {SOLVED:g}% in both, mean over seeds",
        min(accuracy()(g).mean for g in found.values()) >= SOLVED if both else None,
        _listed(found),
        effect,
    )


def fails(records: Records) -> Verdict:
    """Returns whether S4D stops far from solving what attention learned; the effect: from H3."""
    task, effect, holds, gain = "induction", None, None, ""
    found, h3, attention = (of_languages(records, m).get(task) for m in ("s4d", "h3", "attention"))
    if found and h3 and attention:
        values = (g.values("test_accuracy", 100) for g in (h3, found))
        measured = [a - b for a, b in zip(*values, strict=False)]
        effect = Effect(RECALL[task]["h3"] - RECALL[task]["s4d"], measured, "difference")
        late = 100 * late_gain(found.records)
        gain = f"; S4D gains {late:.1f} points from the second to the last third of its steps"
        holds = accuracy()(found).mean <= MOST_OF_S4D and late <= FLAT
        holds = holds and accuracy()(attention).mean >= SOLVED
    listed = {NAMES[m]: g for m, g in (("s4d", found), ("attention", attention)) if g}
    return Verdict(
        f"at most {MOST_OF_S4D:g}%, mean over seeds, where as many steps give attention at least "
        f"{SOLVED:g}%, by a curve that is flat: validation gains at most {FLAT:g} points from the "
        "second to the last third of the steps",
        holds,
        ", ".join(f"{name} {percent(accuracy()(g))}" for name, g in listed.items()) + gain,
        effect,
    )


def gap(mqar: Records) -> Verdict:
    """Returns whether H3 recalls more than S4D at the most pairs."""
    most = max(mqar.values("pairs"), default=None)
    of_most = Group(most, mqar.select(pairs=most))
    found = {NAMES[m]: accuracy(model=m)(of_most) for m in ("h3", "s4d")}
    return c.leads(
        "multi-query recall at the most pairs: H3's accuracy is above S4D's by more than 10 "
        "points and twice the larger standard deviation over seeds (means, not paired)",
        found,
        points=10.0,
        head=f"{most} pairs: " if all(found.values()) else "",
    )


def _listed(found: dict[str, Group]) -> str:
    return ", ".join(f"{TASKS[task]} {percent(accuracy()(g))}" for task, g in found.items())
