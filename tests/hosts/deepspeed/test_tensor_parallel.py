# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism on the real Megatron-core GPTModel under DeepSpeed, against whole tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.helpers import models
from tests.helpers.deepspeed.compared import Compared, assert_same, case_config, check_counters, hyper, set_lr
from tests.helpers.deepspeed.engine_cases import (
    BACKENDS,
    EPS,
    GROUP_2,
    LR,
    LR_FACTORS,
    WEIGHT_DECAY,
    betas_of,
    takes_long,
)
from tests.helpers.deepspeed.engines import DTYPES, feed_step, masters, open_engine, prepare_deepspeed
from tests.helpers.deepspeed.fused_twins import everything
from tests.helpers.distributed import Outcome, RankContext, passes
from tests.helpers.megatron.gpt_shards import LAYERS, SHAPES, cut, cut_all, full_shapes, gpt, parallel, small_gpt
from tests.helpers.models import GradientPlan
from tests.helpers.muon_oracle import oracle_for, tolerance_for
from tests.helpers.optimizers import FULL_NAME
from tests.helpers.oracle import ROLE_SETTINGS, Hyper, assert_same_update, clipped, told
from tests.helpers.suites import Suite, notices_a_wrong_multiplier
from tests.helpers.tables.oracle_names import ROLE, Classes, megatron_classes, regroup

# Not imported here: a worker has to choose the accelerator before DeepSpeed looks for one.
_HOSTS_MISSING = find_spec("deepspeed") is None or find_spec("megatron") is None
pytestmark = pytest.mark.skipif(_HOSTS_MISSING, reason="needs deepspeed and megatron")

DECAY_MULTIPLIERS = {"norm": 0.0, "value": 0.5}


@dataclass(frozen=True)
class Case:
    """A GPTModel on tensor-parallel size ``tp``; the rest of the world is data-parallel."""

    optimizer: str = "mini"
    stage: int = 1
    dtype: str = "fp32"
    shape: str = "gqa"
    clip: float = 0.0
    steps: int = 4
    tied: bool = False
    tp: int = 2
    second_group: tuple[str, ...] = ()  # parts of the names of its parameters
    config: dict[str, Any] = field(default_factory=dict)
    oracle_multipliers: dict[str, float] = field(default_factory=dict)
    value_tensor: bool = False
    poison: tuple[int, ...] = ()  # steps at which tensor-parallel rank 1 feeds a NaN
    end_to_end: bool = False
    backend: str = "auto"
    params: dict[str, Any] = field(default_factory=dict)
    oracle: dict[str, Any] = field(default_factory=dict)  # what only Muon's oracle is told


def _config(case: Case) -> dict[str, Any]:
    granularity = {"value": "tensor", "norm": "tensor"} if case.value_tensor else {}
    params = {"weight_decay_multipliers": DECAY_MULTIPLIERS, "granularity": granularity, "backend": case.backend}
    params |= {"betas": list(betas_of(case.optimizer)), **case.params}
    # end to end an element far below eps keeps the noise of two runs below eps
    eps = {"eps": 1e-3} if case.end_to_end else {}
    clip = {"gradient_clipping": case.clip} if case.clip else {}
    return case_config(case, params=params | eps, **clip)


def _classes(case: Case) -> Classes:
    classes = megatron_classes(layers=LAYERS, **SHAPES[case.shape])
    return regroup(regroup(classes, "value", ROLE), "norm", ROLE) if case.value_tensor else classes


def _is_second(case: Case, name: str) -> bool:
    return any(part in name for part in case.second_group)


def _groups_of(case: Case) -> Callable[[nn.Module], list[dict[str, Any]]] | None:
    """Splits a model's parameters into the case's two groups; None for a single one."""
    if not case.second_group:
        return None

    def split(model: nn.Module) -> list[dict[str, Any]]:
        named = list(model.named_parameters())
        first, second = ([p for n, p in named if _is_second(case, n) is second] for second in (False, True))
        return [{"params": first}, {"params": second} | GROUP_2]

    return split


def _hyper_of(case: Case, names: list[str]) -> dict[str, Hyper]:
    second = hyper(**{key: GROUP_2[key] for key in ("betas", "eps", "weight_decay")})
    first = hyper(betas=betas_of(case.optimizer))
    return {name: replace(second if _is_second(case, name) else first) for name in names}


# ------------------------------------------------------------------------------------- the checks


