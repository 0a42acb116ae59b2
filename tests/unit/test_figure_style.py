# SPDX-License-Identifier: Apache-2.0
"""What every figure must keep: colours that can be told apart, ticks that can be read, lines that can be seen."""

from __future__ import annotations

import csv
import itertools

import pytest

pytest.importorskip("matplotlib", reason="figures need the extra 'launch'")

import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.text import Text

from benchmarks.compare.plots import COLOURS
from benchmarks.compare.trials import ARMS, COMPARED
from benchmarks.step.peers import families
from benchmarks.step.plots import CONTENDERS
from ds_blockwise.blocks.roles import BLOCK_TYPES
from ds_blockwise.figure_style import (
    BACKGROUND,
    BLOCK_TYPE_COLOURS,
    OPTIMIZER_COLOURS,
    TRAINING_COLOUR,
    VALIDATION_COLOUR,
    finish_lines,
    new_figure,
    number,
    scale_y,
    spread,
)
from ds_blockwise.optimizers.registry import OPTIMIZERS
from ds_blockwise.optimizers.settings import BACKENDS
from tests.helpers import ROOT

# what is seen of linear RGB: in normal sight, without red cones, without green cones (Machado et al. 2009)
SIGHTS = (
    torch.eye(3),
    torch.tensor([[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]]),
    torch.tensor([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]),
)
TO_XYZ = torch.tensor([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
PALETTES = (BLOCK_TYPE_COLOURS, OPTIMIZER_COLOURS, {"training": TRAINING_COLOUR, "validation": VALIDATION_COLOUR})


def linear(colour: str) -> torch.Tensor:
    rgb = torch.tensor(to_rgb(colour))
    return torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def lab(rgb: torch.Tensor) -> torch.Tensor:
    x, y, z = (TO_XYZ @ rgb.clamp(0, 1) / torch.tensor([0.9505, 1.0, 1.089])).pow(1 / 3)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("palette", PALETTES, ids=["block types", "optimizers", "losses"])
def test_colours_differ_in_every_sight(palette: dict[str, str]) -> None:
    for (one, first), (other, second) in itertools.combinations(palette.items(), 2):
        for sight in SIGHTS:
            distance = float((lab(sight @ linear(first)) - lab(sight @ linear(second))).norm())
            assert distance > 18, (one, other)


@pytest.mark.parametrize("palette", PALETTES, ids=["block types", "optimizers", "losses"])
def test_colours_stand_out_from_the_background(palette: dict[str, str]) -> None:
    """A contrast of 3 to 1 is what WCAG asks of graphics."""
    luminance = {colour: float(TO_XYZ[1] @ linear(colour)) for colour in (BACKGROUND, *palette.values())}
    for name, colour in palette.items():
        assert (luminance[BACKGROUND] + 0.05) / (luminance[colour] + 0.05) > 3, name


def test_every_block_type_and_optimizer_is_registered() -> None:
    assert list(BLOCK_TYPE_COLOURS) == list(BLOCK_TYPES)
    assert OPTIMIZERS.keys() <= OPTIMIZER_COLOURS.keys()


def test_every_optimizer_of_the_benchmarks_is_drawn_in_its_colour() -> None:
    """Of the kernels' rows, those with bf16 momentum are left to the table."""
    with open(ROOT / "docs/bench/kernels_cpu.csv", newline="", encoding="utf-8") as file:
        timed = {row["contender"] for row in csv.DictReader(file) if row["momentum"] == "fp32"}
    ours = {f"{cls.__name__}[{name}]" for cls in families().values() for name in BACKENDS if name != "auto"}
    assert timed | ours <= CONTENDERS.keys()
    assert {optimizer for optimizer, _ in CONTENDERS.values()} <= OPTIMIZER_COLOURS.keys()
    assert COLOURS.keys() == ARMS.keys(), "--arms draws any of them"
    assert len({COLOURS[arm] for arm in COMPARED}) == len(COMPARED)
    assert {COLOURS["blockwise_adamw"], COLOURS["adamw"]} == {
        OPTIMIZER_COLOURS[CONTENDERS[name][0]] for name in ("BlockwiseAdamW[cpp]", "torch AdamW fused")
    }


def drawn(values: dict[str, list[float]], *, log: bool = False) -> Axes:
    figure, (axes,) = new_figure(6.0, 3.0)
    lines = {name: axes.plot(range(len(heights)), heights)[0] for name, heights in values.items()}
    scale_y(axes, [height for heights in values.values() for height in heights], log=log)
    finish_lines(axes, lines)
    figure.draw_without_rendering()
    return axes


@pytest.mark.parametrize(
    "values",
    [
        [0.8405, 0.8406],
        [8.4051e-7, 8.4052e-7],
        [1.0, 1.0],
        [0.0, 0.0],
        [2.6, 7.9],
        [3e-9, 4e-4],
        [99990.0, 1e5],
        [-1, 1],
    ],
)
@pytest.mark.parametrize("log", [True, False])
def test_ticks_are_few_digits_without_an_offset(values: list[float], log: bool) -> None:
    axes = drawn({"x": values}, log=log)
    low, high = axes.get_ylim()
    labels = [tick.label1.get_text() for tick in axes.yaxis.get_major_ticks() if low <= tick.get_loc() <= high]
    assert axes.yaxis.get_offset_text().get_text() == ""
    assert len(labels) >= 2 and len(set(labels)) == len(labels)
    for label in labels:
        factor = label.strip("$").partition("10^")[0].removesuffix("\\times")
        digits = factor.strip("\N{MINUS SIGN}-").replace(".", "").lstrip("0")
        assert len(digits.rstrip("0")) <= 4, label


def test_lines_that_coincide_are_all_visible() -> None:
    """Their dashes take turns, so that no line covers another; a line that is alone stays whole."""
    same = [1.0, 2.0, 3.0]
    axes = drawn({"emb": same, "head": same, "other": same, "qk": [3.0, 2.0, 1.0]})
    offsets, patterns = zip(*(line._unscaled_dash_pattern for line in axes.lines[:3]), strict=True)
    (on, off) = patterns[0]
    assert set(patterns) == {(on, 2 * on)} and off == 2 * on
    assert sorted(offset % (on + off) for offset in offsets) == [0, on, 2 * on]
    assert axes.lines[3].get_linestyle() == "-"


def test_labels_do_not_cover_each_other() -> None:
    axes = drawn({f"line {i}": [1.0, 1.0 + 1e-3 * i] for i in range(5)} | {"far": [1.0, 9.0]})
    boxes = sorted((Text.get_window_extent(text) for text in axes.texts), key=lambda box: box.y0)
    assert all(below.y1 <= above.y0 + 1 for below, above in itertools.pairwise(boxes))
    figure = axes.get_figure()
    assert figure is not None and all(0 <= box.x0 < box.x1 <= figure.bbox.x1 for box in boxes)


def test_places_stay_in_order_and_apart() -> None:
    assert spread([0.5, 0.5], 0.2) == pytest.approx([0.4, 0.6])
    assert spread([0.9, 0.1], 0.2) == pytest.approx([0.9, 0.1])
    assert spread([1.0, 1.0, 0.0], 0.2) == pytest.approx([0.8, 1.0, 0.0])


def test_numbers() -> None:
    assert [number(x) for x in (0.0, 0.001, 2.5, 9999.0)] == ["0", "0.001", "2.5", "9999"]
    assert [number(x) for x in (1e-5, 2e-5, 1e4)] == ["$10^{-5}$", r"$2\times10^{-5}$", "$10^{4}$"]
