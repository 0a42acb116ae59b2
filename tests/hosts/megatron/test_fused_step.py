# SPDX-License-Identifier: Apache-2.0
"""``convert_(..., fused_step=True)`` on the real `DistributedOptimizer`: the bits of the step that it replaces.

Values against the oracle are in ``test_optimizer.py``, checkpoints of one kind that go on in the other in
``test_checkpoint.py``, refusals in ``test_refusals.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.helpers.counting import Traffic
from tests.helpers.distributed import Outcome, RankContext, passes
from tests.helpers.megatron.cases import of_kinds
from tests.helpers.megatron.parallel import ParallelRun, Topology, parallel_of, whole_shapes
from tests.helpers.megatron.stack import DTYPES, Run, Stack, open_stack, stack_shims
from tests.helpers.models import GradientPlan
from tests.hosts.megatron.test_optimizer import has_registry

pytestmark = pytest.mark.skipif(find_spec("megatron") is None, reason="needs megatron")

CLIP = 0.05  # below every norm that is fed, in bf16 and in fp32
STEPS = 4
LEAST = 12  # elements of the smallest shard whose traffic is counted


@dataclass(frozen=True)
class Case:
    """A model and its optimizer, and what happens to them."""

    model: Stack | Topology
    check: str = "bits"
    poison: tuple[int, ...] = ()  # steps in which the last rank finds a bad gradient
    value: float = float("nan")  # what it finds
    held: tuple[int, ...] = ()  # steps that an observer holds back, after somebody wrote into the masters
    apart: tuple[int, ...] = ()  # steps before which shards were put elsewhere, as `restore_from_cpu` does
    skips: tuple[int, ...] = ()  # steps that change nothing
    clipped: bool = True  # whether the norms that are fed are above the limit
    traffic: tuple[float, float] = (0.0, 0.0)  # bytes per parameter of torch's operations, unfused and fused


def run_case(context: RankContext, case: Case) -> None:
    """Entry of every rank."""
    stack_shims()
    CHECKS[case.check](context, case)


@contextmanager
def opened(case: Case, *, fused: bool) -> Iterator[Any]:
    """A run that steps in one of the two ways."""
    model = replace(case.model, settings={**case.model.settings, "fused_step": fused})
    if isinstance(model, Stack):
        with open_stack(model) as run:
            yield run
        return
    shapes = whole_shapes(model)
    with parallel_of(model):
        run = ParallelRun(model, shapes)
        run.convert()
        yield run


class _Holds:
    """Observes steps, and holds some of them back."""

    def __init__(self) -> None:
        self.now = False

    def before_update(self, work: Any) -> bool:
        """Whether the step may change anything."""
        return not self.now

    def after_update(self, work: Any) -> None:
        """Nothing: it has seen enough."""


def stepped(context: RankContext, case: Case, run: Any) -> Iterator[dict[str, Tensor]]:
    """Take steps; after each, everything that it may have changed or told."""
    holds = _Holds()
    for wrapper in run.optimizer.chained_optimizers:
        wrapper.optimizer.observe(holds)
    for step in range(STEPS):
        # zeros must be on every rank: gradients are averaged
        bad = step in case.poison and (case.value == 0.0 or context.rank == context.world_size - 1)
        holds.now = step in case.held
        for shard in (t for group in run.optimizer.param_groups for t in group["params"]):
            if step in case.apart:
                shard.data = shard.detach().clone()
            if holds.now:
                shard.detach().mul_(1.5)
        if isinstance(run, Run):
            plan = GradientPlan(dist.get_world_size(run.dp_group), 1, _plan_dtype(run.stack))
            run.feed(plan, step, poison=case.value if bad else None)
            done, norm = run.step()
            zeros = run.zeros
            if run.chunk.ddp_config.overlap_param_gather:
                run.chunk.start_param_sync(force_sync=True)  # as the next forward pass would
        else:
            run.feed(GradientPlan(run.dp_size, 1, torch.float32), step)
            done, norm, zeros = run.optimizer.step()
        yield _everything(run) | _numbers(done=done, norm=norm, zeros=zeros, scale=run.optimizer.get_loss_scale())
        run.optimizer.zero_grad()


def _plan_dtype(stack: Stack) -> torch.dtype:
    return torch.float32 if stack.loss_scale or stack.fp32_grads else DTYPES[stack.dtype]


def _numbers(**told: Any) -> dict[str, Tensor]:
    return {name: torch.tensor(-1.0 if value is None else float(value)).double() for name, value in told.items()}


def _everything(run: Any) -> dict[str, Tensor]:
    """Master weights and states of this rank, the model's weights, and the groups' rates."""
    found = {f"model {name}": param.detach().clone() for name, param in run.params.items()}
    for number, wrapper in enumerate(run.optimizer.chained_optimizers):
        inner = wrapper.optimizer
        for index, tensor in enumerate(t for group in inner.param_groups for t in group["params"]):
            at = f"{number}.{index}"
            found[f"master {at}"] = tensor.detach().clone()
            found |= {f"{key} {at}": torch.as_tensor(value).clone() for key, value in inner.state[tensor].items()}
        found |= _numbers(**{f"lr {number}.{i}": group["lr"] for i, group in enumerate(inner.param_groups)})
        found[f"calls {number}"] = torch.tensor(inner.step_calls)
    return found


def _assert_same_bits(found: dict[str, Tensor], wanted: dict[str, Tensor], what: str) -> None:
    assert found.keys() == wanted.keys(), f"{what}: {found.keys() ^ wanted.keys()}"
    different = [n for n in wanted if not torch.equal(_bits(found[n]), _bits(wanted[n]))]
    assert not different, f"{what} differ: {different}"


def _bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, but one NaN for all: torch's own casts of a NaN differ between lanes and what is left."""
    if not tensor.is_floating_point():
        return tensor
    one = torch.where(tensor.isnan(), torch.full_like(tensor, float("nan")), tensor)
    return one.reshape(-1).view(torch.uint8)


