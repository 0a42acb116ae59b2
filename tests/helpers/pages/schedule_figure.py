# SPDX-License-Identifier: Apache-2.0
"""Draws `docs/schedules/shapes.png` from the examples of `docs/schedules.md`.

python -m tests.helpers.pages.schedule_figure
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch

from ds_blockwise.figure_style import BLOCK_TYPE_COLOURS, GREY, new_figure, save, step_axis
from ds_blockwise.optimizers.registry import SCHEDULES
from ds_blockwise.optimizers.schedules.schedule import BlockwiseLR
from tests.helpers import ROOT

PAGE = ROOT / "docs/schedules.md"
FIGURE = ROOT / "docs/schedules/shapes.png"
PEAK = 3e-4
_COLUMNS = 3


def examples() -> list[dict[str, Any]]:
    """The page's JSON of each shape, in order."""
    found = re.findall(r"^```json\n(\{\"type\".*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.M | re.S)
    return [json.loads(text) for text in found]


def schedule_of(example: dict[str, Any]) -> BlockwiseLR:
    """The schedule of an example, on an optimizer with the page's peak; tables are found from the repository's root."""
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        return SCHEDULES[example["type"]](torch.optim.SGD([torch.zeros(1)], lr=PEAK), **example["params"])
    finally:
        os.chdir(before)


def title_of(params: dict[str, Any]) -> str:
    """A panel's title: the shape, and that of its decay."""
    decay = f", {params['decay_shape']}" if "decay_shape" in params else ""
    exponent = f", exponent {params['exponent']:g}" if "exponent" in params else ""
    return f"{params['shape']}{decay}{exponent}"


def draw(path: Path) -> int:
    """Draw a panel for each example; returns how many there are."""
    shown = examples()
    rows = -(-len(shown) // _COLUMNS)
    figure, panels = new_figure(10.0, 2.2 * rows, rows, _COLUMNS, sharex=True, sharey=True)
    for axes, example in zip(panels, shown, strict=True):
        schedule = schedule_of(example)
        updates = range(schedule.total_num_steps + 1)
        rates, progress = [], []
        for _ in updates:
            rates.append(schedule.get_last_lr()[0] / PEAK)
            progress.append(schedule.progress)
            schedule.step()
        axes.plot(updates, progress, color=GREY, linestyle="--", linewidth=1.0)
        axes.plot(updates, rates, color=BLOCK_TYPE_COLOURS["emb"], linewidth=1.8)
        axes.set_title(title_of(example["params"]))
        axes.set_ylim(-0.04, 1.08)
    for axes in panels[-_COLUMNS:]:
        step_axis(axes, "update")
    for axes in panels[::_COLUMNS]:
        axes.set_ylabel("rate over peak")
    panels[0].text(330, 0.93, "rate", color=BLOCK_TYPE_COLOURS["emb"], fontsize=8)
    panels[0].text(640, 0.75, "progress", color=GREY, fontsize=8, ha="right")
    save(figure, path)
    return len(shown)


if __name__ == "__main__":
    draw(FIGURE)
