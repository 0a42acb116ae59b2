# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's MoE layers: experts that other ranks do not have, against all experts on whole tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor, nn

from tests.helpers import models
from tests.helpers.deepspeed.compared import Compared, case_config, check_resume, hyper
from tests.helpers.deepspeed.engine_cases import betas_of
from tests.helpers.deepspeed.engines import DTYPES, masters, open_engine, prepare_deepspeed
from tests.helpers.deepspeed.expert_models import EXPERTS, build, classes_of, set_small_weights, whole_name
from tests.helpers.distributed import Outcome, RankContext, passes
from tests.helpers.models import Feed, GradientPlan
from tests.helpers.muon_oracle import oracle_for, tolerance_for
from tests.helpers.optimizers import FULL_NAME
from tests.helpers.oracle import ROLE_SETTINGS, told
from tests.helpers.suites import Suite, notices_a_wrong_multiplier

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")

Groups = Callable[[nn.Module], list[dict[str, Any]]]


def _split(model: nn.Module) -> list[dict[str, Any]]:
    """As DeepSpeed's tutorial does it."""
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    group = {"params": list(model.parameters()), "name": "parameters"}
    return split_params_into_different_moe_groups_for_optimizer(group)


def _small_groups(model: nn.Module) -> list[dict[str, Any]]:
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    group = {"params": list(model.parameters()), "name": "parameters"}
    return split_params_into_different_moe_groups_for_optimizer(group, max_group_size=3000)


def _unsplit(model: nn.Module) -> list[dict[str, Any]]:
    return [{"params": list(model.parameters())}]


def _marked_dense(model: nn.Module) -> list[dict[str, Any]]:
    return [{"params": list(model.parameters()), "name": "parameters", "moe": False}]


GROUPS: dict[str, Groups | None] = {
    "list": None,
    "split": _split,
    "small": _small_groups,
    "unsplit": _unsplit,
    "dense": _marked_dense,
}


@dataclass(frozen=True)
class Case:
    """A model with experts on ``ep`` of the ranks."""

    optimizer: str = "mini"
    stage: int = 1
    dtype: str = "fp32"
    ep: int = 2
    groups: str = "split"
    steps: int = 3
    residual: bool = False
    what: str = "trains"
    config: dict[str, Any] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)
    oracle_multipliers: dict[str, float] = field(default_factory=dict)
    expected: tuple[str, ...] = ()


@contextmanager
def engine_of(context: RankContext, case: Case) -> Iterator[SimpleNamespace]:
    from deepspeed.utils import groups

    own = {"backend": "cpp", "betas": list(betas_of(case.optimizer)), **case.params}
    config = case_config(case, params=own)
    ep_rank = context.rank % case.ep

    def make() -> nn.Module:
        model = build(case.ep, residual=case.residual)
        set_small_weights(model, case.ep, ep_rank)
        return model

    try:
        with open_engine(config, make, groups=GROUPS[case.groups], feed=False) as run:
            run.names = {id(p): n for n, p in run.model.named_parameters()}
            run.feed = Feed(run.model)
            run.ep_rank, run.expert_dp_rank = ep_rank, context.rank // case.ep
            run.whole = {n: whole_name(n, case.ep, ep_rank) for n in run.names.values()}
            yield run
    finally:
        for name in ("_EXPERT_PARALLEL_GROUP", "_EXPERT_DATA_PARALLEL_GROUP"):
            getattr(groups, name).clear()


