# SPDX-License-Identifier: Apache-2.0
"""`convert_` with experts, multi-token prediction, context parallelism and virtual stages, against whole tensors."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.helpers.deepspeed.engine_cases import BETAS, EPS, LR_FACTORS, WEIGHT_DECAY, betas_of
from tests.helpers.distributed import Outcome, RankContext, passes
from tests.helpers.megatron.cases import is_noticed, of_kinds
from tests.helpers.megatron.parallel import (
    VOCAB,
    ParallelRun,
    Topology,
    chunks_of,
    classes_of,
    parallel_of,
    whole_shapes,
)
from tests.helpers.megatron.stack import EMBEDDING, LR, assert_equal_copies, stack_shims
from tests.helpers.models import GradientPlan, small_weight
from tests.helpers.muon_oracle import oracle_for, tolerance_for
from tests.helpers.oracle import ROLE_SETTINGS, Hyper, Oracle, assert_same_update, told

pytestmark = pytest.mark.skipif(find_spec("megatron") is None, reason="needs megatron")


@dataclass(frozen=True)
class Case:
    """A topology and how long it is trained."""

    topology: Topology
    steps: int = 4
    oracle_multipliers: dict[str, float] = field(default_factory=dict)
    overrides: dict[str, float] = field(default_factory=dict)  # what a rule says, for the oracle
    end_to_end: bool = False
    refused: str = ""  # what the error says


def run_case(context: RankContext, case: Case) -> None:
    """Entry of every rank."""
    stack_shims()
    shapes = whole_shapes(case.topology)
    history = trained_whole(context, case, shapes) if case.end_to_end else []
    with parallel_of(case.topology):
        run = ParallelRun(case.topology, shapes)
        if case.refused:
            with pytest.raises(ValueError, match=case.refused):
                run.convert()
            return
        run.convert()
        if case.end_to_end:
            check_end_to_end(run, history)
        else:
            check_values(context, case, run)


def trained_whole(
    context: RankContext, case: Case, shapes: dict[str, tuple[int, ...]]
) -> list[dict[str, torch.Tensor]]:
    """Weights before and after each step of the oracle on autograd's gradients of the model with all its experts."""
    alone = replace(case.topology, ep=1)
    with parallel_of(alone):
        (model,) = chunks_of(alone)
        start = {name: small_weight(name, shape) for name, shape in shapes.items()}
        mini = case.topology.optimizer == "mini"
        oracle = Oracle(start, classes_of(shapes, alone.groups), mini, Hyper(LR, BETAS, EPS, WEIGHT_DECAY))
        history = [oracle.weights()]
        for step in range(case.steps):
            model.load_state_dict(history[-1], strict=False)
            model.zero_grad()
            for rank in range(context.world_size):
                (loss_of(model, step, rank) / context.world_size).backward()
            oracle.step({name: p.grad for name, p in model.named_parameters()})
            history.append(oracle.weights())
    return history


def loss_of(model: nn.Module, step: int, rank: int) -> torch.Tensor:
    """Mean loss of a data-parallel rank's own tokens."""
    tokens = torch.randint(VOCAB, (2, 13), generator=torch.Generator().manual_seed(100 * step + rank))
    positions = torch.arange(12).expand(2, -1)
    loss: torch.Tensor = model(tokens[:, :-1], positions, None, labels=tokens[:, 1:].contiguous()).mean()
    return loss


def check_end_to_end(run: ParallelRun, history: list[dict[str, torch.Tensor]]) -> None:
    """Tokens really travel to experts on other ranks and their gradients back."""
    from megatron.core.distributed import finalize_model_grads

    for step, (was, then) in enumerate(itertools.pairwise(history)):
        (chunk,) = run.chunks
        before = run.masters()
        chunk.zero_grad_buffer()
        loss_of(chunk, step, run.dp_rank).backward()
        finalize_model_grads(run.chunks)
        run.optimizer.step()
        expected = tuple({n: run.cut(n, weights[n]) for n in before} for weights in (was, then))
        # 1e-4: the products of the two runs add up in another order
        assert_same_update((before, run.masters()), expected, LR, tolerance=1e-4, what=f"step {step}")


