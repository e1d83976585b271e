"""What the paper says of copying, of dynamic programming, and of its two laws."""

import math

import numpy as np
import scipy.stats

from tilescan.experiments.harness.claims import Claim, Verdict, claim, leads, not_run
from tilescan.experiments.harness.groups import Group, by
from tilescan.experiments.harness.records import Record, Records
from tilescan.experiments.harness.tables import percent
from tilescan.experiments.measurements import copying
from tilescan.experiments.measurements.learning_curves import late_gain, needed, times_as_many
from tilescan.experiments.papers.mamba_free_lunch.tables import SOLVED, exact, mechanism, models

FEWER = 3.0  # times fewer examples
PARITY = 2.0  # points of whole answers right
FLAT = 2.0  # points of letters right that a flat curve may still gain
ALIKE = 0.05  # of the parameters, by which models of as many may differ
FIT = 0.99  # smallest R^2 of a law
SOLVES = f"with written steps {SOLVED:.0%} of the Transformer's whole answers are right"
BY_TWO_STDS = "by more than twice the larger standard deviation over seeds (means, not paired)"


def claims(records: Records) -> list[Claim]:
    """Returns the claims, each with its verdict."""
    copies, dp = records.kind("copy"), records.kind("dp")
    far = dp.select(local=False, steps_written=True)
    return [
        claim(
            "attention copies with fewer examples",
            "A Transformer learns to copy from fewer examples than Mamba.",
            fewer_examples(copies),
            why="16 letters, the most tried, fit into the larger state, which learns them in less "
            "than three times the examples; the budget of the smaller one ends below that",
        ),
        claim(
            "a fixed state limits the length",
            "At a fixed state size Mamba copies less the longer the strings are.",
            state_limits(copies),
            needs="accelerator",
        ),
        claim(
            "a larger state copies more",
            "A state that grows with the strings is enough (theorem 3).",
            state_helps(copies),
            why="with one seed of three the larger state learns later: at the end of its 3,300 "
            "steps, the most tried, its letters are still getting better",
        ),
        claim(
            "local steps",
            "Where a step needs only the last few ones, a small Mamba is as good (theorem 5).",
            local_parity(dp.select(local=True)),
        ),
        claim(
            "steps that look far back",
            "Written steps that need the whole input favor the Transformer.",
            leads(
                f"{SOLVES}, and Mamba's are below {BY_TWO_STDS}",
                {family: exact(_family(far, family)) for family in ("Transformer", "Mamba")},
                least=100 * SOLVED,
            ),
        ),
        *map(law, records.kind("score")),
        not_run(
            "70M parameters",
            "A Transformer of 70M parameters copies up to 40 tokens where Mamba fails (figure 2).",
            "whole strings of 40 right, at 70M parameters",
            needs="accelerator",
        ),
    ]


def fewer_examples(copies: Records) -> Verdict:
    """Returns whether every Mamba needs several times the Transformer's examples."""
    # At the longest strings that all seeds of the Transformer solve and the smallest state doesn't.
    attention = by(_family(copies, "Transformer").records, "n_max")
    smallest = by(copies.select(model=next(iter(_by_state(copies)), None)), "n_max")
    fits = {g.key for g in smallest if exact(g).mean >= 100 * SOLVED}
    solved = [g for g in attention if None not in needed(g.records, SOLVED) and g.key not in fits]
    holds, evidence = (False, "no such strings within the budgets") if smallest else (None, "")
    if solved and smallest:
        slow = max(needed(solved[-1].records, SOLVED))
        others = [m for m in models(copies) if not m.startswith("Transformer")]
        groups = by(copies.select(n_max=solved[-1].key), "model", order=(others,))
        ratios = {g.key: times_as_many(g.records, SOLVED, slow) for g in groups}
        holds = all(ratio >= FEWER for ratio, _ in ratios.values())
        said = ", ".join(f"{m} {'> ' * least}{ratio:.1f}" for m, (ratio, least) in ratios.items())
        evidence = f"times the Transformer's {slow:,} at {solved[-1].key} letters: {said}"
    return Verdict(
        f"at the longest strings that every seed of the Transformer comes to copy ({SOLVED:.0%} of "
        "validation's) and the smallest state does not (mean over seeds), the fastest seed of "
        f"every Mamba needs at least {FEWER:g} times the examples of the Transformer's slowest",
        holds,
        evidence,
    )


