# SPDX-License-Identifier: Apache-2.0
"""Multipliers that change during a run or are measured, in plain PyTorch: values, resume, errors."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_blockwise import BlockwiseAdamMini, BlockwiseAdamW, block_report, tag_parameters
from ds_blockwise.blocks.settings.block_settings import BlockSettings
from ds_blockwise.cli.main import main as command_line
from ds_blockwise.measure.auto_multipliers import MeasuredMultipliers
from tests.helpers.deepspeed.engine_cases import LR, Case, build, config_of
from tests.helpers.deepspeed.telemetry_engines import AUTO, AUTO_STEPS, RAMP, READING_STEPS
from tests.helpers.models import GradientPlan, NanoGPT, llama
from tests.helpers.optimizers import SHORT_NAMES
from tests.helpers.oracle import assert_same_update
from tests.helpers.telemetry_truth import AutoTruth, set_gradients
from tests.unit.measure.test_readings import made, stepped

TOTAL = {"total_num_steps": 60}
SETTING = {**AUTO, "auto": AUTO["auto"] | TOTAL}
PLAN = GradientPlan(1, 1, torch.float32)
LIVE = {"model": "llama", "decay_multipliers": False}


def weights(run: SimpleNamespace) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in run.model.named_parameters()}


def follow(run: SimpleNamespace, step: int) -> None:
    """One step of both; their updates must agree."""
    before, was = weights(run), run.oracle.weights()
    run.oracle.step(stepped(run, step))
    assert_same_update((before, weights(run)), (was, run.oracle.weights()), LR, weight_roundings=2, what=f"step {step}")


# ------------------------------------------------------------------------------- changed by the user


@pytest.mark.parametrize("backend", ["cpp", "reference", "triton"])
@pytest.mark.parametrize("optimizer", SHORT_NAMES.values())
def test_changed_multipliers_reach_every_backend(optimizer: str, backend: str) -> None:
    run = made(Case(optimizer, model="gpt2", backend=backend))
    for step in range(4):
        if step == 2:
            new = {"vo": 1.5, "query": 0.25, "norm": 0.0}
            run.optimizer.set_lr_multipliers(new)
            run.oracle.lr_multipliers = new
        follow(run, step)
    assert run.optimizer.lr_multipliers == {"vo": 1.5, "query": 0.25, "norm": 0.0}


def test_changed_before_the_first_step_and_beside_rules() -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    run = made(Case("mini", model="llama", overrides={name: 5.0}))
    run.optimizer.set_lr_multipliers({"ffn": 2.0})
    run.oracle.lr_multipliers = {"ffn": 2.0}  # the rule wins
    follow(run, 0)
    run.optimizer.set_lr_multipliers({"emb": 3.0})
    run.oracle.lr_multipliers = {"ffn": 2.0, "emb": 3.0}
    follow(run, 1)


def test_a_wrong_key_changes_nothing() -> None:
    run = made(Case("mini", model="llama"))
    follow(run, 0)
    with pytest.raises(ValueError, match="unknown key 'fnn'; did you mean 'ffn'"):
        run.optimizer.set_lr_multipliers({"emb": 1.0, "fnn": 2.0})
    with pytest.raises(ValueError, match=r"lr_multipliers\['ffn'\] must be finite and >= 0, got -1"):
        run.optimizer.set_lr_multipliers({"emb": 1.0, "ffn": -1})
    assert run.optimizer.lr_multipliers == {}
    follow(run, 1)


def test_a_load_under_changed_multipliers_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    run = made(Case("mini", model="llama"))
    run.optimizer.set_lr_multipliers({"ffn": 2.0})
    stepped(run, 0)
    other = made(Case("mini", model="llama"))
    other.optimizer.load_state_dict(run.optimizer.state_dict())
    assert "lr_multipliers.ffn was 2, is 0.75" in caplog.text
    assert other.optimizer.lr_multipliers == {}


# ------------------------------------------------------------------------------------------- measured


@pytest.mark.parametrize("optimizer", SHORT_NAMES.values())
def test_measured_by_hand(optimizer: str, caplog: pytest.LogCaptureFixture) -> None:
    """1 until the measurement, a ramp of ten stairs, then what the oracle's own second moments say."""
    caplog.set_level(logging.WARNING, "ds_blockwise.measure.auto_multipliers")
    high = 1.55
    run = made(Case(optimizer, **LIVE), lr_multipliers=SETTING | {"auto": SETTING["auto"] | {"high": high}})
    by_hand = AutoTruth(READING_STEPS, RAMP, 0.6, high, {"head": 3.0})
    run.oracle.lr_multipliers = by_hand.after(0, run.oracle)
    for step in range(AUTO_STEPS):
        follow(run, step)
        run.oracle.lr_multipliers = by_hand.after(step + 1, run.oracle)
    assert run.optimizer.lr_multipliers.keys() == {"emb", "qk", "ffn", "vo", "norm"}
    for kind, multiplier in run.optimizer.lr_multipliers.items():
        assert multiplier == pytest.approx(by_hand.target[kind], rel=1e-5)
    ratios = [value for kind, value in by_hand.target.items() if kind != "norm"]
    assert min(ratios) < high / 8 == max(ratios), "the limit must matter, but not to all"
    (record,) = [record for record in caplog.records if record.name.endswith("auto_multipliers")]
    assert "lr_multipliers measured at step 11" in record.getMessage()
    assert "ramped in over 12 steps" in record.getMessage()


