# SPDX-License-Identifier: Apache-2.0
"""The figure of ``ds-blockwise plan``: memory, time and efficiency over the number of nodes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display on a login node

from matplotlib import pyplot
from matplotlib.axes import Axes

from ds_blockwise.runs.plan import GPUS, REFERENCES, Plan

_COLOURS = ("#0b5394", "#b45f06", "#38761d")


def plot_plans(plans: Sequence[Plan], title: str, path: Path) -> None:
    """Draw three panels over nodes: bytes per GPU by optimizer, days, and the share of the peak with published runs.

    Args:
        plans: of one run, by number of nodes.
        title: of the figure.
        path: PNG file to write.
    """
    figure, (memory, days, mfu) = pyplot.subplots(1, 3, figsize=(15.0, 4.5), layout="constrained")
    nodes = [plan.nodes for plan in plans]
    for colour, name in zip(_COLOURS, plans[0].memory, strict=False):
        values = [plan.memory[name].on_gpu / 1e9 for plan in plans]
        memory.plot(nodes, values, marker="o", color=colour, label=name)
    memory.axhline(GPUS[plans[0].gpu].memory / 1e9, color="grey", linestyle="--", label=plans[0].gpu)
    memory.set_ylabel("GB per GPU")
    memory.set_ylim(bottom=0)
    _band(days, nodes, [plan.days for plan in plans], "days of training")
    days.set_yscale("log")
    _band(mfu, nodes, [(plan.mfu[1] * 100, plan.mfu[0] * 100) for plan in plans], "model FLOPs utilization, %")
    for text, gpus, share in REFERENCES:
        mfu.plot(gpus / plans[0].gpus_per_node, share * 100, "x", color="grey")
        mfu.annotate(
            text, (gpus / plans[0].gpus_per_node, share * 100), fontsize=6, xytext=(3, 3), textcoords="offset points"
        )
    mfu.set_ylim(bottom=0)
    for axes in (memory, days, mfu):
        axes.set_xscale("log", base=2)
        axes.set_xticks(nodes, [str(n) for n in nodes])
        axes.set_xlabel(f"nodes of {plans[0].gpus_per_node} GPUs")
        axes.grid(alpha=0.3)
    memory.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _band(axes: Axes, nodes: Sequence[int], ranges: Sequence[tuple[float, float]], label: str) -> None:
    low, high = ([pair[i] for pair in ranges] for i in range(2))
    axes.fill_between(nodes, low, high, color=_COLOURS[0], alpha=0.3)
    for values in (low, high):
        axes.plot(nodes, values, color=_COLOURS[0], marker="o", markersize=3)
    axes.set_ylabel(label)
