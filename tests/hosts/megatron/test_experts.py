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

from tests.helpers.deepspeed.engine_cases import BETAS, EPS, LR_FACTORS, WEIGHT_DECAY, named
from tests.helpers.distributed import Outcome, RankContext, fleet_outcome, passes
from tests.helpers.megatron.parallel import VOCAB, Layout, ParallelRun, chunks_of, classes_of, parallel_of, whole_shapes
from tests.helpers.megatron.stack import EMBEDDING, LR, stack_shims
from tests.helpers.models import GradientPlan, small_weight
from tests.helpers.oracle import Hyper, Oracle, assert_same_update

pytestmark = pytest.mark.skipif(find_spec("megatron") is None, reason="needs megatron")


@dataclass(frozen=True)
class Case:
    """A layout and how long it is trained."""

    layout: Layout
    steps: int = 4
    oracle_multipliers: dict[str, float] = field(default_factory=dict)
    overrides: dict[str, float] = field(default_factory=dict)  # what a rule says, for the oracle
    end_to_end: bool = False
    refused: str = ""  # what the error says


def run_case(context: RankContext, case: Case) -> None:
    """Entry of every rank."""
    stack_shims()
    shapes = whole_shapes(case.layout)
    history = trained_whole(context, case, shapes) if case.end_to_end else []
    with parallel_of(case.layout):
        run = ParallelRun(case.layout, shapes)
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
    alone = replace(case.layout, ep=1)
    with parallel_of(alone):
        (model,) = chunks_of(alone)
        start = {name: small_weight(name, shape) for name, shape in shapes.items()}
        mini = case.layout.optimizer == "mini"
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
    layout = case.layout
    plan = GradientPlan(run.dp_size, 1, torch.float32)
    start = {name: run.start(name) for name in run.shapes}
    hyper = Hyper(LR, BETAS, EPS, WEIGHT_DECAY)  # of all groups: nothing here multiplies by their wd_mult
    classes = classes_of(run.shapes, layout.groups)
    oracle = Oracle(start, classes, layout.optimizer == "mini", hyper, lr_multipliers=case.oracle_multipliers)
    oracle.overrides = case.overrides
    now = run.masters()
    for name, value in now.items():
        assert torch.equal(value, run.cut(name, run.start(name))), f"start of {name}"
    for step in range(case.steps):
        hyper.lr = LR * LR_FACTORS[step % len(LR_FACTORS)]
        for group in (group for leaf in run.leaves for group in leaf.param_groups):
            group["lr"] = hyper.lr
        run.feed(plan, step)
        done, *_ = run.optimizer.step()
        assert done
        before, now = now, run.masters()
        for name, param in run.params.items():
            assert torch.equal(param.detach(), now[name].to(param.dtype)), f"the model has another {name}"
        check_copies(run, now)
        if step >= 4:
            continue  # later steps are there for the copies
        was = oracle.weights()
        oracle.step({name: run.mean(plan, name, step) for name in run.shapes})
        expected = tuple(
            {n: run.cut(n, weights[EMBEDDING if run.is_copy(n) else n]) for n in now}
            for weights in (was, oracle.weights())
        )
        what = f"step {step}, rank {context.rank}"
        assert_same_update((before, now), expected, hyper.lr, what=what)
    for leaf in run.leaves:
        inner = leaf.optimizer
        if layout.wrapper == "distributed" and layout.optimizer == "mini" and leaf.data_parallel_group.size() > 1:
            assert any(b.table.has_split_blocks for b in inner.bindings()), "no block is split: nothing is tried"
        assert type(inner).__name__.startswith("Blockwise")
        assert inner.step_calls == case.steps
    held = {n: tuple(p.shape) for n, p in run.params.items()}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, held)
    assert {n for names in everyone for n in names} - {"output_layer.weight"} == set(run.shapes) - {
        "output_layer.weight"
    }


def check_copies(run: ParallelRun, weights: dict[str, torch.Tensor]) -> None:
    """The copies of the embedding on several stages are the same bits."""
    from megatron.core import parallel_state

    group = parallel_state.get_embedding_group(check_initialized=False)
    if (
        run.layout.pp == 1
        or not (run.layout.tied or run.layout.mtp)
        or dist.get_rank() not in dist.get_process_group_ranks(group)
    ):
        return
    own = next(weights[n] for n in run.params if n == EMBEDDING or run.is_copy(n))
    copies = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(copies, own.contiguous(), group=group)
    assert all(torch.equal(copy, copies[0]) for copy in copies), "the copies of the embedding drifted apart"


# -------------------------------------------------------------------------------------- the table


