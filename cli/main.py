"""The console command `tilescan`: one subcommand per thing a newcomer wants to do first."""

import argparse
import difflib
import glob
import importlib.metadata
import importlib.util
import os
import pathlib
import sys
from collections.abc import Sequence

import rich.console
import rich.table

_DESCRIPTION = """\
Reproduce the tables of papers on long-sequence models, and use their parts.

  tilescan list                                   which papers there are, what was measured
  tilescan run flash_attention --scale=smoke      the real code on tiny sizes, in seconds
  tilescan run flash_attention --scale=cpu        the table, on a laptop, in minutes
  tilescan run flash_attention --scale=accelerator   the paper's own sizes, on a GPU or a TPU
"""

_RUN = """\
Measure a paper's cells and print its tables, published and measured columns side by side.
Each finished cell is kept in the workdir, so the same command goes on after an interruption.

  tilescan run flash_attention                                      scale cpu
  tilescan run flash_attention --scale=smoke --only=runtime         some cells only
  tilescan run flash_attention --config.runtime.repeats=9           any value of the config
  tilescan run flash_attention --publish                            also rebuild RESULTS.md

The values that can be set are in configs/PAPER.py. `python -m tilescan.experiments.run
--config=configs/PAPER.py:SCALE` is the same thing for people who live in absl.
"""

_REPORT = """\
Rebuild RESULTS.md, results/index.html and every table and figure from the kept records.

  tilescan report                                    of what lies in results/
  tilescan report --from=runs/flash_attention/cpu    first copy this run to results/
"""

_DATA = """\
The text there is: what it holds, its licence, how large it is; fetch it to the cache.

  tilescan data                     list the sources
  tilescan data fetch shakespeare   download it once, checked against its checksum
  tilescan data show shakespeare    documents, sizes, and the beginning of the first one
  tilescan data show mytext.txt     the same of a text of yours, before you train on it
  tilescan data add imdb FILE       keep a file of yours as the source that no package has

A source is one of these names; the path of a .txt, .jsonl (plain, .gz, .xz, .bz2) or .parquet file
or of a folder of them, with :FIELD behind it if the text is not in "text"; or hf:OWNER/NAME, a data
set at Hugging Face, [:COLUMN] likewise.
"""

_GENERATE = """\
Continue a text with a language model: SmolLM2, a folder with safetensors, or a GGUF file.

  tilescan generate --prompt="The capital of France is"                 SmolLM2-135M, 93 MB
  tilescan generate --checkpoint=gpt2/ --prompt="Once" --temperature=0.8 --top-p=0.95 --seed=1
"""

_TRAIN = """\
Train a language model: data, step and loop are deterministic from the seed; a run that was
stopped goes on in its workdir to the same numbers.

  tilescan train --workdir=runs/first                          the default config
  tilescan train --workdir=runs/first --config.train.steps=200 any value of it
  tilescan train --workdir=runs/mine --config.data.sources=mytext.txt,shakespeare
"""

_PLAN = """\
Compile the very training step ahead of time, for this machine or for chips that nobody has at
hand, and print whether it fits: bytes of each device, operations, bytes sent, and bounds on the
time by the vendor's figures. Nothing runs, and no parameter is allocated.

  tilescan plan --config.model.d_model=768
  tilescan plan --topology=v5e:2x4 --config.mesh.fsdp=8      needs the package libtpu
  tilescan plan --topology=h100:64 --config.mesh.fsdp=64     needs XLA's CUDA plugin
  tilescan plan --topology=v5p:4x4x4 --config=my_config.py --config.mesh.sequence=64 --longest
"""


