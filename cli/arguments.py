"""Types of arguments: what argparse converts a word to, or refuses by the argument's name."""

import argparse
import math
import pathlib
from collections.abc import Sequence


def path(text: str) -> pathlib.Path:
    """Returns a path; an empty word, which a shell makes of an unset variable, is none."""
    return pathlib.Path(given(text))


def given(text: str) -> str:
    """Returns a word that is not empty.

    Raises:
      ArgumentTypeError: it is empty.
    """
    if not text.strip():
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def positive(text: str) -> float:
    """Returns a finite number above 0.

    Raises:
      ArgumentTypeError: another number, or none.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text!r}")
    return value


def repeated(words: Sequence[str], options: Sequence[str]) -> str | None:
    """Returns the first of `options` that is given twice among a command line's words."""
    names = [word.partition("=")[0] for word in words]
    if "--" in names:
        names = names[: names.index("--")]
    return next((name for name in names if name in options and names.count(name) > 1), None)
