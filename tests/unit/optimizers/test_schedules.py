# SPDX-License-Identifier: Apache-2.0
"""The schedules decay every block to one absolute minimum and resume where they stopped."""

import json
import math

import pytest
import torch
from torch import nn

from ds_blockwise import BlockwiseAdamW, BlockwiseCosineLR, BlockwiseLinearLR, BlockwiseWSDLR, tag_parameters
from ds_blockwise.kernels.param_groups import progress_of
from ds_blockwise.optimizers.registry import SCHEDULES
from tests.helpers import ROOT

PEAK, FLOOR, WARMUP, TOTAL = 1e-3, 5e-5, 4, 20


def make(multiplier=10.0, peaks=(PEAK,)):
    model = nn.ModuleDict({f"m{i}": nn.ModuleDict({"lm_head": nn.Linear(3, 2, bias=False)}) for i in range(len(peaks))})
    tag_parameters(model)
    groups = [{"params": list(m.parameters()), "lr": lr} for m, lr in zip(model.values(), peaks, strict=True)]
    return model, BlockwiseAdamW(
        groups, eps=0.0, weight_decay=0.0, betas=(0.0, 0.0), lr_multipliers={"head": multiplier}
    )


def moved(model, optimizer):
    """With betas 0 and eps 0 an update is the learning rate times the sign of the gradient."""
    for p in model.parameters():
        p.data.zero_()
        p.grad = torch.ones_like(p)
    optimizer.step()
    return [float(-p.detach().double().mean()) for p in model.parameters()]


def paper(k, mult, shape):
    """The official scripts' formula: warm-up from 0 to mult * peak, then down to the shared minimum."""
    if k <= WARMUP:
        return mult * PEAK * k / WARMUP
    return FLOOR + shape(k) * (mult * PEAK - FLOOR)


SHAPES = {
    BlockwiseCosineLR: lambda k: 0.5 * (1 + math.cos(math.pi * (k - WARMUP) / (TOTAL - WARMUP))),
    BlockwiseLinearLR: lambda k: (TOTAL - k) / (TOTAL - WARMUP),
    BlockwiseWSDLR: lambda k: min(1.0, (TOTAL - k) / 5),
}


def build(cls, optimizer):
    extra = {"decay_num_steps": 5} if cls is BlockwiseWSDLR else {}
    return cls(optimizer, total_num_steps=TOTAL, warmup_num_steps=WARMUP, min_lr=FLOOR, **extra)


@pytest.mark.parametrize("cls", SHAPES)
@pytest.mark.parametrize("mult", [10.0, 1.0, 0.01])
def test_every_block_follows_the_papers_curve_to_the_same_floor(cls, mult):
    """A multiplier on a scheduled base rate would end the embedding at ten times the paper's minimum."""
    model, optimizer = make(mult)
    schedule = build(cls, optimizer)
    for k in range(TOTAL + 3):
        expected = paper(k, mult, SHAPES[cls]) if k < TOTAL else FLOOR
        assert moved(model, optimizer)[0] == pytest.approx(expected, rel=1e-5, abs=1e-12)
        assert schedule.get_last_lr()[0] == pytest.approx(paper(k, 1.0, SHAPES[cls]) if k < TOTAL else FLOOR)
        schedule.step()


def test_each_param_group_keeps_its_own_peak():
    """DeepSpeed's WarmupLR and OneCycle give every group the same rate; ours must not."""
    model, optimizer = make(peaks=(1e-3, 2e-4))
    schedule = build(BlockwiseCosineLR, optimizer)
    for _ in range(WARMUP):
        schedule.step()
    assert schedule.get_last_lr() == pytest.approx([1e-3, 2e-4])
    assert moved(model, optimizer) == pytest.approx([1e-2, 2e-3], rel=1e-5)


def test_a_resumed_schedule_continues_with_the_new_runs_settings():
    """The file holds the position only, so a longer total or another peak in the new JSON is followed."""
    _, optimizer = make()
    schedule = build(BlockwiseCosineLR, optimizer)
    for _ in range(9):
        schedule.step()
    _, again = make()
    resumed = build(BlockwiseCosineLR, again)
    resumed.load_state_dict(schedule.state_dict())
    for _ in range(5):
        schedule.step(), resumed.step()
        assert schedule.get_last_lr() == resumed.get_last_lr() == resumed.get_lr()
        assert optimizer.param_groups[0]["lr_floor"] == again.param_groups[0]["lr_floor"]


DECAY_BEGIN = {BlockwiseCosineLR: WARMUP, BlockwiseLinearLR: WARMUP, BlockwiseWSDLR: TOTAL - 5}


