# SPDX-License-Identifier: Apache-2.0
"""The kernel benchmark's figure: time per parameter against size, one panel per layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from benchmarks.step.tables import LAYOUT_NAMES, Row
from ds_blockwise.figure_style import GREY, OPTIMIZER_COLOURS, finish_lines, log_ticks, new_figure, save, scale_y

# the optimizer that is computed, which decides the colour, and the dashes of the implementation
CONTENDERS: dict[str, tuple[str, str | tuple[int, tuple[int, ...]]]] = {
    "BlockwiseAdamMini[cpp]": ("BlockwiseAdamMini", "-"),
    "BlockwiseAdamMini[triton]": ("BlockwiseAdamMini", "-"),
    "BlockwiseAdamMini[reference]": ("BlockwiseAdamMini", ":"),
    "BlockwiseAdamW[cpp]": ("BlockwiseAdamW", "-"),
    "BlockwiseAdamW[triton]": ("BlockwiseAdamW", "-"),
    "BlockwiseAdamW[reference]": ("BlockwiseAdamW", ":"),
    "BlockwiseLion[cpp]": ("BlockwiseLion", "-"),
    "BlockwiseLion[triton]": ("BlockwiseLion", "-"),
    "BlockwiseLion[reference]": ("BlockwiseLion", ":"),
    "DeepSpeedCPULion": ("BlockwiseLion", "--"),
    "DeepSpeedCPUAdam": ("AdamW", "--"),
    "DeepSpeed FusedAdam": ("AdamW", "--"),
    "torch AdamW fused": ("AdamW", "-."),
    "torch AdamW foreach": ("AdamW", ":"),
    "adam-mini (published)": ("Adam-mini", "--"),
    "apex FusedAdam": ("AdamW", (0, (6, 2, 1, 2, 1, 2))),
    "TE FusedAdam": ("AdamW", (0, (8, 3))),
    "torchao AdamW8bit": ("AdamW8bit", "--"),
}


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw the rows of the CSV; contenders with bf16 momentum are left to the table.

    Args:
        rows: of the CSV.
        path: PNG file to write.
    """
    layouts = [layout for layout in LAYOUT_NAMES if any(row["layout"] == layout for row in rows)]
    figure, panels = new_figure(9.5, 5.0 * len(layouts), len(layouts), 1, sharey=True)
    drawn = []
    for axes, layout in zip(panels, layouts, strict=True):
        drawn.append(_panel(axes, [row for row in rows if row["layout"] == layout and row["median_ms"]]))
        axes.set_title(LAYOUT_NAMES[layout])
        axes.set_ylabel("nanoseconds per parameter")
    shown = [row for row in rows if row["contender"] in CONTENDERS and row["median_ms"]]
    spreads = [float(row[key]) * 1e6 / int(row["parameters"]) for row in shown for key in ("p20_ms", "p80_ms")]
    scale_y(panels[0], spreads, log=True)
    for axes, lines in zip(panels, drawn, strict=True):
        finish_lines(axes, lines)
    where = rows[0]["gpu"] if rows[0]["device"] == "cuda" else f"{rows[0]['cpu']}, {rows[0]['cores']} cores"
    figure.suptitle(f"One optimizer step, fp32, {where}\nmedian, bars from the 20th to the 80th percentile")
    save(figure, path)


def _panel(axes: Axes, rows: Sequence[Row]) -> dict[str, Line2D]:
    lines = {}
    for name, (optimizer, dashes) in CONTENDERS.items():
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
        bars = axes.errorbar(
            numels,
            median,
            yerr=spread,
            color=OPTIMIZER_COLOURS[optimizer],
            marker="o" if name.startswith("Blockwise") else "s",
            markersize=4,
            linestyle=dashes,
            linewidth=1.4,
            capsize=2,
        )
        lines[name] = bars[0]
    cache = int(rows[0]["l3_bytes"]) / 16 if rows and rows[0]["device"] == "cpu" else 0
    if cache:
        axes.axvline(cache, color=GREY, linewidth=0.8, linestyle=":")
        axes.annotate(
            "AdamW's tensors fill\nthe last-level cache",
            (cache, 0.02),
            xycoords=("data", "axes fraction"),
            xytext=(-3, 0),
            textcoords="offset points",
            ha="right",
            fontsize="x-small",
            color=GREY,
        )
    axes.set(xscale="log", xlabel="parameters")
    numels = [int(row["parameters"]) for row in rows]
    if numels:
        log_ticks(axes.xaxis, min(numels), max(numels))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1e6:g}M"))
    return lines
