"""`tilescan train`: trains a language model."""

import argparse

from tilescan.cli import training_config

ABOUT = "train a language model"
DESCRIPTION = """\
Train a language model: data, step and loop are deterministic from the seed; a run that was
stopped goes on in its workdir to the same numbers.

  tilescan train --workdir=runs/first                          the default config
  tilescan train --workdir=runs/first --config.train.steps=200 any value of it
  tilescan train --workdir=runs/mine --config.data.sources=mytext.txt,shakespeare
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    training_config.add_arguments(parser)
    # Checked in `run`: argparse would name its absence before anything that is mistyped.
    parser.add_argument("--workdir", help="folder of checkpoints and metrics (required)")
    parser.add_argument(
        "--distributed",
        nargs="?",
        const="auto",
        metavar="HOST:PORT,COUNT,INDEX",
        help="be one of several processes; without a value SLURM, GKE or Cloud TPU say which",
    )


def run(options: argparse.Namespace) -> int:
    """Trains, or goes on, and prints the last metrics; returns the exit status."""
    if options.workdir is None:
        options.parser.error("the following arguments are required: --workdir")
    if options.distributed:
        join_processes(options.distributed)
    from tilescan.training import train

    metrics = train.train(training_config.load(options), options.workdir)
    for name, value in sorted(metrics.items()):
        print(f"{name:28} {value:.6g}")
    return 0


def join_processes(where: str) -> None:
    """Joins the other processes of a run: "auto", or "HOST:PORT,COUNT,INDEX".

    Raises:
      ValueError: another form.
    """
    import jax

    if where == "auto":
        jax.distributed.initialize()
        return
    coordinator, *numbers = where.split(",")
    if ":" not in coordinator or len(numbers) != 2 or not all(n.isdigit() for n in numbers):
        raise ValueError(
            f"--distributed={where!r} must be HOST:PORT,COUNT,INDEX, e.g. 10.0.0.1:1234,2,0"
        )
    jax.distributed.initialize(coordinator, int(numbers[0]), int(numbers[1]))