@pytest.mark.parametrize("optimizer", SHORT_NAMES.values())
def test_resume_from_a_state_dict_is_bitwise(optimizer: str) -> None:
    """Before the measurement (in the middle of its readings), in the middle of the ramp, and after it."""
    case = Case(optimizer, **LIVE)
    run = made(case, lr_multipliers=SETTING, telemetry={"interval": 28})
    saved: dict[int, Any] = {}
    for step in range(AUTO_STEPS):
        if step in (1, 6, 16, 25):
            saved[step] = (weights(run), json.loads(json.dumps(run.optimizer.state_dict()["ds_blockwise"])))
            saved[step] += ({k: _cloned(v) for k, v in run.optimizer.state_dict().items() if k != "ds_blockwise"},)
        stepped(run, step)
    for start, (then, record, state) in saved.items():
        again = made(case, lr_multipliers=SETTING, telemetry={"interval": 28})
        with torch.no_grad():
            for name, parameter in again.model.named_parameters():
                parameter.copy_(then[name])
        again.optimizer.load_state_dict({**state, "ds_blockwise": record})
        for step in range(start, AUTO_STEPS):
            stepped(again, step)
        assert again.optimizer.lr_multipliers == run.optimizer.lr_multipliers
        assert again.optimizer.telemetry() == run.optimizer.telemetry() != {}
        wanted = weights(run)
        assert all(torch.equal(p, wanted[n]) for n, p in again.model.named_parameters()), start


