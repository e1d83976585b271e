"""Options of more than one command, apart from all that brings JAX: commands start without it."""

import argparse


def add_reworded(parser: argparse.ArgumentParser) -> None:
    """Adds what a report has to be told of criteria that say the same in other words."""
    parser.add_argument(
        "--reworded",
        action="append",
        default=[],
        metavar="'PAPER/SCALE: CLAIM'",
        help="its criterion says the same in other words, and keeps its date; 'PAPER/SCALE: CLAIM "
        "< OLD NAME' if it has a new name as well; any number of times",
    )


def add_allow_modified(parser: argparse.ArgumentParser) -> None:
    """Adds the leave to publish records that no commit gives back."""
    parser.add_argument(
        "--allow-modified",
        action="store_true",
        help="publish records that were made from a modified work tree, too",
    )
