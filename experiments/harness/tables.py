"""Tables with published and measured columns side by side, as Markdown, JSON and terminal text."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from tilescan import terminal
from tilescan.experiments.harness import load
from tilescan.experiments.harness.records import Record
from tilescan.experiments.harness.statistics import Spread

LABEL, PUBLISHED, MEASURED, STATIC = "label", "published", "measured", "static"
# The paper's numbers are of four kinds: read in its own text or its authors', remembered by who
# wrote them here, found in another text about it, and estimated from a drawing.
RECALLED, SECONDARY, READ_OFF = "recalled", "from a secondary source", "read off a figure"
QUOTED = (PUBLISHED, RECALLED, SECONDARY, READ_OFF)
KINDS = (LABEL, *QUOTED, MEASURED, STATIC)


@dataclasses.dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
      title: heading, without the unit.
      kind: LABEL names the row; PUBLISHED stands in the paper, and so do the other kinds of QUOTED,
        as far as is known; MEASURED comes from the records of this run, computed from measurements
        included; STATIC was computed without running, by a compiler or a formula.
      unit: written after the heading in brackets.
      digits: significant digits of its numbers.
      of: computes the column's value from what a row shows, a `Group` of records say; see `table`.
    """

    title: str
    kind: str = LABEL
    unit: str = ""
    digits: int = 3
    of: Callable[[Any], Any] | None = None

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r} of column {self.title!r} is not one of {KINDS}")

    @property
    def style(self) -> str:
        """The kind, without how a published number is known."""
        return PUBLISHED if self.kind in QUOTED else self.kind

    @property
    def heading(self) -> str:
        """Title with unit and, except for labels, the kind."""
        unit = f" ({self.unit})" if self.unit else ""
        return f"{self.title}{unit}" + ("" if self.kind == LABEL else f", {self.kind}")

    def to_json(self) -> dict[str, Any]:
        """Returns what the column says of its numbers, as plain values."""
        return {name: getattr(self, name) for name in ("title", "kind", "unit", "digits")}


@dataclasses.dataclass(frozen=True)
class Table:
    """A named table; a cell is a string, a number, a `Spread`, or None for "not measured".

    Attributes:
      sources: for each row the ids of the paper's cells that it was computed of, where known.
    """

    name: str
    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Any]]
    note: str = ""
    sources: Sequence[Sequence[str]] = ()

    def __post_init__(self):
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(
                    f"table {self.name!r}: the row {list(row)} has {len(row)} cells, "
                    f"and there are {len(self.columns)} columns"
                )

    def texts(self) -> list[list[str]]:
        """Returns every cell as text."""
        return [
            [format_value(v, c.digits) for v, c in zip(row, self.columns, strict=True)]
            for row in self.rows
        ]

    def to_json(self) -> dict:
        """Returns the table as plain values, numbers in full precision."""
        return {
            "name": self.name,
            "title": self.title,
            "note": self.note,
            "columns": [column.to_json() for column in self.columns],
            "rows": [[_json_value(value) for value in row] for row in self.rows],
        }

    def to_markdown(self) -> str:
        """Returns a GitHub table under its title, with the note below."""
        align = ["---" if column.kind == LABEL else "---:" for column in self.columns]
        lines = [[column.heading for column in self.columns], align, *self.texts()]
        body = "\n".join("| " + " | ".join(_escape(v) for v in line) + " |" for line in lines)
        note = f"\n{self.note}\n" if self.note else ""
        return f"### {self.title}\n\n{body}\n{note}"

    def show(self) -> None:
        """Prints the table: published columns in color, measured ones bold; see `terminal`."""
        colors = {PUBLISHED: "cyan", MEASURED: "bold", STATIC: "magenta"}
        width = terminal.width()
        parts = terminal.tables(
            [column.heading for column in self.columns],
            self.texts(),
            width,
            labels=[column.kind == LABEL for column in self.columns],
            styles=[colors.get(column.style, "") for column in self.columns],
        )
        title, note = (terminal.fill(text, width) for text in (self.title, self.note))
        print(terminal.paint(title, "bold"), "\n\n".join(parts), sep="\n", end="\n\n")
        if self.note:
            print(terminal.paint(note, "dim"), end="\n\n")


def columns(
    kind: str, named: Mapping[str, Callable[[Any], Any]], unit: str = "", digits: int = 3
) -> list[Column]:
    """Returns columns that share all but {title: how the value is computed of a row}."""
    return [Column(title, kind, unit, digits, of) for title, of in named.items()]


def table(
    name: str, title: str, rows: Iterable[Any], columns: Sequence[Column], note: str = ""
) -> Table:
    """Returns the table whose columns compute their values (`Column.of`) for each of the rows.

    A row is a `Group`, a record, a tuple with one of them, or anything else that has no source.
    Where times of its records were measured beside other work, the row and the note say so.
    """
    rows = list(rows)
    values = [[column.of(row) for column in columns] for row in rows]
    sources = [_records(row) for row in rows]
    beside = [max(filter(None, (load.share_of(r.result) for r in s)), default=0) for s in sources]
    for row, share in zip(values, beside, strict=True):
        row[0] = f"{row[0]} *" if share else row[0]
    if any(beside):
        marked = ", ".join(f"{row[0]} {s:.0%}" for row, s in zip(values, beside, strict=True) if s)
        note += f"{note and ' '}* Measured while other work took of the machine: {marked}."
    cells = [tuple(record.cell for record in found) for found in sources]
    return Table(name, title, columns, values, note, cells if any(cells) else ())


def _records(row: Any) -> tuple[Record, ...]:
    """Returns the records that a row of `table` shows."""
    if isinstance(row, tuple):
        return tuple(record for item in row for record in _records(item))
    return (row,) if isinstance(row, Record) else tuple(getattr(row, "records", ()))


def percent(value: Spread | float | None) -> str:
    """Returns a number as text with a percent sign, e.g. for the evidence of a claim."""
    return f"{format_value(value)}%"


def format_value(value: Any, digits: int = 3) -> str:
    """Returns a table cell as text: `digits` significant digits, thousands apart, "–" for None."""
    if value is None:
        return "–"
    if isinstance(value, Spread):
        mean = format_value(value.mean, digits)
        if value.std is None:
            return mean
        places = len(mean.partition(".")[2]) if "e" not in mean else None
        std = f"{value.std:.1e}" if places is None else f"{value.std:,.{places}f}"
        return f"{mean} ± {std}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return _format_float(value, digits)
    return str(value)


def _format_float(value: float, digits: int) -> str:
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if size < -4 or size >= 12:
        return f"{value:.{digits - 1}e}"
    rounded = round(value, max(digits - 1 - size, 0))  # 99.96 becomes 100: count again
    size = math.floor(math.log10(abs(rounded)))
    return f"{rounded:,.{max(digits - 1 - size, 0)}f}"


def _json_value(value: Any) -> Any:
    return dataclasses.asdict(value) if isinstance(value, Spread) else value


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
