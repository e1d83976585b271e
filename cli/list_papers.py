"""`tilescan list`: the papers."""

import argparse
import json
import pathlib
from typing import Any

from tilescan.cli.folders import results_folder

ABOUT = "the papers, their scales and what was measured"
DESCRIPTION = "List the papers."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's argument."""
    parser.add_argument("--json", action="store_true", help="print a JSON array of the papers")


def run(options: argparse.Namespace) -> int:
    """Prints a table of the papers, or them as JSON; returns the exit status."""
    import rich.console
    import rich.table

    root = results_folder()
    listed = papers(root)
    if options.json:
        print(json.dumps(listed, indent=2))
        return 0
    table = rich.table.Table(title="Papers", title_justify="left")
    for heading in ("name", "paper", "cells: smoke / cpu / accelerator", "measured"):
        table.add_column(heading)
    for paper in listed:
        cells = " / ".join(map(str, paper["cells"].values()))
        measured = ", ".join(paper["measured"]) or "not yet"
        table.add_row(paper["name"], paper["title"], cells, measured)
    rich.console.Console().print(table)
    print(f"Measured: {root}" if root else "There is no folder of results, here or by the code.")
    print("Measure one: tilescan run NAME --scale=smoke")
    return 0


def papers(root: pathlib.Path | None) -> list[dict[str, Any]]:
    """Returns of each paper its name and title, cells by scale, and the scales measured in root."""
    from tilescan.experiments.harness import registry

    listed = []
    for name in registry.NAMES:
        paper = registry.load(name)
        cells = {s: len(paper.cells(registry.load_config(name, s))) for s in registry.SCALES}
        tables = {s: root and root / name / s / "tables.json" for s in registry.SCALES}
        measured = [s for s, path in tables.items() if path and path.exists()]
        listed.append(dict(name=name, title=paper.title, cells=cells, measured=measured))
    return listed
