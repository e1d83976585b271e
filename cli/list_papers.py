"""`tilescan list`: the papers."""

import argparse

from tilescan.cli.folders import results_folder

ABOUT = "the papers, their scales and what was measured"
DESCRIPTION = "List the papers."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds no argument."""


def run(options: argparse.Namespace) -> int:
    """Prints a table of the papers; returns the exit status."""
    import rich.console
    import rich.table

    from tilescan.experiments.harness import registry as papers

    root = results_folder()
    table = rich.table.Table(title="Papers", title_justify="left")
    for heading in ("name", "paper", "cells: smoke / cpu / accelerator", "measured"):
        table.add_column(heading)
    for name in papers.NAMES:
        paper = papers.load(name)
        counts = [len(paper.cells(papers.load_config(name, scale))) for scale in papers.SCALES]
        measured = [
            scale
            for scale in papers.SCALES
            if root and (root / name / scale / "tables.json").exists()
        ]
        cells = " / ".join(map(str, counts))
        table.add_row(name, paper.title, cells, ", ".join(measured) or "not yet")
    rich.console.Console().print(table)
    print(f"Measured: {root}" if root else "There is no folder of results, here or by the code.")
    print("Measure one: tilescan run NAME --scale=smoke")
    return 0
