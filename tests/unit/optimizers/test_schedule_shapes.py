# SPDX-License-Identifier: Apache-2.0
"""Every shape of `BlockwiseLR` against its closed form, its errors, and exact resumes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ds_blockwise import BlockwiseAdamW, BlockwiseCosineLR, BlockwiseLR, BlockwiseWSDLR, tag_parameters
from ds_blockwise.kernels.param_groups import progress_of
from ds_blockwise.optimizers.schedules.shapes import DECAY_SHAPES, SHAPES

PEAK, FLOOR, WARMUP, TOTAL, DECAY, COOLDOWN = 1e-3, 5e-5, 4, 40, 10, 12
MULTIPLIER = 10.0
Settings = dict[str, Any]
Height = Callable[[int], float]

# of x, the part of the decay that is done
FALLS: dict[str, tuple[Settings, Callable[[float], float]]] = {
    "cosine": ({}, lambda x: math.cos(math.pi * x / 2) ** 2),
    "linear": ({}, lambda x: 1 - x),
    "1-sqrt": ({}, lambda x: 1 - x**0.5),
    "power": ({"exponent": 1.2}, lambda x: (1 - x) ** 1.2),
    "exponential": ({"exponent": 1.7}, lambda x: math.expm1(1.7 * (1 - x)) / math.expm1(1.7)),
}


def _whole(fall: Callable[[float], float]) -> Height:
    return lambda k: fall((k - WARMUP) / (TOTAL - WARMUP))


def _then(stable: Height, fall: Callable[[float], float]) -> Height:
    begin = TOTAL - DECAY
    return lambda k: stable(k) if k <= begin else stable(begin) * fall((k - begin) / DECAY)


def _infinite(k: int) -> float:
    x = min(1.0, (k - WARMUP) / COOLDOWN)
    return 0.3 + 0.7 * math.cos(math.pi * x / 2) ** 2


CURVES: dict[str, tuple[Settings, Height]] = {
    **{name: ({"shape": name, **own}, _whole(fall)) for name, (own, fall) in FALLS.items()},
    **{
        f"wsd, {name}": (
            {"shape": "wsd", "decay_shape": name, "decay_num_steps": DECAY, **own},
            _then(lambda k: 1.0, fall),
        )
        for name, (own, fall) in FALLS.items()
    },
    "inv-sqrt": (
        {"shape": "inv-sqrt", "decay_fraction": DECAY / TOTAL},
        _then(lambda k: (WARMUP / k) ** 0.5, FALLS["linear"][1]),
    ),
    "infinite": (
        {
            "shape": "infinite",
            "cooldown_num_steps": COOLDOWN,
            "constant_factor": 0.3,
            "decay_shape": "exponential",
            "exponent": 1.7,
            "decay_num_steps": DECAY,
        },
        _then(_infinite, FALLS["exponential"][1]),
    ),
}
HAS_STABLE_PHASE = ("wsd", "inv-sqrt", "infinite")


def make() -> tuple[nn.Module, BlockwiseAdamW]:
    model = nn.ModuleDict({"lm_head": nn.Linear(3, 2, bias=False)})
    tag_parameters(model)
    settings: Settings = {"eps": 0.0, "weight_decay": 0.0, "betas": (0.0, 0.0), "lr_multipliers": {"head": MULTIPLIER}}
    return model, BlockwiseAdamW(model.parameters(), lr=PEAK, **settings)


def build(settings: Settings, **more: Any) -> BlockwiseLR:
    return BlockwiseLR(make()[1], **{"total_num_steps": TOTAL, "warmup_num_steps": WARMUP, **settings, **more})


def moved(model: nn.Module, optimizer: BlockwiseAdamW) -> float:
    """With betas 0 and eps 0 an update is the learning rate times the sign of the gradient."""
    (parameter,) = model.parameters()
    parameter.data.zero_()
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return float(-parameter.detach().double().mean())


def rates_of(schedule: BlockwiseLR) -> tuple[object, ...]:
    (group,) = schedule.optimizer.param_groups
    return group["lr"], group["lr_floor"], progress_of(group), schedule.get_lr()


def test_the_curves_above_are_all_that_there_are() -> None:
    assert set(FALLS) == set(DECAY_SHAPES)
    assert {settings["shape"] for settings, _ in CURVES.values()} == {*SHAPES} - {"table"}


@pytest.mark.parametrize("name", CURVES)
def test_every_shape_is_its_closed_form_for_every_block(name: str) -> None:
    """The block's update over the peak, from the first update past the last one, with a floor that all blocks share."""
    settings, height = CURVES[name]
    model, optimizer = make()
    schedule = BlockwiseLR(optimizer, TOTAL, WARMUP, FLOOR, **settings)
    rates = []
    for k in range(TOTAL + 3):
        f = 0.0 if k >= TOTAL else height(k) if k >= WARMUP else math.nan
        expected = MULTIPLIER * PEAK * k / WARMUP if k < WARMUP else FLOOR + f * (MULTIPLIER * PEAK - FLOOR)
        rates.append(moved(model, optimizer))
        assert rates[-1] == pytest.approx(expected, rel=1e-5, abs=1e-12), k
        schedule.step()
    assert rates[WARMUP] == max(rates) and sorted(rates[WARMUP:], reverse=True) == rates[WARMUP:]


