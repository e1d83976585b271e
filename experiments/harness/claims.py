"""A paper's statements as predicates over measured numbers: shown, not shown, or needs scale X.

A predicate returns a `Verdict`: its criterion in words, what it came to, and the numbers, so that
no criterion stands twice, in words and in code.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from tilescan.experiments.harness.records import Records
from tilescan.experiments.harness.statistics import Spread
from tilescan.experiments.harness.tables import QUOTED, percent

SHOWN, NOT_SHOWN = "shown", "not shown"
NEEDS = "needs scale: "


@dataclasses.dataclass(frozen=True)
class Claim:
    """One statement, its criterion, and what the numbers say.

    Attributes:
      name: short name.
      statement: what the paper says, in one sentence.
      criterion: the predicate with its threshold, in words that match the code.
      status: "shown", "not shown", or "needs scale: ..." when these runs cannot decide.
      evidence: the measured numbers that decided.
      why: of a claim that is not shown, what is known of the cause, in one sentence.
      effect: the published and the measured size of the effect, where both are numbers.
      by_construction: whether nothing but a fault of the code could refute it, as a count of what a
        formula says: a regression test, counted apart.
      source: kind of the number that the statement quotes, one of `tables.QUOTED`, where it is
        another than the paper's own.
      late: that the criterion is younger than a record, and what was before; see `criteria`.
    """

    name: str
    statement: str
    criterion: str
    status: str
    evidence: str
    why: str = ""
    effect: "Effect | None" = None
    by_construction: bool = False
    source: str = ""
    late: str = ""

    def __post_init__(self):
        if self.source not in ("", *QUOTED):
            raise ValueError(
                f"source={self.source!r} of claim {self.name!r} is not one of {QUOTED}"
            )

    @property
    def said(self) -> str:
        """What the paper says, with the kind of the number that it quotes."""
        return f"{self.statement} [{self.source}]" if self.source else self.statement

    @property
    def judged(self) -> str:
        """The criterion, with what is to be said of its age."""
        return f"{self.criterion} [{self.late}]" if self.late else self.criterion

    @property
    def outcome(self) -> str:
        """The status, with a word on what follows by construction."""
        return f"{self.status}, by construction" if self.built else self.status

    @property
    def built(self) -> bool:
        """Whether it is shown, and could not have come out otherwise."""
        return self.by_construction and self.status == SHOWN

    def to_json(self) -> dict[str, Any]:
        """Returns the claim as plain values, without what it does not say."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value}


@dataclasses.dataclass(frozen=True)
class Effect:
    """An effect in numbers: how far the measured one goes of the published one.

    Attributes:
      published: its size in the paper.
      measured: its size here, a number for each seed, round or number of devices (at least one).
      kind: "ratio", where 1 is no effect, or "difference", where 0 is.
    """

    published: float
    measured: Sequence[float]
    kind: str = "ratio"

    def __post_init__(self):
        if self.kind not in ("ratio", "difference"):
            raise ValueError(f"kind={self.kind!r} is neither 'ratio' nor 'difference'")

    def shares(self) -> list[float]:
        """Returns the measured effects on an axis where 0 is none and 1 is the published one."""
        if self.kind == "ratio":
            return [math.log(value) / math.log(self.published) for value in self.measured]
        return [value / self.published for value in self.measured]


def effect_of(published: float, *measured: float | None, kind: str = "ratio") -> Effect | None:
    """Returns the `Effect` of what was measured; None where nothing was, or none is published."""
    known = [value for value in measured if value is not None]
    none = published == (1 if kind == "ratio" else 0)
    return Effect(published, known, kind) if known and not none else None


def judge(
    name: str,
    statement: str,
    criterion: str,
    holds: bool | None,
    evidence: str,
    needs: str = "",
    *,
    why: str = "",
    effect: Effect | None = None,
    by_construction: bool = False,
    source: str = "",
) -> Claim:
    """Returns the claim whose status is what the predicate `holds` came to.

    Args:
      name: short name.
      statement: what the paper says.
      criterion: the predicate with its threshold in words.
      holds: value of the predicate; None when its measurements are missing.
      evidence: the numbers.
      needs: the scale that would decide, for `holds=None` of claims out of this scale's reach;
        without it a missing measurement counts as not shown.
      why: what is known of the cause, should the claim not be shown.
      effect: its size, published and measured.
      by_construction, source: as of `Claim`.
    """
    if holds is None:
        status = f"{NEEDS}{needs}" if needs else NOT_SHOWN
        evidence = evidence or "its measurements are missing"
    else:
        status = SHOWN if holds else NOT_SHOWN
    why = why if holds is False else ""
    return Claim(name, statement, criterion, status, evidence, why, effect, by_construction, source)


def undecided(claim: Claim, needs: str) -> Claim:
    """Returns the claim, its numbers kept, where sizes are too small to decide it."""
    if claim.status.startswith(NEEDS):
        return claim
    return dataclasses.replace(claim, status=f"{NEEDS}{needs}")


class Verdict(NamedTuple):
    """What a predicate says: criterion in words, whether it holds (None: not measured), numbers."""

    criterion: str
    holds: bool | None
    evidence: str
    effect: Effect | None = None