def _cloned(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _cloned(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_cloned(inner) for inner in value]
    return value.clone() if isinstance(value, Tensor) else value


def test_resume_under_other_settings_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    fixed = made(Case("mini", **LIVE))
    for step in range(5):
        stepped(fixed, step)
    auto = made(Case("mini", **LIVE), lr_multipliers=SETTING)
    auto.optimizer.load_state_dict(fixed.optimizer.state_dict())
    assert "lr_multipliers.auto was not set, is {'after': 0.02, 'exponent': 0.6" in caplog.text
    assert auto.optimizer.meter.steps == 5  # counted from the moments: the run did not say
    caplog.clear()
    other = made(Case("mini", **LIVE), lr_multipliers={"auto": {"exponent": 0.5, "not_before": 1} | TOTAL})
    other.optimizer.load_state_dict(auto.optimizer.state_dict())
    assert "lr_multipliers.auto was" in caplog.text
    assert "'exponent': 0.5" in caplog.text
    assert "lr_multipliers.head was 3, is 1.25" in caplog.text


def test_a_type_without_gradients_stays_at_one(caplog: pytest.LogCaptureFixture) -> None:
    run = made(Case("adamw", **LIVE), lr_multipliers={"auto": AUTO["auto"] | TOTAL | {"head": True}})
    for step in range(AUTO_STEPS):
        gradients = {n: PLAN.mean(n, tuple(p.shape), step) for n, p in run.model.named_parameters()}
        gradients["lm_head.weight"].zero_()
        set_gradients(run.model, gradients)
        run.optimizer.step()
    assert "head" not in run.optimizer.lr_multipliers
    assert run.optimizer.lr_multipliers["qk"] > 1 / 8
    assert "without gradients, left at 1: head" in caplog.text


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"auto": {"after": 0.01}}, r"'after'\] must be >= 0.02 and < 1.*got 0.01: earlier the order of sharpness"),
        ({"auto": {"exponet": 1}}, "unknown key 'exponet'; did you mean 'exponent'"),
        ({"auto": {"exponent": 0}}, "needs 0 < exponent <= 1, high >= 1 and ramp < 1"),
        ({"auto": {"high": 0.5}}, "needs 0 < exponent <= 1, high >= 1 and ramp < 1"),
        ({"auto": {"total_num_steps": 0}}, r"'total_num_steps'\] must be an integer >= 1, got 0"),
        ({"auto": {"total_num_steps": 100.5}}, r"'total_num_steps'\] must be an integer >= 1, got 100.5"),
        ({"auto": {"total_num_steps": True}}, r"'total_num_steps'\] must be an integer >= 1, got True"),
        (
            {"auto": {"total_num_steps": 8, "not_before": 1}},
            "measures and ramps until step 10, but the run has 8 steps",
        ),
        ({"auto": {"total_num_steps": 800}}, "until step 1017, but the run has 800 steps.*come into their order"),
        ({"auto": {"not_before": 0}}, r"'not_before'\] must be an integer >= 1, got 0"),
        ({"auto": {"head": 3}}, r"'head'\] must be true .* or false, got 3"),
        ({"auto": {"head": True}, "head": 3}, 'has "head": 3 and .* has "head": true. Give one of them'),
        ({"auto": 5}, r"lr_multipliers\['auto'\] must be a mapping"),
        ({"auto": {}, "haed": 3}, "unknown key 'haed'; did you mean 'head'"),
        ("fixed", "lr_multipliers must be a mapping"),
    ],
)
def test_settings_that_are_refused(setting: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        BlockwiseAdamW([torch.nn.Parameter(torch.zeros(1))], lr_multipliers=setting)


@pytest.mark.parametrize(("total", "start"), [(2_000, 1_000), (50_000, 1_000), (100_000, 2_000)])
def test_the_order_needs_a_number_of_steps_not_a_share_of_the_run(total: int, start: int) -> None:
    """2% of a short run lies in its warm-up, where values are sharpest: measured there, multipliers ruined the run."""
    measured = MeasuredMultipliers.of(BlockSettings.parse({"auto": {"total_num_steps": total}}))
    assert measured is not None
    assert next(step for step in range(1, total) if measured.is_due(step)) == start


def test_whole_floats_are_numbers_of_steps() -> None:
    """JSON reads 5e4 as a float; the schedule beside it has always taken it."""
    policy = BlockSettings.parse({"auto": {"total_num_steps": 5e4, "not_before": 2000.0}})
    assert policy.auto is not None
    assert (policy.auto.total_num_steps, policy.auto.not_before) == (50_000, 2000)
    assert type(policy.auto.total_num_steps) is type(policy.auto.not_before) is int


@pytest.mark.parametrize("asked", [None, False, True])
def test_the_output_layer_is_measured_only_if_asked(asked: bool | None) -> None:
    """In the unit of norms its sharpness gives it 2.8, training wants 10: docs/evidence.md."""
    settings = AUTO["auto"] | TOTAL | ({} if asked is None else {"head": asked})
    pinned = {} if asked else {"head": 1.25}
    run = made(Case("mini", **LIVE), lr_multipliers={"auto": settings})
    by_hand = AutoTruth(READING_STEPS, RAMP, 0.6, 9.0, pinned)
    run.oracle.lr_multipliers = by_hand.after(0, run.oracle)
    for step in range(AUTO_STEPS):
        follow(run, step)
        run.oracle.lr_multipliers = by_hand.after(step + 1, run.oracle)
    assert ("head" in run.optimizer.lr_multipliers) is bool(asked), "those in effect that were measured"


def test_a_run_of_unknown_length_does_not_start() -> None:
    run = made(Case("mini", **LIVE), lr_multipliers="auto")
    before = weights(run)
    with pytest.raises(ValueError, match='"total_num_steps": N'):
        stepped(run, 0)
    assert all(torch.equal(p, before[n]) for n, p in run.model.named_parameters())


def test_a_model_without_norms_is_refused_at_once() -> None:
    model = torch.nn.ModuleDict(
        {"embed_tokens": torch.nn.Embedding(5, 4), "lm_head": torch.nn.Linear(4, 5, bias=False)}
    )
    tag_parameters(model)
    optimizer = BlockwiseAdamMini(model.parameters(), lr_multipliers={"auto": {"not_before": 1} | TOTAL})
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(ValueError, match="relative to norms, but the model has only emb, head"):
        optimizer.step()


def test_auto_in_tags_is_passed_on_to_the_optimizer() -> None:
    model = NanoGPT()
    tag_parameters(model, lr_multipliers={"auto": {"not_before": 1} | TOTAL})
    optimizer = BlockwiseAdamMini(model.parameters())
    assert optimizer.meter is not None
    assert optimizer.meter.auto is not None and optimizer.meter.auto.total_num_steps == TOTAL["total_num_steps"]


def test_auto_in_tags_after_the_optimizer_was_built_is_refused() -> None:
    """Nobody would measure: the optimizer looked for settings when it was built."""
    model = NanoGPT()
    optimizer = BlockwiseAdamMini(model.parameters())
    tag_parameters(model, lr_multipliers="auto")
    model(torch.zeros(1, 5, dtype=torch.long)).backward()
    with pytest.raises(ValueError, match="tag_parameters before the optimizer is built"):
        optimizer.step()


def test_multipliers_that_are_measured_are_not_set_by_hand() -> None:
    measuring = BlockwiseAdamMini(llama().parameters(), lr_multipliers={"auto": {"not_before": 1} | TOTAL})
    with pytest.raises(ValueError, match='lr_multipliers is "auto", which sets them itself'):
        measuring.set_lr_multipliers({"ffn": 2})


def test_reports_say_auto(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = Case("mini", **LIVE)
    model = build(case, config_of(case))
    tag_parameters(model, lr_multipliers={"auto": {}, "head": 3}, rules=[{"match": "q_proj", "lr_multiplier": 2}])
    said = {row.fqn: (row.is_measured, row.lr_multiplier) for row in block_report(model).rows}
    assert said["lm_head.weight"] == (False, 3.0)
    assert said["model.layers.0.self_attn.q_proj.weight"] == (False, 2.0)
    assert said["model.layers.0.self_attn.k_proj.weight"] == (True, 1.0)
    line = next(line for line in str(block_report(model)).splitlines() if "k_proj" in line)
    assert " auto " in line
    for setting, expected in (("auto", (False, 1.25)), ({"auto": {"head": True}}, (True, 1.0))):
        tag_parameters(model, lr_multipliers=setting)
        said = {row.fqn: (row.is_measured, row.lr_multiplier) for row in block_report(model).rows}
        assert said["lm_head.weight"] == expected
        assert said["model.embed_tokens.weight"] == (True, 1.0)
    config = tmp_path / "ds.json"
    params = {"lr_multipliers": "auto", "telemetry": {"interval": 7}}
    config.write_text(json.dumps({"optimizer": {"type": "BlockwiseAdamMini", "params": params}}))
    model.config.save_pretrained(tmp_path)
    assert command_line(["blocks", str(tmp_path), "--ds-config", str(config)]) == 0
    assert " auto " in capsys.readouterr().out
