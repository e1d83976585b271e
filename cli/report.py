"""`tilescan report`: rebuilds the pages of results."""

import argparse
import pathlib

from tilescan.cli import arguments
from tilescan.experiments import options as options_lib

ABOUT = "rebuild RESULTS.md and results/index.html"
DESCRIPTION = """\
Rebuild RESULTS.md, results/index.html and every table and figure from the kept records.

  tilescan report                                    of what lies in results/
  tilescan report --from=runs/flash_attention/cpu    first copy this run to results/
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("--results", type=arguments.path, default=pathlib.Path("results"))
    parser.add_argument(
        "--from", dest="source", type=arguments.path, help="publish this workdir first"
    )
    options_lib.add_reworded(parser)
    options_lib.add_allow_modified(parser)


def run(options: argparse.Namespace) -> int:
    """Rebuilds tables, figures and pages; returns the exit status."""
    from tilescan.experiments import report

    return report.rebuild_command(
        options.results, options.source, options.reworded, options.allow_modified
    )
