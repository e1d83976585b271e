"""The configuration of commands that train: a file's or the default one, with overrides."""

import argparse
import shutil
import sys
import typing

from tilescan.cli import arguments

if typing.TYPE_CHECKING:
    import ml_collections


class _HelpConfig(argparse.Action):
    """Prints every key with its default and what it means, and exits."""

    def __init__(self, option_strings, dest, help):
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser, namespace, values, option_string=None):
        from tilescan.training.config_help import help_lines

        # Wrapped for eyes, a line a key for grep.
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        print("\n".join(help_lines(width)))
        parser.exit()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --config=FILE, and lets the command take --config.KEY=VALUE."""
    about = "Python file whose get_config() returns an edited training.config.default_config()"
    parser.add_argument("--config", metavar="FILE", type=arguments.given, help=about)
    parser.add_argument("--help-config", action=_HelpConfig, help="list the keys, and exit")
    parser.set_defaults(config_keys=_config_keys)


def load(options: argparse.Namespace) -> "ml_collections.ConfigDict":
    """Returns the default configuration or that of a file ("PATH:ARGUMENT"), with overrides.

    Raises:
      ValueError: a wrong file, key or value.
    """
    from tilescan.training import config as config_lib
    from tilescan.training import config_files

    file = options.config
    config = config_lib.default_config() if file is None else config_files.load(file)
    for assignment in options.overrides:
        config_lib.override(config, assignment)
    return config


def _config_keys(options: argparse.Namespace) -> list[str]:
    """Returns the keys that may be set; raises ValueError for a wrong file."""
    from tilescan.training import config as config_lib
    from tilescan.training import config_files

    return config_lib.known_keys(options.config and config_files.load(options.config))
