# SPDX-License-Identifier: Apache-2.0
"""The figure of telemetry that the main job leaves behind."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

pytest.importorskip("deepspeed", reason="the main job needs the extra 'deepspeed'")
pytest.importorskip("megatron.core", reason="the main job needs the extra 'megatron'")
pytest.importorskip("matplotlib", reason="figures need the extra 'launch'")

from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from ds_blockwise.blocks.roles import BLOCK_TYPES
from ds_blockwise.figure_style import BLOCK_TYPE_COLOURS
from job.report import plot_telemetry


def test_telemetry_has_the_colours_of_the_sharpness_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two figures of one run that swap the colours of two types would be misread."""
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: figures.append(figure))
    readings = [(step, {kind: {"lr": 0.1 * step} for kind in BLOCK_TYPES}) for step in (1, 2)]
    plot_telemetry(cast("Any", SimpleNamespace(name="x")), cast("Any", SimpleNamespace(telemetry=readings)), tmp_path)
    handles, labels = figures[0].axes[0].get_legend_handles_labels()
    drawn = {label: to_hex(line.get_color()) for line, label in zip(handles, labels, strict=True)}
    assert drawn == BLOCK_TYPE_COLOURS


def test_telemetry_shows_every_line_and_plain_ticks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Types with one rate take turns along their line; a norm that hardly moves has no ticks like 8.405 x 10^-1."""
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: figures.append(figure))
    readings = [
        (step, {kind: {"lr": 0.1 * step, "grad_norm": 0.8405 + 1e-5 * step} for kind in BLOCK_TYPES})
        for step in range(1, 9)
    ]
    plot_telemetry(cast("Any", SimpleNamespace(name="x")), cast("Any", SimpleNamespace(telemetry=readings)), tmp_path)
    figures[0].draw_without_rendering()
    rates, norm = figures[0].axes
    assert len(rates.lines) == len(BLOCK_TYPES) and {line.get_linestyle() for line in rates.lines} == {"--"}
    assert [text.get_text() for text in norm.texts] == ["model"]
    labels = [label.get_text() for label in norm.get_yticklabels()]
    assert labels and all(len(label) <= 5 for label in labels), labels
    assert norm.yaxis.get_offset_text().get_text() == ""