def check_bits(context: RankContext, case: Case) -> None:
    """Masters, states, the model, norms, counts and the loss scale have the same bits after every step."""
    with opened(case, fused=False) as run:
        wanted = list(stepped(context, case, run))
    _check_shows_what_it_says(context, case, wanted)
    with opened(case, fused=True) as run:
        kinds = {type(wrapper).__name__ for wrapper in run.optimizer.chained_optimizers}
        assert kinds == {"FusedDistributedOptimizer"}, kinds
        assert len(run.optimizer.chained_optimizers) == 1 + isinstance(case.model, Topology), "experts have their own"
        for step, found in enumerate(stepped(context, case, run)):
            _assert_same_bits(found, wanted[step], f"after step {step}")


def _check_shows_what_it_says(context: RankContext, case: Case, wanted: list[dict[str, Tensor]]) -> None:
    skipped = tuple(step for step, found in enumerate(wanted) if not found["done"])
    assert skipped == case.skips, skipped
    limit = case.model.clip
    norms = [float(found["norm"]) for step, found in enumerate(wanted) if step not in case.skips]
    norms = [norm for norm in norms if math.isfinite(norm)]
    assert norms or len(case.skips) == STEPS, "no step is left to look at"
    assert all((0 < limit < norm) == case.clipped for norm in norms), norms
    config = case.model.config if isinstance(case.model, Stack) else {}
    if config.get("log_num_zeros_in_grad"):
        assert all(found["zeros"] > 0 for found in wanted), "there is nothing to count"
    for step, (before, after) in enumerate(pairwise(wanted), start=1):
        moved = any(not torch.equal(after[n], before[n]) for n in after if n.startswith("model"))
        assert moved == (step not in case.skips), f"step {step}"


def check_traffic(context: RankContext, case: Case) -> None:
    """Torch's operations around the kernels, counted: bytes per parameter, and how many there are for a shard.

    Without Transformer Engine or apex Megatron-core clips in two operations, of 16 bytes; their kernels move 8.
    """
    found = {}
    for fused in (False, True):
        with opened(case, fused=fused) as run:
            plan = GradientPlan(dist.get_world_size(run.dp_group), 1, torch.bfloat16)
            shards = [t for group in run.optimizer.param_groups for t in group["params"]]
            for step in range(2):  # the first step allocates the state
                run.feed(plan, step)
                with Traffic(least=LEAST) as traffic:
                    run.step()
            per_parameter = traffic.bytes / sum(t.numel() for t in shards if t.numel() >= LEAST)
            found[fused] = SimpleNamespace(bytes=per_parameter, operations=len(traffic.operations))
    assert (found[False].bytes, found[True].bytes) == pytest.approx(case.traffic, abs=0.5), found
    large = sum(t.numel() >= LEAST for t in shards)
    assert found[False].operations - found[True].operations == 3 * large, "two to clip, one to copy"


