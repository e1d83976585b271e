"""What S4's paper says, as predicates on the records."""

from collections.abc import Callable, Mapping
from typing import Any

from tilescan.experiments.harness import claims as c
from tilescan.experiments.harness.claims import Claim, Verdict, claim
from tilescan.experiments.harness.groups import Group, by, first, measured
from tilescan.experiments.harness.records import Records
from tilescan.experiments.harness.statistics import spread
from tilescan.experiments.harness.tables import percent
from tilescan.experiments.papers.s4 import tables as t
from tilescan.experiments.papers.s4.published import ACCURACY, COST, SPEED, WIDTH

# HiPPO and a random initialization, both trained: what the paper says, and by how many points.
PAIRS = {
    ("dense_hippo", "dense_random"): ("a random Gaussian matrix, by more than 15 points", 15.0),
    ("dense_hippo", "random_diagonal"): ("a random diagonal matrix", None),
    ("hippo", "random_nplr"): ("a random matrix with the structure of S4's", None),
}
FITTED = 0.98  # training accuracy from which a gap is one of generalization
EQUAL = 0.05  # by which parameters of models that are compared may differ


def claims(records: Records) -> list[Claim]:
    """Returns exactness, costs, accuracy against a Transformer, generation and initialization."""
    lengths = by(records.kind("exactness"), "length")
    contexts = by(records.kind("generation"), "context")
    return [
        claim(
            "DPLR kernels are exact",
            "The Cauchy products compute the convolution kernel of the dense HiPPO matrix "
            "(Theorem 3).",
            below(
                "float64 errors of both DPLR kernels below {:g} at every length",
                1e-9,
                lengths,
                lambda g: max(v for k, v in g.first.result["kernel"].items() if "float64" in k),
            ),
        ),
        claim(
            "convolution is recurrence",
            "A trained layer is a convolution over a whole sequence and a recurrence token by "
            "token (section 2).",
            below(
                "float32 layers differ by less than {:g} of the largest value at every length",
                1e-4,
                lengths,
                lambda g: max(g.first.result["mixer"].values()),
            ),
        ),
        *(
            claim(
                f"DPLR kernels take less {name} than dense ones",
                f"S4's kernel takes less {name} than powers of a dense matrix, the more so the "
                "more states (Table 2).",
                cheaper(records.kind("cost"), field, place),
            )
            for place, (field, name) in enumerate((("median_ms", "time"), ("temp_bytes", "memory")))
        ),
        *(beats_transformer(records.kind("task"), task) for task in t.TASKS),
        c.not_run(
            "Path-X",
            "S4 solves Path-X, 16,384 steps, at 96.35% where all others guess (Table 4).",
            "accuracy on Path-X",
            needs="accelerator, and days",
        ),
        claim(
            "S4 generates faster, the more so the longer the context",
            "As a recurrence S4 generates faster than a Transformer, whose cache grows (Table 8).",
            c.rises(
                "medians over rounds of a token's time, Transformer / S4: grows from the shortest "
                "to the longest context and ends above 1",
                measured(contexts, t.speed_up),
            ),
        ),
        claim(
            "S4's time of a token is constant",
            "A step of the recurrence costs the same whatever came before (section 2.3).",
            constant_time(contexts),
        ),
        claim(
            "60 times faster generation",
            "S4 of 249M parameters generates 48K tokens a second, a Transformer 0.8K (Table 8).",
            sixty_times(contexts),
            needs="accelerator",
        ),
        *(generalizes(records.kind("init"), pair, *paper) for pair, paper in PAIRS.items()),
    ]


def below(
    criterion: str, bound: float, lengths: list[Group], error: Callable[[Group], float]
) -> Verdict:
    """Returns whether the errors at all lengths are below a bound, which the criterion names."""
    found = measured(lengths, error)
    holds = c.every(value < bound for value in found.values())
    return Verdict(criterion.format(bound), holds, c.listed(found, "{1:.1e} at {0}"))


def cheaper(cost: Records, field: str, place: int) -> Verdict:
    """Returns whether DPLR kernels take less than dense ones, the more so the more states.

    The effect is that at the most states of which the paper publishes it, COST's at `place`.
    """
    longest = cost.select(length=max(cost.values("length"), default=None))
    found = measured(by(longest, "state_dim"), lambda g: t.dense_over_dplr(g, field))
    most = max(found.keys() & COST.keys(), default=None)
    return c.rises(
        "dense / DPLR at the greatest length grows from the fewest to the most states and ends "
        "above 1",
        found,
        " states",
        None if most is None else c.effect_of(COST[most][place], found[most]),
    )