def check_values(context: RankContext, case: Case, run: ParallelRun) -> None:
    from ds_blockwise.kernels import param_groups

    topology = case.topology
    plan = GradientPlan(run.dp_size, 1, torch.float32)
    start = {name: run.start(name) for name in run.shapes}
    # of all groups: nothing here multiplies by their wd_mult
    hyper = Hyper(LR, betas_of(topology.optimizer), EPS, WEIGHT_DECAY)
    classes = classes_of(run.shapes, topology.groups)
    settings = told(topology.settings, case.oracle_multipliers)
    oracle = oracle_for(topology.optimizer, start, classes, hyper, **settings)
    oracle.overrides = case.overrides
    now = run.masters()
    for name, value in now.items():
        assert torch.equal(value, run.cut(name, run.start(name))), f"start of {name}"
    for step in range(case.steps):
        hyper.lr = LR * LR_FACTORS[step % len(LR_FACTORS)]
        oracle.progress = (step + 1) / 8 if oracle.end_multipliers else 0.0
        for group in (group for wrapper in run.wrappers for group in wrapper.param_groups):
            group["lr"] = hyper.lr
            param_groups.set_progress(group, oracle.progress)
        run.feed(plan, step)
        done, *_ = run.optimizer.step()
        assert done
        before, now = now, run.masters()
        for name, param in run.params.items():
            assert torch.equal(param.detach(), now[name].to(param.dtype)), f"the model has another {name}"
        if holds_a_copy(topology):
            assert_equal_copies(next(now[n] for n in run.params if n == EMBEDDING or run.is_copy(n)))
        if step >= 4:
            continue  # later steps are there for the copies
        was = oracle.weights()
        oracle.step({name: run.mean(plan, name, step) for name in run.shapes})
        expected = tuple(
            {n: run.cut(n, weights[EMBEDDING if run.is_copy(n) else n]) for n in now}
            for weights in (was, oracle.weights())
        )
        what = f"step {step}, rank {context.rank}"
        assert_same_update((before, now), expected, hyper.lr, tolerance=tolerance_for(topology.optimizer), what=what)
    cuts_blocks = topology.wrapper == "distributed" and topology.optimizer == "mini"
    for wrapper in run.wrappers:
        inner = wrapper.optimizer
        if cuts_blocks and wrapper.data_parallel_group.size() > 1:
            assert any(b.table.has_split_blocks for b in inner.bindings()), "no block is split: nothing is tried"
        assert type(inner).__name__.startswith("Blockwise")
        assert inner.step_calls == case.steps
    held = {n: tuple(p.shape) for n, p in run.params.items()}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, held)
    assert {n for names in everyone for n in names} - {"output_layer.weight"} == set(run.shapes) - {
        "output_layer.weight"
    }


def holds_a_copy(topology: Topology) -> bool:
    """Whether this rank holds an embedding that another pipeline stage holds as well."""
    from megatron.core import parallel_state

    group = parallel_state.get_embedding_group(check_initialized=False)
    several = topology.pp > 1 and (topology.tied or topology.mtp)
    return several and dist.get_rank() in dist.get_process_group_ranks(group)


# -------------------------------------------------------------------------------------- the table


