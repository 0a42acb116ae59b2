# SPDX-License-Identifier: Apache-2.0
"""Betas per block type, cautious weight decay and multipliers that move, from the settings to the update and back."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_blockwise import BlockwiseCosineLR, BlockwiseWSDLR, tag_parameters
from ds_blockwise.kernels.param_groups import set_progress
from tests.helpers import models
from tests.helpers.deepspeed.engine_cases import MODELS
from tests.helpers.models import GradientPlan
from tests.helpers.optimizers import SHORT_NAMES
from tests.helpers.oracle import Hyper, Oracle, assert_same_update, scheduled_lr
from tests.unit.optimizers.test_oracle import OURS

LR, PEAK = 0.02, 0.02
HYPER = {"betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}
PLAN = GradientPlan(1)
BETAS = {"norm": [0.8, 0.99], "ffn": [None, 0.9], "key": [0.5, None]}
MOVING = {"norm": {"start": 1.0, "end": 0.25}, "value": {"start": 2.0, "end": 3.0}, "qk": 5.0}
STARTS, ENDS = {"norm": 1.0, "value": 2.0, "qk": 5.0}, {"norm": 0.25, "value": 3.0}
OURS_AND_ORACLE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "betas": ({"betas_by_type": BETAS}, {"betas_by_type": BETAS}),
    "cautious": ({"cautious_weight_decay": True}, {"cautious": True}),
    "moving": ({"lr_multipliers": MOVING}, {"lr_multipliers": STARTS, "end_multipliers": ENDS}),
}
OURS_AND_ORACLE["all"] = tuple({k: v for pair in OURS_AND_ORACLE.values() for k, v in pair[i].items()} for i in (0, 1))
KINDS = pytest.mark.parametrize("kind", SHORT_NAMES.values())


def small(family: str = "nano") -> nn.Module:
    return models.set_small_weights(MODELS[family][0]())


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def give_gradients(model: nn.Module, step: int) -> dict[str, Tensor]:
    gradients = {name: PLAN.mean(name, tuple(p.shape), step) for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        p.grad = gradients[name].to(p.dtype)
    return gradients


def build(kind: str, model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    tag_parameters(model)
    return OURS[kind](model.parameters(), lr=LR, **{**HYPER, **settings})


@KINDS
@pytest.mark.parametrize("name", OURS_AND_ORACLE)
@pytest.mark.parametrize("family", ["nano", "qwen3"])
def test_each_setting_is_the_oracles(family: str, name: str, kind: str) -> None:
    """Fused weights (nano) hold roles with and without settings of their own, side by side."""
    ours, theirs = OURS_AND_ORACLE[name]
    model = small(family)
    optimizer = build(kind, model, **ours)
    oracle = Oracle(weights(model), MODELS[family][1], kind == "mini", Hyper(LR, **HYPER), **theirs)
    for step, progress in enumerate((0.0, 0.4, 1.0)):
        set_progress(optimizer.param_groups[0], progress)
        oracle.progress = progress
        gradients = give_gradients(model, step)
        was = weights(model), oracle.weights()
        optimizer.step()
        oracle.step(gradients)
        assert_same_update((was[0], weights(model)), (was[1], oracle.weights()), LR, weight_roundings=1, what=name)


def test_a_rule_sets_betas_and_a_moving_multiplier() -> None:
    model = small()
    rules = [{"match": r"0\.mlp\.c_fc\.weight", "betas": [None, 0.5], "lr_multiplier": {"start": 3, "end": 1}}]
    report = tag_parameters(model, rules=rules)
    (row,) = (row for row in report.rows if row.fqn.endswith("0.mlp.c_fc.weight"))
    assert (row.lr_multiplier, row.lr_multiplier_end, row.betas) == (3.0, 1.0, (None, 0.5))
    line = next(line for line in report.table(full=True).splitlines() if "0.mlp.c_fc.weight" in line)
    assert "3 to 1" in line and "-/0.5" in line
    assert [other for other in report.rows if other.lr_multiplier_end is not None] == [row]


@KINDS
@pytest.mark.parametrize("schedule", [BlockwiseCosineLR, BlockwiseWSDLR])
def test_a_schedule_moves_multipliers_over_its_decay(schedule: type, kind: str) -> None:
    """RLRS (arXiv 2507.03526): a rate at the start and one at the end; both decay to the same absolute minimum."""
    model = small()
    optimizer = build(kind, model, lr_multipliers=MOVING)
    shape = {"warmup_num_steps": 2, "total_num_steps": 8, "min_lr": 1e-3}
    moved = schedule(optimizer, **shape, **({"decay_num_steps": 3} if schedule is BlockwiseWSDLR else {}))
    oracle = Oracle(weights(model), MODELS["nano"][1], kind == "mini", Hyper(PEAK, **HYPER))
    oracle.lr_multipliers, oracle.end_multipliers = STARTS, ENDS
    begin = 5 if schedule is BlockwiseWSDLR else 2
    for k in range(9):
        oracle.progress = min(1.0, max(0.0, (k - begin) / (8 - begin)))
        name = "wsd" if schedule is BlockwiseWSDLR else "cosine"
        rate = scheduled_lr(name, k, warmup=2, total=8, min_lr=1e-3, decay=3)
        gradients = give_gradients(model, k)
        oracle.set_weights(weights(model))
        was = weights(model), oracle.weights()
        optimizer.step()
        moved.step()
        oracle.step(gradients, rate)
        assert_same_update((was[0], weights(model)), (was[1], oracle.weights()), PEAK, weight_roundings=1, what=f"{k}")


@KINDS
def test_without_a_schedule_of_ours_the_first_step_is_refused(kind: str) -> None:
    """Nobody would notice that a multiplier stays at its start for the whole run."""
    model = small()
    optimizer = build(kind, model, lr_multipliers=MOVING)
    other = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=5)
    give_gradients(model, 0)
    before = weights(model)
    with pytest.raises(ValueError, match=r'no schedule of ds_blockwise.*"scheduler": \{"type": "BlockwiseCosineLR"'):
        optimizer.step()
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    del other
    schedule = BlockwiseCosineLR(optimizer, total_num_steps=5)
    optimizer.step()
    schedule.step()
    optimizer.param_groups[0]["lr"] = 0.5  # by somebody else
    with pytest.raises(ValueError, match=r"lr 0\.5 of param group 0"):
        optimizer.step()
    optimizer.set_lr_multipliers({"norm": 1.0})
    with pytest.raises(ValueError, match=r"param group 0"):
        optimizer.step()  # values move still


@KINDS
@pytest.mark.parametrize("form", ["expanded", "compact"])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(form: str, kind: str) -> None:
    ours, _ = OURS_AND_ORACLE["all"]

    def start() -> tuple[nn.Module, torch.optim.Optimizer, BlockwiseCosineLR]:
        model = small()
        optimizer = build(kind, model, checkpoint_format=form, **ours)
        return model, optimizer, BlockwiseCosineLR(optimizer, total_num_steps=8, warmup_num_steps=2, min_lr=1e-4)

    def go_on(run: tuple[nn.Module, torch.optim.Optimizer, BlockwiseCosineLR], steps: range) -> None:
        for k in steps:
            give_gradients(run[0], k)
            run[1].step()
            run[2].step()

    whole, first, second = start(), start(), start()
    go_on(whole, range(8))
    go_on(first, range(5))
    saved = copy.deepcopy([part.state_dict() for part in first])
    for part, state in zip(second, saved, strict=True):
        part.load_state_dict(state)
    go_on(second, range(5, 8))
    for a, b in zip(whole[0].parameters(), second[0].parameters(), strict=True):
        assert torch.equal(a, b)


@KINDS
def test_a_resume_under_other_settings_is_reported(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    ours, _ = OURS_AND_ORACLE["all"]
    model = small()
    optimizer = build(kind, model, **ours)
    set_progress(optimizer.param_groups[0], 0.5)
    give_gradients(model, 0)
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    with caplog.at_level(logging.WARNING):
        build(kind, small(), **ours).load_state_dict(copy.deepcopy(state))
    assert "saved under other settings" not in caplog.text
    changed = {"betas_by_type": {"norm": [0.8, 0.98]}, "lr_multipliers": {**MOVING, "norm": 1.0}}
    with caplog.at_level(logging.WARNING):
        build(kind, small(), **changed).load_state_dict(state)
    for line in (
        "cautious_weight_decay was True, is False",
        "betas_by_type.norm was [0.8, 0.99], is [0.8, 0.98]",
        "betas_by_type.ffn was [None, 0.9], is not set",
        "lr_multipliers.norm was {'start': 1.0, 'end': 0.25}, is 1",
    ):
        assert line in caplog.text


def test_a_copy_keeps_the_settings() -> None:
    model = small()
    optimizer = build("adamw", model, **OURS_AND_ORACLE["all"][0])
    copied = copy.deepcopy(optimizer)
    assert copied.cautious_weight_decay and copied.block_settings == optimizer.block_settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"betas_by_type": {"nrom": [0.9, 0.99]}}, "unknown key 'nrom'; did you mean 'norm'"),
        ({"betas_by_type": {"norm": 0.99}}, r"betas_by_type\['norm'\] must be two numbers"),
        ({"betas_by_type": {"norm": [0.9, 1.0]}}, r"betas_by_type\['norm'\]\[1\] must be >= 0 and < 1, got 1"),
        ({"betas_by_type": {"norm": [None, None]}}, r"betas_by_type\['norm'\] sets nothing"),
        ({"rules": [{"match": "x", "betas": [0.9]}]}, r"rules\[0\].betas must be two numbers"),
        ({"lr_multipliers": {"norm": {"start": 1}}}, r"lr_multipliers\['norm'\].*'end' is missing"),
        ({"lr_multipliers": {"norm": {"start": 1, "stop": 2}}}, "unknown key 'stop'"),
        ({"lr_multipliers": {"norm": {"start": 1, "end": -1}}}, r"\['norm'\]\['end'\] must be finite and >= 0"),
        ({"cautious_weight_decay": "yes"}, "cautious_weight_decay must be true or false, got 'yes'"),
        ({"cautious_wd": True}, "unknown key 'cautious_wd'; did you mean 'cautious_weight_decay'"),
    ],
)
def test_mistakes_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        OURS["mini"](small().parameters(), lr=LR, **settings)


def test_start_and_end_that_are_equal_are_one_number() -> None:
    """It needs no schedule."""
    model = small()
    optimizer = build("adamw", model, lr_multipliers={"norm": {"start": 2, "end": 2.0}})
    give_gradients(model, 0)
    optimizer.step()
    assert optimizer.block_settings.lr_multipliers == {"norm": 2.0}


@KINDS
def test_telemetry_reads_each_roles_own_betas_and_present_multiplier(kind: str) -> None:
    """An alarm would ring, or stay silent, at update sizes that the step did not have."""
    model = small("qwen3").double()
    settings = {"betas_by_type": BETAS, "lr_multipliers": MOVING, "telemetry": {"interval": 1}, "weight_decay": 0.0}
    optimizer = build(kind, model, **settings)
    for step, progress in enumerate((0.0, 0.5)):
        set_progress(optimizer.param_groups[0], progress)
        give_gradients(model, step)
        before = weights(model)
        optimizer.step()
        after = weights(model)
        readings = optimizer.telemetry()
    norms = [name for name in before if "norm" in name]
    moved = torch.cat([(before[name] - after[name]).flatten() for name in norms])
    assert readings["norm"].update_rms == pytest.approx(float(moved.square().mean().sqrt()), rel=1e-9)
    assert readings["norm"].lr_multiplier == pytest.approx(1.0 - 0.5 * 0.75)
    state = [optimizer.state[p] for name, p in model.named_parameters() if name in norms]
    second = torch.cat([s["exp_avg_sq"].flatten() for s in state]) / (1 - 0.99**2)
    first = torch.cat([s["exp_avg"].flatten() for s in state]) / (1 - 0.8**2)
    assert readings["norm"].second_moment == pytest.approx(float(second.mean()), rel=1e-9)
    assert readings["norm"].momentum_rms == pytest.approx(float(first.square().mean().sqrt()), rel=1e-9)