class _Parser(argparse.ArgumentParser):
    """Errors name the nearest known option and end with a command that helps."""

    def error(self, message: str):
        near = self.nearest(message)
        self.refuse(message, [near] if near else [])

    def refuse(self, message: str, meant: Sequence[str]):
        """Ends with the message and what may have been meant."""
        hint = f"\ndid you mean {' or '.join(map(repr, meant))}?" if meant else ""
        self.exit(2, f"{self.prog}: error: {message}{hint}\nsee: {self.prog} --help\n")

    def nearest(self, message: str, cutoff: float = 0.6) -> str | None:
        """The option, subcommand or choice that a word of the message is nearest to."""
        known = [*self._option_string_actions, *self._choices()]
        for word in message.replace("'", " ").replace(",", " ").replace(":", " ").split():
            name = word.split("=")[0]
            begun = [k for k in known if len(name) > 2 and k.startswith(name)]
            match = begun or difflib.get_close_matches(name, known, 1, cutoff)
            if match and name not in known:
                return match[0]
        return None

    def _choices(self) -> list[str]:
        """The subcommands, and the words that arguments may be."""
        return [name for action in self._actions for name in action.choices or ()]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status (2 for a wrong command line)."""
    _leave_absent_tpus_alone()
    parser = _build_parser()
    options, rest = parser.parse_known_args(argv)
    wrong = [word for word in _joined(rest) if not (options.overridable and _is_override(word))]
    if wrong:
        _refuse(options, wrong)
    options.overrides = rest
    try:
        return options.command(options)
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        sys.stderr.close()
        return 0
    except (ValueError, OSError, ImportError, RuntimeError, ArithmeticError) as error:
        # Of the RuntimeErrors most are ours: a source that cannot be had, a damaged checkpoint.
        print(f"tilescan: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print(str(stop) or "interrupted", file=sys.stderr)
        return 130


def _joined(words: Sequence[str]) -> list[str]:
    """["--a", "5", "--b=6"] as ["--a 5", "--b=6"]: an option and its value are one word."""
    joined: list[str] = []
    for word in words:
        bare = joined and joined[-1].startswith("-") and not set("= ") & set(joined[-1])
        if bare and not word.startswith("--"):
            joined[-1] += f" {word}"
        else:
            joined.append(word)
    return joined


def _is_override(word: str) -> bool:
    name, equals, _ = word.partition("=")
    return name.startswith("--config.") and bool(equals) and " " not in name


def _refuse(options, wrong: Sequence[str]) -> None:
    """Ends with what is not known on a command line, and what may have been meant."""
    message = f"unrecognized argument: {' '.join(wrong)}"
    keys = _config_keys(options) if options.overridable else []
    if keys:
        from tilescan.training.config import assignments_meant

        words = [word.replace(" ", "=", 1) for word in wrong]
        meant = [key for word in words for key in assignments_meant(word, keys)]
        if not meant and options.parser.nearest(message, cutoff=0.8) is None:
            meant = [key for word in words for key in assignments_meant(word, keys, near=True)]
        if meant:
            options.parser.refuse(message, meant)
    options.parser.error(message)


def _config_keys(options) -> list[str]:
    """The keys that a command's --config.KEY=VALUE may set, as far as it is known of what."""
    from tilescan.experiments.harness import registry as papers
    from tilescan.training import config as config_lib
    from tilescan.training import config_files

    try:
        if hasattr(options, "paper"):
            config = papers.load_config(options.paper, options.scale)
            return [key for key in config_lib.known_keys(config) if "." in key]
        file = options.config
        return config_lib.known_keys(file and config_files.load(file))
    except ValueError:  # a paper or a file that is wrong as well
        return []