@pytest.mark.parametrize("cls", SHAPES)
def test_the_progress_goes_from_0_to_1_over_the_decay(cls):
    """The optimizer reads it in its param groups; a schedule that is resumed sets it again."""
    _, optimizer = make(peaks=(1e-3, 2e-4))
    schedule = build(cls, optimizer)
    for k in range(TOTAL + 3):
        expected = min(1.0, max(0.0, (k - DECAY_BEGIN[cls]) / (TOTAL - DECAY_BEGIN[cls])))
        found = [progress_of(group) for group in optimizer.param_groups]
        assert [schedule.progress, *found] == pytest.approx([expected] * 3, rel=1e-15)
        resumed = build(cls, make()[1])
        resumed.load_state_dict(schedule.state_dict())
        assert progress_of(resumed.optimizer.param_groups[0]) == found[0]
        schedule.step()


def test_the_progress_does_not_outlive_its_schedule():
    """Of a rate that something else has set there is no progress; a group of another optimizer never had any."""
    _, optimizer = make()
    group = optimizer.param_groups[0]
    assert progress_of(group) is None
    build(BlockwiseCosineLR, optimizer)
    assert progress_of(group) == 0.0
    group["lr"] = 2e-4
    assert progress_of(group) is None


def test_the_floor_does_not_outlive_its_schedule():
    """After a resume under another schedule the old floor in the param group must not shift the blocks' rates."""
    model, optimizer = make()
    schedule = build(BlockwiseCosineLR, optimizer)
    for _ in range(15):
        schedule.step()
    assert optimizer.param_groups[0]["lr_floor"][1] > 0
    optimizer.param_groups[0]["lr"] = 2e-4
    assert moved(model, optimizer)[0] == pytest.approx(2e-3, rel=1e-5)


def test_torch_schedulers_move_the_base_rate():
    """Any torch scheduler works in plain PyTorch, and the multiplier stays on top."""
    model, optimizer = make()
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    assert moved(model, optimizer)[0] == pytest.approx(1e-2, rel=1e-5)
    schedule.step()
    assert moved(model, optimizer)[0] == pytest.approx(5e-3, rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"total_num_steps": 0}, "total_num_steps"),
        ({"total_num_steps": 10, "warmup_num_steps": 10}, "below total_num_steps"),
        ({"total_num_steps": 10, "min_lr": 0.1}, "absolute"),
        ({"total_num_steps": 10, "min_lr": "auto"}, "auto"),
        ({"total_num_steps": 10.5}, "integer >= 1, got 10.5"),
        ({"total_num_steps": True}, "integer >= 1, got True"),
        ({"total_num_steps": math.inf}, "integer >= 1, got inf"),
        ({"total_num_steps": 10, "warmup_num_steps": -1.0}, "integer >= 0, got -1.0"),
    ],
)
def test_bad_schedules_are_refused(settings, words):
    """A ratio given as min_lr would freeze training at a rate above the peak."""
    _, optimizer = make()
    with pytest.raises((ValueError, TypeError), match=words):
        BlockwiseCosineLR(optimizer, **settings)


def test_whole_floats_are_numbers_of_steps():
    """JSON reads 2e1 as a float, and Accelerate hands on what a user computed with a division."""
    _, optimizer = make()
    schedule = BlockwiseWSDLR(optimizer, total_num_steps=2e1, warmup_num_steps=4.0, decay_num_steps=5.0)
    steps = (schedule.total_num_steps, schedule.warmup_num_steps, schedule.decay_num_steps)
    assert steps == (20, 4, 5) and all(type(count) is int for count in steps)


def test_a_decay_longer_than_the_run_is_refused():
    """WSD: warm-up and decay must fit."""
    _, optimizer = make()
    with pytest.raises(ValueError, match="do not fit"):
        BlockwiseWSDLR(optimizer, total_num_steps=10, warmup_num_steps=6, decay_num_steps=5)


@pytest.mark.parametrize("cls", SHAPES)
def test_rewarming_after_a_load_climbs_back_to_the_schedule(cls):
    """Continual pre-training: from 0 at the first update after the load, with the floor scaled alike."""
    model, optimizer = make()
    state = {"last_batch_iteration": 5}
    extra = {"decay_num_steps": 5} if cls is BlockwiseWSDLR else {}
    schedule = cls(optimizer, TOTAL, WARMUP, min_lr=FLOOR, rewarm_num_steps=4, **extra)
    schedule.load_state_dict(state)
    for k in range(6, 16):
        expected = min(1.0, (k - 6) / 4) * paper(k, 10.0, SHAPES[cls])
        assert moved(model, optimizer)[0] == pytest.approx(expected, rel=1e-5, abs=1e-12), k
        schedule.step()


