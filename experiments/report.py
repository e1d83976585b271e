"""Rebuilds everything that is read from what was measured: python -m tilescan.experiments.report.

Layout of the folder of results:
  PAPER/SCALE/config.json  cells/ID.json      what was asked for, and the records of it
  PAPER/SCALE/tables.json  figures/NAME.svg   made here, of the records alone
  PAPER/README.md  PAPER/index.html           the paper's page
  criteria.json                               since when claims are judged as they are, see criteria
  index.html  code.json  effects.svg          all papers; RESULTS.md beside the folder is the same

The same records give the same bytes.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from tilescan import terminal
from tilescan.experiments import options as options_lib
from tilescan.experiments.harness import publish as publish_lib
from tilescan.experiments.harness import registry
from tilescan.experiments.harness.results import Results

_HELP = "Rebuild RESULTS.md, results/index.html and every table and figure from the records."


def show(results: Results, folder: pathlib.Path) -> None:
    """Prints the claims and tables of one results folder."""
    for table in results.tables:
        table.show()
    width = terminal.width()
    for claim in results.claims:
        late = f"; {claim.late}" if claim.late else ""
        text = terminal.fill(f"{claim.outcome}: {claim.name} ({claim.evidence}){late}", width)
        print(text.replace(claim.outcome, terminal.paint(claim.outcome, "bold"), 1))
    print(f"\nRecords, tables and figures are in {folder}")


def rebuild_command(
    root: pathlib.Path,
    source: pathlib.Path | None,
    reworded: Sequence[str] = (),
    allow_modified: bool = False,
) -> int:
    """Publishes `source` if given, rebuilds, lists the files; returns the exit status.

    Args:
      root: the folder of results.
      source: workdir of a run.
      reworded: as of `criteria.updated`.
      allow_modified: as of `publish.publish`.
    """
    try:
        if source is None and not root.exists():
            raise ValueError(
                f"--results={root}: there is no such folder; --from=WORKDIR makes one, and a "
                "checkout has one"
            )
        if source is not None:
            paper = registry.load(publish_lib.paper_of(source))
            publish_lib.publish(paper, source, root, allow_modified=allow_modified)
        for path in publish_lib.write_all(root, reworded=reworded):
            print(path)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: --results={root} cannot be written: {error}", file=sys.stderr)
        return 1
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tilescan.experiments.report", description=_HELP
    )
    parser.add_argument("--results", default="results", type=pathlib.Path, help="what to rebuild")
    parser.add_argument("--from", dest="source", type=pathlib.Path, help="publish this workdir")
    options_lib.add_reworded(parser)
    options_lib.add_allow_modified(parser)
    options = parser.parse_args(argv)
    return rebuild_command(
        options.results, options.source, options.reworded, options.allow_modified
    )


if __name__ == "__main__":
    sys.exit(main())
