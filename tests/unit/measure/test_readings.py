# SPDX-License-Identifier: Apache-2.0
"""Telemetry in plain PyTorch: values against whole tensors, costs nothing between readings, alarms, settings."""

from __future__ import annotations

import copy
import csv
import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ds_blockwise import BlockwiseAdamMini, BlockwiseAdamW, BlockwiseCosineLR, tag_parameters
from ds_blockwise.measure.readings import TelemetryAlarm, TelemetrySettings
from ds_blockwise.optimizers.registry import OPTIMIZERS
from ds_blockwise.parallel import agree
from tests.helpers.deepspeed.engine_cases import Case, build, config_of, groups_of, hyper_of, oracle_of, settings_of
from tests.helpers.models import GradientPlan
from tests.helpers.optimizers import ALL_NAMES
from tests.helpers.oracle import scheduled_lr
from tests.helpers.telemetry_truth import assert_reads, set_gradients, truth

CLASSES = {ALL_NAMES[name]: cls for name, cls in OPTIMIZERS.items()}
SCHEDULE = {"warmup_num_steps": 2, "total_num_steps": 9, "min_lr": 3e-3}
PLAN = GradientPlan(1, 1, torch.float32)


def made(case: Case, **settings: Any) -> SimpleNamespace:
    """A tagged model, its optimizer, and the oracle on the same weights."""
    model = build(case, config_of(case))
    for_model = settings_of(case)
    for_optimizer = {key: for_model.pop(key) for key in ("momentum_dtype", "backend")} | settings
    tag_parameters(model, **for_model)
    split = groups_of(case)
    hyper = hyper_of(case, [name for name, _ in model.named_parameters()])
    first = next(iter(hyper.values()))
    optimizer = CLASSES[case.optimizer](
        split(model) if split else model.parameters(),
        lr=first.lr, betas=first.betas, eps=first.eps, weight_decay=first.weight_decay, **for_optimizer,
    )  # fmt: skip
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    return SimpleNamespace(model=model, optimizer=optimizer, oracle=oracle_of(case, start, hyper))


def stepped(run: SimpleNamespace, step: int) -> dict[str, torch.Tensor]:
    gradients = {n: PLAN.mean(n, tuple(p.shape), step) for n, p in run.model.named_parameters()}
    set_gradients(run.model, gradients)
    run.optimizer.step()
    return gradients


@pytest.mark.parametrize("model", ["qwen3", "gpt2", "nano"])
@pytest.mark.parametrize("optimizer", ["mini", "adamw", "lion", "muon"])
def test_values_of_whole_tensors(optimizer: str, model: str) -> None:
    """Fused and transposed weights are taken apart; biases, tied weights and the schedule's floor are in."""
    run = made(Case(optimizer, model=model), telemetry={"interval": 2})
    schedule = BlockwiseCosineLR(run.optimizer, **SCHEDULE)
    heard: list[Any] = []
    run.optimizer.on_telemetry(heard.append)
    for step in range(6):
        was = run.oracle.weights()
        gradients = stepped(run, step)
        schedule.step()
        rate = scheduled_lr("cosine", step, warmup=2, total=9, min_lr=3e-3)
        run.oracle.step(gradients, rate)
        assert len(heard) == (step + 1) // 2
        if step % 2:
            assert heard[-1] == run.optimizer.telemetry()
            assert_reads(run.optimizer.telemetry(), truth(run.oracle, was, gradients, rate), step + 1, f"step {step}")
            assert all(r.grad_norm is None and r.clip_factor is None for r in heard[-1].values())


