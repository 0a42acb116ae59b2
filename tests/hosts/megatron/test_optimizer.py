# SPDX-License-Identifier: Apache-2.0
"""`megatron_patch.convert_` on the real Megatron-core optimizers, against whole tensors and hand-written blocks."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.helpers.deepspeed.engine_cases import EPS, FULL_NAME, WEIGHT_DECAY, betas_of
from tests.helpers.distributed import Outcome, RankContext, passes
from tests.helpers.megatron.cases import is_noticed, of_kinds
from tests.helpers.megatron.gpt_shards import LAYERS, SHAPES
from tests.helpers.megatron.stack import (
    DECOUPLED_LR,
    DTYPES,
    EMBEDDING,
    LR,
    NAMES,
    Run,
    Stack,
    assert_equal_copies,
    lr_after,
    open_stack,
    stack_shims,
)
from tests.helpers.models import GradientPlan
from tests.helpers.muon_oracle import oracle_for, tolerance_for
from tests.helpers.oracle import Hyper, assert_same_update, clipped, told
from tests.helpers.tables.oracle_names import megatron_classes

pytestmark = pytest.mark.skipif(find_spec("megatron") is None, reason="needs megatron")

STEPS = 5


def has_registry() -> bool:
    core = find_spec("megatron.core") if find_spec("megatron") else None
    folder = Path(core.origin).parent if core is not None and core.origin is not None else Path()
    return (folder / "optimizer" / "emerging_optimizers.py").is_file()


@dataclass(frozen=True)
class Case:
    """A stack and what happens to it."""

    stack: Stack = field(default_factory=Stack)
    steps: int = STEPS
    poison: tuple[int, ...] = ()  # steps at which one rank finds a NaN
    oracle_multipliers: dict[str, float] = field(default_factory=dict)
    oracle: dict[str, Any] = field(default_factory=dict)  # what only Muon's oracle is told


def run_case(context: RankContext, case: Case) -> None:
    """Entry of every rank."""
    stack_shims()
    with open_stack(case.stack) as run:
        check_values(context, case, run)
        if case.stack.by_name:
            check_same_bits(case, run)


def check_values(context: RankContext, case: Case, run: Run) -> None:
    stack = case.stack
    plan = GradientPlan(dist.get_world_size(run.dp_group), 1, torch.float32 if stack.loss_scale else plan_dtype(stack))
    start = {name: run.start(name) for name in run.shapes}
    now = run.masters()
    for name, value in now.items():
        assert torch.equal(value, run.cut(name, run.start(name))), f"start of {name}"
    betas = betas_of(stack.optimizer)
    hyper = {name: Hyper(LR, betas, EPS, 0.0 if "layernorm" in name else WEIGHT_DECAY) for name in start}
    classes = megatron_classes(layers=LAYERS, **SHAPES[stack.shape])
    settings = told(stack.settings, case.oracle_multipliers) | case.oracle
    oracle = oracle_for(stack.optimizer, start, classes, hyper, **settings)
    applied = 0
    for step in range(case.steps):
        poisoned = step in case.poison
        run.feed(plan, step, poison=float("nan") if poisoned and context.rank == context.world_size - 1 else None)
        before, was = run.masters(), oracle.weights()
        done, norm = run.step()
        now = run.masters()
        if poisoned:
            assert not done
            assert all(torch.equal(now[n], before[n]) for n in now), "moved on an overflow"
        else:
            assert done
            gradients: dict[str, Tensor] = {name: run.mean(plan, name, step) for name in start}
            _check_norm(norm, gradients)
            for name, h in hyper.items():
                decoupled = stack.decoupled and name in (EMBEDDING, "output_layer.weight")
                h.lr = lr_after(applied, DECOUPLED_LR if decoupled else LR)
            oracle.step(clipped(gradients, stack.clip) if stack.clip else gradients)
            applied += 1
            expected = tuple({n: _of(run, n, weights) for n in now} for weights in (was, oracle.weights()))
            what = f"step {step}, rank {context.rank}"
            lr = lr_after(applied - 1)
            assert_same_update((before, now), expected, lr, tolerance=tolerance_for(stack.optimizer), what=what)
        _check_steps(run, applied)
        for name, param in run.params.items():
            assert torch.equal(param.detach(), now[name].to(param.dtype)), f"the model has another {name}"
    if stack.tied and stack.pp > 1:
        assert_equal_copies(next(p.detach() for n, p in run.params.items() if n == EMBEDDING or run.is_copy(n)))


def check_same_bits(case: Case, run: Run) -> None:
    """What `convert_` makes of Adam takes the same steps."""
    other = Run(replace(case.stack, by_name=False))
    plan = GradientPlan(dist.get_world_size(run.dp_group), 1, plan_dtype(case.stack))
    for step in range(case.steps):
        other.feed(plan, step)
        other.step()
    found, expected = run.masters(), other.masters()
    assert [type(w) for w in run.optimizer.chained_optimizers] == [type(w) for w in other.optimizer.chained_optimizers]
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def plan_dtype(stack: Stack) -> torch.dtype:
    """What gradients are averaged in."""
    return DTYPES[stack.dtype]


def _of(run: Run, name: str, weights: dict[str, Tensor]) -> Tensor:
    return run.cut(name, weights[EMBEDDING if run.is_copy(name) else name])


def _check_norm(norm: float | None, gradients: dict[str, Tensor]) -> None:
    expected = sum(float(g.double().square().sum()) for g in gradients.values()) ** 0.5
    assert norm is not None
    assert abs(norm - expected) < 1e-5 * expected, (norm, expected)


def _check_steps(run: Run, applied: int) -> None:
    inner = run.wrapper.optimizer
    assert type(inner).__name__.startswith("Blockwise")
    assert inner.step_calls == applied
    assert all(state["step"] == applied for state in inner.state.values())


# -------------------------------------------------------------------------------------- the table


def _cases() -> dict[str, tuple[int, Case]]:
    table: dict[str, tuple[int, Case]] = {}

    def add(kind: str, dp: int, stack: Stack, **rest: Any) -> None:
        s = stack
        name = f"{kind}-{s.wrapper}-{s.dtype}-{s.shape}-{s.optimizer}-tp{s.tp}-pp{s.pp}-dp{dp}"
        assert name not in table
        table[name] = (dp * s.tp * s.pp, Case(s, **rest))

    for optimizer in ("adamw", "mini"):
        for wrapper in ("plain", "distributed"):
            for dtype in ("fp32", "bf16"):
                add("values", 2, Stack(optimizer, wrapper, dtype))
                add("values", 1, Stack(optimizer, wrapper, dtype, tp=2))
    for wrapper, dtype in product(("plain", "distributed"), ("fp32", "bf16")):
        add("values", 2, Stack("lion", wrapper, dtype))
    add("values", 1, Stack("lion", "plain", "bf16", tp=2))
    add("values", 2, Stack("muon", "plain", "bf16"))
    for wrapper in ("plain", "distributed", "layerwise"):
        add("values", 2, Stack("muon", wrapper))
    add("values", 3, Stack("muon", "distributed", "bf16"))
    for shape, dp in (("gqa", 2), ("mqa", 1)):
        add("values", dp, Stack("muon", "distributed", shape=shape, tp=2))
    own = {"orthogonalize": {"qk": "role", "value": "role"}, "momentum": 0.8, "normuon": False, "scale": "mup"}
    said = {"how": dict.fromkeys(("query", "key", "value"), "role")}
    said |= {"momentum_beta": 0.8, "row_beta": None, "scale": "mup"}
    add("own", 2, Stack("muon", tp=2, settings=own), oracle=said)
    mini = Stack()
    for dtype in ("fp32", "bf16"):
        add("values", 2, Stack("mini", "layerwise", dtype))
    add("values", 2, Stack("mini", "layerwise", "bf16", tp=2))
    add("mqa", 1, replace(mini, shape="mqa", tp=2))
    add("mqa", 1, replace(mini, shape="mqa", tp=2, wrapper="plain"))
    add("mqa", 2, replace(mini, shape="mqa", tp=2, dtype="bf16"))
    add("values", 2, replace(mini, tp=2))
    add("buckets", 2, replace(mini, bucket_size=900))
    add("mixed", 2, replace(mini, dtype="bf16", mixed=True))
    by_role = {"betas_by_type": {"norm": [0.8, 0.99], "key": [0.5, None]}, "cautious_weight_decay": True}
    add("by_role", 2, replace(mini, settings=by_role))
    add("by_role", 1, Stack("adamw", tp=2, settings=by_role))
    add("clip", 2, replace(mini, clip=0.05))
    add("clip", 1, replace(mini, clip=0.05, tp=2, wrapper="plain"))
    fused = {"settings": {"fused_step": True}, "clip": 0.05}
    add("fused", 2, replace(mini, dtype="bf16", **fused))
    add("fused", 2, Stack("adamw", dtype="bf16", fp32_grads=True, **fused))
    add("fused", 1, replace(mini, shape="mqa", tp=2, **fused))
    add("decoupled", 2, replace(mini, decoupled=True))
    add("tied", 2, replace(mini, tied=True))
    tied = replace(mini, pp=2, tied=True)
    add("pipeline", 1, tied)
    add("pipeline", 1, replace(tied, optimizer="adamw", dtype="bf16"))
    add("pipeline", 1, replace(tied, optimizer="lion", dtype="bf16"))
    add("pipeline", 1, replace(tied, optimizer="muon", dtype="bf16", wrapper="plain"))
    for optimizer in ("mini", "lion", "muon"):
        add("pipeline", 2, replace(tied, optimizer=optimizer))
    add("overflow", 2, replace(mini, dtype="bf16", loss_scale=True), poison=(0, 2))
    add("overflow", 2, replace(mini, dtype="fp16", loss_scale=True), poison=(1,))
    add("overflow", 1, replace(mini, dtype="fp16", loss_scale=True, wrapper="plain", tp=2), poison=(1,))
    if has_registry():
        # some with settings of their own, which must arrive
        add("by_name", 2, Stack("adamw", "plain", "bf16", by_name=True))
        add("by_name", 2, replace(mini, by_name=True, settings={"lr_multipliers": {"emb": 3}}))
        add("by_name", 2, Stack("lion", by_name=True))
        add("by_name", 2, Stack("muon", by_name=True))
    add("mutant", 2, mini, oracle_multipliers={"value": 4.01}, steps=2)
    return table


CASES = _cases()
NO_REGISTRY = pytest.param(None, marks=pytest.mark.skip(reason="Megatron-core has no registry before 0.18"))


@pytest.mark.parametrize("name", of_kinds(CASES, "values", "mqa", "buckets", "mixed", "tied", "by_role", "own"))
def test_values(outcome: Outcome, name: str) -> None:
    """A shard would get the second moment of its own part of a block, or another block's multiplier."""
    passes(outcome, name)


