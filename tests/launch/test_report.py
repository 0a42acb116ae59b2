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

from ds_blockwise.blocks.defaults import BLOCK_TYPE_COLOURS
from ds_blockwise.blocks.roles import BLOCK_TYPES
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
