"""`tilescan rerun`: measures one committed number again."""

import argparse
import pathlib

from tilescan.cli import arguments
from tilescan.cli.folders import results_folder

ABOUT = "measure one committed record again"
DESCRIPTION = """\
Measure one committed record again, with today's code, and print the old and the new numbers.

  tilescan rerun h3                                        list the records of results/h3/cpu
  tilescan rerun h3 text-h3-seed0                          measure one of them again
  tilescan rerun h3 text-h3-seed0 --workdir=runs/h3/cpu    of a run of yours

The page of a paper (results/PAPER/README.md) lists its records too. Nothing in results/ changes.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("paper", help="its name, see `tilescan list`")
    parser.add_argument("cell", nargs="?", metavar="record", help="its id; without one: list all")
    parser.add_argument("--scale", default="cpu", help="of the record [cpu]")
    parser.add_argument(
        "--workdir", type=arguments.path, help="of the record [results/PAPER/SCALE]"
    )


def run(options: argparse.Namespace) -> int:
    """Measures the record's cell and prints both, or lists records; returns the exit status."""
    from tilescan.experiments import rerun
    from tilescan.experiments.harness import registry

    registry.load(options.paper)
    root = results_folder() or pathlib.Path("results")
    folder = options.workdir or root / options.paper / options.scale
    if options.cell is None:
        print("\n".join(rerun.recorded(folder)))
        return 0
    return rerun.rerun(options.paper, options.cell, folder)