def _leave_absent_tpus_alone() -> None:
    """Chooses the CPU where libtpu is installed but neither a TPU nor another accelerator's plugin.

    JAX would start libtpu in vain, which writes a page of errors to the terminal.
    """
    tpus = [*glob.glob("/dev/accel*"), *glob.glob("/dev/vfio/[0-9]*")]
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    others = plugins or importlib.util.find_spec("jax_plugins")
    if importlib.util.find_spec("libtpu") and not tpus and not others:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="tilescan",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)

    def add(name, command, about, description, overridable=False):
        sub = commands.add_parser(
            name,
            help=about,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        sub.set_defaults(command=command, parser=sub, overridable=overridable)
        return sub

    add("list", _list, "the papers, their scales and what was measured", "List the papers.")

    sub = add("run", _run, "measure a paper and print its tables", _RUN, overridable=True)
    sub.add_argument("paper", help="its name, see `tilescan list`")
    sub.add_argument("--scale", default="cpu", help="smoke, cpu or accelerator [cpu]")
    sub.add_argument("--workdir", help="folder of the records [runs/PAPER/SCALE]")
    sub.add_argument("--only", default="", help="measure the cells whose id contains this")
    sub.add_argument("--publish", action="store_true", help="copy the records to results/")

    from tilescan.cli import rerun

    sub = add("rerun", _rerun, "measure one committed record again", rerun.DESCRIPTION)
    rerun.add_arguments(sub)

    sub = add("report", _report, "rebuild RESULTS.md and results/index.html", _REPORT)
    sub.add_argument("--results", type=pathlib.Path, default=pathlib.Path("results"))
    sub.add_argument("--from", dest="source", type=pathlib.Path, help="publish this workdir first")

    sub = add("plan", _plan, "compile a training step without running it", _PLAN, overridable=True)
    _add_config(sub)
    sub.add_argument("--topology", help="e.g. v5e:2x4, v5p:4x4x4, h100:64 [this machine]")
    sub.add_argument("--memory", type=float, help="GiB of a device [the vendor's figure]")
    sub.add_argument(
        "--longest", action="store_true", help="find the longest data.seq_len that fits"
    )

    from tilescan.cli import diagnose as diagnose_mamba2

    about = "say where a Mamba-2 checkpoint breaks behind its training length"
    sub = add("diagnose", _diagnose, about, diagnose_mamba2.DESCRIPTION)
    diagnose_mamba2.add_arguments(sub)

    sub = add("data", _data, "list, fetch and show the sources of text", _DATA)
    sub.add_argument("action", nargs="?", default="list", choices=("list", "fetch", "show", "add"))
    sub.add_argument("source", nargs="?", help="its name, see `tilescan data`; show: or a path")
    sub.add_argument("file", nargs="?", help="add: a file of yours, copied to the cache")
    sub.add_argument("--offline", action="store_true", help="never download")

    sub = add("generate", _generate, "continue a text with a language model", _GENERATE)
    sub.add_argument(
        "--checkpoint", default="smollm2", help="folder with safetensors, GGUF file [smollm2]"
    )
    sub.add_argument("--prompt", required=True)
    sub.add_argument("--max-new-tokens", type=int, default=64)
    sub.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest [0]")
    sub.add_argument("--top-k", type=int)
    sub.add_argument("--top-p", type=float)
    sub.add_argument("--seed", type=int, default=0)

    sub = add("train", _train, "train a language model", _TRAIN, overridable=True)
    _add_config(sub)
    # Checked in _train: argparse would name its absence before anything that is mistyped.
    sub.add_argument("--workdir", help="folder of checkpoints and metrics (required)")
    sub.add_argument(
        "--distributed",
        nargs="?",
        const="auto",
        metavar="HOST:PORT,COUNT,INDEX",
        help="be one of several processes; without a value SLURM, GKE or Cloud TPU say which",
    )
    return parser


def _add_config(sub: argparse.ArgumentParser) -> None:
    about = "Python file whose get_config() returns an edited training.config.default_config()"
    sub.add_argument("--config", metavar="FILE", help=about)


def _list(options) -> int:
    from tilescan.experiments.harness import registry as papers

    root = _results_folder()
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


def _results_folder() -> pathlib.Path | None:
    """results/ of the current folder or else of this checkout; None where there is neither."""
    folders = (pathlib.Path("results"), pathlib.Path(__file__).resolve().parents[1] / "results")
    return next((folder for folder in folders if folder.is_dir()), None)


def _run(options) -> int:
    from tilescan.experiments import run
    from tilescan.experiments.harness import registry as papers

    config = papers.load_config(options.paper, options.scale, options.overrides)
    return run.measure(config, options.workdir, options.only, options.publish)


def _rerun(options) -> int:
    from tilescan.cli import rerun

    return rerun.run(options, _results_folder())


def _report(options) -> int:
    from tilescan.experiments import report

    return report.rebuild_command(options.results, options.source)


def _plan(options) -> int:
    from tilescan.cli import commands

    return commands.plan(options)


def _diagnose(options) -> int:
    from tilescan.cli import diagnose as diagnose_mamba2

    return diagnose_mamba2.run(options)


def _data(options) -> int:
    from tilescan.cli import commands

    action, given = options.action, (options.source, options.file)
    takes = {"list": 0, "fetch": 1, "show": 1, "add": 2}[action]
    missing = "the name of a source" if given[0] is None else "the path of a file"
    if None in given[:takes]:
        options.parser.error(f"data {action} needs {missing}")
    if any(given[takes:]):
        options.parser.error(f"data {action} takes no {given[takes]!r}")
    if action == "list":
        return commands.list_data()
    if action == "add":
        return commands.add_data(*given)
    if action == "fetch":
        return commands.fetch_data(options.source, options.offline)
    return commands.show_data(options.source, options.offline)


def _generate(options) -> int:
    from tilescan.cli import commands

    return commands.generate(options)


def _train(options) -> int:
    from tilescan.cli import commands

    if options.workdir is None:
        options.parser.error("the following arguments are required: --workdir")
    if options.distributed:
        commands.join_processes(options.distributed)
    return commands.train(options.overrides, options.workdir, options.config)


if __name__ == "__main__":
    sys.exit(main())
