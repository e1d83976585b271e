"""Figures as SVG text: the same bytes for the same numbers, readable on light and dark pages."""

import html
import io
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from tilescan.experiments.harness import layout

_STYLE = {
    "svg.hashsalt": "tilescan",  # ids inside the file, otherwise random
    "svg.fonttype": "path",  # looks the same where the font is missing
    "font.size": 10,
    "axes.edgecolor": layout.INK,
    "axes.labelcolor": layout.INK,
    "axes.titlecolor": layout.INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": layout.INK,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "xtick.color": layout.INK,
    "ytick.color": layout.INK,
    "text.color": layout.INK,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
}

# {name: (x values, y values) or {x: y}}; None as y leaves a gap.
Lines = Mapping[str, tuple[Sequence[float], Sequence[float | None]] | Mapping[float, float | None]]


def line_chart(
    panels: Mapping[str, Lines],
    *,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    dashed: Sequence[str] = (),
    markers: bool = True,
    share_y: bool = True,
    caption: str = "",
) -> str:
    """Returns an SVG with a panel an entry, one legend below; "" where there is nothing to show.

    Args:
      panels: {title: {line: (x, y) or {x: y}}}; a line of the same name has the same color
        everywhere.
      x_label: text of the x axes.
      y_label: text of the left y axes.
      log_x: base-2 logarithmic x axis with the x values as ticks where they have room, or else
        with powers of two (lengths are powers of two).
      log_y: logarithmic y axis.
      dashed: names of lines to draw dashed, e.g. what is published rather than measured; "A,
        published" has the color of "A".
      markers: False draws plain lines, for many points; dashes then tell them apart.
      share_y: False gives each panel a y axis of its own.
      caption: what the figure shows; what is against what by default. See `caption_of`.
    """
    panels = {
        title: {name: _points(line) for name, line in lines.items()}
        for title, lines in panels.items()
    }
    names = layout.in_order(dict.fromkeys(name for lines in panels.values() for name in lines))
    if not names:
        return ""
    with matplotlib.rc_context(_STYLE):
        figure, axes = layout.grid(len(panels), share_y)
        styles = layout.styles(names, dashed, markers)
        covered = [layout.covered(lines, dashed, log_y) for lines in panels.values()]
        for axis, (title, lines), under in zip(axes, panels.items(), covered, strict=True):
            for name, (x, y) in lines.items():
                style, above = styles[name], min(under[name], 3)
                wide = {"linewidth": 1.8 + 1.6 * above, "markersize": 4.5 + 1.5 * above}
                some = {"markevery": -(-len(x) // 10)} if markers else {}
                axis.plot(x, y, label=name, **style, **wide, **some)
            axis.set_title(title, fontsize=10)
            axis.set_xlabel(x_label)
            first = axis.get_subplotspec().is_first_col()
            axis.set_ylabel(textwrap.fill(y_label, 32) if first else "")
            axis.set_xscale("log", base=2) if log_x else None
            axis.set_yscale("log") if log_y else None

        # Ticks know the limits of axes only now, when all lines are drawn.
        for axis, lines in zip(axes, panels.values(), strict=True):
            if log_x:
                layout.ticks_of_lengths(
                    axis.xaxis, {value for x, _ in lines.values() for value in x}
                )
            else:
                layout.linear_ticks(axis.xaxis)
            layout.log_ticks(axis.yaxis) if log_y else layout.linear_ticks(axis.yaxis)
        layout.legend(figure, axes, names)
        text = caption or _caption(panels, x_label, y_label, dashed, any(covered))
        return _to_svg(figure, text)


def line_figure(
    rows: Sequence[Any],
    lines: Mapping[str, Callable[[Any], Any]],
    *,
    x: str,
    y: str,
    log: bool = False,
    dashed: Sequence[str] = (),
    caption: str = "",
) -> str:
    """Returns an SVG of one panel: the lines' values over the keys of groups of records.

    Args:
      rows: groups (`groups.by`) whose keys are numbers.
      lines: {name: function of a group}; a number, a `Spread` (its mean), or None for a gap.
      x, y: labels; x is logarithmic.
      log: whether y is, too.
      dashed: names of lines to draw dashed.
      caption: as of `line_chart`.
    """
    return panel_figure({"": (rows, lines)}, x=x, y=y, log=log, dashed=dashed, caption=caption)


def panel_figure(
    panels: Mapping[str, tuple[Sequence[Any], Mapping[str, Callable[[Any], Any]]]],
    *,
    x: str,
    y: str,
    log: bool = False,
    dashed: Sequence[str] = (),
    caption: str = "",
) -> str:
    """Returns an SVG of a panel for each {title: (rows, lines)}, which are as of `line_figure`.

    Text in place of a number is a gap; a line of gaps alone is left out.
    """

    def number(value: Any) -> float | None:
        value = getattr(value, "mean", value)
        return value if isinstance(value, int | float) else None

    shown = {}
    for title, (rows, lines) in panels.items():
        keys = [row.key for row in rows]
        drawn = {name: (keys, [number(of(row)) for row in rows]) for name, of in lines.items()}
        shown[title] = {n: line for n, line in drawn.items() if any(v is not None for v in line[1])}
    labels = {"x_label": x, "y_label": y, "caption": caption}
    return line_chart(shown, log_x=True, log_y=log, dashed=dashed, **labels)


def effects_chart(effects: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Returns an SVG with a row an effect: dots where measured, on an axis from none to published.

    Effects beyond the ends of the axis are drawn as triangles on its edge.

    Args:
      effects: {paper: {claim: measured effects as shares of the published one, a number for each
        seed}}; a paper's name stands above its claims.
    """
    low, high = -1.0, 3.0
    rows = [row for paper, claims in effects.items() for row in [(paper, None), *claims.items()]]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9, 0.7 + 0.26 * len(rows)), layout="constrained")
        axis = figure.subplots()
        for place, (_, shares) in enumerate(rows):
            for share in shares or ():
                marker = "<" if share < low else ">" if share > high else layout.MARKERS[0]
                shown = min(max(share, low), high)
                axis.plot(shown, place, marker, color=layout.COLORS[0], alpha=0.8, clip_on=False)
        # The first paper is at the top; names of papers stand out from those of their claims.
        axis.set_ylim(len(rows) - 0.4, -0.6)
        axis.set_yticks(range(len(rows)), [textwrap.shorten(name, 72) for name, _ in rows])
        axis.tick_params(axis="y", length=0)
        for label, (_, shares) in zip(axis.get_yticklabels(), rows, strict=True):
            label.set_fontweight("bold" if shares is None else "normal")
        axis.set_xlim(low, high)
        axis.set_xticks([-1, 0, 1, 2, 3], ["-1", "0: none", "1: as published", "2", "3"])
        for value, style in ((0.0, "-"), (1.0, "--")):
            axis.axvline(value, color=layout.INK, linestyle=style, linewidth=1)
        return _to_svg(figure, "Measured effects as shares of the published ones.")


def caption_of(svg: str) -> str:
    """Returns what a figure of this module shows, in words that it carries as its title."""
    found = re.search("<title>(.*?)</title>", svg, re.DOTALL)
    return html.unescape(found[1]) if found else ""


def width_of(svg: str) -> float:
    """Returns the width of a figure of this module in points."""
    found = re.search(r'<svg[^>]* width="([\d.]+)pt"', svg)
    return float(found[1]) if found else 0.0


def _points(line: Any) -> tuple[Sequence[float], Sequence[float | None]]:
    """Returns (x values, y values) of a line in either form."""
    return (list(line), list(line.values())) if isinstance(line, Mapping) else line


def _caption(
    panels: Mapping[str, Lines], x_label: str, y_label: str, dashed: Sequence[str], covers: bool
) -> str:
    """Returns what is against what, in which panels, and how to read the lines."""
    titles = "; ".join(filter(None, panels))
    head = f"{y_label} against {x_label}" if y_label else f"{titles}: against {x_label}"
    head = head[0].upper() + head[1:] + (f": {titles}" if y_label and titles else "")
    shown = [name for name in dashed if any(name in lines for lines in panels.values())]
    common = {name.rpartition(", ")[2] for name in shown}
    parts = [head, f"Dashed: {', '.join(common if len(common) == 1 else shown)}" if shown else ""]
    parts.append("A wider line lies under another" if covers else "")
    return ". ".join(filter(None, parts)) + "."


def _to_svg(figure: Figure, caption: str) -> str:
    """Returns the figure's text, its box widened by what would stand outside."""
    buffer = io.StringIO()
    about = {"Title": caption, "Date": None, "Creator": None}
    options = {"transparent": True, "bbox_inches": "tight", "pad_inches": 0.05}
    figure.savefig(buffer, format="svg", metadata=about, **options)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"
