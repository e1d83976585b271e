"""Measures a paper: python -m tilescan.experiments.run --config=configs/flash_attention.py:cpu.

Cells that are finished in --workdir are kept, so the same command goes on after an interruption.
Any value of the config is overridden by its path, e.g. --config.runtime.repeats=3.
"""

import contextlib
import pathlib
import sys
from collections.abc import Iterator

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from tilescan.experiments import report
from tilescan.experiments.harness import load, locks
from tilescan.experiments.harness import publish as publish_lib
from tilescan.experiments.harness import registry as papers
from tilescan.experiments.harness import runner as harness
from tilescan.experiments.harness.results import collect
from tilescan.files import is_on_disk
from tilescan.training import config_files
from tilescan.training.config import assignments_meant, known_keys
from tilescan.training.environment import expected_compiler_warning

_CONFIG = config_flags.DEFINE_config_file("config", help_string="configs/PAPER.py:SCALE")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the records [runs/PAPER/SCALE].")
_ONLY = flags.DEFINE_string("only", "", "Measure only the cells whose id contains this.")
_JOBS = flags.DEFINE_integer("jobs", 1, "How many cells to measure at once, e.g. one a core.")
_PUBLISH = flags.DEFINE_bool("publish", False, "Copy the records to results/, rebuild RESULTS.md.")


_ALLOW_MODIFIED = flags.DEFINE_bool("allow_modified", False, "Publish a modified tree's, too.")


def measure(
    config: ConfigDict,
    workdir: str | None = None,
    only: str = "",
    publish: bool = False,
    allow_modified: bool = False,
    jobs: int = 1,
) -> int:
    """Runs the paper of `config`, prints its tables; the exit status is 1 if a cell failed.

    At scale smoke, whose times mean nothing, other work on the machine does not matter.
    """
    workdir = workdir or f"runs/{config.paper}/{config.scale}"
    if not is_on_disk(workdir):
        raise ValueError(f"workdir={workdir!r}: records are kept on a disk; give a local folder")
    workdir = pathlib.Path(workdir)
    paper = papers.load(config.paper)
    if warning := expected_compiler_warning():  # cells start JAX, some with more devices
        print(f"warning: {warning}", file=sys.stderr)
    smoke = config.scale == "smoke"
    say = lambda text: print(text, file=sys.stderr)
    try:
        with (
            contextlib.nullcontext() if smoke else locks.alone("run of experiments", say),
            load.patient(0.0 if smoke else load.PATIENCE),
            _quick_programs(smoke),
        ):
            outcome = harness.run(paper, config, workdir, only=only, jobs=jobs)
    except KeyboardInterrupt:
        print(f"\nInterrupted. Finished cells are in {workdir}; the same command goes on there.")
        return 130
    results = collect(paper, workdir)
    publish_lib.write(results, workdir)
    report.show(results, workdir)
    for cell, reason in outcome.failed.items():
        print(f"FAILED {cell}: {reason}\n  {workdir / 'errors' / cell}.txt", file=sys.stderr)
    if publish:
        publish_lib.publish(paper, workdir, pathlib.Path("results"), allow_modified=allow_modified)
    return 1 if outcome.failed else 0


@contextlib.contextmanager
def _quick_programs(quick: bool) -> Iterator[None]:
    """Compiles without optimizing where `quick`: programs of scale smoke run for milliseconds."""
    name = "jax_disable_most_optimizations"
    before = jax.config.read(name)
    jax.config.update(name, quick or before)
    try:
        yield
    finally:
        jax.config.update(name, before)


def parse_flags(argv: list[str]) -> list[str]:
    """Parses as absl does, after the config's file and the flags were checked.

    absl meets a wrong file or value with a traceback, and does not know that --steps=5 means
    --config.curves.steps=5.
    """
    files = [word.partition("=")[2] for word in argv if word.startswith("--config=")]
    if files:
        try:
            _check_flags(files[-1], argv[1:])
        except ValueError as error:
            sys.exit(f"error: {error}")
    return app.parse_flags_with_usage(argv)


def _check_flags(file: str, words: list[str]) -> None:
    """Raises ValueError for a file that gives no paper's config, a wrong override or flag."""
    config = config_files.load_any(file)
    if "paper" not in config:
        raise ValueError(f"--config={file} is not a paper's configuration, as configs/s4.py's is")
    overrides = [word for word in words if word.startswith("--config.") and "=" in word]
    papers.apply_overrides(config, overrides)
    for word in words:
        known = word.removeprefix("--").partition("=")[0] in flags.FLAGS
        meant = assignments_meant(word, known_keys(config))
        if word.startswith("--") and not word.startswith("--config.") and not known and meant:
            raise ValueError(f"unknown flag {word}; did you mean {' or '.join(meant)}?")


def main(argv: list[str]) -> int:
    """Runs the paper that the flags name; returns the exit status."""
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # checkpoints tell of every step at INFO
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; options begin with --")
    if _CONFIG.value is None:
        raise app.UsageError("--config is missing, e.g. --config=configs/flash_attention.py:cpu")
    try:
        allow = _ALLOW_MODIFIED.value
        workdir, only, publish = _WORKDIR.value, _ONLY.value, _PUBLISH.value
        return measure(_CONFIG.value, workdir, only, publish, allow, _JOBS.value)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
