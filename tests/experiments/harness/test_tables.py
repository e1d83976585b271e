"""Numbers become text the same way everywhere, and nothing is lost in JSON."""

import json

import pytest

from tilescan import terminal
from tilescan.experiments.harness import statistics, tables
from tilescan.experiments.harness.groups import Group
from tilescan.experiments.harness.records import Record, Records
from tilescan.experiments.harness.statistics import Spread
from tilescan.experiments.harness.tables import Column, Table


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0.0, "0"),
        (3, "3"),
        (123456, "123,456"),
        (1234.5678, "1,235"),
        (12.345, "12.3"),
        (0.012345, "0.0123"),
        (9.999, "10.0"),
        (99.96, "100"),
        (-0.5, "-0.500"),
        (1.5e-7, "1.50e-07"),
        (2.5e13, "2.50e+13"),
        (True, "yes"),
        ("out of memory", "out of memory"),
        (Spread(3.14159, 0.01234, 3), "3.14 ± 0.01"),
        (Spread(3.14159, None, 1), "3.14"),
        (Spread(123456.0, 78.9, 2), "123,456 ± 79"),
        (Spread(1.5e-7, 2e-8, 2), "1.50e-07 ± 2.0e-08"),
    ],
)
def test_format_value(value, text):
    assert tables.format_value(value) == text


def test_spread_is_the_sample_standard_deviation():
    assert statistics.spread([1, 2, 3, 4]) == Spread(2.5, pytest.approx(1.2909944), 4)
    assert statistics.spread([7]) == Spread(7.0, None, 1)
    assert statistics.spread([]) is None


def test_ratio_of_missing_values_is_missing():
    assert statistics.ratio(3, 2) == 1.5
    assert statistics.ratio(None, 2) is None and statistics.ratio(1, 0) is None
    assert statistics.ratio("out of memory", 2) is None


def make_table():
    columns = [
        Column("length"),
        Column("time", tables.PUBLISHED, "ms"),
        Column("time", tables.MEASURED, "ms"),
    ]
    rows = [["1|024", 0.95, Spread(12.0, 0.5, 3)], ["2048", None, "out of memory"]]
    return Table("t", "Title", columns, rows, note="A note.")


def test_markdown_puts_published_and_measured_side_by_side():
    assert make_table().to_markdown() == (
        "### Title\n\n"
        "| length | time (ms), published | time (ms), measured |\n"
        "| --- | ---: | ---: |\n"
        "| 1\\|024 | 0.950 | 12.0 ± 0.5 |\n"
        "| 2048 | – | out of memory |\n"
        "\nA note.\n"
    )


def test_json_keeps_full_precision():
    data = json.loads(json.dumps(make_table().to_json()))
    assert data["rows"][0] == ["1|024", 0.95, {"mean": 12.0, "std": 0.5, "count": 3}]
    assert data["columns"][1]["kind"] == "published"


PRINTED = """\
Title
        time (ms),     time (ms),
length   published       measured
─────────────────────────────────
1|024        0.950     12.0 ± 0.5
2048             –  out of memory

A note.

"""


def test_a_table_is_printed_to_fit_the_terminal_or_whole_to_a_file(capsys, monkeypatch):
    monkeypatch.setattr(terminal, "width", lambda: 33)
    make_table().show()
    assert capsys.readouterr().out == PRINTED
    monkeypatch.setattr(terminal, "width", lambda: None)
    make_table().show()
    assert "length  time (ms), published  time (ms), measured\n" in capsys.readouterr().out


def test_a_wide_table_goes_on_below_with_its_labels_and_no_word_is_broken():
    headings = ["a name", "what it is", *(f"value {i}, measured" for i in range(6))]
    rows = [
        [f"row {r}", "some words that wrap", *(f"{r}.{i} ± 0.1" for i in range(6))] for r in "ab"
    ]
    labels = [True, True, *(False,) * 6]
    parts = terminal.tables(headings, rows, 44, labels=labels)
    lines = [line for part in parts for line in part.splitlines()]
    assert len(parts) > 1 and max(map(len, lines)) <= 44
    assert all(part.split()[:1] == ["a"] or "name" in part for part in parts)
    whole = " ".join(lines).split()
    assert all(word in whole for row in [headings, *rows] for text in row for word in text.split())
    (one,) = terminal.tables(headings, rows, None, labels=labels)
    assert len(one.splitlines()) == 4


def test_long_lines_go_on_indented():
    text = "short\n  a line of more words than there is room for"
    assert (
        terminal.fill(text, 24) == "short\n  a line of more words\n    than there is room\n    for"
    )
    assert terminal.fill(text, None) == text


def test_row_of_wrong_length_and_unknown_kind_are_refused():
    with pytest.raises(ValueError, match="2 cells, and there are 1 columns"):
        Table("t", "T", [Column("a")], [[1, 2]])
    with pytest.raises(ValueError, match="kind='guessed'"):
        Column("a", "guessed")


def test_rows_know_the_cells_that_they_show():
    made = [Record("p", f"c{n}", "", {"n": n}, 0, {"x": n}, 1.0, {}) for n in (1, 2)]
    group = Group(0, Records(made))
    shown = tables.columns(tables.MEASURED, {"x": lambda row: 1.0, "y": lambda row: 2.0}, "ms")
    assert [c.heading for c in shown] == ["x (ms), measured", "y (ms), measured"]
    rows = [made[0], group, ("label", made[1]), 8]
    sources = tables.table("t", "T", rows, shown).sources
    assert sources == [("c1",), ("c1", "c2"), ("c2",), ()]