@pytest.mark.parametrize("optimizer", ["mini", "adamw"])
def test_param_groups_are_averaged_over_elements(optimizer: str) -> None:
    run = made(Case(optimizer, groups="mixed", granularity="mixed"), telemetry={"interval": 1})
    for step in range(3):
        was = run.oracle.weights()
        gradients = stepped(run, step)
        run.oracle.step(gradients)
        assert_reads(run.optimizer.telemetry(), truth(run.oracle, was, gradients), step + 1, f"step {step}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_updates_of_muon_and_lion_are_kept_for_readings_alone(dtype: torch.dtype) -> None:
    """What the step subtracted is held by the items of the steps that are read; 16-bit weights read alike."""
    for name in ("lion", "muon"):
        run = made(Case(name, model="llama"), telemetry={"interval": 2})
        run.model.to(dtype)
        kept: list[list[bool]] = []

        class Watch:
            def before_update(self, work: Any) -> bool:
                return True

            def after_update(self, work: Any) -> None:
                kept.append([w.item.update is not None for w in work])  # noqa: B023 - called in this turn of the loop

        run.optimizer.observe(Watch())
        for step in range(4):
            stepped(run, step)
        matrices = sum("proj" in n for n, _ in run.model.named_parameters())
        wanted = len(kept[1]) if name == "lion" else matrices
        assert [sum(found) for found in kept] == [0, wanted, 0, wanted]
        ffn = run.optimizer.telemetry()["ffn"]
        scale = 1.0 if name == "lion" else 0.2  # the sign; "rms": of a matrix whose singular values are about 1
        assert ffn.update_rms == pytest.approx(scale * ffn.lr, rel=0.2)


def test_no_gradient_is_no_update() -> None:
    run = made(Case("mini", model="llama"), telemetry={"interval": 1})
    gradients = {n: PLAN.mean(n, tuple(p.shape), 0) for n, p in run.model.named_parameters() if "norm" not in n}
    set_gradients(run.model, gradients)
    run.optimizer.step()
    norm = run.optimizer.telemetry()["norm"]
    assert (norm.update_rms, norm.grad_rms, norm.second_moment, norm.update_ratio) == (0.0, 0.0, 0.0, 0.0)
    assert norm.param_rms > 0
    assert run.optimizer.telemetry()["ffn"].update_rms > 0


@pytest.mark.parametrize("optimizer", ["mini", "adamw"])
def test_nothing_is_read_between_readings(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wait for the device in every step would cost more than the step."""
    calls: list[str] = []

    def counted(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def counting(*args: Any, **keywords: Any) -> Any:
            calls.append(name)
            return original(*args, **keywords)

        monkeypatch.setattr(owner, name, counting)

    run = made(Case(optimizer, model="llama", backend="reference"), telemetry={"interval": 4})
    stepped(run, 0)
    for name in ("cpu", "item", "tolist", "__float__", "__bool__", "__int__"):
        counted(torch.Tensor, name)
    counted(torch.linalg, "vector_norm")
    counted(agree, "gather")
    monkeypatch.setattr("ds_blockwise.measure.type_sums.gather", agree.gather)
    per_step = []
    for step in range(1, 9):
        calls.clear()
        stepped(run, step)
        per_step.append(list(calls))
    read = [index for index, found in enumerate(per_step) if found]
    assert read == [2, 6], per_step  # the 4th and the 8th update
    assert per_step[2].count("gather") <= 2


def test_alarm_once_per_episode(caplog: pytest.LogCaptureFixture) -> None:
    run = made(
        Case("adamw", model="llama"), telemetry={"interval": 1, "band": {"ffn": [1e-3, 0.1]}, "warmup_num_steps": 2}
    )
    caplog.set_level(logging.WARNING, "ds_blockwise.measure.readings")
    group, counts = run.optimizer.param_groups[0], []
    # the first two steps are warm-up; then two episodes above the band and one below
    for step, lr in enumerate((0.1, 0.1, 0.1, 0.1, 1e-2, 0.1, 1e-9, 1e-9)):
        group["lr"] = lr
        stepped(run, step)
        counts.append(len(caplog.records))
    ratio = run.optimizer.telemetry()["ffn"].update_ratio
    assert ratio < 1e-3
    assert counts == [0, 0, 1, 1, 1, 2, 3, 3]
    texts = [record.getMessage() for record in caplog.records]
    assert "'ffn'" in texts[0] and "step 3" in texts[0] and "above its band [0.001, 0.1]" in texts[0]
    assert "effective lr 0.075" in texts[0] and "lower lr" in texts[0]
    assert "below its band" in texts[2] and "step 7" in texts[2] and "raise lr" in texts[2]


def test_stop_raises_after_everyone_has_heard() -> None:
    run = made(Case("mini", model="llama"), telemetry={"interval": 2, "band": [0.0, 1e-9], "on_alarm": "stop"})
    heard: list[Any] = []
    run.optimizer.on_telemetry(heard.append)
    stepped(run, 0)
    with pytest.raises(TelemetryAlarm, match=r"block type 'emb'.*at step 2, above its band"):
        stepped(run, 1)
    assert len(heard) == 1
    assert issubclass(TelemetryAlarm, FloatingPointError)


def test_nan_is_outside_every_band() -> None:
    run = made(Case("mini", model="llama"), telemetry={"interval": 1, "band": {"vo": [0.0, 1e9]}, "on_alarm": "stop"})
    run.model.model.layers[0].self_attn.o_proj.weight.data[0, 0] = math.nan
    with pytest.raises(TelemetryAlarm, match="'vo' is nan"):
        stepped(run, 0)


def test_a_copy_reads_on() -> None:
    run = made(Case("mini", model="llama"), telemetry={"interval": 2})
    stepped(run, 0)
    model, optimizer = copy.deepcopy((run.model, run.optimizer))
    for own, copied in zip(run.model.parameters(), model.parameters(), strict=True):
        copied.block_spec, copied.block_shard = own.block_spec, own.block_shard  # torch copies no attributes
    twin = SimpleNamespace(model=model, optimizer=optimizer)
    for one in (run, twin):
        stepped(one, 1)
    assert twin.optimizer.telemetry() == run.optimizer.telemetry() != {}


def test_parameters_that_leave_do_not_silence_it() -> None:
    run = made(Case("mini", model="llama"), telemetry={"interval": 1})
    stepped(run, 0)
    run.optimizer.param_groups[0]["params"].pop()
    steps = []
    for step in range(1, 4):
        stepped(run, step)
        steps.append(run.optimizer.telemetry()["ffn"].step)
    assert steps == [1, 2, 3]  # one reading is lost


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"intervall": 5}, "unknown key 'intervall'; did you mean 'interval'"),
        ({"interval": 0}, "telemetry.interval must be an integer >= 1, got 0"),
        ({"interval": 100.5}, "telemetry.interval must be an integer >= 1, got 100.5"),
        ({"interval": True}, "telemetry.interval must be an integer >= 1, got True"),
        ({"band": {"fnn": [0, 1]}}, "unknown block type 'fnn'; did you mean 'ffn'"),
        ({"band": {"ffn": [2, 1]}}, r"telemetry.band\['ffn'\] must be \[low, high\] with low < high"),
        ({"band": [1e-4]}, r"telemetry.band must be \[low, high\]"),
        ({"on_alarm": "stopp"}, "on_alarm must be one of log, stop, got 'stopp'; did you mean 'stop'"),
        ({"warmup_num_steps": -1}, "telemetry.warmup_num_steps must be an integer >= 0"),
        (100, "telemetry must be a mapping"),
    ],
)
def test_settings_that_are_refused(setting: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        BlockwiseAdamMini([torch.nn.Parameter(torch.zeros(1))], telemetry=setting)


def test_whole_floats_are_numbers_of_steps() -> None:
    settings = TelemetrySettings.parse({"interval": 1e2, "warmup_num_steps": 0.0})
    assert settings is not None
    assert (settings.interval, settings.warmup_num_steps) == (100, 0)
    assert type(settings.interval) is type(settings.warmup_num_steps) is int, "shown in errors and in checkpoints"


def test_listening_without_telemetry_is_an_error() -> None:
    optimizer = BlockwiseAdamW([torch.nn.Parameter(torch.zeros(1))])
    assert optimizer.telemetry() == {}
    with pytest.raises(ValueError, match=r'telemetry is off.*"interval": 100'):
        optimizer.on_telemetry(print)


def test_the_benchmark_of_its_cost_runs(tmp_path: Path) -> None:
    from benchmarks.costs import telemetry as telemetry_cost

    quick = "--hidden 32 --layers 1 --vocab 64 --batch 1 --length 8 --rounds 2 --out"
    threads = torch.get_num_threads()
    try:
        telemetry_cost.main([*quick.split(), str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
    with open(tmp_path / "telemetry_cost.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["optimizer"] for row in rows] == ["BlockwiseAdamW", "BlockwiseAdamMini"]
    for row in rows:
        share = float(row["read_adds_ms"]) / (100 * float(row["step_ms"]))
        assert float(row["added"].rstrip("%")) / 100 == pytest.approx(share, rel=2e-2, abs=1e-5)
        assert row["added"] in telemetry_cost.markdown(rows)


def test_copies_count_once() -> None:
    """What tensor-parallel ranks hold whole beside weights that are cut would otherwise weigh too much."""
    readings = []
    for copies in (0, 1):
        model = build(Case("adamw", model="llama"), config_of(Case("adamw", model="llama")))
        tag_parameters(model)
        gradients = {n: PLAN.mean(n, tuple(p.shape), 0) for n, p in model.named_parameters()}
        set_gradients(model, gradients)
        parameters = list(model.parameters())
        own = model.model.layers[0].mlp.up_proj.weight
        for _ in range(copies):
            copied = torch.nn.Parameter(own.detach().clone())
            copied.block_spec, copied.block_shard, copied.grad = own.block_spec, own.block_shard, own.grad.clone()
            parameters.append(copied)
        optimizer = BlockwiseAdamW(parameters, lr=1e-2, telemetry={"interval": 1})
        optimizer.step()
        readings.append(optimizer.telemetry()["ffn"].quantities())
    assert readings[1] == pytest.approx(readings[0], rel=1e-12)
