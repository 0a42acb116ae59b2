# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of converted Megatron-core optimizers: every format, other topologies, to and from stock AdamW."""

from __future__ import annotations

import contextlib
import logging
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.helpers.deepspeed.engine_cases import BETAS, EPS, FULL_NAME, WEIGHT_DECAY
from tests.helpers.distributed import Outcome, RankContext, passes
from tests.helpers.megatron.cases import of_kinds
from tests.helpers.megatron.checkpoints import RESHARDABLE, allow_dist_checkpoints, load, save
from tests.helpers.megatron.gpt_shards import LAYERS, SHAPES, join
from tests.helpers.megatron.stack import DECOUPLED_LR, EMBEDDING, LR, Run, Stack, lr_after, open_stack, stack_shims
from tests.helpers.models import GradientPlan
from tests.helpers.muon_oracle import MuonOracle, oracle_for, tolerance_for
from tests.helpers.oracle import Hyper, State, assert_same_update
from tests.helpers.tables.oracle_names import megatron_classes

pytestmark = pytest.mark.skipif(find_spec("megatron") is None, reason="needs megatron")

SAVED_AFTER, STEPS = 3, 5


@dataclass(frozen=True)
class Case:
    """What writes a checkpoint, in which format, and what reads it."""

    writer: Stack
    reader: Stack
    form: str  # one of the formats of `tests.helpers.megatron.checkpoints`
    check: str = "resume"


def run_case(context: RankContext, case: Case) -> None:
    """Entry of every rank."""
    allow_dist_checkpoints()
    stack_shims()
    directory = context.tmp_path / f"checkpoint{zlib.crc32(repr(case).encode())}"
    if context.rank == 0:
        directory.mkdir(exist_ok=True)
    context.barrier()
    CHECKS[case.check](case, directory)


def _train(run: Run, first: int, last: int) -> None:
    plan = GradientPlan(dist.get_world_size(), 1)  # one plan for all topologies of this world
    for step in range(first, last):
        run.scheduler.num_steps = step
        run.scheduler.step(increment=0)
        run.chunk.zero_grad_buffer()
        for name, param in run.params.items():
            # the same gradient on every rank, so that no average depends on the topology
            param.main_grad.copy_(run.cut(name, plan.mean(name, run.shapes[name], step)))
        run.chunk.finish_grad_sync()
        assert run.optimizer.step()[0]


def _contents(run: Run) -> dict[str, dict[str, Tensor]]:
    """Unsharded tensors of all that a checkpoint must bring back."""
    from megatron.core import parallel_state

    found = {"masters": run.masters(), **{key: run.state(key) for key in ("exp_avg", "exp_avg_sq")}}
    group = parallel_state.get_tensor_model_parallel_group()
    everyone: list[Any] = [None] * run.stack.tp
    dist.all_gather_object(everyone, found, group=group)
    return {
        what: {name: join(name, [other[what][name] for other in everyone]) for name in tensors}
        for what, tensors in found.items()
    }


def _assert_same(run: Run, expected: dict[str, dict[str, Tensor]]) -> None:
    found = _contents(run)
    for what, tensors in expected.items():
        for name, value in tensors.items():
            assert torch.equal(found[what][name], value), f"{what} of {name}"


def _groups(run: Run) -> list[dict[str, Any]]:
    kept = ("lr", "weight_decay", "betas", "eps", "max_lr", "min_lr", "wd_mult")
    return [{key: group[key] for key in kept} for group in run.optimizer.param_groups]


# -------------------------------------------------------------------------------------- the checks


def check_resume(case: Case, directory: Path) -> None:
    """A fresh run that loads goes on exactly as the one that saved."""
    with open_stack(case.writer) as run:
        _train(run, 0, SAVED_AFTER)
        save(run, case.form, directory)
        saved, groups = _contents(run), _groups(run)
        _assert_same(run, saved)  # saving changes nothing
        _train(run, SAVED_AFTER, STEPS)
        ended = _contents(run)
    with open_stack(case.reader) as run:
        load(run, case.form, directory)
        assert _groups(run) == groups
        inner = run.wrapper.optimizer
        assert all(state["step"] == SAVED_AFTER for state in inner.state.values())
        blocks = {b.tensor: b.table.num_blocks for b in inner.bindings()}
        if inner.shares_second_moment:
            assert all(s["exp_avg_sq"].numel() == blocks[t] for t, s in inner.state.items()), "not back in blocks"
        _assert_same(run, saved)
        _train(run, SAVED_AFTER, STEPS)
        _assert_same(run, ended)


