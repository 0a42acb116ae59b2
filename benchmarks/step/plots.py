# SPDX-License-Identifier: Apache-2.0
"""The kernel benchmark's figure: time per parameter against size, one panel per layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks.step.tables import LAYOUT_NAMES, Row

COLOURS = {
    "BlockwiseAdamMini[cpp]": "#38761d",
    "BlockwiseAdamMini[triton]": "#38761d",
    "BlockwiseAdamMini[reference]": "#93c47d",
    "BlockwiseAdamW[cpp]": "#0b5394",
    "BlockwiseAdamW[triton]": "#0b5394",
    "BlockwiseAdamW[reference]": "#9fc5e8",
    "DeepSpeedCPUAdam": "#990000",
    "DeepSpeed FusedAdam": "#990000",
    "torch AdamW fused": "#b45f06",
    "torch AdamW foreach": "#e69138",
    "adam-mini (published)": "#741b47",
    "apex FusedAdam": "#444444",
    "TE FusedAdam": "#76a5af",
    "torchao AdamW8bit": "#a64d79",
}


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw the rows of the CSV; contenders with bf16 momentum are left to the table.

    Args:
        rows: of the CSV.
        path: PNG file to write.
    """
    layouts = [layout for layout in LAYOUT_NAMES if any(row["layout"] == layout for row in rows)]
    figure, panels = pyplot.subplots(
        1, len(layouts), figsize=(5.6 * len(layouts), 5.6), sharey=True, layout="constrained", squeeze=False
    )
    for axes, layout in zip(panels[0], layouts, strict=True):
        _panel(axes, [row for row in rows if row["layout"] == layout and row["median_ms"]])
        axes.set_title(LAYOUT_NAMES[layout])
    panels[0][0].set_ylabel("nanoseconds per parameter")
    handles: dict[str, object] = {}
    for axes in panels[0]:
        handles.update({label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)})
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize="small")
    where = rows[0]["gpu"] if rows[0]["device"] == "cuda" else f"{rows[0]['cpu']}, {rows[0]['cores']} cores"
    figure.suptitle(f"One optimizer step, fp32, {where}; median, bars from the 20th to the 80th percentile")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _panel(axes: pyplot.Axes, rows: Sequence[Row]) -> None:
    for name, colour in COLOURS.items():
        points = sorted(
            (int(row["parameters"]), *(float(row[key]) for key in ("median_ms", "p20_ms", "p80_ms")))
            for row in rows
            if row["contender"] == name
        )
        if not points:
            continue
        numels = [point[0] for point in points]
        median, low, high = ([point[i] * 1e6 / point[0] for point in points] for i in (1, 2, 3))
        spread = [
            [max(0.0, m - at) for m, at in zip(median, low, strict=True)],
            [max(0.0, at - m) for m, at in zip(median, high, strict=True)],
        ]
        axes.errorbar(
            numels,
            median,
            yerr=spread,
            label=name,
            color=colour,
            marker="o" if name.startswith("Blockwise") else "s",
            markersize=4,
            linestyle="-" if name.startswith("Blockwise") else "--",
            linewidth=1.4,
            capsize=2,
        )
    cache = int(rows[0]["l3_bytes"]) / 16 if rows and rows[0]["device"] == "cpu" else 0
    if cache:
        axes.axvline(cache, color="#999999", linewidth=0.8, linestyle=":")
        axes.annotate(
            "AdamW's tensors fill\nthe last-level cache",
            (cache, 0.02),
            xycoords=("data", "axes fraction"),
            ha="right",
            fontsize="x-small",
            color="#666666",
        )
    axes.set(xscale="log", yscale="log", xlabel="parameters")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1e6:g}M"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
