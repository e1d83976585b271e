"""The known name that a mistyped one means."""

import difflib
from collections.abc import Iterable


def nearest(name: object, known: Iterable[str], cutoff: float = 0.4) -> str | None:
    """Returns the known name that is spelled most like `name`.

    Args:
      name: what was given, of any type.
      known: the names that there are.
      cutoff: between 0, which always finds one, and 1, which finds equal names alone.

    Returns:
      One of `known`, or None if none is like it.
    """
    return next(iter(difflib.get_close_matches(str(name), list(known), 1, cutoff)), None)


def did_you_mean(name: object, known: Iterable[str], cutoff: float = 0.4) -> str:
    """Returns "did you mean 'x'? ", for the middle of a message, or "" if no known name is near."""
    near = nearest(name, known, cutoff)
    return "" if near is None else f"did you mean {near!r}? "
