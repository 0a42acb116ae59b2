# SPDX-License-Identifier: Apache-2.0
"""Telemetry and measured multipliers in Megatron-core's own optimizers, after `megatron_patch.convert_`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.helpers.deepspeed.engine_cases import BETAS, EPS, WEIGHT_DECAY
from tests.helpers.deepspeed.telemetry_engines import AUTO, AUTO_STEPS, RAMP, READING_STEPS
from tests.helpers.distributed import Outcome, RankContext, passes
from tests.helpers.megatron.checkpoints import allow_dist_checkpoints, load, save
from tests.helpers.megatron.gpt_shards import LAYERS, SHAPES
from tests.helpers.megatron.parallel import ParallelRun, Topology, parallel_of, whole_shapes
from tests.helpers.megatron.stack import LR, TOTAL, Run, Stack, lr_after, open_stack, stack_shims
from tests.helpers.models import GradientPlan
from tests.helpers.oracle import Hyper, Oracle, assert_same_update
from tests.helpers.tables.oracle_names import megatron_classes
from tests.helpers.telemetry_truth import AutoTruth, assert_reads, truth

pytestmark = pytest.mark.skipif(find_spec("megatron") is None, reason="needs megatron")

SAVED = 16  # in the middle of the ramp
SETTINGS = {"telemetry": {"interval": 2}, "lr_multipliers": {**AUTO, "auto": AUTO["auto"] | {"total_num_steps": 60}}}


@dataclass(frozen=True)
class Case:
    """A stack that measures, and the format in which it is saved and resumed."""

    stack: Stack
    form: str


def run_case(context: RankContext, case: Case | Topology) -> None:
    """Entry of every rank."""
    stack_shims()
    if isinstance(case, Topology):
        check_refused(case)
        return
    allow_dist_checkpoints()
    directory = context.tmp_path / f"run-{case.stack.optimizer}-{case.stack.tp}"
    if context.rank == 0:
        directory.mkdir()
    context.barrier()
    with open_stack(case.stack) as run:
        weights, *measured = check_values(run, case, directory)
    with open_stack(case.stack) as run:
        load(run, case.form, directory)
        inner = run.wrapper.optimizer
        assert inner.meter.steps == SAVED
        for step in range(SAVED, AUTO_STEPS):
            one_step(run, step)
        assert [inner.lr_multipliers, inner.run_state(), inner.telemetry()] == measured
        assert all(torch.equal(value, weights[name]) for name, value in run.masters().items())


def one_step(run: Run, step: int) -> GradientPlan:
    plan = GradientPlan(dist.get_world_size(run.dp_group), 1)
    run.scheduler.num_steps = step
    run.scheduler.step(increment=0)
    run.feed(plan, step)
    assert run.optimizer.step()[0]
    return plan


def check_values(run: Run, case: Case, directory: Path) -> tuple[Any, ...]:
    """Every step and reading is the oracle's on whole tensors, with multipliers by hand."""
    start = {name: run.start(name) for name in run.shapes}
    hyper = {name: Hyper(LR, BETAS, EPS, 0.0 if "layernorm" in name else WEIGHT_DECAY) for name in start}
    classes = megatron_classes(layers=LAYERS, **SHAPES["gqa"])
    oracle = Oracle(start, classes, case.stack.optimizer == "mini", hyper)
    by_hand = AutoTruth(READING_STEPS, RAMP, 0.6, 9.0, {"head": 3.0})
    oracle.lr_multipliers = by_hand.after(0, oracle)
    inner = run.wrapper.optimizer
    heard: list[Any] = []
    inner.on_telemetry(heard.append)
    for step in range(AUTO_STEPS):
        before, was = run.masters(), oracle.weights()
        plan = one_step(run, step)
        for h in hyper.values():
            h.lr = lr_after(min(step, TOTAL))
        gradients = {name: run.mean(plan, name, step) for name in start}
        oracle.step(gradients)
        expected = tuple({n: run.cut(n, w[n]) for n in before} for w in (was, oracle.weights()))
        lr = lr_after(min(step, TOTAL))
        assert_same_update((before, run.masters()), expected, lr, weight_roundings=2, what=f"step {step}")
        if step % 2:
            assert_reads(inner.telemetry(), truth(oracle, was, gradients), step + 1, f"step {step}")
        oracle.lr_multipliers = by_hand.after(step + 1, oracle)
        if step + 1 == SAVED:
            save(run, case.form, directory)
    assert len(heard) == AUTO_STEPS // 2
    assert all(abs(inner.lr_multipliers[k] - r) <= 1e-5 * r for k, r in by_hand.target.items())
    return run.masters(), inner.lr_multipliers, inner.run_state(), inner.telemetry()


def check_refused(topology: Topology) -> None:
    """Norms are stepped by one optimizer, experts by another: neither can compare them."""
    shapes = whole_shapes(topology)
    with parallel_of(topology):
        run = ParallelRun(topology, shapes)
        with pytest.raises(ValueError, match="2 optimizers step parts of this model"):
            run.convert()


def _cases() -> dict[str, tuple[int, Case | Topology]]:
    tensor = Stack("mini", tp=2, settings=SETTINGS)
    return {
        "distributed-tp2": (2, Case(tensor, "dp_reshardable")),
        "distributed-dp2": (2, Case(replace(tensor, optimizer="adamw", tp=1), "fully_reshardable")),
        "plain-dp2": (2, Case(replace(tensor, wrapper="plain", tp=1), "torch")),
        "refused-experts": (2, Topology(ep=2, experts=True, settings=SETTINGS)),
    }


CASES = _cases()


@pytest.mark.parametrize("name", CASES)
def test_megatrons_own_optimizers(outcome: Outcome, name: str) -> None:
    """The distributed optimizer hands no record to what it wraps: a resumed run would measure again."""
    passes(outcome, name)
