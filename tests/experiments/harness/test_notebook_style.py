"""Lines of a notebook's figure can be told apart without their color."""

import matplotlib

from tilescan.experiments.harness.notebook_style import COLORS, use_notebook_style


def test_each_line_has_a_color_and_a_marker_of_its_own():
    with matplotlib.rc_context():
        use_notebook_style()
        lines = list(matplotlib.rcParams["axes.prop_cycle"])
    assert [line["color"] for line in lines] == list(COLORS)
    assert len({line["color"] for line in lines}) == len({line["marker"] for line in lines}) == 8
    assert len({str(line["linestyle"]) for line in lines[:6]}) == 6
