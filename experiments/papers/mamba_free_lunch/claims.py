"""What the paper says of copying, of dynamic programming, and of its two laws."""

import math

import numpy as np
import scipy.stats

from tilescan.experiments.harness.claims import Claim, Verdict, claim, higher_by, not_run
from tilescan.experiments.harness.groups import Group, by
from tilescan.experiments.harness.records import Record, Records
from tilescan.experiments.harness.statistics import Spread
from tilescan.experiments.harness.tables import percent
from tilescan.experiments.measurements.training import examples_to
from tilescan.experiments.papers.mamba_free_lunch import theory
from tilescan.experiments.papers.mamba_free_lunch.tables import SOLVED, exact, mechanism, models

FEWER = 3.0  # times fewer examples
PARITY = 0.02  # of the share of whole answers right
FIT = 0.99  # smallest R^2 of a law


def claims(records: Records) -> list[Claim]:
    """Returns the claims, each with its verdict."""
    copies, dp = records.select(kind="copy"), records.select(kind="dp")
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
            "Written steps that need the whole input favour the Transformer.",
            longer_steps(dp.select(local=False, steps_written=True)),
        ),
        *(law(record) for record in records.select(kind="score")),
        not_run(
            "70M parameters",
            "A Transformer of 70M parameters copies up to 40 tokens where Mamba fails (figure 2).",
            "whole strings of 40 right, at 70M parameters",
            needs="accelerator",
        ),
    ]


def fewer_examples(copies: Records) -> Verdict:
    """Returns whether every Mamba needs several times the Transformer's examples."""
    attention = [m for m in models(copies) if m.startswith("Transformer")]
    others = [m for m in models(copies) if m not in attention]
    of_attention = Group(None, copies.select(model=attention[0] if attention else None))
    holds, evidence = None, ""
    solved = [g for g in by(of_attention.records, "n_max") if exact(g).mean >= 100 * SOLVED]
    if solved and others:
        longest = solved[-1]
        slow = max(
            (n for r in longest.records if (n := examples_to(r.result, SOLVED))), default=None
        )
        # A model that never got there needs more than its budget.
        fastest = {
            g.key: min(examples_to(r.result, SOLVED) or r.result["examples"][-1] for r in g.records)
            for g in by(copies.select(n_max=longest.key), "model", order=(others,))
        }
        ratios = {model: needed / slow for model, needed in fastest.items()} if slow else {}
        holds = bool(ratios) and min(ratios.values()) >= FEWER
        listed = ", ".join(f"{model} {value:.1f}" for model, value in ratios.items())
        evidence = (
            f"times the Transformer's slowest seed, at {longest.key} tokens, at least: {listed}"
        )
    elif others and attention:
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
    several = len(groups) > 1
    return Verdict(
        "whole strings right fall from the shortest to the longest setting by more than twice the "
        "larger standard deviation over seeds, with the smallest state",
        higher_by(exact(groups[0]), exact(groups[-1]), 0.0) if several else None,
        f"{model}: {listed}" if several else "",
    )


def state_helps(copies: Records) -> Verdict:
    """Returns whether the largest state copies more of the longest strings than the smallest."""
    longest = max(copies.values("n_max"), default=None)
    groups = by(copies.select(n_max=longest), "model", order=(_by_state(copies),))
    listed = ", ".join(f"{g.key} {percent(exact(g))}" for g in groups)
    several = len(groups) > 1
    return Verdict(
        "at the longest strings whole ones right rise from the smallest to the largest state by "
        "more than twice the larger standard deviation over seeds",
        higher_by(exact(groups[-1]), exact(groups[0]), 0.0) if several else None,
        f"strings of {longest}: {listed}" if several else "",
    )


def _by_state(copies: Records) -> list[str]:
    return [m for m in models(copies) if m.startswith("Mamba-2")]


def local_parity(dp: Records) -> Verdict:
    """Returns whether Mamba is as good where steps are local."""
    ours, theirs = _whole_answers(dp, "Transformer"), _whole_answers(dp, "Mamba")
    known = ours is not None and theirs is not None
    return Verdict(
        f"Mamba's whole answers right are at most {100 * PARITY:g} points below the Transformer's",
        theirs.mean >= ours.mean - 100 * PARITY if known else None,
        f"Mamba {percent(theirs)}, Transformer {percent(ours)}" if known else "",
    )


def longer_steps(dp: Records) -> Verdict:
    """Returns whether the Transformer is better where written steps need the whole input."""
    ours, theirs = _whole_answers(dp, "Transformer"), _whole_answers(dp, "Mamba")
    known = ours is not None and theirs is not None
    return Verdict(
        "whole answers right with written steps: the Transformer's are above Mamba's by more than "
        "twice the larger standard deviation over seeds",
        higher_by(ours, theirs, 0.0),
        f"Transformer {percent(ours)}, Mamba {percent(theirs)}" if known else "",
    )


def _whole_answers(dp: Records, family: str) -> Spread | None:
    return exact(Group(family, Records([r for r in dp if r.settings["model"].startswith(family)])))


def law(record: Record) -> Claim:
    """Returns whether the required score grows with the distance as a theorem says."""
    lengths = np.array(record.result["lengths"], float)
    scores = np.array(record.result["scores"], float)
    if record.settings["mechanism"] == theory.ATTENTION:
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
    )