def check_ended(context: RankContext, case: Case) -> None:
    """After a step that was skipped, `get_parameters` is that of Megatron-core again once gradients are zeroed."""
    with opened(case, fused=True) as run:
        shards = [t for group in run.wrapper.optimizer.param_groups for t in group["params"]]
        plan = GradientPlan(dist.get_world_size(run.dp_group), 1, torch.float32)
        run.feed(plan, 0, poison=float("inf"))
        assert not run.step()[0]
        run.optimizer.zero_grad()
        found = run.wrapper.get_parameters()
        assert len(found) == len(shards) and all(a is b for a, b in zip(found, shards, strict=True))


CHECKS = {"bits": check_bits, "traffic": check_traffic, "ended": check_ended}


# -------------------------------------------------------------------------------------- the table


def _cases() -> dict[str, tuple[int, Case]]:
    table: dict[str, tuple[int, Case]] = {}

    def add(name: str, model: Stack | Topology, **rest: Any) -> None:
        assert name not in table
        table[name] = (2, Case(model, **rest))

    bf16 = Stack(dtype="bf16", clip=CLIP)
    for optimizer in ("adamw", "mini"):
        add(f"bits-{optimizer}", replace(bf16, optimizer=optimizer))
        add(f"bits-{optimizer}-fp32_grads", replace(bf16, optimizer=optimizer, fp32_grads=True))
        add(f"bits-{optimizer}-fp32", replace(bf16, optimizer=optimizer, dtype="fp32"))
    add("bits-high_limit", replace(bf16, clip=1e6), clipped=False)
    add("bits-no_limit", replace(bf16, clip=0.0, fp32_grads=True), clipped=False)
    add("bits-mqa-tp2", replace(bf16, shape="mqa", tp=2))
    add("bits-tp2-fp32_grads", replace(bf16, tp=2, fp32_grads=True, optimizer="adamw"))
    add("bits-mixed", replace(bf16, mixed=True))
    add("bits-buckets-decoupled", replace(bf16, bucket_size=900, decoupled=True))
    add("bits-overlap", replace(bf16, bucket_size=900, ddp={"overlap_param_gather": True}))
    add("bits-reference", replace(bf16, settings={"backend": "reference", "momentum_dtype": "bf16"}))
    for name, fp32_grads in (("bf16", False), ("fp32_grads", True)):
        counted = replace(bf16, fp32_grads=fp32_grads, config={"log_num_zeros_in_grad": True})
        add(f"bits-zeros-{name}", counted, poison=tuple(range(STEPS)), value=0.0)
    add("bits-held", bf16, held=(1, 2))
    add("bits-apart", replace(bf16, mixed=True), apart=(1,))
    scaled = replace(bf16, loss_scale=True)
    add("bits-scaled", scaled, poison=(1,), skips=(1,))
    add("bits-fp16", replace(scaled, dtype="fp16", optimizer="adamw"), poison=(0, 2), skips=(0, 2), value=float("inf"))
    add("bits-nan", bf16, poison=(STEPS - 1,))
    add("bits-inf", replace(bf16, fp32_grads=True), poison=(STEPS - 1,), value=float("inf"))
    for dtype in ("fp32", "bf16"):
        add(f"bits-experts-{dtype}", Topology(dtype=dtype, ep=2, experts=True, clip=CLIP))
    if has_registry():
        add("bits-by_name", replace(bf16, by_name=True))
        add("bits-threshold", replace(bf16, config={"grad_norm_skip_threshold": 0.0}), skips=tuple(range(STEPS)))
    # norm 4, clip 16, copy 6; of bf16 gradients also the cast, 6
    add("traffic-fp32_grads", replace(bf16, fp32_grads=True), check="traffic", traffic=(26, 4))
    add("traffic-bf16", bf16, check="traffic", traffic=(32, 10))
    add("ended", scaled, check="ended")
    return table


CASES = _cases()


@pytest.mark.parametrize("name", of_kinds(CASES, "bits"))
def test_the_step_has_the_bits_of_the_one_that_it_replaces(outcome: Outcome, name: str) -> None:
    """Training would be another one with the setting than without."""
    passes(outcome, name)


@pytest.mark.parametrize("name", of_kinds(CASES, "traffic"))
def test_gradients_and_weights_are_read_as_often_as_the_page_says(outcome: Outcome, name: str) -> None:
    """The setting would be for nothing: Megatron-core's passes over memory would still be made."""
    passes(outcome, name)


@pytest.mark.parametrize("name", of_kinds(CASES, "ended"))
def test_a_skipped_step_leaves_nothing_behind(outcome: Outcome, name: str) -> None:
    """Whoever looks at the parameters between steps would see one number."""
    passes(outcome, name)
