# SPDX-License-Identifier: Apache-2.0
"""How every figure looks: colours of block types and optimizers, axes, ticks, labels on lines.

Needs matplotlib, from the extra ``launch``. The background is opaque and light, so that a figure reads the same on a
light and on a dark page. Colours differ in normal sight and with red or green blindness.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.style import context
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, ScalarFormatter

from ds_blockwise.blocks.roles import BlockType

BACKGROUND = "#fafafa"
INK = "#222222"
GREY = "#6e6e6e"
TRAINING_COLOUR = "#888888"
VALIDATION_COLOUR = "#332288"

BLOCK_TYPE_COLOURS: dict[BlockType, str] = {
    "emb": "#4477aa",
    "head": "#b2182b",
    "qk": "#d55e00",
    "ffn": "#009e73",
    "vo": "#332288",
    "norm": "#741b47",
    "other": "#000000",
}
OPTIMIZER_COLOURS: dict[str, str] = {
    "AdamW": "#000000",
    "AdamW8bit": "#888888",
    "BlockwiseAdamW": "#332288",
    "Adam-mini": "#e6550d",  # the published partition, with uniform learning rates
    "BlockwiseAdamMini": "#4477aa",
    "BlockwiseLion": "#442244",
    "BlockwiseMuon": "#8800ee",
    "Muon": "#b2182b",
    "MuonRoles": "#bb66ff",  # torch's Muon, the roles of fused weights apart
}

_STYLE: dict[str, object] = {
    "figure.facecolor": BACKGROUND,
    "axes.facecolor": BACKGROUND,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": "medium",
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.3,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}
_DASH = 4.0  # in line widths
_TOUCHING = 2.0  # points between two lines of which the upper one hides the lower
_NARROW = 0.04  # of the values: a linear axis never shows less, or its ticks need more than four digits
_STEPS = [1, 2, 5, 10]  # between ticks
_LOG_FROM = 3.0  # largest value over smallest from which a log axis is worth it


def new_figure(
    width: float, height: float, rows: int = 1, columns: int = 1, *, sharex: bool = False, sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    """An empty figure and its panels, row by row.

    Args:
        width, height: in inches.
        rows, columns: of panels.
        sharex, sharey: whether all panels have one axis.
    """
    with context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        panels = figure.subplots(rows, columns, sharex=sharex, sharey=sharey, squeeze=False)
    return figure, list(panels.flat)


def save(figure: Figure, path: Path) -> None:
    """Write a PNG; its folder is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def number(value: float) -> str:
    """A number with at most four digits, in plain digits from 0.001 to 9999, else times a power of ten."""
    return f"{value:.4g}" if value == 0.0 or 1e-3 <= abs(value) < 1e4 else scientific(value)


def scientific(value: float) -> str:
    """A number with at most three digits, times a power of ten."""
    exponent = math.floor(math.log10(abs(value)) + 1e-9)
    factor = f"{value / 10.0**exponent:.3g}"
    return rf"$10^{{{exponent}}}$" if factor == "1" else rf"${factor}\times10^{{{exponent}}}$"


def scale_y(axes: Axes, values: Sequence[float], *, log: bool) -> None:
    """Set the y axis from the data.

    Args:
        axes: in which everything has been drawn.
        values: that have to be seen; without any the axis stays as it is.
        log: ask for a log axis; it is linear if a value is not positive, or all are within a factor of 3.
    """
    if not values:
        return
    low, high = min(values), max(values)
    if log and low > 0.0 and high / low >= _LOG_FROM:
        axes.set_yscale("log")
        margin = (high / low) ** 0.06
        axes.set_ylim(low / margin, high * margin)
        log_ticks(axes.yaxis, low, high)
        return
    middle, half = (low + high) / 2, (high - low) / 2 * 1.08
    half = max(half, _NARROW / 2 * max(abs(low), abs(high))) or 1.0
    axes.set_ylim(middle - half, middle + half)
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=_STEPS, min_n_ticks=3))
    plain = ScalarFormatter(useOffset=False)
    plain.set_scientific(False)
    few_digits = 1e-3 <= max(abs(low), abs(high)) < 1e5
    axes.yaxis.set_major_formatter(plain if few_digits else FuncFormatter(lambda value, _: number(value)))


