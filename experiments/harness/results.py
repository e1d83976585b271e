"""What is shown of one paper at one scale, computed from its records alone."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence

from tilescan.experiments.harness import records as records_lib
from tilescan.experiments.harness.cells import Paper
from tilescan.experiments.harness.claims import Claim, undecided
from tilescan.experiments.harness.records import Records
from tilescan.experiments.harness.tables import Table


@dataclasses.dataclass(frozen=True)
class Results:
    """All that is shown of one paper at one scale; `folder` is relative to results/."""

    paper: Paper
    scale: str
    folder: str
    records: Records
    tables: Sequence[Table]
    claims: Sequence[Claim]
    figures: Mapping[str, str]


def collect(paper: Paper, folder: pathlib.Path, name: str = "") -> Results:
    """Computes tables, claims and figures of the records in `folder`.

    Scale smoke runs the code on sizes that show nothing: its claims are not decided.

    Raises:
      ValueError: the folder has no config.json, or a broken record.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["config"]
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"{folder} is no folder of results: config.json: {error}") from error
    records = records_lib.load(folder)
    claims = paper.claims(records)
    if config["scale"] == "smoke":
        claims = [undecided(claim, "cpu") for claim in claims]
    return Results(
        paper=paper,
        scale=config["scale"],
        folder=name,
        records=records,
        tables=paper.tables(records),
        claims=claims,
        figures=paper.figures(records),
    )


def provenance(records: Records) -> str:
    """Where the numbers come from, in one line: cells, time, device, versions, commit."""
    if not len(records):
        return "nothing measured yet"
    environments = [record.environment for record in records]

    def every(text):
        return ", ".join(sorted({str(text(e)) for e in environments}))

    seconds = sum(record.seconds for record in records)
    device = every(lambda e: f"{e['device']} ({e['cpu_count']} cores)")
    versions = every(lambda e: f"JAX {e['packages']['jax']}, Python {e['python']}")
    commits = every(
        lambda e: (e["commit"] or "unknown")[:10] + (" with changes" if e["modified"] else "")
    )
    when = max(e["finished"] for e in environments)[:10]
    return (
        f"{len(records)} cells in {seconds / 60:.1f} minutes on {device} · {versions} · "
        f"commit {commits} · {when}"
    )