def run_case(context: RankContext, case: Case) -> None:
    """Entry of every rank."""
    prepare_deepspeed()
    import ds_blockwise  # noqa: F401 - registers the optimizers
    import megatron_patch

    megatron_patch.cpu_shims()
    (check_end_to_end if case.end_to_end else check_fed)(context, case)
    if "fused_step" in case.params:
        check_twins(context, case)


def _opened(case: Case, tp_rank: int) -> Any:
    """An engine on a rank's part of the model."""
    from megatron_patch import mpu_adapter

    def build() -> nn.Module:
        return small_gpt(case.shape, DTYPES[case.dtype], tp_rank, tied=case.tied, tp=case.tp)

    return open_engine(_config(case), build, groups=_groups_of(case), mpu=mpu_adapter())


def check_fed(context: RankContext, case: Case) -> None:
    from megatron.core import parallel_state

    shapes = full_shapes(case.shape, tied=case.tied)
    exact = case.optimizer in ("adamw", "lion", "muon") and not (case.clip or case.params)
    reference = _reference(case) if exact else None
    with parallel(case.tp):
        tp_rank = parallel_state.get_tensor_model_parallel_rank()
        tp_group = parallel_state.get_tensor_model_parallel_group()
        dp_rank = parallel_state.get_data_parallel_rank()
        dtype = DTYPES[case.dtype]
        plan = GradientPlan(context.world_size // case.tp, 1, dtype)
        with _opened(case, tp_rank) as run:
            start = {n: models.small_weight(n, s).to(dtype).float() for n, s in shapes.items()}
            oracle = oracle_for(
                case.optimizer,
                start,
                _classes(case),
                _hyper_of(case, list(shapes)),
                weight_decay_multipliers=DECAY_MULTIPLIERS,
                **told(case.params, case.oracle_multipliers),
                **case.oracle,
            )
            pair = Compared(run, oracle, lambda whole: cut_all(whole, tp_rank, case.tp))
            pair.check_start()
            part = partial(cut, rank=tp_rank, size=case.tp)
            for step in range(case.steps):
                pair.set_lr(step)
                poisoned = step in case.poison
                poison = float("nan") if poisoned and tp_rank == 1 else None
                feed_step(run, plan, step, dp_rank, shapes=shapes, cut=part, poison=poison)
                if poisoned:
                    pair.check_skipped()
                    continue
                gradients = {n: plan.mean(n, s, step) for n, s in shapes.items()}
                if case.clip:
                    gradients = clipped(gradients, case.clip)
                what = f"step {step}, tensor-parallel rank {tp_rank}"
                pair.check_step(gradients, what=what, tolerance=tolerance_for(case.optimizer))
                _check_replicas(pair.now, tp_group, case.tp)
                if reference is not None:
                    assert_same(pair.now, cut_all(reference(gradients, pair.lr), tp_rank), f"{what}: unsharded weights")


def check_twins(context: RankContext, case: Case) -> None:
    """With ``fused_step`` and without it: the same bits after every step, the norm over all ranks among them."""
    from megatron.core import parallel_state

    shapes, found = full_shapes(case.shape, tied=case.tied), []
    with parallel(case.tp):
        tp_rank = parallel_state.get_tensor_model_parallel_rank()
        dp_rank = parallel_state.get_data_parallel_rank()
        plan = GradientPlan(context.world_size // case.tp, 1, DTYPES[case.dtype])
        part = partial(cut, rank=tp_rank, size=case.tp)
        for fused in (False, True):
            with _opened(replace(case, params={**case.params, "fused_step": fused}), tp_rank) as run:
                for step in range(case.steps):
                    poison = float("nan") if step in case.poison and tp_rank == 1 else None
                    feed_step(run, plan, step, dp_rank, shapes=shapes, cut=part, poison=poison)
                    found.append(everything(run))
    for step in range(case.steps):
        assert_same(found[case.steps + step], found[step], f"after step {step}, with fused_step and without")
    norms = [float(one["norm"]) for one in found]
    assert all(norm > case.clip for norm in norms), norms


def _reference(case: Case) -> Callable[[dict[str, Tensor], float], dict[str, Tensor]]:
    """Our optimizer on whole fp32 tensors in this process; only the cut differs from the engine."""
    from ds_blockwise import tag_parameters
    from ds_blockwise.optimizers.registry import OPTIMIZERS

    with parallel(1):
        model = small_gpt(case.shape, DTYPES[case.dtype], None, tied=case.tied)
        model = model.to(DTYPES[case.dtype]).float()  # Megatron-core keeps norms in fp32; DeepSpeed rounds them too
        tag_parameters(model)
    named = dict(model.named_parameters())
    settings = {"lr": LR, "betas": betas_of(case.optimizer), "eps": EPS, "weight_decay": WEIGHT_DECAY}
    settings |= {"backend": case.backend, "weight_decay_multipliers": DECAY_MULTIPLIERS, **case.params}
    optimizer = OPTIMIZERS[FULL_NAME[case.optimizer]](model.parameters(), **settings)

    def step(gradients: dict[str, Tensor], lr: float) -> dict[str, Tensor]:
        optimizer.param_groups[0]["lr"] = lr
        for name, parameter in named.items():
            parameter.grad = gradients[name].clone()
        optimizer.step()
        return {name: p.detach() for name, p in named.items()}

    return step


def _check_replicas(weights: dict[str, Tensor], tp_group: Any, tp: int) -> None:
    for name, weight in weights.items():
        if "layernorm" in name:
            copies = [torch.empty_like(weight) for _ in range(tp)]
            dist.all_gather(copies, weight.contiguous(), group=tp_group)
            assert all(torch.equal(copy, copies[0]) for copy in copies), f"{name} differs between tensor ranks"


def check_end_to_end(context: RankContext, case: Case) -> None:
    """The same batches through TP 1 and TP 2: whole tensors of one against shards of the other."""
    whole_runs = _train(context, case, 1)
    parts_runs = _train(context, case, case.tp)
    tp_rank = context.rank % case.tp
    for step, ((whole_was, whole_now), (was, now)) in enumerate(zip(whole_runs, parts_runs, strict=True)):
        expected = cut_all(whole_was, tp_rank), cut_all(whole_now, tp_rank)
        # 1e-4: the matrix products of the two runs add up in another order, and an element far
        # below eps keeps that noise below eps (see _config).
        lr = LR * LR_FACTORS[step]
        assert_same_update((was, now), expected, lr, tolerance=1e-4, what=f"step {step}")


def _train(context: RankContext, case: Case, tp: int) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Weights before and after each step; every rank sees the same tokens."""
    from megatron_patch import mpu_adapter

    history = []
    with (
        parallel(tp),
        open_engine(
            _config(case), lambda: gpt(case.shape, DTYPES[case.dtype], tied=case.tied), mpu=mpu_adapter(), feed=False
        ) as run,
    ):
        now = masters(run)
        positions = torch.arange(10).expand(2, -1)
        for step in range(case.steps):
            set_lr(run, step)
            generator = torch.Generator().manual_seed(step)
            tokens = torch.randint(SHAPES[case.shape]["vocab"], (2, 11), generator=generator)
            loss = run.engine(tokens[:, :-1], positions, None, labels=tokens[:, 1:]).mean()
            run.engine.backward(loss)
            run.engine.step()
            before, now = now, masters(run)
            history.append((before, now))
            check_counters(run, step + 1)
    return history


# -------------------------------------------------------------------------------------- the table


def _cases() -> dict[str, tuple[int, Case]]:
    table: dict[str, tuple[int, Case]] = {}

    def add(kind: str, dp: int, case: Case, backends: tuple[str, ...] = BACKENDS) -> None:
        for backend in backends:
            name = f"{kind}-{case.shape}-z{case.stage}-{case.dtype}-{case.optimizer}-tp{case.tp}-dp{dp}-{backend}"
            table[name] = (case.tp * dp, replace(case, backend=backend))

    wrappers = ((0, "fp32"), (1, "fp32"), (1, "bf16"), (2, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16"))
    for dp, optimizer, (stage, dtype) in product((1, 2), ("adamw", "mini"), wrappers):
        add("fed", dp, Case(optimizer, stage, dtype))
    for dp, stage in product((1, 2), (0, 2)):
        add("fed", dp, Case("mini", stage, shape="mqa"))
    accumulate = {"data_types": {"grad_accum_dtype": "fp32"}}
    add("bf16_optimizer", 2, Case("mini", 1, "bf16", config=accumulate))
    add("value_tensor", 2, Case("mini", 1, value_tensor=True))
    add("by_role", 1, Case("mini", 2, params=ROLE_SETTINGS))
    add("by_role", 2, Case("adamw", 3, params=ROLE_SETTINGS))
    add("value_tensor", 1, Case("mini", 0, shape="mqa", value_tensor=True))
    add("tied", 2, Case("mini", 1, tied=True))
    for shape, stage in (("gqa3", 1), ("gqa3", 3), ("mqa3", 0), ("mqa3", 2)):
        add("fed", 1, Case("mini", stage, shape=shape, tp=3))
    for dp, stage in ((1, 0), (2, 1), (2, 3)):
        add("fed_groups", dp, Case("mini", stage, second_group=("layernorm", "linear_fc2", "layers.1.")))
    add("fed_tied_groups", 2, Case("mini", 2, tied=True, second_group=("word_embeddings",)))
    for stage in (1, 2):
        add("overflow", 2, Case("mini", stage, "bf16", poison=(0, 2), steps=5))
    add("overflow", 1, Case("mini", 0, "fp32", poison=(0, 2), steps=4))
    add("clip", 2, Case("mini", 1, clip=0.05))
    add("clip", 1, Case("mini", 0, clip=0.05))
    for optimizer, stage in product(("adamw", "mini"), (0, 2)):
        add("e2e", 1, Case(optimizer, stage, steps=3, end_to_end=True))
    add("e2e", 2, Case("mini", 1, steps=3, shape="mqa", end_to_end=True))
    for dp, stage, dtype in ((1, 0, "fp32"), (1, 2, "bf16"), (2, 1, "fp32"), (2, 3, "bf16")):
        add("lion", dp, Case("lion", stage, dtype), ("cpp",))
    add("lion", 1, Case("lion", 1, shape="mqa", clip=0.05, tied=True), ("cpp",))
    by_role = {"how": dict.fromkeys(("query", "key", "value"), "role")}
    for dp, stage in ((1, 0), (1, 2), (2, 1), (2, 3)):
        add("muon", dp, Case("muon", stage), ("cpp",))
    for dp, stage in ((1, 1), (2, 2)):
        roles = {"orthogonalize": {"qk": "role", "value": "role"}}
        add("muon_roles", dp, Case("muon", stage, params=roles, oracle=by_role), ("cpp",))
        add("muon", dp, Case("muon", stage, shape="mqa"), ("cpp",))
    add("muon_overflow", 2, Case("muon", 1, "bf16", poison=(0, 2), steps=5), ("cpp",))
    fused = {"clip": 0.05, "params": {"fused_step": True}}
    add("fused_step", 2, Case("mini", 1, "bf16", poison=(1,), **fused), ("cpp",))
    add(
        "fused_step",
        2,
        Case("mini", 2, "bf16", tied=True, second_group=("word_embeddings", "layers.1."), **fused),
        ("cpp",),
    )
    add("fused_step", 1, Case("adamw", 2, "fp32", tied=True, **fused), ("cpp",))
    add("mutant", 1, Case("mini", 2, oracle_multipliers={"value": 4.01}, steps=2))
    return table


SUITE = Suite(run_case, _cases(), per_spawn=12, slow=takes_long)
outcome = SUITE.outcome()


@SUITE.cases("fed", "bf16_optimizer", "tied", "value_tensor", "by_role")
def test_tensor_parallel_values(outcome: Outcome, name: str) -> None:
    """Row-parallel weights would get each rank's own second moment, and replicas drift apart."""
    passes(outcome, name)


@SUITE.cases("muon")
def test_muon_under_tensor_parallelism(outcome: Outcome, name: str) -> None:
    """Shards of a role would be orthogonalised by themselves, fused gate and up as one matrix."""
    passes(outcome, name)


@SUITE.cases("lion")
def test_lion_under_tensor_parallelism(outcome: Outcome, name: str) -> None:
    """An element would get the multiplier that another rank's row has, or replicas drift apart."""
    passes(outcome, name)


@SUITE.cases("overflow")
def test_overflow_on_one_tensor_rank(outcome: Outcome, name: str) -> None:
    """A NaN on one tensor-parallel rank would let the others step alone, or hang them."""
    passes(outcome, name)


@SUITE.cases("clip")
def test_clipping_uses_the_whole_norm(outcome: Outcome, name: str) -> None:
    """The norm would miss a rank or count replicas twice, so TP would change the step size."""
    passes(outcome, name)


@SUITE.cases("fused_step")
def test_fused_step_sees_all_ranks(outcome: Outcome, name: str) -> None:
    """Its norm would miss a rank or count replicas twice, or a rank would step where another one skips."""
    passes(outcome, name)


@SUITE.cases("e2e")
def test_tp2_trains_like_tp1(outcome: Outcome, name: str) -> None:
    """Going to two tensor-parallel ranks would change the trained model."""
    passes(outcome, name)


@SUITE.cases("mutant")
def test_the_comparison_notices_a_wrong_multiplier(outcome: Outcome, name: str) -> None:
    """The tests above would prove nothing: a wrong multiplier inside linear_qkv must be seen."""
    notices_a_wrong_multiplier(outcome, name)
