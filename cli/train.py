"""`tilescan train`: trains a language model."""

import argparse

from tilescan.cli import arguments, training_config

ABOUT = "train a language model"
DESCRIPTION = """\
Train a language model: data, step and loop are deterministic from the seed; a run that was
stopped goes on in its workdir to the same numbers.

  tilescan train --workdir=runs/first                          the default config
  tilescan train --workdir=runs/first --config.train.steps=200 any value of it
  tilescan train --workdir=runs/mine --config.data.sources=mytext.txt,shakespeare
  tilescan train --workdir=runs/first --config.train.sample_every=100     with texts it writes
  tilescan train --workdir=runs/tuned --config.train.start_from=smollm2   from a published model

Stages, mixtures of sources, replay of old data and schedules: docs/learning_rates.md
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    training_config.add_arguments(parser)
    # Checked in `run`: argparse would name its absence before anything that is mistyped.
    about = "folder of checkpoints and metrics (required)"
    parser.add_argument("--workdir", type=arguments.given, help=about)
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
    from tilescan.training import stages, train

    config = training_config.load(options)
    if config.stages:
        found = stages.train_stages(config, options.workdir)
    else:
        found = {"": train.train(config, options.workdir)}
    for stage, metrics in found.items():
        print(f"stage {stage}\n" if stage else "", end="")
        for name, value in sorted(metrics.items()):
            print(f"{name:28} {value:.6g}")
    return 0


def join_processes(where: str) -> None:
    """Joins the other processes of a run: "auto", or "HOST:PORT,COUNT,INDEX".

    Raises:
      ValueError: another form, a port, count or index that cannot be; "auto" where no cluster says
        who the processes are.
    """
    import jax

    if where == "auto":
        try:
            jax.distributed.initialize()
        except (ValueError, RuntimeError) as error:
            raise ValueError(
                f"--distributed without a value needs SLURM, GKE, Open MPI or Cloud TPU, which "
                f"tell who the processes are ({error}); elsewhere write "
                "--distributed=HOST:PORT,COUNT,INDEX, e.g. 10.0.0.1:1234,2,0"
            ) from error
        return
    jax.distributed.initialize(*parse_processes(where))


def parse_processes(where: str) -> tuple[str, int, int]:
    """Parses "HOST:PORT,COUNT,INDEX" to ("HOST:PORT", COUNT, INDEX).

    Raises:
      ValueError: another form; a port outside 1..65535, a count below 1, an index outside
        0..COUNT - 1, with which the processes would wait for each other in vain.
    """
    coordinator, *numbers = where.split(",")
    host, colon, port = coordinator.rpartition(":")
    numbers = [port, *numbers]
    if not host or len(numbers) != 3 or not all(n.isascii() and n.isdigit() for n in numbers):
        raise ValueError(
            f"--distributed={where!r} must be HOST:PORT,COUNT,INDEX, e.g. 10.0.0.1:1234,2,0"
        )
    port, count, index = map(int, numbers)
    if not 1 <= port <= 65535:
        raise ValueError(f"--distributed={where!r}: port {port} must be between 1 and 65535")
    if not 0 <= index < count:
        raise ValueError(
            f"--distributed={where!r}: of COUNT={count} processes INDEX={index} must be one of "
            f"0 to {count - 1}"
            if count
            else f"--distributed={where!r}: COUNT must be at least 1"
        )
    return coordinator, count, index