def state_limits(copies: Records) -> Verdict:
    """Returns whether the smallest state copies less of longer strings; None while it learns."""
    model = next(iter(_by_state(copies)), None)
    groups = by(copies.select(model=model), "n_max")
    gain = 100 * late_gain(groups[-1].records) if groups else 0.0
    shares = ", ".join(f"{percent(exact(g))} at {g.key}" for g in groups)
    verdict = _ends_differ(
        f"whole strings right fall from the shortest to the longest setting {BY_TWO_STDS}, with "
        "the smallest state, and not for want of training: at the longest, letters right (mean "
        "over seeds and validations, before the rate falls) are in the last third at most "
        f"{FLAT:g} points above the third before; where they rise more, it is not decided",
        groups,
        f"{model}: {shares}; letters right gain {gain:.1f} points",
    )
    return verdict._replace(holds=None) if verdict.holds and gain > FLAT else verdict


def state_helps(copies: Records) -> Verdict:
    """Returns whether the largest state copies more of the longest strings than the smallest."""
    longest = max(copies.values("n_max"), default=None)
    groups = by(copies.select(n_max=longest), "model", order=(_by_state(copies),))[::-1]
    sizes = [g.first.result["params"] for g in groups]
    each = zip(groups, sizes, strict=True)
    shares = ", ".join(f"{g.key} {percent(exact(g))}, {size:,} parameters" for g, size in each)
    verdict = _ends_differ(
        f"at the longest strings whole ones right rise from the smallest to the largest state "
        f"{BY_TWO_STDS}, which has at most {ALIKE:.0%} more parameters",
        groups,
        f"strings of {longest}: {shares}",
    )
    return verdict._replace(holds=verdict.holds and sizes[0] <= (1 + ALIKE) * sizes[-1])


def _ends_differ(criterion: str, groups: list[Group], evidence: str) -> Verdict:
    """Returns whether the first of at least two groups has more right than the last."""
    if len(groups) < 2:
        return Verdict(criterion, None, "")
    ends = {"first": exact(groups[0]), "last": exact(groups[-1])}
    return leads(criterion, ends)._replace(evidence=evidence)


def _by_state(copies: Records) -> list[str]:
    return [m for m in models(copies) if m.startswith("Mamba-2")]


def local_parity(dp: Records) -> Verdict:
    """Returns whether Mamba is as good where steps are local and the Transformer solves them."""
    theirs, ours = (exact(_family(dp, family)) for family in ("Mamba", "Transformer"))
    both = theirs and ours
    return Verdict(
        f"{SOLVES}, and Mamba's are at most {PARITY:g} points below, means over seeds",
        ours.mean >= 100 * SOLVED and theirs.mean >= ours.mean - PARITY if both else None,
        f"Mamba {percent(theirs)}, Transformer {percent(ours)}" if both else "",
    )


def _family(records: Records, name: str) -> Group:
    return Group(name, Records([r for r in records if r.settings["model"].startswith(name)]))


def law(record: Record) -> Claim:
    """Returns whether the required score grows with the distance as a theorem says."""
    lengths, scores = (np.array(record.result[k], float) for k in ("lengths", "scores"))
    if record.settings["mechanism"] == copying.ATTENTION:
        says = "Attention's score grows as log L (theorem 2)."
        x, y, want = np.log(lengths), scores, 1.0
    else:
        says = "A decaying state's score grows as (1/decay)^L (theorem 1)."
        x, y, want = lengths, np.log(scores), -math.log(record.settings["decay"])
    line = scipy.stats.linregress(x, y)
    return claim(
        f"required score, {mechanism(record.settings)}",
        says,
        Verdict(
            f"straight line with R^2 >= {FIT} and the theorem's slope {want:.4g} within 1%",
            bool(line.rvalue**2 >= FIT and abs(line.slope - want) <= 0.01 * want),
            f"slope {line.slope:.4g}, R^2 {line.rvalue**2:.5f}",
        ),
        by_construction=True,
    )
