"""All papers on one page: a row a paper, a symbol a claim, and what did not come out."""

import dataclasses
from collections.abc import Mapping, Sequence

from tilescan.experiments.harness.catalogue import FAMILIES
from tilescan.experiments.harness.cells import Paper
from tilescan.experiments.harness.claims import NOT_SHOWN, SHOWN, Claim
from tilescan.experiments.harness.results import Results

SYMBOLS = {SHOWN: "✓", NOT_SHOWN: "✗"}
NEEDS_SCALE = "○"
BY_CONSTRUCTION = "≡"
LATE = "†"
# What became of the code under a paper's records since they were measured.
UNCHANGED, CHANGED, UNKNOWN = "unchanged", "changed", "unknown"
LEGEND = (
    f"{SYMBOLS[SHOWN]} shown, {SYMBOLS[NOT_SHOWN]} not shown, {NEEDS_SCALE} needs a larger scale, "
    f"{BY_CONSTRUCTION} by construction: only a fault of the code could refute it, and it counts "
    f"apart; {LATE} the criterion is younger than a record it reads; in the order of the paper's "
    "page. Minutes: of all cells one after another; of those measured side by side (`--jobs`) each "
    "counts whole. Code: whether the code under the records changed since they were measured, and "
    "in which files (unknown: measured before records kept that)."
)
# What the ledger of criteria can prove.
LEDGER = (
    "For each criterion criteria.json has the time since which it stands: of the commit that "
    "brought it, or, for later ones, of the run or report that met it first; what it was before; "
    "and earlier wordings. That proves in which order texts and records were kept, and no more: "
    "not what anybody knew or meant before, nor that a clock was right, and it does not notice a "
    "change of what is computed under the same words. A claim measured again after its criterion "
    "changed is not marked."
)
EFFECTS = (
    "Measured effects on an axis where 0 is no effect and 1 the published one, of ratios by their "
    "logarithms; a dot for each seed, round or number of devices, a triangle where it lies beyond "
    "the axis."
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One paper at one scale.

    Attributes:
      paper: what it is.
      folder: of its page, relative to results/.
      scale: of its records.
      claims: in the order of its page.
      seeds: how many different ones its cells have.
      minutes: that its cells took.
      machine: names of devices.
      measured: the date of the last record.
      code: UNCHANGED, CHANGED or UNKNOWN, and in which files.
    """

    paper: Paper
    folder: str
    scale: str
    claims: Sequence[Claim]
    seeds: int
    minutes: float
    machine: str
    measured: str
    code: str

    @property
    def shown(self) -> str:
        """How many of the claims that were decided are shown, those by construction apart."""
        decided = [claim for claim in self.claims if claim.status in SYMBOLS]
        built = sum(claim.built for claim in decided)
        shown = sum(claim.status == SHOWN for claim in decided) - built
        text = f"{shown} of {len(decided) - built}"
        return f"{text} + {built}{BY_CONSTRUCTION}" if built else text


def symbol(claim: Claim) -> str:
    """Returns the sign of a claim's status, with one on a criterion younger than its records."""
    sign = BY_CONSTRUCTION if claim.built else SYMBOLS.get(claim.status, NEEDS_SCALE)
    return f"{sign}{LATE}" if claim.late else sign


def rows(found: Sequence[Results], code: Mapping[str, str]) -> list[Row]:
    """Returns a row for each paper and scale, by family.

    Args:
      found: all results.
      code: {folder: what became of the code under it, in words}; see `staleness`.
    """
    made = []
    for results in sorted(found, key=lambda r: FAMILIES.index(r.paper.family)):
        environments = [record.environment for record in results.records]
        made.append(
            Row(
                paper=results.paper,
                folder=results.paper.name,
                scale=results.scale,
                claims=results.claims,
                seeds=len({record.seed for record in results.records}),
                minutes=sum(record.seconds for record in results.records) / 60,
                machine=", ".join(sorted({short_device(e["device"]) for e in environments})),
                measured=max((e["finished"][:10] for e in environments), default=""),
                code=code.get(results.folder, UNKNOWN),
            )
        )
    return made


def short_device(name: str) -> str:
    """Returns a processor's name without its trademarks and counts."""
    for noise in ("(R)", "(TM)", " Processor", " CPU"):
        name = name.replace(noise, "")
    return " ".join(name.partition("@")[0].split())


def not_shown(found: Sequence[Results]) -> list[tuple[Results, Claim]]:
    """Returns the claims that measurements refute, with their papers."""
    return [(r, c) for r in found for c in r.claims if c.status == NOT_SHOWN]


def late(found: Sequence[Results]) -> list[tuple[Results, str, list[Claim]]]:
    """Returns the claims whose criteria are younger than a record they read, by what is said."""
    made = []
    for results in found:
        said = dict.fromkeys(claim.late for claim in results.claims if claim.late)
        made += [(results, s, [c for c in results.claims if c.late == s]) for s in said]
    return made


def _measured(claim: Claim) -> bool:
    """Returns whether a claim has an effect that could have been another."""
    has_one = claim.effect is not None and len(claim.effect.measured) > 0
    return has_one and not claim.by_construction


def effects(found: Sequence[Results]) -> dict[str, dict[str, list[float]]]:
    """Returns {paper: {claim: measured effects as shares of the published one}}."""
    made: dict[str, dict[str, list[float]]] = {}
    for results in found:
        shares = {c.name: c.effect.shares() for c in results.claims if _measured(c)}
        if shares:
            made.setdefault(results.paper.short_title, {}).update(shares)
    return made
