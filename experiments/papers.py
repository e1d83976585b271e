"""The papers that can be reproduced: one module of this package and one config file each."""

import difflib
import importlib
import pathlib

import ml_collections
from absl import flags
from ml_collections import config_flags

import configs
from experiments.harness import Paper

NAMES = ("flash_attention", "flash_attention_2")
SCALES = ("smoke", "cpu", "accelerator")


def nearest(name: str, known) -> str:
    """A hint for a mistyped name: the nearest known one, and all of them."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    hint = f"did you mean {match[0]!r}? " if match else ""
    return f"{hint}(known: {', '.join(known)})"


def load(name: str) -> Paper:
    """The paper's definition.

    Raises:
      ValueError: no such paper; the message names the nearest.
    """
    if name not in NAMES:
        raise ValueError(f"paper={name!r} is unknown; {nearest(name, NAMES)}")
    return importlib.import_module(f"experiments.{name}").PAPER


def config_path(name: str) -> pathlib.Path:
    """Where the paper's config file lies."""
    return pathlib.Path(configs.__path__[0]) / f"{name}.py"


def check_scale(scale: str) -> str:
    """`scale` itself if it is one of SCALES; config files call this first.

    Raises:
      ValueError: it is not; the message names the nearest.
    """
    if scale not in SCALES:
        raise ValueError(f"scale={scale!r} is unknown; {nearest(scale, SCALES)}")
    return scale


def load_config(name: str, scale: str, overrides: list[str] = ()) -> ml_collections.ConfigDict:
    """The paper's config at a scale, with overrides such as "--config.runtime.repeats=3".

    The config is locked: it cannot grow keys.

    Raises:
      ValueError: unknown paper, scale or key (the nearest is named), or a value of a wrong type.
    """
    load(name), check_scale(scale)
    arguments = ["tilescan", f"--config={config_path(name)}:{scale}", *overrides]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", flag_values=values, lock_config=True, sys_argv=arguments
    )
    try:
        values(arguments)
    except (AttributeError, KeyError, TypeError, flags.Error) as error:
        raise ValueError(f"an override does not fit configs/{name}.py: {_clean(error)}") from error
    return values.config


def _clean(error: Exception) -> str:
    """The message in one line, without the quotes that nested exceptions collect."""
    text = str(error.args[0] if error.args else error)
    return " ".join(text.replace("\\n", " ").replace("\\'", "'").split()).strip("'\"")
