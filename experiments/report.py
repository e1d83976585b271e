"""Rebuilds everything that is read from what was measured: python -m tilescan.experiments.report.

Layout of a results folder, one per paper and scale:
  config.json  cells/ID.json     what was asked for, and the records of what was measured
  tables.md  tables.json  figures/NAME.svg     made here, of the records alone

RESULTS.md and results/index.html gather all of them. The same records give the same bytes.
"""

import argparse
import dataclasses
import json
import pathlib
import shutil
import sys
from collections.abc import Iterable, Sequence

import rich.console

from tilescan.experiments.harness import html as page
from tilescan.experiments.harness import records as records_lib
from tilescan.experiments.harness import registry as papers
from tilescan.experiments.harness.cells import Paper
from tilescan.experiments.harness.claims import Claim
from tilescan.experiments.harness.records import write_atomically
from tilescan.experiments.harness.results import Results, collect, provenance
from tilescan.experiments.harness.tables import Column, Table

_HELP = "Rebuild RESULTS.md, results/index.html and every table and figure from the records."


def files(results: Results) -> dict[str, str]:
    """The files of one results folder that are made of its records, by relative path."""
    tables = {
        "paper": results.paper.name,
        "scale": results.scale,
        "claims": [dataclasses.asdict(claim) for claim in results.claims],
        "tables": [table.to_json() for table in results.tables],
    }
    figures = {f"figures/{name}.svg": text for name, text in results.figures.items()}
    return {"tables.json": records_lib.dumps(tables), "tables.md": markdown(results), **figures}


def markdown(results: Results, figures: str = "figures") -> str:
    """One paper at one scale as Markdown; `figures` is the path of its figures."""
    parts = [f"## {results.paper.title}", results.paper.summary]
    parts.append(f"Scale **{results.scale}** · {provenance(results.records)}")
    parts.append(claims_table(results.claims).to_markdown())
    parts += [f"![{name}]({figures}/{name}.svg)" for name in results.figures]
    parts += [table.to_markdown() for table in results.tables]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def claims_table(claims: Iterable[Claim]) -> Table:
    """The claims as a table."""
    rows = [[c.name, c.statement, c.criterion, c.status, c.evidence] for c in claims]
    titles = ("claim", "what the paper says", "criterion", "status")
    columns = [*(Column(title) for title in titles), Column("evidence")]
    return Table("claims", "Claims", columns, rows)


def write(paper: Paper, folder: pathlib.Path) -> None:
    """Writes the tables and figures of one results folder."""
    shutil.rmtree(folder / "figures", ignore_errors=True)
    for name, text in files(collect(paper, folder)).items():
        write_atomically(folder / name, text)


def show(paper: Paper, folder: pathlib.Path) -> None:
    """Prints the claims and tables of one results folder."""
    console = rich.console.Console()
    if not console.is_terminal:  # a log has no width: give the headings theirs
        console = rich.console.Console(width=140)
    results = collect(paper, folder)
    for table in results.tables:
        console.print(table.to_rich(), "")
    for claim in results.claims:
        console.print(f"[bold]{claim.status}[/bold]  {claim.name}: {claim.evidence}")
    console.print(f"\nRecords, tables and figures are in {folder}", highlight=False)


def gather(root: pathlib.Path) -> list[Results]:
    """Results of all papers and scales under `root`, in the order of papers.NAMES."""
    found = []
    for name in papers.NAMES:
        for scale in papers.SCALES:
            folder = root / name / scale
            if (folder / "config.json").exists():
                found.append(collect(papers.load(name), folder, f"{name}/{scale}"))
    return found


def rebuild(root: pathlib.Path) -> dict[pathlib.Path, str]:
    """Every generated file under `root` with its text, RESULTS.md beside `root` included."""
    found = gather(root)
    made = {
        root / results.folder / name: text
        for results in found
        for name, text in files(results).items()
    }
    made[root.parent / "RESULTS.md"] = results_markdown(found, root.name)
    made[root / "index.html"] = page.render(found)
    return made


def results_markdown(found: Sequence[Results], root: str) -> str:
    """RESULTS.md."""
    head = """# Results

Made by `python -m tilescan.experiments.report` from the records under `results/`; a test holds
that this file is exactly what they give. *Published* columns stand in the papers. *Measured*
columns were measured by this code on the machine that is named. *Static* columns come from a
compiler or a formula, without running. Every claim has a criterion that the numbers can fail; it
was fixed before them, unless its row says which run it was chosen on.

Measure a paper again: `tilescan run flash_attention --scale=cpu --publish`.
"""
    parts = [markdown(r, figures=f"{root}/{r.folder}/figures") for r in found]
    return "\n".join([head, *parts])


def publish(paper: Paper, workdir: pathlib.Path, root: pathlib.Path) -> None:
    """Copies the records of a run to `root`/PAPER/SCALE and rebuilds all that is made of them."""
    results = collect(paper, workdir)
    target = root / paper.name / results.scale
    if target.resolve() != workdir.resolve():
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(workdir / "cells", target / "cells")
        shutil.copy2(workdir / "config.json", target / "config.json")
    write_all(root)


def write_all(root: pathlib.Path) -> list[pathlib.Path]:
    """Writes what `rebuild` makes; returns the paths."""
    made = rebuild(root)
    for path, text in made.items():
        write_atomically(path, text)
    return list(made)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tilescan.experiments.report", description=_HELP
    )
    parser.add_argument("--results", default="results", type=pathlib.Path, help="what to rebuild")
    parser.add_argument("--from", dest="source", type=pathlib.Path, help="publish this workdir")
    options = parser.parse_args(argv)
    return rebuild_command(options.results, options.source)


def rebuild_command(root: pathlib.Path, source: pathlib.Path | None) -> int:
    """What `main` and `tilescan report` do: publish `source` if given, rebuild, list the files."""
    try:
        if source is not None:
            publish(papers.load(_paper_of(source)), source, root)
        for path in write_all(root):
            print(path)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: --results={root} cannot be written: {error}", file=sys.stderr)
        return 1
    return 0


def _paper_of(source: pathlib.Path) -> str:
    """The paper whose records lie in a workdir; ValueError if it is no workdir."""
    try:
        return json.loads((source / "config.json").read_text(encoding="utf-8"))["paper"]
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise ValueError(
            f"--from={source} is not the workdir of a run: its config.json cannot be read "
            f"({error}); give the folder that `tilescan run` named, e.g. runs/flash_attention/cpu"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
