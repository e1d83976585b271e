"""Every key of the configuration in a line: its default and what it means, read from the source."""

import functools
import inspect
import operator
import re
import textwrap
from typing import Any

from tilescan.models import LanguageModelConfig
from tilescan.models.mixers import MIXERS
from tilescan.training.config import default_config, known_keys
from tilescan.training.settings import SECTIONS, Settings


def help_lines(width: int | None = None) -> list[str]:
    """Returns each key of the default configuration: "section.key = default  meaning".

    Args:
      width: columns after which a meaning goes on in the next line, indented; None gives a line a
        key, however long.
    """
    about, lines = meanings(), []
    for key, value in leaves().items():
        shown = "(...)" if len(repr(value)) > 40 else repr(value)
        line = f"{key} = {shown}".ljust(40) + f"  {about.get(key, '')}"
        if width is None:
            lines.append(line)
            continue
        indent = " " * (42 if width >= 72 else 8)
        lines += textwrap.wrap(line, width, subsequent_indent=indent, break_on_hyphens=False)
    return lines


def leaves() -> dict[str, Any]:
    """Returns the dotted keys of the default configuration that are no sections, with defaults."""
    config = default_config()
    found = {
        key: functools.reduce(operator.getitem, key.split("."), config) for key in known_keys()
    }
    return {key: value for key, value in found.items() if not hasattr(value, "keys")}


def meanings() -> dict[str, str]:
    """Returns what the keys mean: comments and docstrings of the classes that hold them."""
    found = {
        name: text
        for name, text in comments(Settings).items()
        if name in ("seed", "task", "stages")
    }
    for section, cls in SECTIONS.items():
        found |= {f"{section}.{name}": text for name, text in comments(cls).items()}
    found |= {f"model.{name}": text for name, text in attributes(LanguageModelConfig).items()}
    for mixer, cls in MIXERS.items():
        found |= {f"model.mixers.{mixer}.{name}": text for name, text in attributes(cls).items()}
    return found


def comments(cls: type) -> dict[str, str]:
    """Returns the comment of each field: that of its line, or else the lines above it."""
    found, above = {}, []
    sources = (inspect.getsource(base) for base in reversed(cls.__mro__[:-1]))
    for line in "\n".join(sources).splitlines():
        field = re.match(r"    (\w+): [^#]*(?:# (.*))?$", line)
        if field:
            found[field[1]] = field[2] or " ".join(above)
        above = [*above, line.strip("# ")] if line.startswith("    # ") else []
    return found


def attributes(cls: type) -> dict[str, str]:
    """Returns the meaning of each attribute that a class or a base of it names in its docstring."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        text = inspect.cleandoc(vars(base).get("__doc__") or "")
        listed = re.search(r"^Attributes[^\n]*:\n((?:(?:  .*)?(?:\n|$))+)", text, re.M)
        for names, about in re.findall(
            r"^  (\w+(?:, \w+)*): (.*(?:\n    .*)*)", listed[1] if listed else "", re.M
        ):
            found |= dict.fromkeys(names.split(", "), " ".join(about.split()))
    return found
