"""`tilescan list`: the papers."""

import argparse
import json
import pathlib
import shutil
import sys
from typing import Any

from tilescan.cli.folders import results_folder

ABOUT = "the papers, their scales and what was measured"
DESCRIPTION = "List the papers."
_COUNTED = {"shown": "✓", "by construction": "≡", "not shown": "✗", "needs scale": "○"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's argument."""
    parser.add_argument("--json", action="store_true", help="print a JSON array of the papers")


def run(options: argparse.Namespace) -> int:
    """Prints a line a paper, or them as JSON; returns the exit status."""
    root = results_folder()
    if options.json:
        print(json.dumps(papers(root), indent=2))
        return 0
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    print("\n".join(lines(root, width)))
    print("✓ shown, ≡ by construction, ✗ not shown, ○ needs a larger scale", end="; ")
    absent = "There is no folder of results, here or by the code: a checkout has one, a wheel none."
    print(f"measured in {root}" if root else absent)
    print("Measure one: tilescan run NAME --scale=smoke")
    return 0


def lines(root: pathlib.Path | None, width: int | None = None) -> list[str]:
    """Returns a line a paper, under its family: name, title, scales measured, counts of claims.

    Args:
      root: the folder of results.
      width: columns of a line, in which titles are cut at a word; None: as long as titles are.
    """
    from tilescan.experiments.harness import catalogue

    known = {name: catalogue.about(name) for name in catalogue.NAMES}
    names = max(map(len, known), default=0)
    rows = {}
    for name, about in known.items():
        claims = catalogue.claims(root, name)
        title = about.short or about.title.partition(" (arXiv")[0]
        largest = claims.get("accelerator") or claims.get("cpu") or {}
        counts = " ".join(f"{largest.get(k, 0):>2}{sign}" for k, sign in _COUNTED.items())
        rows[name] = title, ", ".join(claims) or "not yet", counts if largest else ""

    scales = max((len(row[1]) for row in rows.values()), default=0)
    room = max((len(row[0]) for row in rows.values()), default=0)
    if width is not None:
        room = max(min(room, width - names - scales - 24), 12)
    listed = []
    for family in catalogue.FAMILIES:
        of_family = [name for name in rows if known[name].family == family]
        listed += [family] if of_family else []
        for name in of_family:
            title, measured, counts = rows[name]
            cells = f"{name:<{names}}  {cut(title, room):<{room}}  {measured:<{scales}}  {counts}"
            listed.append(f"  {cells}".rstrip())
    return listed


def cut(text: str, width: int) -> str:
    """Returns at most `width` characters of a text, cut after a word, "…" for the rest."""
    if len(text) <= width:
        return text
    return text[:width].rpartition(" ")[0].rstrip(" ,:;") + "…"


def papers(root: pathlib.Path | None) -> list[dict[str, Any]]:
    """Returns of each paper its name and title, cells by scale, and the scales measured in root."""
    from tilescan.experiments.harness import catalogue, registry

    listed = []
    for name in registry.NAMES:
        paper = registry.load(name)
        cells = {s: len(paper.cells(registry.load_config(name, s))) for s in registry.SCALES}
        claims = catalogue.claims(root, name)
        about = dict(name=name, title=paper.title, family=paper.family, arxiv=paper.arxiv)
        listed.append({**about, "cells": cells, "measured": list(claims), "claims": claims})
    return listed