def _cases() -> dict[str, tuple[int, Case]]:
    table: dict[str, tuple[int, Case]] = {}

    def add(kind: str, dp: int, layout: Layout, **rest: Any) -> None:
        at = layout
        sizes = [f"{k}{v}" for k in ("tp", "pp", "virtual", "cp", "ep", "etp") if (v := getattr(at, k)) > 1]
        name = "-".join([kind, at.wrapper, at.dtype, at.optimizer, *sizes, f"dp{dp}"])
        assert name not in table
        table[name] = (dp * at.tp * at.pp * at.cp, Case(at, **rest))

    for optimizer, wrapper in (("mini", "distributed"), ("adamw", "distributed"), ("mini", "plain")):
        add("experts", 4, Layout(optimizer, wrapper, ep=2, experts=True))
    add("experts", 2, Layout("mini", "distributed", "bf16", ep=2, experts=True))
    add("experts", 2, Layout("adamw", "plain", "bf16", ep=2, experts=True))
    add("experts", 2, Layout("mini", "distributed", experts=True))
    add("experts", 1, Layout("mini", "plain", tp=2, ep=2, experts=True))
    add("experts", 1, Layout("mini", "plain", tp=2, etp=2, experts=True))
    add("experts", 2, Layout("mini", "distributed", tp=2, ep=2, etp=2, experts=True))
    for wrapper, dtype, optimizer, dp in (
        ("plain", "fp32", "mini", 1),
        ("plain", "bf16", "adamw", 1),
        ("distributed", "bf16", "mini", 2),
        ("distributed", "fp32", "adamw", 1),
    ):
        # the output layer is on the last stage only: the first must not mind the rule
        settings = {"rules": [{"match": r"^output_layer\.", "lr_multiplier": 3.5}]}
        layout = Layout(optimizer, wrapper, dtype, pp=2, layers=2, mtp=True, settings=settings)
        add("mtp", dp, layout, steps=24, overrides={"output_layer.weight": 3.5})
    add("mtp_tied", 1, Layout(pp=2, layers=2, mtp=True, tied=True), steps=24)
    add("virtual", 1, Layout(pp=2, virtual=2, layers=4, tied=True), steps=24)
    add("virtual", 1, Layout("adamw", "plain", "bf16", pp=2, virtual=2, layers=4, tied=True), steps=24)
    add("context", 1, Layout(cp=2))
    add("context", 2, Layout(cp=2))
    add("context", 2, Layout("adamw", "plain", cp=2))
    for tp in (1, 2, 4):
        add("one_group", 1, Layout(tp=tp, groups=1))
    add("trained", 2, Layout("mini", "distributed", ep=2, experts=True), end_to_end=True, steps=3)
    add("refused", 2, Layout(etp=2, experts=True), refused="Set expert_tensor_parallel_size to 1 or to tensor_model_p")
    add("mutant", 2, Layout(ep=2, experts=True), oracle_multipliers={"ffn": 6.01})
    return table


CASES = _cases()


def _names(*kinds: str) -> list[Any]:
    return named(name for name in CASES if name.startswith(kinds))


@pytest.fixture(scope="module")
def outcome(request: pytest.FixtureRequest) -> Outcome:
    return fleet_outcome(request, run_case, CASES, per_spawn=20)


@pytest.mark.parametrize("name", _names("experts"))
def test_experts(outcome: Outcome, name: str) -> None:
    """Blocks of experts would be summed over ranks that hold other experts, or cut as if all held all."""
    passes(outcome, name)


@pytest.mark.parametrize("name", _names("refused"))
def test_other_expert_tensor_sizes_are_refused(outcome: Outcome, name: str) -> None:
    """Rows of experts would be summed over the tensor-parallel group, which is another one."""
    passes(outcome, name)


@pytest.mark.parametrize("name", _names("trained"))
def test_experts_on_two_ranks_train_like_all_on_one(outcome: Outcome, name: str) -> None:
    """Going to two expert-parallel ranks would change the trained model."""
    passes(outcome, name)


@pytest.mark.parametrize("name", _names("mtp", "virtual"))
def test_copies_of_the_embedding(outcome: Outcome, name: str) -> None:
    """The copy for multi-token prediction, or of a tied output layer, would drift away from the first stage's."""
    passes(outcome, name)


@pytest.mark.parametrize("name", _names("context"))
def test_context_parallel_ranks_share_shards(outcome: Outcome, name: str) -> None:
    """Shards are cut over data x context ranks: sums over the data-parallel ranks alone would miss parts of blocks."""
    passes(outcome, name)


@pytest.mark.parametrize("name", _names("one_group"))
def test_one_query_group(outcome: Outcome, name: str) -> None:
    """With more ranks than query groups a head lies on several ranks, which each would give a second moment."""
    passes(outcome, name)


@pytest.mark.parametrize("name", _names("mutant"))
def test_the_comparison_notices_a_wrong_multiplier(outcome: Outcome, name: str) -> None:
    """The tests above would prove nothing."""
    failure = outcome(name)
    assert failure is not None, f"{name}: a wrong multiplier went unnoticed"
    assert "parameters off by more than" in failure, failure
