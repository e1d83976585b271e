"""Figures are drawn without pyplot, whose state belongs to a notebook that imports us."""

import itertools
import re
import subprocess
import sys

import matplotlib
import matplotlib.figure
import numpy as np
import pytest

from tilescan.experiments.harness import layout, matrix
from tilescan.experiments.harness.claims import Effect, effect_of, judge
from tilescan.experiments.harness.figures import (
    caption_of,
    effects_chart,
    line_chart,
    line_figure,
    panel_figure,
    width_of,
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


@pytest.fixture
def laid_out(monkeypatch):
    """Draws a chart as `line_chart` does; returns the figure itself and its caption."""
    from tilescan.experiments.harness import figures

    def draw(panels, **options):
        kept = []
        monkeypatch.setattr(figures, "_to_svg", lambda *drawn: kept.append(drawn) or "<svg/>")
        line_chart(panels, **{"x_label": "tokens", "y_label": "ms", **options})
        kept[0][0].draw_without_rendering()
        return kept[0]

    return draw


MANY = [16 * k for k in range(1, 17)]  # lengths whose labels have no room side by side
CROWDED = {
    f"a method of the paper, {kind} {size}": {x: float(size + x) for x in MANY}
    for kind in ("published", "modelled")
    for size in (8, 16, 32)
}


@pytest.mark.parametrize("panels", [1, 4])
def test_nothing_is_cut_and_no_labels_touch(laid_out, panels):
    label = "a label of the y axis that is much longer than the axis itself is high"
    drawn = {f"panel {i}": CROWDED for i in range(panels)}
    figure, _ = laid_out(drawn, y_label=label, log_x=True, log_y=True)
    page = figure.bbox
    for legend in figure.legends:
        box = legend.get_window_extent()
        assert page.x0 <= box.x0 and box.x1 <= page.x1
    for axis in figure.axes:
        assert axis.yaxis.label.get_window_extent().height < 1.1 * axis.bbox.height
        for ticks, low, high in ((axis.xaxis, "x0", "x1"), (axis.yaxis, "y0", "y1")):
            boxes = [t.get_window_extent() for t in ticks.get_ticklabels() if t.get_text()]
            pairs = itertools.pairwise(sorted(boxes, key=lambda b: getattr(b, low)))
            assert all(getattr(a, high) < getattr(b, low) for a, b in pairs)
            assert len(boxes) > 2 or not ticks.get_visible() or not boxes


def test_lines_are_told_apart_and_captions_say_how_to_read_them(laid_out):
    same, other = {1: 1.0, 2: 2.0}, {1: 3.0, 2: 9.0}
    lines = {"at 16": same, "at 128": other, "at 32": same, "at 16, published": other}
    figure, caption = laid_out({"one": lines, "two": lines}, dashed=("at 16, published",))
    assert caption == (
        "Ms against tokens: one; two. Dashed: published. A wider line lies under another."
    )
    drawn = {line.get_label(): line for line in figure.axes[0].lines}
    assert drawn["at 16"].get_linewidth() > drawn["at 32"].get_linewidth()
    assert drawn["at 16"].get_color() == drawn["at 16, published"].get_color()
    markers = [(line.get_marker(), line.get_linestyle()) for line in drawn.values()]
    assert len(set(markers)) == 4
    assert layout.in_order(["at 16", "at 128", "at 32"]) == ["at 16", "at 32", "at 128"]
    assert layout.in_order(["b 2", "a 1"]) == ["b 2", "a 1"]

    plain, _ = laid_out({"": {"a": same, "b": other}}, markers=False)
    assert len({line.get_linestyle() for line in plain.axes[0].lines}) == 2


def test_values_that_hardly_differ_have_ticks():
    figure = matplotlib.figure.Figure()
    axis = figure.add_subplot()
    axis.set_yscale("log")
    axis.set_ylim(4.011, 4.019)
    layout.log_ticks(axis.yaxis)
    ticks = axis.get_yticks()
    assert len(ticks) >= 2 and all(4.011 <= tick <= 4.019 for tick in ticks)


def test_a_figure_carries_its_caption_and_its_width():
    text = line_chart({"": {"a": {1: 2.0}}}, x_label="a < b", y_label="", caption="x & <y>")
    assert caption_of(text) == "x & <y>" and 350 < width_of(text) < 450


# What each color vision makes of linear RGB: Machado, Oliveira and Fernandes 2009, severity 1.
VISIONS = {
    "trichromat": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanope": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "deuteranope": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "tritanope": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}


def linear(color):
    """Returns a color's linear red, green and blue."""
    rgb = np.array(matplotlib.colors.to_rgb(color))
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def oklab(rgb):
    """Returns linear RGB in a space where distances are differences that are seen (Oklab)."""
    to_cones = [[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.6300]]
    to_lab = [[0.2105, 0.7936, -0.0041], [1.9780, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]]
    return np.array(to_lab) @ np.cbrt(np.array(to_cones) @ np.clip(rgb, 0, 1))


@pytest.mark.parametrize("vision", VISIONS)
def test_colors_are_told_apart_by_every_color_vision(vision):
    seen = [oklab(np.array(VISIONS[vision]) @ linear(color)) for color in layout.COLORS]
    apart = [np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)]
    assert min(apart) > 0.1  # 0.02 is just noticed; six colors at random come to about 0.03


def test_colors_stand_out_on_light_and_dark_pages():
    luminance = lambda color: float(linear(color) @ [0.2126, 0.7152, 0.0722])
    for color, least in [*((color, 3.0) for color in layout.COLORS), (layout.INK, 4.0)]:
        for page in ("#ffffff", "#14171a"):
            high, low = sorted((luminance(color), luminance(page)), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= least, (color, page)


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
    starts = re.findall(rf'<g style="fill: {layout.INK}" transform="translate\(([\d.-]+) ', text)
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
