"""Figures are drawn without pyplot, whose state belongs to a notebook that imports us."""

import subprocess
import sys

from tilescan.experiments.harness.figures import line_chart, line_figure

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
