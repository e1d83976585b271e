"""Figures are drawn without pyplot, whose state belongs to a notebook that imports us."""

import subprocess
import sys

DRAWING = """
import sys
from tilescan.experiments.harness.figures import line_chart
text = line_chart({"": {"a": ([1, 2], [3, 4])}}, x_label="x", y_label="y")
assert text.startswith("<?xml") and "matplotlib.pyplot" not in sys.modules
"""


def test_drawing_leaves_the_backend_alone():
    subprocess.run([sys.executable, "-c", DRAWING], check=True, timeout=100)
