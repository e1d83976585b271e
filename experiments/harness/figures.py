"""Figures as SVG text: the same bytes for the same numbers, readable on light and dark pages."""

import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure  # without pyplot, whose backend is a notebook's own business

# Mid-tones with enough contrast on white and on near-black, told apart by color-blind readers too.
COLORS = ("#1f83d6", "#e0722e", "#2a9d70", "#c05ab0", "#b08a00", "#7a7f87")
MARKERS = ("o", "s", "^", "D", "v", "P")
_INK = "#808790"  # axes and text: about 4:1 on white and 5:1 on black

_STYLE = {
    "svg.hashsalt": "tilescan",  # ids inside the file, otherwise random
    "svg.fonttype": "path",  # looks the same where the font is missing
    "font.size": 10,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _INK,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "text.color": _INK,
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
) -> str:
    """Returns an SVG with a panel an entry, one legend below; "" where there is nothing to show.

    Args:
      panels: {title: {line: (x, y) or {x: y}}}; a line of the same name has the same color
        everywhere.
      x_label: text of the x axes.
      y_label: text of the left y axis.
      log_x: base-2 logarithmic x axis with the x values as ticks (lengths are powers of two).
      log_y: logarithmic y axis.
      dashed: names of lines to draw dashed, e.g. what is published rather than measured.
      markers: False draws plain lines, for many points.
      share_y: False gives each panel a y axis of its own.
    """
    panels = {
        title: {name: _points(line) for name, line in lines.items()}
        for title, lines in panels.items()
    }
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    if not names:
        return ""
    with matplotlib.rc_context(_STYLE):
        width = 3.4 * len(panels) + 1.2
        figure = Figure(figsize=(width, 3.5))
        axes = figure.subplots(1, len(panels), squeeze=False, sharey=share_y)
        for axis, (title, lines) in zip(axes[0], panels.items(), strict=True):
            for name, (x, y) in lines.items():
                index = names.index(name)
                axis.plot(
                    x,
                    y,
                    color=COLORS[index % len(COLORS)],
                    marker=MARKERS[index % len(MARKERS)] if markers else None,
                    linestyle="--" if name in dashed else "-",
                    label=name,
                )
            axis.set_title(title, fontsize=10)
            axis.set_xlabel(x_label)
            if log_x:
                ticks = sorted({value for x, _ in lines.values() for value in x})
                axis.set_xscale("log", base=2)
                axis.set_xticks(ticks, [_short(tick) for tick in ticks])
                axis.minorticks_off()
            if log_y:
                axis.set_yscale("log")
        axes[0][0].set_ylabel(y_label)
        handles = {}
        for axis in axes[0]:
            for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
                handles.setdefault(label, handle)
        figure.legend(
            handles.values(), handles, loc="outside lower center", ncols=min(len(handles), 4)
        )
        return _to_svg(figure)


def line_figure(
    rows: Sequence[Any],
    lines: Mapping[str, Callable[[Any], Any]],
    *,
    x: str,
    y: str,
    log: bool = False,
    dashed: Sequence[str] = (),
) -> str:
    """Returns an SVG of one panel: the lines' values over the keys of groups of records.

    Args:
      rows: groups (`groups.by`) whose keys are numbers.
      lines: {name: function of a group}; a number, a `Spread` (its mean), or None for a gap.
      x, y: labels; x is logarithmic.
      log: whether y is, too.
      dashed: names of lines to draw dashed.
    """
    return panel_figure({"": (rows, lines)}, x=x, y=y, log=log, dashed=dashed)


def panel_figure(
    panels: Mapping[str, tuple[Sequence[Any], Mapping[str, Callable[[Any], Any]]]],
    *,
    x: str,
    y: str,
    log: bool = False,
    dashed: Sequence[str] = (),
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
    return line_chart(shown, x_label=x, y_label=y, log_x=True, log_y=log, dashed=dashed)


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
        figure = Figure(figsize=(9, 0.7 + 0.26 * len(rows)))
        axis = figure.subplots()
        for place, (_, shares) in enumerate(rows):
            for share in shares or ():
                marker = "<" if share < low else ">" if share > high else MARKERS[0]
                shown = min(max(share, low), high)
                axis.plot(shown, place, marker, color=COLORS[0], alpha=0.8, clip_on=False)
        # The first paper is at the top; names of papers stand out from those of their claims.
        axis.set_ylim(len(rows) - 0.4, -0.6)
        axis.set_yticks(range(len(rows)), [textwrap.shorten(name, 72) for name, _ in rows])
        axis.tick_params(axis="y", length=0)
        for label, (_, shares) in zip(axis.get_yticklabels(), rows, strict=True):
            label.set_fontweight("bold" if shares is None else "normal")
        axis.set_xlim(low, high)
        axis.set_xticks([-1, 0, 1, 2, 3], ["-1", "0: none", "1: as published", "2", "3"])
        for value, style in ((0.0, "-"), (1.0, "--")):
            axis.axvline(value, color=_INK, linestyle=style, linewidth=1)
        return _to_svg(figure)


def _points(line: Any) -> tuple[Sequence[float], Sequence[float | None]]:
    """Returns (x values, y values) of a line in either form."""
    return (list(line), list(line.values())) if isinstance(line, Mapping) else line


def _short(value: float) -> str:
    """Returns 16384 as 16k: tick labels must not touch."""
    return f"{value / 1024:g}k" if value >= 1024 and value % 1024 == 0 else f"{value:g}"


def _to_svg(figure: Figure) -> str:
    figure.set_layout_engine("constrained")
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"