def leads(criterion: str, *pair: tuple[str, Records], published: float | None = None) -> Verdict:
    """Returns whether the first of two is more accurate on test data, paired by seed.

    Fewer than three seeds decide nothing. The effect is the gap, in points.
    """
    criterion += (
        " test accuracy is higher with every seed (paired by seed: the same batches), on average "
        "by more than twice the standard deviation of the gap over three seeds or more"
    )
    ours, theirs = ({r.seed: 100 * r.result["test_accuracy"] for r in found} for _, found in pair)
    gaps = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    evidence = ", ".join(f"{name} {percent(t.accuracy(found))}" for name, found in pair if found)
    gap = spread(gaps)
    if gap is None or gap.std is None or gap.count < 3:
        return Verdict(criterion, None, evidence)
    evidence += f", gap {gap.mean:.1f} ± {gap.std:.1f} points"
    effect = c.effect_of(published, *gaps, kind="difference") if published else None
    return Verdict(criterion, min(gaps) > 0 and gap.mean > 2 * gap.std, evidence, effect)


def generalizes(inits: Records, pair: tuple[str, str], other: str, points: float | None) -> Claim:
    """Returns whether HiPPO leads a random initialization where both fit the training data."""
    trained = inits.select(frozen=False)
    found = [(t.INITS[init], trained.select(init=init)) for init in pair]
    name = " beats ".join(t.INITS[init] for init in pair) + ", trained"
    verdict = leads(
        f"training accuracy of at least {FITTED:.0%} (of the batches logged last) with every seed "
        "of both, where the first's",
        *found,
        published=points,
    )
    fits = [r.result["train_accuracy"] for _, records in found for r in records]
    if verdict.holds is not None:
        evidence = f"{verdict.evidence}; training accuracy of at least {min(fits):.1%}"
        verdict = verdict._replace(evidence=evidence, holds=verdict.holds and min(fits) >= FITTED)
    statement = (
        f"HiPPO generalizes better than {other} where both fit the training data "
        f"(Figure {'4a' if 'nplr' in pair[1] else '3'})."
    )
    return claim(name, statement, verdict)


def beats_transformer(tasks: Records, task: str) -> Claim:
    """Returns whether S4 is ahead of a Transformer on one task."""
    chosen, of_paper = tasks.select(name=task, task=t.SOURCES[task]), ACCURACY[task]
    seen = first(chosen, "{examples:,}", examples=_examples)
    small = any(r.settings.get("pool", 1) > 1 for r in chosen)
    shown = " of averaged pixels" if small else ""
    found = [(t.NAMES[model], chosen.select(model=model)) for model in ("s4", "attention")]
    verdict = leads(
        f"after as many training examples each, with parameters equal within {EQUAL:.0%}, S4's",
        *found,
        published=of_paper["s4"] - of_paper["attention"],
    )
    if verdict.holds is not None:
        sizes = [r.result["params"] for _, records in found for r in records]
        equal = max(sizes) <= (1 + EQUAL) * min(sizes)
        evidence = f"{verdict.evidence}, after {seen} examples{shown}"
        verdict = verdict._replace(evidence=evidence, holds=verdict.holds and equal)
    return claim(
        f"S4 beats a Transformer: {t.TASKS[task]}",
        f"S4 {of_paper['s4']:g}%, Transformer {of_paper['attention']:g}%, both trained to the end "
        f"(Table {6 if task == 'digits' else 4}).",
        verdict,
        needs="accelerator" if task == "pathfinder" and verdict.holds is None else "",
    )


def _examples(settings: Mapping[str, Any]) -> int:
    """Returns how many examples a training sees, those that come again included."""
    return settings["train.steps"] * settings["data.batch_size"]


def constant_time(contexts: list[Group]) -> Verdict:
    """Returns whether S4's time of a token does not depend on the context."""
    times = measured(contexts, lambda g: t.token_ms(g, "s4"))
    return Verdict(
        "its longest time over contexts is less than 1.5 times its shortest",
        max(times.values()) < 1.5 * min(times.values()) if len(times) > 1 else None,
        c.listed(times, "{1:.3g} ms at {0}"),
    )


def sixty_times(contexts: list[Group]) -> Verdict:
    """Returns whether S4 reaches the published speed; only models of that width refute it."""
    most = max(measured(contexts, t.speed_up).values(), default=None)
    widths = [g.first.settings["models"]["s4"]["model.d_model"] for g in contexts]
    decided = most is not None and (most >= SPEED or max(widths) >= WIDTH)
    return Verdict(
        f"time of a token, Transformer / S4, of at least {SPEED:g} at some context; "
        f"refuted only by models of the paper's width, {WIDTH:,}",
        most >= SPEED if decided else None,
        "" if most is None else f"at most {most:.2f}",
        c.effect_of(SPEED, most),
    )
