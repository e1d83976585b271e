"""What the paper says of copying, of dynamic programming, and of its two laws."""

import math

import numpy as np
import scipy.stats

from tilescan.experiments.harness.claims import Claim, Verdict, claim, leads, not_run
from tilescan.experiments.harness.groups import Group, by
from tilescan.experiments.harness.records import Record, Records
from tilescan.experiments.harness.tables import percent
from tilescan.experiments.measurements import copying
from tilescan.experiments.measurements.training import examples_to
from tilescan.experiments.papers.mamba_free_lunch.tables import SOLVED, exact, mechanism, models

FEWER = 3.0  # times fewer examples
PARITY = 0.02  # of the share of whole answers right
FIT = 0.99  # smallest R^2 of a law
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
            why="it was judged at 4 letters, the only length that every seed of the Transformer "
            "solves in 600 steps, and strings so short fit into any state",
        ),
        claim(
            "a fixed state limits the length",
            "At a fixed state size Mamba copies less the longer the strings are.",
            state_limits(copies),
        ),
        claim(
            "a larger state copies more",
            "A state that grows with the strings is enough (theorem 3).",
            state_helps(copies),
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
                "whole answers right with written steps: the Transformer's are above Mamba's "
                + BY_TWO_STDS,
                {family: exact(_family(far, family)) for family in ("Transformer", "Mamba")},
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
    # At the longest strings that the Transformer solves; a seed that never got there needs more
    # than its budget.
    of_attention = by(_family(copies, "Transformer").records, "n_max")
    others = [m for m in models(copies) if not m.startswith("Transformer")]
    solved = [g for g in of_attention if exact(g).mean >= 100 * SOLVED]
    holds, evidence = None, ""
    if solved and others:
        longest = solved[-1]
        slow = max(
            filter(None, (examples_to(r.result, SOLVED) for r in longest.records)), default=0
        )
        ratios = {}
        for g in by(copies.select(n_max=longest.key), "model", order=(others,)):
            budget = g.first.result["examples"][-1]
            fastest = min(examples_to(r.result, SOLVED) or budget for r in g.records)
            ratios |= {g.key: fastest / slow} if slow else {}
        holds = bool(ratios) and min(ratios.values()) >= FEWER
        listed = ", ".join(f"{model} {value:.1f}" for model, value in ratios.items())
        evidence = (
            f"times the Transformer's slowest seed, at {longest.key} tokens, at least: {listed}"
        )
    elif others and of_attention:
        holds, evidence = False, "the Transformer solved no length within its budget"
    return Verdict(
        f"at the longest strings that the Transformer solves ({SOLVED:.0%} right), the fastest "
        f"seed of every Mamba needs at least {FEWER:g} times the examples of its slowest seed",
        holds,
        evidence,
    )


def state_limits(copies: Records) -> Verdict:
    """Returns whether the smallest state copies less of longer strings."""
    model = next(iter(_by_state(copies)), None)
    groups = by(copies.select(model=model), "n_max")
    listed = ", ".join(f"{percent(exact(g))} at {g.key}" for g in groups)
    return _ends_differ(
        f"whole strings right fall from the shortest to the longest setting {BY_TWO_STDS}, with "
        "the smallest state",
        groups,
        f"{model}: {listed}",
    )


def state_helps(copies: Records) -> Verdict:
    """Returns whether the largest state copies more of the longest strings than the smallest."""
    longest = max(copies.values("n_max"), default=None)
    groups = by(copies.select(n_max=longest), "model", order=(_by_state(copies),))
    listed = ", ".join(f"{g.key} {percent(exact(g))}" for g in groups)
    return _ends_differ(
        f"at the longest strings whole ones right rise from the smallest to the largest state "
        f"{BY_TWO_STDS}",
        groups[::-1],
        f"strings of {longest}: {listed}",
    )


def _ends_differ(criterion: str, groups: list[Group], evidence: str) -> Verdict:
    """Returns whether the first of at least two groups has more right than the last."""
    if len(groups) < 2:
        return Verdict(criterion, None, "")
    ends = {"first": exact(groups[0]), "last": exact(groups[-1])}
    return leads(criterion, ends)._replace(evidence=evidence)


def _by_state(copies: Records) -> list[str]:
    return [m for m in models(copies) if m.startswith("Mamba-2")]


def local_parity(dp: Records) -> Verdict:
    """Returns whether Mamba is as good where steps are local."""
    theirs, ours = (exact(_family(dp, family)) for family in ("Mamba", "Transformer"))
    return Verdict(
        f"Mamba's whole answers right are at most {100 * PARITY:g} points below the Transformer's, "
        "means over seeds",
        theirs.mean >= ours.mean - 100 * PARITY if theirs and ours else None,
        f"Mamba {percent(theirs)}, Transformer {percent(ours)}" if theirs and ours else "",
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
