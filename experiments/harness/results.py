"""What is shown of one paper at one scale, computed from its records alone."""

import dataclasses
import functools
import itertools
import pathlib
import types
from collections.abc import Mapping, Sequence

from tilescan.experiments.harness import criteria
from tilescan.experiments.harness import records as records_lib
from tilescan.experiments.harness.cells import Paper
from tilescan.experiments.harness.claims import Claim, undecided
from tilescan.experiments.harness.records import Records
from tilescan.experiments.harness.runner import kept_config
from tilescan.experiments.harness.tables import Table


@dataclasses.dataclass(frozen=True)
class Results:
    """All that is shown of one paper at one scale, computed from its records when asked for.

    Attributes:
      paper: how to read the records.
      scale: of the config.
      folder: relative to results/.
      records: what was measured.
      entries: {claim: entry} of the ledger of criteria.
    """

    paper: Paper
    scale: str
    folder: str
    records: Records
    entries: criteria.Entries = types.MappingProxyType({})

    @functools.cached_property
    def tables(self) -> Sequence[Table]:
        """The paper's tables, those that have rows."""
        return [table for table in self.paper.tables(self.records) if table.rows]

    @functools.cached_property
    def claims(self) -> Sequence[Claim]:
        """The paper's claims; at scale smoke, whose sizes show nothing, they are not decided.

        Those whose criteria are younger than their records say so.
        """
        read = functools.partial(criteria.readings, self.paper.claims, self.records)
        claims = criteria.marked(self.paper.claims(self.records), self.entries, read)
        return [undecided(claim, "cpu") for claim in claims] if self.scale == "smoke" else claims

    @functools.cached_property
    def figures(self) -> Mapping[str, str]:
        """The paper's figures, {name: SVG text}, those that have lines."""
        return {name: svg for name, svg in self.paper.figures(self.records).items() if svg}

    def figures_beside(self, table: str) -> list[str]:
        """Returns the names of the figures that belong to a table; "": those that go with none.

        A figure belongs to the first of the tables whose names share most words with its own, from
        the first word on: "memory-against-length" to "memory-forward".
        """
        names = [shown.name for shown in self.tables]
        return [f for f in self.figures if max(["", *names], key=lambda t: _shared(f, t)) == table]


def _shared(one: str, two: str) -> int:
    """Returns how many words two names begin with alike."""
    pairs = zip(one.split("-"), two.split("-"), strict=False)
    return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))


def collect(paper: Paper, folder: pathlib.Path, name: str = "") -> Results:
    """Returns the results whose records lie in `folder`; `name` is the folder's in results/.

    Raises:
      ValueError: the folder has no config.json, or a broken record.
    """
    return Results(paper, kept_config(folder)["scale"], name, records_lib.load(folder))


def provenance(records: Records) -> str:
    """Returns where the numbers come from, in one line: cells, time, device, versions, commit."""
    if not len(records):
        return "nothing measured yet"
    environments = [record.environment for record in records]

    def every(text):
        return ", ".join(sorted({str(text(e)) for e in environments}))

    seconds = sum(record.seconds for record in records)
    cores = lambda n: f"{n} core" + "s" * (n != 1)
    device = every(lambda e: f"{e['device']} ({cores(e['cpu_count'])})")
    versions = every(lambda e: f"JAX {e['packages']['jax']}, Python {e['python']}")
    commits = every(
        lambda e: (e["commit"] or "unknown")[:10] + (" with changes" if e["modified"] else "")
    )
    when = max(e["finished"] for e in environments)[:10]
    return (
        f"{len(records)} cells in {seconds / 60:.1f} minutes on {device} · {versions} · "
        f"commit {commits} · {when}"
    )
