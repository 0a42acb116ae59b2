# SPDX-License-Identifier: Apache-2.0
"""The two figures of sharpness: what is drawn where, in which colour, and what cannot be drawn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="figures need the extra 'launch'")

from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from ds_blockwise.blocks.roles import BLOCK_TYPES, Role
from ds_blockwise.figure_style import BLOCK_TYPE_COLOURS
from ds_blockwise.measure.role_sums import RoleOf
from ds_blockwise.measure.sharpness_plot import draw, plot_blocks, plot_over_time
from ds_blockwise.measure.sharpness_report import Sample, SharpnessReport, build_report

PARTS = {
    RoleOf("embed.weight", Role.EMBEDDING, False): 4,
    RoleOf("lm_head.weight", Role.OUTPUT, False): 4,
    RoleOf("layers.0.q.weight", Role.QUERY, False): 2,
    RoleOf("layers.1.q.weight", Role.QUERY, False): 2,
    RoleOf("layers.0.v.weight", Role.VALUE, False): 2,
    RoleOf("layers.0.up.weight", Role.FFN, False): 2,
    RoleOf("norm.weight", Role.NORM, False): 1,
    RoleOf("router.weight", Role.ROUTER, False): 1,
}


def report(step: int | None = 10, **traces: float) -> SharpnessReport:
    """One measurement: every trace is 8, so that sharpness is 8 over the number of elements, but for ``traces``."""
    samples = [Sample(5, {of: traces.get(of.fqn.replace(".", "_"), 8.0) for of in PARTS})]
    return build_report(samples, PARTS, estimator="fisher", step=step)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Axes]:
    """The axes of every figure that is saved."""
    axes: list[Axes] = []
    save = Figure.savefig

    def keep(figure: Figure, *args: object, **kwargs: object) -> None:
        axes.extend(figure.axes)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return axes


def test_every_block_type_has_a_colour_of_its_own() -> None:
    assert list(BLOCK_TYPE_COLOURS) == list(BLOCK_TYPES)
    assert len(set(BLOCK_TYPE_COLOURS.values())) == len(BLOCK_TYPES)


def test_curves_have_the_colours_of_their_block_types(drawn: list[Axes], tmp_path: Path) -> None:
    plot_over_time([report(20), report(10, norm_weight=2.0)], "title", tmp_path / "a.png")
    (axes,) = drawn
    handles, labels = axes.get_legend_handles_labels()
    lines = {label: handle[0] for handle, label in zip(handles, labels, strict=True)}
    assert {label: to_hex(line.get_color()) for label, line in lines.items()} == BLOCK_TYPE_COLOURS
    assert [list(values) for values in lines["norm"].get_data()] == [[10, 20], [2.0, 8.0]], "in the order of steps"
    assert axes.get_yscale() == "log" and "fisher" in axes.get_ylabel()


def test_dots_have_the_colours_of_their_block_types(drawn: list[Axes], tmp_path: Path) -> None:
    plot_blocks(report(), "title", tmp_path / "b.png")
    (axes,) = drawn
    names = [label.get_text() for label in axes.get_xticklabels()]
    dots = [line for line in axes.lines if line.get_marker() == "."]
    assert {name: to_hex(line.get_color()) for name, line in zip(names, dots, strict=True)} == BLOCK_TYPE_COLOURS
    queries = dots[names.index("qk")]
    assert list(queries.get_ydata()) == [4.0, 4.0], "one dot for each layer"
    assert "step 10" in axes.get_title()


def test_values_that_a_log_axis_cannot_show_are_left_out(drawn: list[Axes], tmp_path: Path) -> None:
    plot_over_time([report(1, norm_weight=-1.0), report(2)], "title", tmp_path / "a.png")
    handles, labels = drawn[0].get_legend_handles_labels()
    assert list(handles[labels.index("norm")][0].get_xdata()) == [2]
    negative = report(**{of.fqn.replace(".", "_"): -1.0 for of in PARTS})
    with pytest.raises(ValueError, match="no block has a positive sharpness"):
        plot_blocks(negative, "title", tmp_path / "b.png")


def test_measurements_that_make_no_curve_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no measurement with a step"):
        plot_over_time([report(None)], "title", tmp_path / "a.png")
    with pytest.raises(ValueError, match="measured by fisher, hutchinson"):
        plot_over_time([report(1), replace(report(2), estimator="hutchinson")], "title", tmp_path / "a.png")


def test_draw_names_what_it_wrote(tmp_path: Path) -> None:
    both = draw([report()], report(), "title", tmp_path / "new")
    assert [path.name for path in both] == ["sharpness.png", "sharpness_blocks.png"]
    assert all(path.stat().st_size > 10_000 for path in both)
    assert [path.name for path in draw([report(None)], report(None), "title", tmp_path)] == ["sharpness_blocks.png"]
