"""The console command `tilescan`: one subcommand per thing a newcomer wants to do first."""

import argparse
import glob
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import tilescan
from tilescan.cli import (
    arguments,
    completion,
    data,
    diagnose,
    export,
    forecast,
    generate,
    list_papers,
    plan,
    refine,
    report,
    rerun,
    run,
    train,
)
from tilescan.spelling import nearest

_DESCRIPTION = """\
Reproduce the tables of papers on long-sequence models, and use their parts.

  tilescan list                                   which papers there are, what was measured
  tilescan run flash_attention --scale=smoke      the real code on tiny sizes, in half a minute
  tilescan run flash_attention --scale=cpu        the table, on a laptop, in minutes
  tilescan run flash_attention --scale=accelerator   the paper's own sizes, on a GPU or a TPU
"""

# A command is a module: ABOUT in a line, DESCRIPTION with examples, add_arguments(parser) and
# run(options), which returns the exit status. Heavy imports stay inside `run`. A command that takes
# --config.KEY=VALUE sets config_keys(options), which lists the keys.
COMMANDS = {
    "list": list_papers,
    "run": run,
    "rerun": rerun,
    "report": report,
    "plan": plan,
    "diagnose": diagnose,
    "data": data,
    "generate": generate,
    "train": train,
    "forecast": forecast,
    "refine": refine,
    "export": export,
    "completion": completion,
}


class _Parser(argparse.ArgumentParser):
    """Errors name the nearest known option and end with a command that helps."""

    def error(self, message: str) -> NoReturn:
        """Ends with the message and the nearest known word."""
        near = self.nearest(message)
        self.refuse(message, [near] if near else [])

    def refuse(self, message: str, meant: Sequence[str]) -> NoReturn:
        """Ends with the message and what may have been meant."""
        hint = f"\ndid you mean {' or '.join(map(repr, meant))}?" if meant else ""
        self.exit(2, f"{self.prog}: error: {message}{hint}\nsee: {self.prog} --help\n")

    def nearest(self, message: str, cutoff: float = 0.6) -> str | None:
        """Returns the option, subcommand or choice that a word of the message is nearest to."""
        known = [*self._option_string_actions, *self._choices()]
        if message.startswith("argument "):  # whose name is ours
            message = message.partition(": ")[2]
        for word in message.replace("'", " ").replace(",", " ").replace(":", " ").split():
            name = word.split("=")[0]
            begun = [k for k in known if len(name) > 2 and k.startswith(name)]
            match = begun[0] if begun else nearest(name, known, cutoff)
            if match and name not in known:
                return match
        return None

    def single(self) -> list[str]:
        """Returns the options, "--seed" for example, that are given once at the most."""
        found = self._option_string_actions.items()
        return [name for name, action in found if not isinstance(action, argparse._AppendAction)]

    def _choices(self) -> list[str]:
        """Returns the subcommands, and the words that arguments may be."""
        return [name for action in self._actions for name in action.choices or ()]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status (2 for a wrong command line)."""
    _leave_absent_tpus_alone()
    parser = _build_parser()
    argv = sys.argv[1:] if argv is None else argv
    options, rest = parser.parse_known_args(argv)
    twice = arguments.repeated(argv, options.parser.single())
    if twice:
        options.parser.refuse(f"{twice} is given twice", [])
    overridable = options.config_keys is not None
    wrong = [word for word in _joined(rest) if not (overridable and _is_override(word))]
    if wrong:
        _refuse(options, wrong)
    options.overrides = rest
    try:
        return COMMANDS[options.name].run(options)
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
    """Joins ["--a", "5", "--b=6"] to ["--a 5", "--b=6"]: an option and its value are one word."""
    joined: list[str] = []
    for word in words:
        bare = joined and joined[-1].startswith("-") and not set("= ") & set(joined[-1])
        if bare and not word.startswith("--"):
            joined[-1] += f" {word}"
        else:
            joined.append(word)
    return joined


def _is_override(word: str) -> bool:
    """Returns whether a word has the form --config.KEY=VALUE."""
    name, equals, _ = word.partition("=")
    return name.startswith("--config.") and bool(equals) and " " not in name


def _refuse(options: argparse.Namespace, wrong: Sequence[str]) -> None:
    """Ends with what is not known on a command line, and what may have been meant."""
    message = f"unrecognized argument: {' '.join(wrong)}"
    try:
        keys = options.config_keys(options) if options.config_keys else []
    except ValueError:  # a paper or a file that is wrong as well
        keys = []
    if keys:
        from tilescan.training.config import assignments_meant

        words = [word.replace(" ", "=", 1) for word in wrong]
        meant = [key for word in words for key in assignments_meant(word, keys)]
        if not meant and options.parser.nearest(message, cutoff=0.8) is None:
            meant = [key for word in words for key in assignments_meant(word, keys, near=True)]
        if meant:
            options.parser.refuse(message, meant)
    options.parser.error(message)


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
    """Makes the parser of all commands."""
    parser = _Parser(
        prog="tilescan",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"tilescan {tilescan.__version__}")
    commands = parser.add_subparsers(
        metavar="COMMAND", dest="name", required=True, parser_class=_Parser
    )
    for name, command in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=command.ABOUT,
            description=command.DESCRIPTION,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        sub.set_defaults(parser=sub, root=parser, config_keys=None)
        command.add_arguments(sub)
    return parser


if __name__ == "__main__":
    sys.exit(main())
