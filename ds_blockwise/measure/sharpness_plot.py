# SPDX-License-Identifier: Apache-2.0
"""The two figures of a run's sharpness: over time by block type, and how it is distributed over blocks.

Needs matplotlib, from the extra ``launch``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from ds_blockwise.blocks.roles import BLOCK_TYPES, BlockType
from ds_blockwise.figure_style import BLOCK_TYPE_COLOURS, INK, finish_lines, new_figure, save, scale_y, step_axis
from ds_blockwise.measure.sharpness_report import SharpnessReport


def draw(reports: Sequence[SharpnessReport], report: SharpnessReport, title: str, folder: Path) -> list[Path]:
    """Write ``sharpness.png`` (if measurements have steps) and ``sharpness_blocks.png``.

    Args:
        reports: of one run.
        report: the one whose blocks are shown.
        title: of both figures.
        folder: made if it is not there.

    Raises:
        ValueError: there is nothing that can be drawn.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    if any(r.step is not None for r in reports):
        paths.append(folder / "sharpness.png")
        plot_over_time(reports, title, paths[-1])
    paths.append(folder / "sharpness_blocks.png")
    plot_blocks(report, title, paths[-1])
    return paths


def plot_over_time(reports: Sequence[SharpnessReport], title: str, path: Path) -> None:
    """Draw the average sharpness of every block type over optimizer steps, with standard errors, on a log axis.

    Args:
        reports: of one run, with their steps, by one estimator. Values that are not positive (negative curvature) are
            left out: they have no place on a log axis.
        title: of the figure.
        path: PNG file to write.

    Raises:
        ValueError: no report has a step, or the estimators differ.
    """
    timed = sorted((r.step, i, r) for i, r in enumerate(reports) if r.step is not None)
    if not timed:
        raise ValueError("no measurement with a step: nothing can be drawn over time")
    estimator = _one_estimator(reports)
    figure, (axes,) = new_figure(8.0, 5.0)
    lines: dict[str, Line2D] = {}
    drawn: list[float] = []
    for block_type in _types(reports):
        points = [
            (step, entry.sharpness, entry.standard_error)
            for step, _, report in timed
            for entry in report.at("type")
            if entry.block_type == block_type and entry.sharpness > 0.0
        ]
        if points:
            steps, values, errors = zip(*points, strict=True)
            colour = BLOCK_TYPE_COLOURS[block_type]
            bars = axes.errorbar(steps, values, errors, color=colour, marker="o", markersize=3, label=block_type)
            lines[block_type] = bars[0]
            drawn += values
    step_axis(axes)
    _describe(axes, drawn, estimator, title)
    finish_lines(axes, lines)
    save(figure, path)


def plot_blocks(report: SharpnessReport, title: str, path: Path) -> None:
    """Draw how sharpness is distributed over the blocks of each type, a box for each type, on a log axis.

    A block is what one role holds of one parameter, such as the query rows of one layer. The box holds the middle half,
    the line is the median, the dots are all blocks, the cross is the type's average.

    Args:
        report: one measurement.
        title: of the figure.
        path: PNG file to write.

    Raises:
        ValueError: no block has a positive sharpness.
    """
    values = {
        block_type: [e.sharpness for e in report.at("parameter") if e.block_type == block_type and e.sharpness > 0.0]
        for block_type in _types([report])
    }
    values = {block_type: found for block_type, found in values.items() if found}
    if not values:
        raise ValueError("no block has a positive sharpness: nothing can be drawn on a log axis")
    figure, (axes,) = new_figure(8.0, 5.0)
    axes.boxplot(list(values.values()), tick_labels=list(values), showfliers=False, whis=(0, 100))
    averages = report.by_type()
    for place, (block_type, found) in enumerate(values.items(), start=1):
        axes.plot([place] * len(found), found, ".", color=BLOCK_TYPE_COLOURS[block_type], alpha=0.5)
        axes.plot([place], [averages[block_type]], "x", color=INK)
    axes.grid(visible=False, axis="x")
    when = "" if report.step is None else f", step {report.step}"
    drawn = [value for found in values.values() for value in found] + [averages[block_type] for block_type in values]
    _describe(axes, drawn, report.estimator, title + when)
    save(figure, path)


def _types(reports: Sequence[SharpnessReport]) -> list[BlockType]:
    found = {entry.block_type for report in reports for entry in report.at("type")}
    return [block_type for block_type in BLOCK_TYPES if block_type in found]


def _one_estimator(reports: Sequence[SharpnessReport]) -> str:
    names = sorted({report.estimator for report in reports})
    if len(names) > 1:
        raise ValueError(f"measured by {', '.join(names)}: a curve needs one estimator. Draw them one by one.")
    return names[0]


def _describe(axes: Axes, values: Sequence[float], estimator: str, title: str) -> None:
    axes.set_ylabel(f"average sharpness, trace / parameters ({estimator})")
    axes.set_title(title)
    scale_y(axes, [value for value in values if value > 0.0], log=True)