def check_warm_start(case: Case, directory: Path) -> None:
    """AdamW's second moments become the means over blocks, but for Muon's matrices; the rest is taken over as it is.

    The first steps are those of the definition that goes on from there.
    """
    with open_stack(case.writer) as run:
        _train(run, 0, SAVED_AFTER)
        save(run, case.form, directory)
        saved = _contents(run)
        shapes = run.shapes
    optimizer, start = case.reader.optimizer, saved["masters"]
    hyper = {n: Hyper(LR, BETAS, EPS, 0.0 if "layernorm" in n else WEIGHT_DECAY) for n in shapes}
    oracle = oracle_for(optimizer, start, megatron_classes(layers=LAYERS, **SHAPES[case.reader.shape]), hyper)
    oracle.take_over({n: State(saved["exp_avg"][n], saved["exp_avg_sq"][n], SAVED_AFTER) for n in shapes})
    with open_stack(case.reader) as run:
        load(run, case.form, directory)
        found = _contents(run)
        if optimizer == "lion":
            assert all("exp_avg_sq" not in state for state in run.wrapper.optimizer.state.values())
        for name, second in () if optimizer == "lion" else saved["exp_avg_sq"].items():
            mean = oracle.block_mean(name, second.double()).float()
            for rows in oracle.matrices(name) if isinstance(oracle, MuonOracle) else ():
                mean[rows] = 0.0
            torch.testing.assert_close(found["exp_avg_sq"][name], mean, rtol=1e-6, atol=0.0)
        _assert_same(run, {key: saved[key] for key in ("masters", "exp_avg")})
        now, plan = found["masters"], GradientPlan(dist.get_world_size(), 1)
        for step in range(SAVED_AFTER, STEPS):
            for name, own in hyper.items():
                apart = case.reader.decoupled and name in (EMBEDDING, "output_layer.weight")
                own.lr = lr_after(step, DECOUPLED_LR if apart else LR)
            was, before = oracle.weights(), now
            oracle.step({n: plan.mean(n, s, step) for n, s in shapes.items()})
            _train(run, step, step + 1)
            now = _contents(run)["masters"]
            expected, tolerance = (was, oracle.weights()), tolerance_for(optimizer)
            assert_same_update((before, now), expected, lr_after(step), tolerance=tolerance, what=f"step {step}")
        assert all(state["step"] == STEPS for state in run.wrapper.optimizer.state.values())


def check_stock_reads(case: Case, directory: Path) -> None:
    """A stock AdamW goes on from our checkpoint."""
    with open_stack(case.writer) as run:
        _train(run, 0, SAVED_AFTER)
        save(run, case.form, directory)
        saved = _contents(run)
    with open_stack(case.reader) as run:
        _train(run, 0, 1)  # without Transformer Engine upstream loads only into state that exists
        load(run, case.form, directory)
        _assert_same(run, saved)


def check_refused(case: Case, directory: Path) -> None:
    """Second moments that mean something else, or are not there, are an error on every rank, before the first step."""
    with open_stack(case.writer) as run:
        _train(run, 0, 1)
        save(run, case.form, directory)
    with open_stack(case.reader) as run:
        wrote, own = FULL_NAME[case.writer.optimizer], FULL_NAME[case.reader.optimizer]
        with pytest.raises(ValueError, match=rf"written by {wrote}, which keeps .*; {own} keeps .*Load weights only"):
            load(run, case.form, directory)


def check_mixed_up(case: Case, directory: Path) -> None:
    """Upstream writes other parameters' state when buckets are padded; that must not reach a disk."""
    with open_stack(case.writer) as run:
        _train(run, 0, 1)
        with pytest.raises(ValueError, match="dp_reshardable"):
            save(run, case.form, directory)


def check_report(case: Case, directory: Path) -> None:
    """Resuming under other multipliers is said once, on the first rank."""
    with open_stack(case.writer) as run:
        _train(run, 0, 1)
        save(run, case.form, directory)
    with open_stack(case.reader) as run, _warnings() as lines:
        load(run, case.form, directory)
    if dist.get_rank() == 0:
        (line,) = [line for line in lines if "other settings" in line]
        assert "lr_multipliers.ffn was 0.75, is 5" in line, line
    else:
        assert not lines


@contextlib.contextmanager
def _warnings() -> Iterator[list[str]]:
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("ds_blockwise")
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


CHECKS = {
    "resume": check_resume,
    "warm_start": check_warm_start,
    "stock_reads": check_stock_reads,
    "refused": check_refused,
    "mixed_up": check_mixed_up,
    "report": check_report,
}


# --------------------------------------------------------------------------------------- the table


