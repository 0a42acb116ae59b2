# SPDX-License-Identifier: Apache-2.0
"""The figure of ``ds-blockwise plan``: what is in it, and that its words stay where they belong."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="figures need the extra 'launch'")

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from ds_blockwise.runs.plan import REFERENCES, Plan
from ds_blockwise.runs.plan_files import plan_over_nodes, read_runs
from ds_blockwise.runs.plan_memory import RankCounts
from ds_blockwise.runs.plan_plot import plot_plans
from tests.helpers import ROOT

PARAMETERS = 1_935_362_560


@pytest.fixture(scope="module")
def plans() -> list[Plan]:
    runs = read_runs(ROOT / "configs" / "run" / "llama_2b", [], None)
    return plan_over_nodes(
        runs, runs[-1], lambda run: RankCounts(PARAMETERS // run.parallel.tensor, 636_288), 8, "h100-80g"
    )


@pytest.fixture
def panels(plans: list[Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Axes]:
    """The panels by position: memory, optimizer state, days, share of the peak."""
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: figures.append(figure))
    plot_plans(plans, "title", tmp_path / "plan.png")
    figures[0].draw_without_rendering()
    return figures[0].axes


def test_words_stay_in_their_place(panels: list[Axes]) -> None:
    """Published runs inside their panel; names of lines inside the figure, and in no other panel."""
    inside = [text for text in panels[3].texts if text.get_text() in {name for name, _, _ in REFERENCES}]
    assert len(inside) == len(REFERENCES)
    frame = panels[3].get_window_extent()
    for text in inside:
        box = Text.get_window_extent(text)
        assert frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1, text
    figure = panels[0].get_figure()
    assert figure is not None
    for axes in panels:
        for text in axes.texts:
            box = Text.get_window_extent(text)
            assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, text
            assert not any(box.overlaps(other.get_window_extent()) for other in panels if other is not axes), text


def test_state_is_shown_with_and_without_zero(panels: list[Axes], plans: list[Plan]) -> None:
    """Two moments of 4 bytes for AdamW; Adam-mini's second moments are one for each block."""
    names = {text.get_text() for text in panels[1].texts}
    assert f"AdamW without ZeRO\n{PARAMETERS * 8 / 1e9:.3g} to {PARAMETERS * 4 / 1e9:.3g} GB" in names, "halves by TP"
    assert f"AdamW with ZeRO\n{PARAMETERS * 8 / 8 / 1e9:.3g} to {PARAMETERS * 8 / 512 / 1e9:.3g} GB" in names
    assert sum(name.startswith("BlockwiseAdamMini with") for name in names) == 2
    assert plans[0].moments_without_zero == {"BlockwiseAdamMini": 4 * (PARAMETERS + 636_288), "AdamW": 8 * PARAMETERS}


def test_memory_curves_that_coincide_are_both_visible(panels: list[Axes]) -> None:
    styles = [line.get_linestyle() for line in panels[0].lines[:2]]
    assert styles == ["--", "--"], styles
