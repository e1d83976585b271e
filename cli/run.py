"""`tilescan run`: measures a paper."""

import argparse

from tilescan.cli import arguments
from tilescan.experiments import options as options_lib

ABOUT = "measure a paper and print its tables"
DESCRIPTION = """\
Measure a paper's cells and print its tables, published and measured columns side by side.
Each finished cell is kept in the workdir, so the same command goes on after an interruption.

  tilescan run flash_attention                                      scale cpu
  tilescan run flash_attention --scale=smoke --only=runtime         some cells only
  tilescan run flash_attention --config.runtime.repeats=9           any value of the config
  tilescan run h3 --jobs=2                                          two cells at once
  tilescan run flash_attention --publish                            also rebuild RESULTS.md

The values that can be set are in configs/PAPER.py. `python -m tilescan.experiments.run
--config=configs/PAPER.py:SCALE` is the same thing for people who live in absl.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("paper", help="its name, see `tilescan list`")
    parser.add_argument("--scale", default="cpu", help="smoke, cpu or accelerator [cpu]")
    parser.add_argument(
        "--workdir", type=arguments.given, help="folder of the records [runs/PAPER/SCALE]"
    )
    parser.add_argument("--only", default="", help="measure the cells whose id contains this")
    parser.add_argument(
        "--jobs", type=int, default=1, help="measure N cells at once, timed ones after them [1]"
    )
    parser.add_argument("--publish", action="store_true", help="copy the records to results/")
    options_lib.add_allow_modified(parser)
    parser.set_defaults(config_keys=_config_keys)


def run(options: argparse.Namespace) -> int:
    """Measures what is missing and prints the tables; returns the exit status."""
    from tilescan.experiments import run
    from tilescan.experiments.harness import registry as papers

    config = papers.load_config(options.paper, options.scale, options.overrides)
    return run.measure(
        config,
        options.workdir,
        options.only,
        options.publish,
        options.allow_modified,
        options.jobs,
    )


def _config_keys(options: argparse.Namespace) -> list[str]:
    """Returns the keys of the paper's config; raises ValueError for an unknown paper or scale."""
    from tilescan.experiments.harness import registry as papers
    from tilescan.training import config as config_lib

    config = papers.load_config(options.paper, options.scale)
    return [key for key in config_lib.known_keys(config) if "." in key]
