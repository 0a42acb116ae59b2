# SPDX-License-Identifier: Apache-2.0
"""Pairs of engines that differ in ``fused_step`` only: what ``test_fused_step`` compares on every rank."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_blockwise.optimizers.registry import OPTIMIZERS
from tests.helpers.counting import Traffic
from tests.helpers.deepspeed.compared import assert_same
from tests.helpers.deepspeed.engine_cases import Case, build, config_of, groups_of
from tests.helpers.deepspeed.engines import DTYPES, feed_step, masters, model_weights, open_engine
from tests.helpers.distributed import RankContext
from tests.helpers.models import GradientPlan

CLIP = 0.05  # below every norm that is fed


def opened(case: Case, *, fused: bool, client: str = "") -> Any:
    """An engine that steps in one of the two ways.

    Args:
        case: the engine.
        fused: which way.
        client: the user gives an ``"optimizer"`` of ours or a ``"function"`` that makes one; empty: the JSON names it.
    """
    case = replace(case, params=case.params | {"fused_step": fused})
    config = config_of(case)
    if not client:
        return open_engine(config, lambda: build(case, config), groups=groups_of(case))
    named = config.pop("optimizer")
    config["zero_force_ds_cpu_optimizer"] = False
    make = functools.partial(OPTIMIZERS[named["type"]], **named["params"])
    given = {"optimizer": lambda model: make(model.parameters()), "function": lambda model: make}[client]
    return open_engine(config, lambda: build(case, config), client=given)


def fed(context: RankContext, case: Case, run: SimpleNamespace, steps: range) -> Iterator[int]:
    """Take steps, on one rank with a bad gradient where the case says so; each second one lacks what is ``absent``."""
    plan = GradientPlan(context.world_size, case.gas, DTYPES[case.dtype], seed=1)
    bad_rank = min(1, context.world_size - 1)
    for step in steps:
        poison = case.poison_value if step in case.poison and context.rank == bad_rank else None
        absent = case.absent if step % 2 else ()
        feed_step(run, plan, step, context.rank, poison=poison, absent=absent)
        yield step


def everything(run: SimpleNamespace) -> dict[str, Tensor]:
    """Master weights, the model's, the whole state and what the engine tells of the step."""
    engine = run.engine
    found = {f"master {name}": value for name, value in masters(run).items()}
    found |= {f"model {name}": value for name, value in model_weights(run).items()}
    for index, state in enumerate(engine.basic_optimizer.state.values()):
        found |= {f"state {index} {key}": torch.as_tensor(value).clone() for key, value in state.items()}
    told = {"norm": engine.get_global_grad_norm(), "skipped": engine.skipped_steps, "steps": engine.global_steps}
    return found | {key: torch.tensor(float(value or 0)) for key, value in told.items()}


def check_bits(context: RankContext, case: Case) -> None:
    """Weights, state, norm and counters have the same bits after every step."""
    wanted = []
    with opened(case, fused=False) as run:
        for _ in fed(context, case, run, range(case.steps)):
            wanted.append(everything(run))
    clipped = any(case.clip < float(found["norm"]) < float("inf") for found in wanted)
    known = case.zero.get("compute_grad_norm", True)
    assert clipped == (known and case.clip in (0, CLIP)), "the case would not show what it says"
    assert int(wanted[-1]["skipped"]) == len(case.poison)
    with opened(case, fused=True) as run:
        assert "fused_step" in type(run.engine.optimizer.step).__module__
        for step in fed(context, case, run, range(case.steps)):
            assert_same(everything(run), wanted[step], f"after step {step}")


def check_client(context: RankContext, case: Case) -> None:
    """An optimizer that the user built, or a function that builds it, steps as the one that the JSON names."""
    found = []
    for client in ("", "optimizer", "function"):
        with opened(case, fused=True, client=client) as run:
            list(fed(context, case, run, range(2)))
            found.append(everything(run))
    for client in found[1:]:
        assert_same(client, found[0], "built by the user")


def check_engines(context: RankContext, case: Case) -> None:
    """Two engines that live at the same time step as each of them does alone."""
    cases = case, replace(case, optimizer="adamw", model="nano")
    alone = []
    for one in cases:
        with opened(one, fused=False) as run:
            list(fed(context, one, run, range(3)))
            alone.append(everything(run))
    with ExitStack() as stack:
        runs = [stack.enter_context(opened(one, fused=True)) for one in cases]
        for step in range(3):
            for one, run in zip(cases, runs, strict=True):
                list(fed(context, one, run, range(step, step + 1)))
        found = [everything(run) for run in runs]
    for one, wanted in zip(found, alone, strict=True):
        assert_same(one, wanted, "beside another engine")