def plans(context: RankContext, case: Case) -> tuple[GradientPlan, GradientPlan]:
    """Of the parameters that every rank has, and of experts."""
    dtype = DTYPES[case.dtype]
    return GradientPlan(context.world_size, 1, dtype), GradientPlan(context.world_size // case.ep, 1, dtype)


def is_expert(name: str) -> bool:
    return "deepspeed_experts" in name


def feed(run: SimpleNamespace, context: RankContext, case: Case, step: int) -> None:
    dense, expert = plans(context, case)
    shapes = {n: tuple(p.shape) for n, p in run.model.named_parameters()}
    run.feed.gradients = {
        n: expert.share(run.whole[n], s, step, run.expert_dp_rank)
        if is_expert(n)
        else dense.share(n, s, step, context.rank)
        for n, s in shapes.items()
    }
    run.engine.backward(run.engine())
    run.engine.step()


def run_case(context: RankContext, case: Case) -> None:
    """Entry of every rank."""
    prepare_deepspeed()
    import ds_blockwise  # noqa: F401 - registers the optimizers

    globals()[f"check_{case.what}"](context, case)


# ------------------------------------------------------------------------------------- the checks


def whole_masters(run: SimpleNamespace) -> dict[str, Tensor]:
    """fp32 weights under the names of the model whose experts are all on one rank."""
    return {run.whole[n]: w for n, w in masters(run).items()}


def check_trains(context: RankContext, case: Case) -> None:
    dense, expert = plans(context, case)
    with engine_of(context, case) as run:
        marks = [(g.get("name"), g.get("moe", False)) for g in run.engine.basic_optimizer.param_groups]
        assert any(moe for _, moe in marks) and not all(moe for _, moe in marks), marks
        everyone: list[Any] = [None] * context.world_size
        dist.all_gather_object(everyone, {n: tuple(w.shape) for n, w in whole_masters(run).items()})
        shapes = {name: shape for one in everyone for name, shape in one.items()}
        start = {n: models.small_weight(n, s).to(DTYPES[case.dtype]).float() for n, s in shapes.items()}
        classes = classes_of(residual=case.residual)
        assert set(shapes) == set(classes), set(shapes) ^ set(classes)
        own, settings = hyper(betas=betas_of(case.optimizer)), told(case.params, case.oracle_multipliers)
        oracle = oracle_for(case.optimizer, start, classes, own, **settings)
        pair = Compared(run, oracle, lambda whole: {n: whole[n] for n in run.whole.values()}, whole_masters)
        pair.check_start()
        for step in range(case.steps):
            pair.set_lr(step)
            feed(run, context, case, step)
            # an expert sees the tokens of all ranks: DeepSpeed divides their sum by all ranks, not by its copies
            gradients = {
                n: expert.mean(n, s, step) / case.ep if is_expert(n) else dense.mean(n, s, step)
                for n, s in shapes.items()
            }
            pair.check_step(gradients, what=f"step {step}", tolerance=tolerance_for(case.optimizer))
        assert marks == [(g.get("name"), g.get("moe", False)) for g in run.engine.basic_optimizer.param_groups]


def check_resumes(context: RankContext, case: Case) -> None:
    from ds_blockwise.hosts.deepspeed.checkpoint.inspect import convert_checkpoint, describe_checkpoint

    folder = context.tmp_path / f"moe-{case.stage}-{case.ep}-{case.optimizer}"

    def look() -> None:
        assert describe_checkpoint(folder)["problems"] == []
        with pytest.raises(ValueError, match=r"run with experts \(DeepSpeed's MoE\)"):
            convert_checkpoint(folder, folder / "portable")

    check_resume(lambda: engine_of(context, case), lambda run, step: feed(run, context, case, step), folder, look)
    (name, *_) = sorted(path.name for path in folder.rglob("*_expert_*_model_states.pt"))
    with engine_of(context, replace(case, config={"checkpoint": {"verify": "own"}})) as run:
        if context.rank == 0:
            (path,) = folder.rglob(name)
            spoilt = bytearray(whole := path.read_bytes())
            spoilt[len(spoilt) // 2] ^= 0x40
            path.write_bytes(spoilt)
        context.barrier()
        with pytest.raises(RuntimeError, match=f"{name}: its contents have changed"):
            run.engine.load_checkpoint(str(folder))
        context.barrier()
        if context.rank == 0:
            path.write_bytes(whole)
        context.barrier()
    other = Case(case.optimizer, case.stage, case.dtype, ep=3 - case.ep)
    with engine_of(context, other) as run, pytest.raises(ValueError, match=f"ep was {case.ep}, is {other.ep}"):
        run.engine.load_checkpoint(str(folder))


def check_refused(context: RankContext, case: Case) -> None:
    with pytest.raises(ValueError) as caught, engine_of(context, case):
        pass
    for text in case.expected:
        assert text in str(caught.value), f"{text!r} is not in {caught.value}"


# -------------------------------------------------------------------------------------- the table


def _cases() -> dict[str, tuple[int, Case]]:
    table: dict[str, tuple[int, Case]] = {}

    def add(kind: str, world: int, case: Case) -> None:
        name = f"{kind}-{case.groups}-z{case.stage}-{case.dtype}-{case.optimizer}-ep{case.ep}-world{world}"
        table[name] = (world, case)

    for optimizer, (stage, dtype) in product(("adamw", "mini", "lion"), ((0, "fp32"), (1, "bf16"), (2, "fp32"))):
        add("values", 2, Case(optimizer, stage, dtype))
        add("values", 4, Case(optimizer, stage, dtype))
    for stage, dtype in ((0, "bf16"), (1, "fp32"), (2, "bf16")):
        add("values", 2, Case("mini", stage, dtype, groups="list"))
        add("values", 2, Case("mini", stage, dtype, ep=1))
        add("values", 4, Case("mini", stage, dtype, groups="small"))
    for stage in (0, 1, 2):
        add("values", 4, Case("muon", stage))
    add("by_role", 4, Case("mini", 2, params=ROLE_SETTINGS))
    add("by_role", 2, Case("adamw", 1, "bf16", params=ROLE_SETTINGS))
    add("residual", 2, Case("mini", 2, residual=True))
    add("bf16_optimizer", 4, Case("mini", 1, "bf16", config={"data_types": {"grad_accum_dtype": "fp32"}}))
    add("resume", 2, Case("mini", 1, what="resumes"))
    add("resume", 2, Case("adamw", 2, ep=1, what="resumes"))
    add("resume", 2, Case("mini", 0, what="resumes"))
    add("resume", 2, Case("lion", 2, what="resumes"))
    add("resume", 2, Case("muon", 1, what="resumes"))
    unsplit = ('"name"', "split_params_into_different_moe_groups_for_optimizer")
    add("refused", 2, Case("mini", 1, groups="unsplit", what="refused", expected=unsplit))
    add("refused", 2, Case("mini", 2, groups="dense", what="refused", expected=unsplit[1:]))
    for optimizer in FULL_NAME:
        add("refused", 2, Case(optimizer, 3, what="refused", expected=("experts", "ZeRO stage 1 or 2")))
    clip = {"gradient_clipping": 1.0}
    add("refused", 2, Case("mini", 0, "bf16", what="refused", config=clip, expected=("gradient_clipping", "experts")))
    fused = {"params": {"fused_step": True}, "expected": ('"fused_step": true', "MoE layers", '"fused_step": false')}
    add("refused", 2, Case("mini", 2, "bf16", what="refused", **fused))
    for optimizer, ffn in (("mini", 6.01), ("lion", 6.01), ("muon", 1.01)):
        add("mutant", 2, Case(optimizer, 2, oracle_multipliers={"ffn": ffn}, steps=2))
    return table


CASES = _cases()
SUITE = Suite(run_case, CASES)
outcome = SUITE.outcome()


@SUITE.cases("values", "residual", "bf16_optimizer", "by_role")
def test_experts_train_like_whole_tensors(outcome: Outcome, name: str) -> None:
    """An expert's blocks would be summed with those of the experts of other ranks."""
    passes(outcome, name)


@SUITE.cases("resume")
def test_resume_is_bitwise_and_convert_is_refused(outcome: Outcome, name: str) -> None:
    """One rank's experts would go on with another's moments."""
    passes(outcome, name)


@SUITE.cases("refused")
def test_what_cannot_train_is_refused(outcome: Outcome, name: str) -> None:
    """Forgotten groups end in an assertion, a KeyError, or experts that are averaged over all ranks."""
    passes(outcome, name)


@SUITE.cases("mutant")
def test_the_comparison_notices_a_wrong_multiplier(outcome: Outcome, name: str) -> None:
    """The tests above would prove nothing."""
    notices_a_wrong_multiplier(outcome, name)


def test_the_table_has_several_experts_per_rank() -> None:
    """With one expert on each rank, local and whole numbers could not be confused."""
    assert {EXPERTS // case.ep for _, case in CASES.values()} == {2, 4}