def claim(
    name: str, statement: str, verdict: Verdict, needs: str = "", why: str = "", **more: Any
) -> Claim:
    """Returns the claim whose criterion, status and evidence come from one predicate.

    Args:
      name: short name.
      statement: what the paper says.
      verdict: of the predicate.
      needs, why: as of `judge`.
      **more: by_construction and source, as of `Claim`.
    """
    criterion, holds, evidence, effect = verdict
    return judge(name, statement, criterion, holds, evidence, needs, why=why, effect=effect, **more)


def not_run(
    name: str,
    statement: str,
    criterion: str,
    needs: str,
    evidence: str = "not run",
    source: str = "",
) -> Claim:
    """Returns a claim that no scale here measures; `needs` says what would decide it."""
    return judge(name, statement, criterion, None, evidence, needs=needs, source=source)


def lower_every_seed(
    records: Records,
    metric: str,
    words: str,
    names: Mapping[str, str],
    *,
    worse: Mapping[str, Any],
    better: Mapping[str, Any],
    published: float | None = None,
) -> Verdict:
    """Returns whether `metric` is lower for `better` than for `worse` with each seed of both.

    Args:
      records: of one kind.
      metric: name of a measured number.
      words: what it is called.
      names: of the values of the setting that differs.
      worse, better: settings that select the two, e.g. {"model": "s4d"}.
      published: the paper's metric of `worse` / that of `better`.
    """
    one, two = ({r.seed: r.result[metric] for r in records.select(**s)} for s in (worse, better))
    seeds = sorted(set(one) & set(two))
    a, b = (names[next(iter(s.values()))] for s in (worse, better))
    evidence = ", ".join(f"{a} {one[s]:.3f}, {b} {two[s]:.3f} (seed {s})" for s in seeds)
    holds = all(two[s] < one[s] for s in seeds) if seeds else None
    effect = Effect(published, [one[s] / two[s] for s in seeds]) if published and seeds else None
    criterion = f"a lower {words} with every seed (paired by seed: the same data and batches)"
    return Verdict(criterion, holds, evidence, effect)


def leads(
    criterion: str,
    found: Mapping[str, Spread | None],
    points: float = 0.0,
    head: str = "",
    effect: Effect | None = None,
    least: float | None = None,
) -> Verdict:
    """Returns whether the first of two means is above the second, by `higher_by`.

    Args:
      criterion: the predicate in words.
      found: {name: mean and std}, the first and the second; None: not measured.
      points: least difference.
      head: of the evidence.
      effect: its size, published and measured.
      least: what the first mean must come to as well.
    """
    listed = ", ".join(f"{name} {percent(value)}" for name, value in found.items() if value)
    high, low = found.values()
    holds = higher_by(high, low, points)
    if holds and least is not None:
        holds = high.mean >= least
    return Verdict(criterion, holds, head + listed, effect)


def rises(
    criterion: str, found: Mapping[Any, float], unit: str = "", effect: Effect | None = None
) -> Verdict:
    """Returns whether a ratio grows from the first of some points to the last, and ends above 1.

    Args:
      criterion: the predicate in words.
      found: {point: ratio}.
      unit: of the points, in the evidence.
      effect: its size, published and measured.
    """
    values = list(found.values())
    holds = values[-1] > max(values[0], 1) if len(values) > 1 else None
    evidence = ", ".join(f"{value:.2f} at {point}{unit}" for point, value in found.items())
    return Verdict(criterion, holds, evidence, effect)


def higher_by(high: Spread | None, low: Spread | None, points: float) -> bool | None:
    """Returns whether means differ by more than `points` and twice the larger deviation."""
    if high is None or low is None:
        return None
    return high.mean - low.mean > max(points, 2 * max(high.std or 0.0, low.std or 0.0))


def within(value: float | None, low: float, high: float) -> bool | None:
    """Returns whether low <= value <= high; None if it was not measured."""
    return None if value is None else low <= value <= high


def grows(values: Sequence[float]) -> bool | None:
    """Returns whether the last of at least two values is above the first."""
    return values[-1] > values[0] if len(values) > 1 else None


def every(conditions: Iterable[bool]) -> bool | None:
    """Returns whether all conditions hold; None if there are none: nothing was measured."""
    conditions = list(conditions)
    return all(conditions) if conditions else None


def near(values: Iterable[float], target: float, tolerance: float) -> bool | None:
    """Returns whether all values are the target within a relative tolerance; None without any."""
    return every(abs(value / target - 1) <= tolerance for value in values)


def listed(found: Mapping[Any, Any], text: str = "{} {:.1e}") -> str:
    """Returns evidence of {name: number}: `text` with each name and number filled in."""
    return ", ".join(text.format(name, value) for name, value in found.items())


def at_most(
    criterion: str, found: Mapping[Any, float], bound: float, text: str = "{} {:.1e}"
) -> Verdict:
    """Returns whether all numbers found are at most `bound`.

    Args:
      criterion: the predicate in words.
      found: {name: number}.
      bound: the greatest that is allowed.
      text: evidence of a name and its number.
    """
    holds = every(value <= bound for value in found.values())
    return Verdict(criterion, holds, listed(found, text))