def check_moved(context: RankContext, case: Case) -> None:
    """DeepSpeed may put weights and state elsewhere between two steps, and nothing holds what they leave."""
    found, held = [], []
    for fused in (False, True):
        with opened(case, fused=fused) as run:
            list(fed(context, case, run, range(2)))
            left = run.engine.optimizer.bit16_groups_flat[0].untyped_storage()
            run.engine.offload_states()
            held.append(torch._C._storage_Use_Count(left._cdata))
            run.engine.reload_states()
            list(fed(context, case, run, range(2, 4)))
            found.append(everything(run))
    assert_same(found[1], found[0], "after a move")
    assert held[0] == held[1], held


def check_compiled(context: RankContext, case: Case) -> None:
    """``engine.compile`` changes the forward pass; gradients come as before."""
    found = []
    for fused in (False, True):
        with opened(case, fused=fused) as run:
            run.engine.compile(backend="eager")
            list(fed(context, case, run, range(2)))
            found.append(everything(run))
    assert_same(found[1], found[0], "of a compiled engine")


def check_resume(context: RankContext, case: Case) -> None:
    """A checkpoint of either kind goes on in either kind, with the same bits."""
    for saves, loads in ((True, False), (False, True)):
        folder = context.tmp_path / f"fused_{saves}"
        with opened(case, fused=saves) as run:
            list(fed(context, case, run, range(2)))
            run.engine.save_checkpoint(str(folder), tag="saved")
            list(fed(context, case, run, range(2, 4)))
            wanted = everything(run)
        with opened(case, fused=loads) as run:
            assert run.engine.load_checkpoint(str(folder))[0] is not None
            list(fed(context, case, run, range(2, 4)))
            found = everything(run)
        assert_same(found, wanted, f"saved with fused_step {saves}, loaded with {loads}")


def check_gradients(context: RankContext, case: Case) -> None:
    """DeepSpeed's functions for gradients say the same before a step, and the same after it."""
    from deepspeed.utils import safe_get_full_grad

    plan, found = GradientPlan(context.world_size, 1, DTYPES[case.dtype]), []
    for fused in (False, True):
        with opened(case, fused=fused) as run:
            run.feed.gradients = {n: plan.share(n, tuple(p.shape), 0, context.rank) for n, p in masters(run).items()}
            run.engine.backward(run.engine())
            before = {name: safe_get_full_grad(p) for name, p in run.model.named_parameters()}
            run.engine.step()
            after = {name: _gradient_after(safe_get_full_grad, p) for name, p in run.model.named_parameters()}
            found.append((before, after))
    assert_same(found[1][0], found[0][0], "gradients before the step")
    assert found[1][1] == found[0][1]


def _gradient_after(get: Callable[..., object], parameter: torch.nn.Parameter) -> str:
    try:
        return str(get(parameter))
    except ValueError as error:
        return str(error)


def check_telemetry(context: RankContext, case: Case) -> None:
    """Readings are those of the step that was replaced: of clipped gradients, though none were written."""
    readings = []
    for fused in (False, True):
        measured = replace(case, params={**case.params, "telemetry": {"interval": 1}})
        with opened(measured, fused=fused) as run:
            list(fed(context, case, run, range(2)))
            readings.append(run.engine.basic_optimizer.telemetry())
    unfused, fused_ = readings
    assert unfused and unfused.keys() == fused_.keys()
    for kind, wanted in unfused.items():
        numbers = {name: value for name, value in asdict(wanted).items() if isinstance(value, float)}
        assert numbers and numbers == pytest.approx({n: getattr(fused_[kind], n) for n in numbers}, rel=1e-6), kind


def check_traffic(context: RankContext, case: Case) -> None:
    """Torch reads and writes each bf16 gradient once, to lay them side by side; the rest is in the kernels."""
    per_parameter = []
    for fused in (False, True):
        with opened(case, fused=fused) as run:
            engine = run.engine
            run.feed.gradients = {name: torch.ones(p.shape) for name, p in masters(run).items()}
            (partition,) = engine.optimizer.single_partition_of_fp32_groups
            for _ in range(2):  # the first step allocates the state
                engine.backward(engine())
                with Traffic(least=32) as traffic:
                    engine.optimizer.step()
            per_parameter.append(traffic.bytes / partition.numel())
    unfused, fused_ = per_parameter
    # twice 2 for the overflow check, 10 + 8 for the norm, 4 side by side, 6 to cast, 8 to scale, 6 to copy
    assert unfused > 0.9 * (4 + 18 + 4 + 6 + 8 + 6), unfused
    assert fused_ < 4 + 1, fused_  # and some numbers for each tensor, which are small here


TWINS = {
    "bits": check_bits,
    "client": check_client,
    "engines": check_engines,
    "moved": check_moved,
    "compiled": check_compiled,
    "resume": check_resume,
    "gradients": check_gradients,
    "telemetry": check_telemetry,
    "traffic": check_traffic,
}