def log_ticks(axis: Axis, low: float, high: float) -> None:
    """Readable ticks for a log axis from one value to another, the denser the fewer decades it shows."""
    decades = math.log10(high / low)
    denser = ((1.0, (1.0, 2.0, 3.0, 5.0, 7.0)), (2.5, (1.0, 2.0, 5.0)), (4.0, (1.0, 3.0)))
    between = next((subs for limit, subs in denser if decades < limit), (1.0,))
    written = number if 1e-3 <= low and high < 1e4 else scientific
    axis.set_major_locator(LogLocator(subs=between, numticks=8))
    axis.set_major_formatter(FuncFormatter(lambda value, _: written(value)))
    axis.set_minor_formatter(NullFormatter())


def step_axis(axes: Axes, label: str = "optimizer step") -> None:
    """An x axis of whole numbers."""
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(8, steps=_STEPS, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def finish_lines(axes: Axes, lines: Mapping[str, Line2D], *, size: float = 8.0) -> None:
    """Make lines that lie on each other visible, and label them.

    Args:
        axes, lines, size: see `label_lines`.
    """
    show_coinciding(list(lines.values()))
    label_lines(axes, lines, size=size)


def label_lines(axes: Axes, lines: Mapping[str, Line2D], *, size: float = 8.0) -> None:
    """Write each line's name at the right of the axes, in its colour and beside its end.

    Args:
        axes: with their final limits.
        lines: by name.
        size: of the names, in points.
    """
    ends = {name: points[-1] for name, line in lines.items() if (points := _data(line))}
    if not ends:
        return
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    height = axes.get_position().height * figure.get_figheight() * 72
    to_axes = axes.transAxes.inverted()
    gap = size * (0.1 + 1.25 * max(name.count("\n") + 1 for name in ends)) / height
    wanted = [float(to_axes.transform(axes.transData.transform(end))[1]) for end in ends.values()]
    for (name, end), at in zip(ends.items(), spread(wanted, gap), strict=True):
        colour = lines[name].get_color()
        axes.annotate(
            name,
            end,
            (1.03, at),
            textcoords="axes fraction",
            va="center",
            fontsize=size,
            color=colour,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "shrinkA": 1, "shrinkB": 1},
        )


def show_coinciding(lines: Sequence[Line2D]) -> None:
    """Give lines that hide each other along at least half of the shorter one dashes that take turns.

    Args:
        lines: of one pair of axes with its final limits; lines that are alone stay as they are.
    """
    groups: list[list[Line2D]] = []
    for line in lines:
        met = [group for group in groups if any(_coincide(line, other) for other in group)]
        groups = [group for group in groups if group not in met] + [[*(x for group in met for x in group), line]]
    for group in groups:
        for place, line in enumerate(group if len(group) > 1 else []):
            line.set_linestyle((place * _DASH, (_DASH, (len(group) - 1) * _DASH)))
            line.set_markevery((place, len(group)))


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Places in [0, 1] near the wanted ones, in their order, at least ``gap`` apart if there is room."""
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    pools: list[list[float]] = []
    for rank, i in enumerate(order):
        pools.append([wanted[i] - rank * gap])
        while len(pools) > 1 and _mean(pools[-2]) > _mean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    last = max(0.0, 1.0 - (len(wanted) - 1) * gap)
    shifted = [min(max(_mean(pool), 0.0), last) for pool in pools for _ in pool]
    places = dict(zip(order, (at + rank * gap for rank, at in enumerate(shifted)), strict=True))
    return [places[i] for i in range(len(wanted))]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _data(line: Line2D) -> list[tuple[float, float]]:
    points = np.asarray(line.get_xydata(), dtype=np.float64)
    return [(float(x), float(y)) for x, y in points[np.isfinite(points).all(axis=1)]]


def _points(line: Line2D) -> dict[float, float]:
    """Heights in points on the page, by the value of x."""
    assert line.axes is not None and line.axes.figure is not None
    scale = 72 / line.axes.figure.dpi
    return {x: float(line.axes.transData.transform((x, y))[1]) * scale for x, y in _data(line)}


def _coincide(one: Line2D, other: Line2D) -> bool:
    first, second = _points(one), _points(other)
    common = first.keys() & second.keys()
    near = sum(abs(first[x] - second[x]) < _TOUCHING for x in common)
    return near > 0 and 2 * near >= min(len(first), len(second))