def test_rewarming_begins_once():
    """A resume of the re-warmed run goes on in the middle of the climb; without the option there is none."""

    def loaded(state, rewarm):
        schedule = BlockwiseLinearLR(make()[1], TOTAL, WARMUP, min_lr=FLOOR, rewarm_num_steps=rewarm)
        schedule.load_state_dict(state)
        return schedule

    first = loaded({"last_batch_iteration": 5}, 4)
    first.step()
    first.step()
    again = loaded(first.state_dict(), 4)
    assert again.get_lr() == first.get_lr()
    assert 0 < again.get_lr()[0] < loaded(first.state_dict(), 0).get_lr()[0]
    assert loaded(first.state_dict(), 3).get_lr() == [0.0]
    assert "rewarm_start" not in loaded(first.state_dict(), 0).state_dict()


def test_rewarm_num_steps_is_checked():
    with pytest.raises(ValueError, match="rewarm_num_steps must be an integer >= 0, got -1"):
        BlockwiseCosineLR(make()[1], TOTAL, rewarm_num_steps=-1)


def test_the_position_of_torchs_schedules_is_taken():
    """torch counts calls of step(); the next rate must be that of the same update."""
    _, optimizer = make()
    theirs = torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]), lambda k: 1.0)
    ours = BlockwiseLinearLR(optimizer, TOTAL, WARMUP, min_lr=FLOOR)
    for _ in range(5):
        theirs.optimizer.step()
        theirs.step()
        ours.step()
    fresh = BlockwiseLinearLR(make()[1], TOTAL, WARMUP, min_lr=FLOOR)
    fresh.load_state_dict(theirs.state_dict())
    assert fresh.state_dict() == ours.state_dict() and fresh.get_lr() == ours.get_lr()


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({}, "no last_batch_iteration"),
        ({"steps": 3}, "it has steps"),
        ({"last_batch_iteration": "3"}, "last_batch_iteration '3', which must be an integer"),
        ({"last_batch_iteration": -2}, "-2"),
        ({"last_epoch": 1.5}, "last_epoch 1.5"),
        ({"last_batch_iteration": 3, "rewarm_num_steps": None}, "rewarm_num_steps None"),
    ],
)
def test_a_state_that_is_no_position_changes_nothing(state, words):
    schedule = BlockwiseLinearLR(make()[1], TOTAL, WARMUP, min_lr=FLOOR, last_batch_iteration=4)
    before = (schedule.state_dict(), schedule.get_lr())
    with pytest.raises(ValueError, match=words):
        schedule.load_state_dict(state)
    assert (schedule.state_dict(), schedule.get_lr()) == before


@pytest.mark.parametrize(
    ("multipliers", "min_lr", "named"),
    [
        ({}, 2e-4, "norm"),
        ({}, 1e-4, None),
        ({"norm": 0.5}, 2e-4, None),
        ({"preset": "paper"}, 9e-4, None),
        ({"ffn": {"start": 0.05, "end": 1.0}}, 1e-4, "ffn"),
        ("auto", 9e-4, None),
    ],
)
def test_a_floor_above_a_block_types_peak_is_said_once(multipliers, min_lr, named, caplog):
    """A floor of a fifth of the peak, usual elsewhere, lets the rate of norms rise while all others fall."""
    optimizer = BlockwiseAdamW([torch.nn.Parameter(torch.zeros(2))], lr=PEAK, lr_multipliers=multipliers)
    BlockwiseCosineLR(optimizer, TOTAL, WARMUP, min_lr=min_lr)
    found = [record.getMessage() for record in caplog.records if "min_lr" in record.getMessage()]
    assert len(found) == (named is not None), found
    if named:
        assert f"'{named}'" in found[0] and f"{min_lr:g}" in found[0], found


BEFORE = json.loads((ROOT / "tests/data/schedules/before_shapes.json").read_text())


@pytest.mark.parametrize("case", BEFORE, ids=lambda case: f"{case['type']}-{'-'.join(case['params'])}")
def test_the_named_schedules_have_the_same_bits_as_before_there_were_shapes(case):
    """Rates and floors of two param groups at every update, a load in between, from the code before `BlockwiseLR`."""
    groups = [{"params": [torch.zeros(1)], "lr": lr} for lr in (6e-4, 1.7e-3)]
    schedule = SCHEDULES[case["type"]](torch.optim.SGD(groups, lr=1.0), **case["params"])
    for k, row in enumerate(case["rows"]):
        if k == 9 and "rewarm_num_steps" in case["params"]:
            schedule.load_state_dict({"last_batch_iteration": 8})
        found = [x for group in schedule.optimizer.param_groups for x in (group["lr"], group["lr_floor"][1])]
        assert found == [float.fromhex(text) for text in row], k
        schedule.step()
    assert schedule.state_dict() == case["state"]


@pytest.mark.parametrize("calls", [-1, 0, 1, 4])
def test_the_position_of_a_torch_schedule_is_its_number_of_steps(calls):
    """A state of -1, from before torch's first step, set a negative rate."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = BlockwiseCosineLR(optimizer, total_num_steps=10, warmup_num_steps=4)
    schedule.load_state_dict({"last_epoch": calls})
    assert schedule.get_last_lr() == [max(calls, 0) / 4]