@pytest.mark.parametrize("name", of_kinds(CASES, "clip"))
def test_clipping_uses_the_whole_norm(outcome: Outcome, name: str) -> None:
    """The new optimizer would step on gradients that Megatron-core did not clip."""
    passes(outcome, name)


@pytest.mark.parametrize("name", of_kinds(CASES, "fused"))
def test_the_fused_step(outcome: Outcome, name: str) -> None:
    """Kernels would scale gradients by another factor than Megatron-core's, or leave the model's weights behind."""
    passes(outcome, name)


@pytest.mark.parametrize("name", of_kinds(CASES, "decoupled"))
def test_groups_keep_their_own_learning_rates(outcome: Outcome, name: str) -> None:
    """A group's own maximum (decoupled_lr) would be lost, or replace the multiplier instead of composing with it."""
    passes(outcome, name)


@pytest.mark.parametrize("name", of_kinds(CASES, "pipeline"))
def test_tied_embeddings_on_two_stages(outcome: Outcome, name: str) -> None:
    """The last stage's copy is called output_layer: with another block type the copies would drift apart."""
    passes(outcome, name)


@pytest.mark.parametrize("name", of_kinds(CASES, "overflow"))
def test_overflow_on_one_rank(outcome: Outcome, name: str) -> None:
    """A NaN on one rank would let the others step alone, or count a step that was not made."""
    passes(outcome, name)