@pytest.mark.parametrize("name", CURVES)
def test_a_resume_is_exact_at_every_update(name: str) -> None:
    """Also from a state of another shape, which is a position: one's own settings win."""
    settings, _ = CURVES[name]
    whole, other = build(settings, min_lr=FLOOR), BlockwiseCosineLR(make()[1], TOTAL + 9)
    for _ in range(TOTAL + 2):
        for state in (whole.state_dict(), other.state_dict()):
            resumed = build(settings, min_lr=FLOOR)
            resumed.load_state_dict(state)
            assert rates_of(resumed) == rates_of(whole)
        whole.step(), other.step()


@pytest.mark.parametrize("name", CURVES)
def test_the_progress_is_that_of_the_decay_at_the_end(name: str) -> None:
    settings, _ = CURVES[name]
    begin = TOTAL - DECAY if settings["shape"] in HAS_STABLE_PHASE else WARMUP
    schedule = build(settings)
    for k in range(TOTAL + 2):
        assert schedule.progress == pytest.approx(min(1.0, max(0.0, (k - begin) / (TOTAL - begin))), rel=1e-15)
        schedule.step()


@pytest.mark.parametrize(("phase", "count"), [("warmup", WARMUP), ("decay", DECAY), ("cooldown", COOLDOWN)])
def test_a_fraction_of_the_run_is_that_many_updates(phase: str, count: int) -> None:
    settings = {key: value for key, value in CURVES["infinite"][0].items() if key != f"{phase}_num_steps"}
    given = {"warmup_num_steps": WARMUP} if phase != "warmup" else {}
    by_fraction = BlockwiseLR(make()[1], TOTAL, **given, **settings, **{f"{phase}_fraction": count / TOTAL})
    by_count = build(CURVES["infinite"][0])
    for _ in range(TOTAL):
        assert by_fraction.get_lr() == by_count.get_lr()
        by_fraction.step(), by_count.step()


def test_a_small_fraction_is_one_update() -> None:
    assert build({"shape": "linear"}, warmup_num_steps=0, warmup_fraction=0.001).warmup_num_steps == 1
    assert build({"shape": "linear"}, warmup_num_steps=0, warmup_fraction=0.0).warmup_num_steps == 0


