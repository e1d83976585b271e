"""Layout of figures: colors and dashes of lines, ticks that do not touch, a legend that fits."""

import collections
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence

from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure  # without pyplot, whose backend is a notebook's own business

# Told apart by readers of every color vision, and 3:1 or more on white and on near-black pages.
COLORS = ("#0072b2", "#e07a14", "#00a3b8", "#cc0a0a", "#c21fff", "#7a5c66")
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("-", (0, (6, 1.5)), (0, (1.5, 1.5)), (0, (6, 1.5, 1.5, 1.5)), (0, (3, 1)), (0, (9, 3)))
INK = "#747b84"  # axes and text: over 4:1 on white and on near-black


def in_order(names: Iterable[str]) -> list[str]:
    """Returns names in their order, but by number where they differ by it: "at 16", "at 128"."""
    names = list(names)
    split = [re.fullmatch(r"(.*?)([\d,.]*\d)", name) for name in names]
    if all(split) and len({found[1] for found in split}) == 1:
        return sorted(
            names, key=lambda name: float(re.search(r"[\d,.]*$", name)[0].replace(",", ""))
        )
    return names


def grid(count: int, share_y: bool) -> tuple[Figure, list[Axes]]:
    """Returns a figure of `count` panels: up to three a row, four as two rows."""
    columns = count if count <= 3 else 2 if count == 4 else 3
    rows = -(-count // columns)
    width = 3.4 * columns + 1.2 if columns > 1 else 5.8
    figure = Figure(figsize=(width, 3.1 * rows + 0.5), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, sharey=share_y).flat)
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]


def styles(names: Sequence[str], dashed: Sequence[str], markers: bool) -> dict[str, dict]:
    """Returns how each line is drawn; a dashed "A, published" looks like "A" otherwise."""
    stem = lambda name: name.rpartition(", ")[0] or name
    partners = {
        name: next((n for n in names if n not in dashed and stem(name) in (n, stem(n))), name)
        for name in names
        if name in dashed
    }
    own = [name for name in names if partners.get(name, name) == name]
    styles = {}
    for name in names:
        index = own.index(partners.get(name, name))
        style = styles[name] = {"color": COLORS[index % len(COLORS)], "linestyle": "-"}
        if markers:
            style["marker"] = MARKERS[index % len(MARKERS)]
        if name in dashed:
            style |= {"linestyle": "--", "markerfacecolor": "none"}
        elif not markers and not dashed:
            style["linestyle"] = DASHES[index % len(DASHES)]
    return styles


def covered(
    lines: Mapping[str, tuple], dashed: Sequence[str], log: bool
) -> collections.Counter[str]:
    """Returns how many later lines lie on a line, point by point: so much wider it is drawn."""
    scale = lambda v: math.log(v) if log and v > 0 else v
    points = {
        name: {a: scale(b) for a, b in zip(x, y, strict=True) if b is not None}
        for name, (x, y) in lines.items()
    }
    every = [value for found in points.values() for value in found.values()]
    near = 0.01 * (max(every) - min(every)) if every else 0.0
    under = collections.Counter()
    for (one, first), (two, second) in itertools.combinations(points.items(), 2):
        both = first.keys() & second.keys()
        same = sum(abs(first[x] - second[x]) <= near for x in both)
        if two not in dashed and len(both) > 1 and same > 0.7 * min(len(first), len(second)):
            under[one] += 1
    return under


def ticks_of_lengths(axis: Axis, values: set[float]) -> None:
    """Sets ticks at the values; where labels would touch, at powers of two, as many as fit."""
    low, high = (math.log2(x) for x in axis.get_view_interval())
    inches = axis.axes.get_position().width * axis.get_figure().get_figwidth()

    def fits(ticks: Sequence[float]) -> bool:
        half = [0.045 * (len(_short(tick)) + 1) for tick in ticks]
        at = [inches * (math.log2(tick) - low) / (high - low) for tick in ticks]
        pairs = zip(itertools.pairwise(at), itertools.pairwise(half), strict=True)
        return all(b - a > p + q for (a, b), (p, q) in pairs)

    ticks = sorted(values)
    powers = [2.0**k for k in range(math.ceil(low), math.floor(high) + 1)]
    choices = [ticks, *(powers[::step] for step in range(1, 30))]
    ticks = (
        next(t for t in choices if fits(t)) if len(powers) > 1 else ticks[:: len(ticks) - 1 or 1]
    )
    axis.set_ticks(ticks, [_short(tick) for tick in ticks])
    axis.set_minor_locator(ticker.NullLocator())


def log_ticks(axis: Axis) -> None:
    """Sets three to seven ticks of a logarithmic axis, as plain numbers where all are short."""
    low, high = axis.get_view_interval()
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 2, 3, 4, 6, 8), (*range(10, 100, 5),)):
        unit = steps[0]
        ticks = [step / unit * 10.0**k for k in decades for step in steps]
        ticks = sorted({t for t in ticks if low <= t <= high})
        if len(ticks) > 2:
            break
    if not ticks:  # values that hardly differ: a line is as good as a logarithm
        ticks = [t for t in ticker.MaxNLocator(4).tick_values(low, high) if low <= t <= high]
    ticks = ticks[:: -(-len(ticks) // 7)]
    plain = 1e-4 <= ticks[0] and ticks[-1] < 1e7
    axis.set_ticks(
        ticks, [f"{t:,.10g}" if plain else f"$10^{{{math.log10(t):.3g}}}$" for t in ticks]
    )
    axis.set_minor_locator(ticker.NullLocator())


def linear_ticks(axis: Axis) -> None:
    """Sets at most six ticks, with thousands apart."""
    axis.set_major_locator(ticker.MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(lambda value, _: f"{value:,.10g}".replace("-", "\N{MINUS SIGN}"))


def legend(figure: Figure, axes: Sequence[Axes], names: Sequence[str]) -> None:
    """Puts one legend below all panels, row by row, in as many columns as fit."""
    handles = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    for columns in range(min(len(names), 4), 0, -1):
        order = [names[i] for column in range(columns) for i in range(column, len(names), columns)]
        shown = [handles[name] for name in order]
        legend = figure.legend(shown, order, loc="outside lower center", ncols=columns)
        if columns == 1 or legend.get_window_extent().width < 0.97 * figure.bbox.width:
            figure.set_figheight(figure.get_figheight() + 0.2 * (-(-len(names) // columns) - 1))
            return
        legend.remove()


def _short(value: float) -> str:
    """Returns 16384 as 16k: tick labels must not touch."""
    return f"{value / 1024:g}k" if value >= 1024 and value % 1024 == 0 else f"{value:g}"