@pytest.mark.parametrize("name", of_kinds(CASES, "by_name") or [NO_REGISTRY])
def test_megatron_core_builds_ours_by_name(outcome: Outcome, name: str) -> None:
    """Its own way would keep the whole state on every rank, or step with Adam and say our name."""
    passes(outcome, name)


@pytest.mark.parametrize("name", of_kinds(CASES, "mutant"))
def test_the_comparison_notices_a_wrong_multiplier(outcome: Outcome, name: str) -> None:
    """The tests above would prove nothing: a wrong multiplier inside linear_qkv must be seen."""
    is_noticed(outcome, name)


def test_the_registry_leaves_other_optimizers_alone_and_refuses_what_it_would_not_shard() -> None:
    """Layer-wise, upstream would step raw parameters with an optimizer that has no blocks."""
    from megatron_patch.convert import _building_ours

    build = _building_ours(lambda config, model_chunks: ("upstream", config.optimizer))
    muon = SimpleNamespace(optimizer="muon", use_layer_wise_distributed_optimizer=True)
    assert build(config=muon, model_chunks=[]) == ("upstream", "muon")
    ours = SimpleNamespace(optimizer="blockwise_muon", use_layer_wise_distributed_optimizer=True)
    with pytest.raises(ValueError, match=r"use_layer_wise_distributed_optimizer=True .*use_distributed_optimizer=True"):
        build(config=ours, model_chunks=[])


@pytest.mark.skipif(not has_registry(), reason="Megatron-core has no registry before 0.18")
@pytest.mark.parametrize("name", NAMES.values())
def test_a_part_of_the_parameters_cannot_have_ours(name: str) -> None:
    """config_overrides name optimizers of the registry; ours would step without their settings and checkpoints."""
    from megatron.core.optimizer.emerging_optimizers import _EMERGING_OPTIMIZERS

    import megatron_patch

    assert megatron_patch.MEGATRON_NAMES[name] in FULL_NAME.values()
    with pytest.raises(ValueError, match=rf"optimizer '{name}': ds_blockwise steps all of them or none"):
        _EMERGING_OPTIMIZERS[name].config_to_kwargs(None, [], None)