def test_the_infinite_schedule_has_the_papers_rates() -> None:
    """arXiv 2403.08763: a cosine to the constant rate, then exponentially to the minimum; here 3e-4, 1.65e-4, 3e-5."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=3e-4)
    exponent = math.log(1.65 / 0.3)
    settings: Settings = {"cooldown_num_steps": 40, "decay_num_steps": 20, "decay_shape": "exponential"}
    schedule = BlockwiseLR(optimizer, 100, 10, 3e-5, shape="infinite", exponent=exponent, **settings)
    rates = []
    for _ in range(101):
        rates += schedule.get_last_lr()
        schedule.step()
    assert rates[10] == pytest.approx(3e-4)
    assert rates[50:81] == pytest.approx([1.65e-4] * 31)
    assert rates[80:] == pytest.approx([1.65e-4 * (0.3 / 1.65) ** (k / 20) for k in range(21)])


WSD: Settings = {"shape": "wsd"}
INFINITE: Settings = {"shape": "infinite", "cooldown_fraction": 0.2}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, ["no shape was given", '"shape": "cosine"', "infinite"]),
        ({"shape": "cosin"}, ["unknown shape 'cosin'", "did you mean 'cosine'", "1-sqrt"]),
        ({"shape": ["cosine"]}, ["unknown shape ['cosine']"]),
        ({**WSD, "decay_shape": "sqrt"}, ["unknown decay_shape 'sqrt'", "did you mean '1-sqrt'"]),
        ({**WSD, "decay_shape": "wsd"}, ["unknown decay_shape 'wsd'"]),
        ({"shape": "cosine", "decay_shape": "linear"}, ["decay_shape belongs to shape 'wsd'", "not to 'cosine'"]),
        ({"shape": "linear", "decay_num_steps": 3}, ["decay_num_steps belongs to shape 'wsd' or", "not to 'linear'"]),
        ({**WSD, "cooldown_fraction": 0.1}, ["cooldown_fraction belongs to shape 'infinite', not to 'wsd'"]),
        ({"shape": "cosine", "exponent": 2}, ["exponent belongs to shape 'power' or 'exponential', not to 'cosine'"]),
        ({**WSD, "exponent": 2}, ["exponent belongs to decay_shape 'power' or", "not to 'linear'"]),
        ({"shape": "cosine", "table": "x.csv"}, ["table belongs to shape 'table', not to 'cosine'"]),
        ({"shape": "power"}, ["shape 'power' needs an exponent", '"exponent": 1.2']),
        ({"shape": "power", "exponent": 0}, ["exponent must be above 0, got 0"]),
        ({"shape": "power", "exponent": "2"}, ["exponent must be a number, got '2'"]),
        ({**WSD, "decay_num_steps": 5, "decay_fraction": 0.1}, ["decay_num_steps (5) and decay_fraction (0.1)"]),
        ({**WSD, "decay_fraction": 0.0}, ["decay_fraction must be above 0 and below 1, got 0.0"]),
        ({**WSD, "decay_fraction": 1.0}, ["decay_fraction must be >= 0 and < 1, got 1.0"]),
        ({**WSD, "decay_num_steps": 0}, ["decay_num_steps must be an integer >= 1, got 0"]),
        ({**WSD, "warmup_fraction": 0.1}, ["warmup_num_steps (4) and warmup_fraction (0.1)", "give one"]),
        ({**WSD, "decay_num_steps": 37}, ["warmup_num_steps (4) and decay_num_steps (37) do not fit into", "(40)"]),
        ({**INFINITE, "decay_num_steps": 30}, ["decay_num_steps (30) and cooldown_num_steps (8) do not fit"]),
        ({"shape": "infinite"}, ['"cooldown_fraction": 0.3']),
        ({**INFINITE, "constant_factor": 1.5}, ["constant_factor must be >= 0 and < 1, got 1.5"]),
        ({"shape": "inv-sqrt", "warmup_num_steps": 0}, ["needs a warm-up", "warmup_fraction"]),
        ({"shape": "table"}, ["needs a file", '"table": "schedule.csv"']),
    ],
)
def test_wrong_settings_are_explained(settings: Settings, words: list[str]) -> None:
    with pytest.raises((ValueError, TypeError)) as error:
        build(settings)
    for word in words:
        assert word in str(error.value)


def test_the_named_wsd_takes_every_decay_shape() -> None:
    named = BlockwiseWSDLR(make()[1], TOTAL, WARMUP, decay_fraction=0.25, decay_shape="1-sqrt")
    general = build({"shape": "wsd", "decay_num_steps": DECAY, "decay_shape": "1-sqrt"})
    for _ in range(TOTAL):
        assert named.get_lr() == general.get_lr()
        named.step(), general.step()