def _cases() -> dict[str, tuple[int, Case]]:
    table: dict[str, tuple[int, Case]] = {}

    def add(check: str, form: str, writer: Stack, reader: Stack | None = None) -> None:
        reader = reader or writer
        kind = "-mixed" * writer.mixed + "-fused" * bool(writer.settings.get("fused_step"))
        kind += "-to_fused" * bool(reader.settings.get("fused_step"))
        name = f"{check}-{form}-{writer.wrapper}-{writer.dtype}{kind}-{reader.optimizer}-tp{writer.tp}to{reader.tp}"
        assert name not in table
        table[name] = (2, Case(writer, reader, form, check))

    mini, adamw = Stack(decoupled=True), Stack("adamw", decoupled=True)
    stock = replace(adamw, stock=True)
    for form in RESHARDABLE:
        add("resume", form, mini)
        add("resume", form, replace(mini, dtype="bf16"))
        add("resume", form, replace(adamw, dtype="bf16"))
        add("resume", form, replace(mini, tp=2))
        add("warm_start", form, stock, mini)
        add("resume", form, replace(mini, dtype="bf16", mixed=True))
        for dtype in ("fp32", "bf16"):
            add("resume", form, replace(mini, wrapper="plain", dtype=dtype))
    fused = replace(mini, dtype="bf16", clip=0.05, settings={"fused_step": True})
    add("resume", "dp_reshardable", fused)
    add("resume", "dp_reshardable", fused, replace(fused, settings={}))
    add("resume", "fully_reshardable", replace(fused, settings={}), fused)
    # upstream loads fully_reshardable only with Transformer Engine, and fp32 shards not at all
    add("stock_reads", "dp_reshardable", replace(mini, dtype="bf16"), replace(stock, dtype="bf16"))
    add("resume", "fully_reshardable", mini, replace(mini, tp=2))
    add("resume", "fully_reshardable", replace(mini, tp=2, dtype="bf16"), replace(mini, dtype="bf16"))
    for dtype in ("fp32", "bf16"):
        add("resume", "torch", replace(mini, wrapper="plain", dtype=dtype))
        add("resume", "torch", replace(mini, wrapper="plain", dtype=dtype, tp=2))
    add("resume", "torch", replace(adamw, wrapper="plain"))
    add("warm_start", "dp_reshardable", stock, adamw)
    lion = Stack("lion", decoupled=True)
    add("resume", "dp_reshardable", replace(lion, dtype="bf16"))
    add("resume", "fully_reshardable", lion, replace(lion, tp=2))
    add("resume", "torch", replace(lion, wrapper="plain", tp=2))
    for form in RESHARDABLE:
        add("warm_start", form, stock, lion)
    muon = Stack("muon", decoupled=True)
    add("resume", "dp_reshardable", replace(muon, dtype="bf16"))
    add("resume", "fully_reshardable", muon, replace(muon, tp=2))
    add("resume", "torch", replace(muon, wrapper="plain", tp=2))
    for form in ("fully_reshardable", "dp_zero"):
        add("warm_start", form, stock, muon)
    plain = {"wrapper": "plain", "decoupled": False}  # upstream cannot load groups that differ in max_lr only
    add("warm_start", "torch", replace(muon, **plain), replace(lion, **plain))
    add("refused", "dp_reshardable", replace(lion, dtype="bf16"), replace(mini, dtype="bf16"))
    add("refused", "dp_zero", replace(lion, dtype="bf16"), replace(muon, dtype="bf16"))
    add("refused", "fully_reshardable", replace(muon, dtype="bf16"), replace(adamw, dtype="bf16"))
    add("refused", "torch", replace(lion, **plain), replace(mini, **plain))
    add("refused", "fully_reshardable", replace(muon, **plain), replace(adamw, **plain))
    add("resume", "dp_zero", replace(mini, dtype="bf16"))
    add("warm_start", "dp_zero", stock, mini)
    add("warm_start", "torch", replace(stock, **plain), replace(mini, **plain))
    add("warm_start", "fully_reshardable", replace(stock, **plain), replace(mini, **plain))
    add("stock_reads", "torch", replace(mini, **plain), replace(stock, **plain))
    for form in ("fully_reshardable", "torch"):
        add("resume", form, replace(mini, wrapper="layerwise", dtype="bf16"))
    add("mixed_up", "fully_reshardable", replace(mini, bucket_size=900))
    for wrapper, form in (("distributed", "dp_reshardable"), ("plain", "fully_reshardable")):
        add(
            "report",
            form,
            replace(mini, wrapper=wrapper),
            replace(mini, wrapper=wrapper, settings={"lr_multipliers": {"ffn": 5}}),
        )
    return table


CASES = _cases()
PER_SPAWN = 12


@pytest.mark.parametrize("name", of_kinds(CASES, "resume"))
def test_a_resumed_run_goes_on_exactly(outcome: Outcome, name: str) -> None:
    """State would be lost, mixed up between shards, or rounded on its way through a checkpoint."""
    passes(outcome, name)


@pytest.mark.parametrize("name", of_kinds(CASES, "warm_start", "stock_reads"))
def test_checkpoints_go_to_and_from_stock_adamw(outcome: Outcome, name: str) -> None:
    """A run could not change its optimizer without losing its moments."""
    passes(outcome, name)


@pytest.mark.parametrize("name", of_kinds(CASES, "refused"))
def test_other_second_moments_are_refused(outcome: Outcome, name: str) -> None:
    """Adam would divide by moments of something else, or by what was never saved."""
    passes(outcome, name)


@pytest.mark.parametrize("name", of_kinds(CASES, "mixed_up"))
def test_a_checkpoint_that_upstream_mixes_up_is_refused(outcome: Outcome, name: str) -> None:
    """Moments of other parameters would be saved without a word."""
    passes(outcome, name)


@pytest.mark.parametrize("name", of_kinds(CASES, "report"))
def test_other_settings_are_reported(outcome: Outcome, name: str) -> None:
    """A run could go on with other multipliers than it was begun with, unnoticed."""
    passes(outcome, name)
