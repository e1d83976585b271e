"""A paper's statements as predicates over measured numbers: shown, not shown, or needs scale X."""

import dataclasses

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
    """

    name: str
    statement: str
    criterion: str
    status: str
    evidence: str


def judge(
    name: str, statement: str, criterion: str, holds: bool | None, evidence: str, needs: str = ""
) -> Claim:
    """Claim whose status is what the predicate `holds` came to.

    Args:
      name: short name.
      statement: what the paper says.
      criterion: the predicate with its threshold in words.
      holds: value of the predicate; None when its measurements are missing.
      evidence: the numbers.
      needs: the scale that would decide, for `holds=None` of claims out of this scale's reach;
        without it a missing measurement counts as not shown.
    """
    if holds is None:
        status = f"{NEEDS}{needs}" if needs else NOT_SHOWN
        evidence = evidence or "its measurements are missing"
    else:
        status = SHOWN if holds else NOT_SHOWN
    return Claim(name, statement, criterion, status, evidence)


def undecided(claim: Claim, needs: str) -> Claim:
    """The claim, its numbers kept, where sizes are too small to decide it."""
    if claim.status.startswith(NEEDS):
        return claim
    return dataclasses.replace(claim, status=f"{NEEDS}{needs}")
