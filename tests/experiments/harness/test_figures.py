"""Figures are drawn without pyplot, whose state belongs to a notebook that imports us."""

import subprocess
import sys

from tilescan.experiments.harness.figures import line_chart, line_figure, panel_figure
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
