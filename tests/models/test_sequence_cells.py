"""The page about what can be split over the sequence says what happens."""

import functools

import pytest
from sequence_cells import DOC, Cell, cells, document, named, outcome

QUICK = Cell("attention", "ulysses", True, "zigzag")
tried = functools.cache(outcome)


@functools.cache
def page() -> dict[Cell, str]:
    """{cell: "exact" or its error} as the committed page has it."""
    lines = DOC.read_text().splitlines()
    errors = dict(line.split(". ", 1) for line in lines if line[:1].isdigit())
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| `")]
    marks = {(row[0].strip("`"), row[1].strip("`")): row[2:] for row in rows}
    found = {}
    for cell in cells():
        mark = marks[cell.mixer, cell.kind].pop(0)
        found[cell] = "exact" if mark == "✓" else named(errors[mark], "MIXER", cell.mixer)
    return found


def test_the_page_is_what_its_outcomes_make():
    assert document(page()) == DOC.read_text()


def test_a_cell_is_as_the_page_says():
    assert tried(QUICK) == page()[QUICK]


@pytest.mark.slow
@pytest.mark.parametrize("cell", cells(), ids=str)
def test_every_cell_is_as_the_page_says(cell):
    assert tried(cell) == page()[cell]
