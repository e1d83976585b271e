"""How notebooks draw: SVG, and lines that readers tell apart without color."""

import importlib.util
import sys

import matplotlib
from matplotlib.rcsetup import cycler

# Okabe and Ito's palette for color-blind readers, without its yellow, which is faint on white.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
_DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), "-", "--")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

_STYLE = {
    "axes.prop_cycle": cycler(color=COLORS) + cycler(linestyle=_DASHES) + cycler(marker=_MARKERS),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "figure.figsize": (11, 3.6),  # the width of a notebook's page
    "font.size": 10,
    "image.interpolation": "none",  # cells of a picture stay sharp at any size
    "legend.frameon": False,
    "lines.markersize": 5,
    "svg.hashsalt": "tilescan",  # ids inside the file, otherwise random
}


def use_notebook_style() -> None:
    """Sets pyplot's style for this process and, inside of a Jupyter kernel, SVG as its format.

    Each line of an axis gets a color, dashes and a marker of its own, up to eight of them.
    """
    matplotlib.rcParams.update(_STYLE)
    if "ipykernel" in sys.modules and importlib.util.find_spec("matplotlib_inline"):
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        set_matplotlib_formats("svg", metadata={"Date": None, "Creator": None})
