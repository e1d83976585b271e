"""Text for terminals: lines and tables that fit the width and break no word.

Where the output is no terminal but a file or a pipe, nothing is cut, wrapped or colored.
"""

import dataclasses
import itertools
import os
import shutil
import sys
import textwrap
from collections.abc import Sequence

_GAP = "  "
_CODES = {"bold": "1", "dim": "2", "magenta": "35", "cyan": "36"}
_WORDS = {"break_long_words": False, "break_on_hyphens": False}


def width() -> int | None:
    """Returns the columns of the terminal that output goes to, None if it goes elsewhere."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def paint(text: str, style: str) -> str:
    """Returns text in a style, "bold", "dim", "magenta" or "cyan", where output shows styles."""
    plain = (
        not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    )
    return text if plain or not style else f"\033[{_CODES[style]}m{text}\033[0m"


def fill(text: str, columns: int | None) -> str:
    """Returns text whose lines have at most `columns`; what is longer goes on below, indented."""
    if columns is None:
        return text
    filled = []
    for line in text.splitlines():
        indent = " " * (len(line) - len(line.lstrip()))
        room = max(columns - len(indent), 3)
        more = textwrap.wrap(line.strip(), room, subsequent_indent="  ", **_WORDS)
        filled += [line] if len(line) <= columns else [indent + part for part in more]
    return "\n".join(filled)


def tables(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    columns: int | None,
    *,
    labels: Sequence[bool],
    styles: Sequence[str] = (),
) -> list[str]:
    """Returns one table or, where that is too wide, several with some of its columns each.

    Labels and headings wrap between words; a value stands in one line. Only a word that is wider
    than the terminal makes a table wider.

    Args:
      headings: of the columns.
      rows: cells as text.
      columns: of the terminal; None: as many as there are.
      labels: for each column whether it holds words rather than values; the first of them that do
        begin every table.
      styles: of the columns, as of `paint`; plain by default.
    """
    cells = list(zip(headings, *rows, strict=True))
    sizes = [_Size.of(*column) for column in zip(cells, labels, strict=True)]
    head = list(itertools.takewhile(lambda i: labels[i], range(len(cells))))

    # Columns after the first labels, as many a table as there is room for.
    groups = [list(head)]
    for i in range(len(head), len(cells)):
        room = sum(sizes[j].planned(columns, len(head)) + len(_GAP) for j in groups[-1])
        if columns is not None and len(groups[-1]) > len(head) and room + sizes[i].least > columns:
            groups.append(list(head))
        groups[-1].append(i)

    made = []
    for group in groups:
        of = [sizes[i] for i in group]
        right = [not labels[i] for i in group]
        style = [styles[i] if styles else "" for i in group]
        made.append(_render([cells[i] for i in group], _widths(of, columns), right, style))
    return made


@dataclasses.dataclass(frozen=True)
class _Size:
    """Columns that a column of a table needs at least, that it makes use of, and that it fills."""

    least: int
    enough: int
    most: int
    label: bool

    @classmethod
    def of(cls, column: Sequence[str], label: bool) -> "_Size":
        words = [max(map(len, text.split()), default=0) for text in column]
        least = max(words) if label else max(words[0], *map(len, column[1:]), 0)
        most = max(map(len, column))
        least, most = max(least, 1), max(most, 1)
        return cls(least, most if label else max(least, min(most, 22)), most, label)

    def planned(self, columns: int | None, labels: int) -> int:
        """Returns what a table counts with: labels together have half of the terminal."""
        share = (columns or 0) // (2 * labels or 1)
        return min(self.enough, max(self.least, share)) if self.label else self.least


def _widths(sizes: Sequence[_Size], columns: int | None) -> list[int]:
    """Returns the widths of a table's columns: the least, and what is left where it helps."""
    if columns is None:
        return [size.most for size in sizes]
    wide = [size.least for size in sizes]
    for _ in range(columns - sum(wide) - len(_GAP) * (len(sizes) - 1)):
        # A column more for what lacks most: labels, and then headings of values.
        lacking = [
            (size.enough > n and size.label, size.enough - n)
            for size, n in zip(sizes, wide, strict=True)
        ]
        if max(lacking) <= (False, 0):
            break
        wide[lacking.index(max(lacking))] += 1
    return wide


def _render(
    cells: Sequence[Sequence[str]],
    wide: Sequence[int],
    right: Sequence[bool],
    styles: Sequence[str],
) -> str:
    """Returns a table's lines; `cells` are its columns, headings first."""
    lines = []
    for row, line in enumerate(zip(*cells, strict=True)):
        wrapped = [textwrap.wrap(c, w, **_WORDS) or [""] for c, w in zip(line, wide, strict=True)]
        height = max(map(len, wrapped))
        if row == 0:  # headings stand on the line below them
            wrapped = [[""] * (height - len(parts)) + parts for parts in wrapped]
        for parts in itertools.zip_longest(*wrapped, fillvalue=""):
            last = max((i for i, part in enumerate(parts) if part), default=0)
            line_of = []
            for i, part in enumerate(parts[: last + 1]):
                before = " " * (wide[i] - len(part))
                after = "" if right[i] or i == last else before
                style = "bold" if row == 0 else styles[i]
                line_of.append((before if right[i] else "") + paint(part, style) + after)
            lines.append(_GAP.join(line_of))
        if row == 0:
            lines.append(paint("─" * (sum(wide) + len(_GAP) * (len(wide) - 1)), "dim"))
    return "\n".join(lines)
