# SPDX-License-Identifier: Apache-2.0
"""The figure of ``ds-blockwise plan``: memory, optimizer state, time and efficiency over the number of nodes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from ds_blockwise.figure_style import BACKGROUND, GREY, OPTIMIZER_COLOURS, finish_lines, new_figure, save, scale_y
from ds_blockwise.runs.plan import GPUS, REFERENCES, Plan

_LARGEST_REFERENCE = max(share * 100 for _, _, share in REFERENCES)


def plot_plans(plans: Sequence[Plan], title: str, path: Path) -> None:
    """Draw four panels over nodes: memory, optimizer state with and without ZeRO, days, and the share of the peak.

    Args:
        plans: of one run, by number of nodes.
        title: of the figure.
        path: PNG file to write.
    """
    figure, panels = new_figure(13.0, 8.0, 2, 2)
    memory, state, days, mfu = panels
    nodes = [plan.nodes for plan in plans]
    colour = OPTIMIZER_COLOURS.get(next(iter(plans[0].memory)), GREY)
    for axes in panels:
        axes.set_xscale("log", base=2)
        axes.set_xticks(nodes, [str(n) for n in nodes])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel(f"nodes of {plans[0].gpus_per_node} GPUs")
    _draw_memory(memory, plans)
    _draw_state(state, plans)
    _band(days, nodes, [plan.days for plan in plans], colour, log=True)
    days.set_title("days of training")
    shares = [(plan.mfu[1] * 100, plan.mfu[0] * 100) for plan in plans]
    _band(mfu, nodes, shares, colour, log=False)
    mfu.set_title("model FLOPs utilization, %, and published runs")
    _draw_references(mfu, plans[0].gpus_per_node)
    figure.suptitle(title)
    save(figure, path)


def _draw_memory(axes: Axes, plans: Sequence[Plan]) -> None:
    nodes, limit = [plan.nodes for plan in plans], GPUS[plans[0].gpu].memory / 1e9
    lines, drawn = {}, [limit]
    for name in plans[0].memory:
        values = [plan.memory[name].on_gpu / 1e9 for plan in plans]
        (lines[name],) = axes.plot(nodes, values, marker="o", color=OPTIMIZER_COLOURS.get(name, GREY))
        drawn += values
    (lines[plans[0].gpu],) = axes.plot(nodes, [limit] * len(nodes), color=GREY, linestyle=":")
    axes.set_title("peak memory, GB per GPU")
    scale_y(axes, drawn, log=True)
    finish_lines(axes, lines)


def _draw_state(axes: Axes, plans: Sequence[Plan]) -> None:
    nodes = [plan.nodes for plan in plans]
    lines, drawn = {}, list[float]()
    for name in plans[0].memory:
        colour = OPTIMIZER_COLOURS.get(name, GREY)
        without = [plan.moments_without_zero[name] / 1e9 for plan in plans]
        within = [plan.memory[name].moments / 1e9 for plan in plans]
        curves = {"without ZeRO": (without, "s")}
        if within != without:
            where = ", in CPU memory" if plans[0].memory[name].offloaded else ""
            curves[f"with ZeRO{where}"] = (within, "o")
        for how, (values, marker) in curves.items():
            ends = " to ".join(dict.fromkeys(f"{value:.3g}" for value in (values[0], values[-1])))
            (lines[f"{name} {how}\n{ends} GB"],) = axes.plot(nodes, values, marker=marker, color=colour)
            drawn += values
    axes.set_title("optimizer state (both moments), GB per GPU")
    scale_y(axes, drawn, log=True)
    finish_lines(axes, lines)


def _draw_references(axes: Axes, gpus_per_node: int) -> None:
    published = [(gpus / gpus_per_node, share * 100, text) for text, gpus, share in REFERENCES]
    for x, y, _ in published:
        axes.plot(x, y, "x", color=GREY)
    left, right = (math.log(limit) for limit in axes.get_xlim())
    for x, y, text in published:
        in_the_left_half = math.log(x) < (left + right) / 2
        axes.annotate(
            text,
            (x, y),
            (5 if in_the_left_half else -5, 4),
            textcoords="offset points",
            ha="left" if in_the_left_half else "right",
            fontsize=7.5,
            color=GREY,
            bbox={"facecolor": BACKGROUND, "alpha": 0.7, "linewidth": 0, "pad": 0.5},
        )


def _band(axes: Axes, nodes: Sequence[int], ranges: Sequence[tuple[float, float]], colour: str, *, log: bool) -> None:
    low, high = ([pair[i] for pair in ranges] for i in range(2))
    axes.fill_between(nodes, low, high, color=colour, alpha=0.15, linewidth=0)
    lines = {}
    for name, values in (("lowest", low), ("highest", high)):
        (lines[name],) = axes.plot(nodes, values, color=colour, marker="o", markersize=3)
    scale_y(axes, [*low, *high] if log else [0.0, 1.05 * _LARGEST_REFERENCE, *low, *high], log=log)
    finish_lines(axes, lines)