def _cases() -> dict[str, tuple[int, Case]]:
    table: dict[str, tuple[int, Case]] = {}

    def add(kind: str, dp: int, topology: Topology, **rest: Any) -> None:
        at = topology
        sizes = [f"{k}{v}" for k in ("tp", "pp", "virtual", "cp", "ep", "etp") if (v := getattr(at, k)) > 1]
        name = "-".join([kind, at.wrapper, at.dtype, at.optimizer, *sizes, f"dp{dp}"])
        assert name not in table
        table[name] = (dp * at.tp * at.pp * at.cp, Case(at, **rest))

    for optimizer, wrapper in (("mini", "distributed"), ("adamw", "distributed"), ("mini", "plain")):
        add("experts", 4, Topology(optimizer, wrapper, ep=2, experts=True))
    add("experts", 2, Topology("mini", "distributed", "bf16", ep=2, experts=True))
    add("experts", 2, Topology("adamw", "plain", "bf16", ep=2, experts=True))
    add("experts", 2, Topology("mini", "distributed", experts=True))
    add("experts", 1, Topology("mini", "plain", tp=2, ep=2, experts=True))
    add("experts", 1, Topology("mini", "plain", tp=2, etp=2, experts=True))
    add("experts", 2, Topology("mini", "distributed", tp=2, ep=2, etp=2, experts=True))
    for optimizer in ("adamw", "lion"):
        add("experts", 1, Topology(optimizer, tp=2, etp=2, experts=True))
        add("one_group", 1, Topology(optimizer, tp=2, groups=1))
    add("experts", 4, Topology("lion", "distributed", ep=2, experts=True))
    add("experts", 2, Topology("lion", "plain", "bf16", ep=2, experts=True))
    add("experts", 4, Topology("muon", "distributed", ep=2, experts=True))
    add("experts", 1, Topology("muon", "plain", tp=2, ep=2, experts=True))
    add("experts", 2, Topology("muon", "distributed", tp=2, ep=2, etp=2, experts=True))
    for optimizer, wrapper in (("mini", "distributed"), ("adamw", "plain")):
        add("by_role", 4, Topology(optimizer, wrapper, ep=2, experts=True, settings=ROLE_SETTINGS))
    add("one_group", 1, Topology("muon", tp=4, groups=1))
    for wrapper, dtype, optimizer, dp in (
        ("plain", "fp32", "mini", 1),
        ("plain", "bf16", "adamw", 1),
        ("distributed", "bf16", "mini", 2),
        ("distributed", "fp32", "adamw", 1),
        ("distributed", "bf16", "lion", 1),
        ("distributed", "fp32", "muon", 2),
    ):
        # the output layer is on the last stage only: the first must not mind the rule
        settings = {"rules": [{"match": r"^output_layer\.", "lr_multiplier": 3.5}]}
        topology = Topology(optimizer, wrapper, dtype, pp=2, layers=2, mtp=True, settings=settings)
        add("mtp", dp, topology, steps=24, overrides={"output_layer.weight": 3.5})
    add("mtp_tied", 1, Topology(pp=2, layers=2, mtp=True, tied=True), steps=24)
    add("virtual", 1, Topology(pp=2, virtual=2, layers=4, tied=True), steps=24)
    add("virtual", 1, Topology("adamw", "plain", "bf16", pp=2, virtual=2, layers=4, tied=True), steps=24)
    add("virtual", 1, Topology("lion", pp=2, virtual=2, layers=4, tied=True), steps=24)
    add("virtual", 1, Topology("muon", "plain", "bf16", pp=2, virtual=2, layers=4, tied=True), steps=24)
    for optimizer in ("lion", "muon"):
        add("context", 1, Topology(optimizer, cp=2))
    add("context", 1, Topology(cp=2))
    add("context", 2, Topology(cp=2))
    add("context", 2, Topology("adamw", "plain", cp=2))
    for tp in (1, 2, 4):
        add("one_group", 2 if tp == 1 else 1, Topology(tp=tp, groups=1))  # two ranks: no spawn of its own
    add("trained", 2, Topology("mini", "distributed", ep=2, experts=True), end_to_end=True, steps=3)
    add(
        "refused", 2, Topology(etp=2, experts=True), refused="Set expert_tensor_parallel_size to 1 or to tensor_model_p"
    )
    add("mutant", 2, Topology(ep=2, experts=True), oracle_multipliers={"ffn": 6.01})
    return table


CASES = _cases()


@pytest.mark.parametrize("name", of_kinds(CASES, "experts", "by_role"))
def test_experts(outcome: Outcome, name: str) -> None:
    """Blocks of experts would be summed over ranks that hold other experts, or cut as if all held all."""
    passes(outcome, name)


@pytest.mark.parametrize("name", of_kinds(CASES, "refused"))
def test_other_expert_tensor_sizes_are_refused(outcome: Outcome, name: str) -> None:
    """Rows of experts would be summed over the tensor-parallel group, which is another one."""
    passes(outcome, name)


@pytest.mark.parametrize("name", of_kinds(CASES, "trained"))
def test_experts_on_two_ranks_train_like_all_on_one(outcome: Outcome, name: str) -> None:
    """Going to two expert-parallel ranks would change the trained model."""
    passes(outcome, name)


@pytest.mark.parametrize("name", of_kinds(CASES, "mtp", "virtual"))
def test_copies_of_the_embedding(outcome: Outcome, name: str) -> None:
    """The copy for multi-token prediction, or of a tied output layer, would drift away from the first stage's."""
    passes(outcome, name)


@pytest.mark.parametrize("name", of_kinds(CASES, "context"))
def test_context_parallel_ranks_share_shards(outcome: Outcome, name: str) -> None:
    """Shards are cut over data x context ranks: sums over the data-parallel ranks alone would miss parts of blocks."""
    passes(outcome, name)


@pytest.mark.parametrize("name", of_kinds(CASES, "one_group"))
def test_one_query_group(outcome: Outcome, name: str) -> None:
    """With more ranks than query groups a head lies on several ranks, which each would give a second moment."""
    passes(outcome, name)


@pytest.mark.parametrize("name", of_kinds(CASES, "mutant"))
def test_the_comparison_notices_a_wrong_multiplier(outcome: Outcome, name: str) -> None:
    """The tests above would prove nothing."""
    is_noticed(outcome, name)
