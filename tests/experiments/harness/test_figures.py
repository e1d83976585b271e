"""Figures are drawn without pyplot, whose state belongs to a notebook that imports us."""

import re
import subprocess
import sys

import pytest

from tilescan.experiments.harness import matrix
from tilescan.experiments.harness.claims import Effect, effect_of, judge
from tilescan.experiments.harness.figures import (
    effects_chart,
    line_chart,
    line_figure,
    panel_figure,
)
from tilescan.experiments.harness.groups import Group
from tilescan.experiments.harness.records import Records

DRAWING = """
import sys
from tilescan.experiments.harness.figures import line_chart
text = line_chart({"": {"a": ([1, 2], [3, 4])}}, x_label="x", y_label="y")
assert text.startswith("<?xml") and "matplotlib.pyplot" not in sys.modules
"""


def test_drawing_leaves_the_backend_alone():
    subprocess.run([sys.executable, "-c", DRAWING], check=True, timeout=100)


def test_nothing_to_show_is_no_figure():
    assert line_chart({}, x_label="x", y_label="y") == ""
    assert line_chart({"": {}}, x_label="x", y_label="y", log_x=True, log_y=True) == ""
    assert line_figure([], {"a": len}, x="x", y="y", log=True) == ""


def test_panels_leave_out_lines_without_numbers_and_gaps():
    rows = [Group(length, Records([])) for length in (64, 128, 256)]
    values = {64: 1.0, 128: "out of memory", 256: 3.0}
    shown = {"some": lambda g: values[g.key], "none": lambda g: "out of memory"}
    gaps = {"some": lambda g: {64: 1.0, 128: None, 256: 3.0}[g.key]}
    labels = {"x": "length", "y": "ms", "log": True}
    drawn = panel_figure({"one": (rows, shown), "two": (rows, shown)}, **labels)
    assert drawn == panel_figure({"one": (rows, gaps), "two": (rows, gaps)}, **labels)
    assert drawn != panel_figure({"one": (rows, gaps)}, **labels)
    assert line_figure(rows, gaps, **labels) == panel_figure({"": (rows, shown)}, **labels)


EFFECTS = {
    "A paper": {
        "the shortest of claims": [0.5],
        "a claim of a few more words than that": [1.0, 9.0],
    },
    "Another": {"a claim": [-4.0]},
}


def test_effects_are_drawn_whole_under_their_papers():
    text = effects_chart(EFFECTS)
    assert text == effects_chart(EFFECTS)
    names = re.findall("<!-- (.*?) -->", text)
    for paper, claims in EFFECTS.items():
        assert names.count(paper) == 1
        assert all(names.index(claim) > names.index(paper) for claim in claims)

    # A name's right end is its anchor; long before the left edge of the page it has begun.
    width = float(re.search(r'viewBox="0 0 ([\d.]+)', text)[1])
    starts = re.findall(r'<g style="fill: #808790" transform="translate\(([\d.-]+) ', text)
    assert starts and all(0 <= float(x) < width for x in starts)


def test_effects_of_claims_are_gathered_by_paper():
    effect = effect_of(4.0, 2.0, None)
    assert effect == Effect(4.0, [2.0]) and effect.shares() == [pytest.approx(0.5)]
    assert effect_of(4.0, None) is None and effect_of(4.0) is None
    assert effect_of(1.0, 2.0) is None, "of no published effect there is no share"
    assert effect_of(8.0, 2.0, kind="difference").shares() == [0.25]
    claims = [judge("a", "", "", True, "", effect=effect), judge("b", "", "", True, "")]

    class Found:
        paper = type("P", (), {"short_title": "Toy"})

    Found.claims = claims
    assert matrix.effects([Found]) == {"Toy": {"a": [pytest.approx(0.5)]}}
