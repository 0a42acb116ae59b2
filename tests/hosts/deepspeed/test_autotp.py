# SPDX-License-Identifier: Apache-2.0
"""AutoTP: Hugging Face models that DeepSpeed splits because the JSON says so, against whole tensors."""

from __future__ import annotations

from importlib.util import find_spec
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.helpers import models
from tests.helpers.deepspeed.autotp_engines import DECAY_MULTIPLIERS, Case, engine_of, feed, held
from tests.helpers.deepspeed.autotp_models import classes_of, cut
from tests.helpers.deepspeed.compared import Compared, hyper
from tests.helpers.deepspeed.engine_cases import betas_of
from tests.helpers.deepspeed.engines import DTYPES, prepare_deepspeed
from tests.helpers.distributed import Outcome, RankContext, passes
from tests.helpers.models import GradientPlan
from tests.helpers.muon_oracle import oracle_for, tolerance_for
from tests.helpers.oracle import ROLE_SETTINGS, Weights, clipped, told
from tests.helpers.suites import Suite, notices_a_wrong_multiplier
from tests.helpers.tables.oracle_names import ROLE, regroup

_MISSING = [name for name in ("deepspeed", "transformers") if find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(_MISSING), reason="needs deepspeed and transformers")


def run_case(context: RankContext, case: Case) -> None:
    """Entry of every rank."""
    prepare_deepspeed()
    import ds_blockwise  # noqa: F401 - registers the optimizers

    plan = GradientPlan(context.world_size // case.tp, 1, DTYPES[case.dtype])
    with engine_of(context, case) as run:
        start = {n: models.small_weight(n, s).to(DTYPES[case.dtype]).float() for n, s in run.shapes.items()}
        classes = classes_of(case.model)
        for key, role in case.granularity.items():
            classes = regroup(classes, key, {"tensor": ROLE}[role])
        oracle = oracle_for(
            case.optimizer,
            start,
            classes,
            hyper(betas=betas_of(case.optimizer)),
            weight_decay_multipliers=DECAY_MULTIPLIERS,
            **told(case.params, case.oracle_multipliers),
        )

        def part(whole: Weights) -> dict[str, Tensor]:
            found = {n: cut(case.model, n, w, run.tp_rank, case.tp) for n, w in whole.items()}
            return {n: w for n, w in found.items() if w.numel()}

        pair = Compared(run, oracle, part, held)
        pair.check_start()
        for step in range(case.steps):
            pair.set_lr(step)
            feed(run, plan, step)
            gradients = {n: plan.mean(n, s, step) for n, s in run.shapes.items()}
            gradients = clipped(gradients, case.clip) if case.clip else gradients
            what = f"step {step}, tensor-parallel rank {run.tp_rank}"
            pair.check_step(gradients, what=what, tolerance=tolerance_for(case.optimizer))
        check_replicas(run, pair.now)


def check_replicas(run: Any, weights: dict[str, Tensor]) -> None:
    """What every tensor-parallel rank holds whole must be the same to the last bit."""
    group = run.engine.mpu.get_tensor_model_parallel_group()
    whole = [name for name, weight in weights.items() if tuple(weight.shape) == run.shapes[name]]
    everyone: list[Any] = [None] * run.tp
    dist.all_gather_object(everyone, {name: weights[name] for name in whole}, group=group)
    common = set.intersection(*(set(one) for one in everyone))
    assert any("norm" in name for name in common)
    different = [n for n in common if any(not torch.equal(one[n], everyone[0][n]) for one in everyone)]
    assert not different, f"copies of the tensor-parallel ranks differ: {different}"


# -------------------------------------------------------------------------------------- the table

BF16_OPTIMIZER = {"data_types": {"grad_accum_dtype": "fp32"}}
WRAPPERS = ((0, "fp32"), (0, "bf16"), (1, "fp32"), (1, "bf16"), (2, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16"))


def _cases() -> dict[str, tuple[int, Case]]:
    table: dict[str, tuple[int, Case]] = {}

    def add(kind: str, dp: int, case: Case) -> None:
        name = f"{kind}-{case.model}-z{case.stage}-{case.dtype}-{case.optimizer}-tp{case.tp}-dp{dp}"
        table[name] = (case.tp * dp, case)

    for optimizer, (stage, dtype) in product(("adamw", "mini", "lion"), WRAPPERS):
        # fp32 and bf16 take turns on one and two data-parallel ranks; ZeRO-0 has one kind of data parallelism
        add("values", 1 + (stage + (dtype == "bf16")) % 2 if stage else 1, Case(optimizer, stage, dtype))
    for stage, dp in ((0, 1), (1, 2), (3, 2)):
        add("values", dp, Case("mini", stage, model="even"))
    for stage, dp in ((0, 1), (1, 2), (2, 1)):
        add("values", dp, Case("mini", stage, model="mqa"))
    add("values", 1, Case("mini", 0, "bf16", model="mqa"))
    add("values", 2, Case("adamw", 1, model="mqa"))
    for model in ("qwen2", "thirds", "neox", "glm", "attention", "tied"):
        add("values", 1, Case("mini", 2, "bf16", model))
        add("values", 2, Case("adamw" if model in ("glm", "neox") else "mini", 1, model=model))
    add("values", 1, Case("mini", 1, model="qwen3", tp=4))
    for model, stage, dp in (("even", 1, 1), ("mqa", 2, 2), ("glm", 1, 2), ("qwen3", 3, 2), ("neox", 0, 1)):
        add("values", dp, Case("muon", stage, model=model))
    add("values", 1, Case("muon", 1, model="qwen3", tp=4))
    for model, stage, dtype, dp in (("mqa", 2, "bf16", 2), ("glm", 1, "fp32", 1), ("neox", 0, "fp32", 1)):
        add("values", dp, Case("lion", stage, dtype, model))
    add("bf16_optimizer", 2, Case("mini", 1, "bf16", config=BF16_OPTIMIZER))
    add("sub_groups", 2, Case("mini", 3, model="even", zero={"sub_group_size": 700}))
    add("zero_init", 1, Case("mini", 3, model="even", zero_init=True))
    add("zero_init", 2, Case("mini", 3, "bf16", model="qwen2", zero_init=True))
    for model, stage, dp in (("qwen3", 0, 1), ("qwen3", 1, 2), ("neox", 2, 1), ("qwen2", 3, 1)):
        add(
            "granularity",
            dp,
            Case("mini", stage, model=model, granularity={"value": "tensor", "bias": "tensor", "norm": "tensor"}),
        )
    for stage, dp in ((0, 1), (1, 2), (3, 2)):
        add("clip", dp, Case("mini", stage, clip=0.05))
    for optimizer, stage, dtype, dp in (("mini", 1, "bf16", 2), ("adamw", 2, "fp32", 1)):
        add("fused_step", dp, Case(optimizer, stage, dtype, clip=0.05, params={"fused_step": True}))
    for optimizer, stage, dp, model in (("mini", 1, 2, "qwen3"), ("mini", 3, 2, "even"), ("adamw", 2, 1, "mqa")):
        add("by_role", dp, Case(optimizer, stage, model=model, params=ROLE_SETTINGS, steps=4))
    add("mutant", 1, Case("mini", 2, oracle_multipliers={"value": 4.01}, steps=2))
    add("mutant", 1, Case("lion", 2, oracle_multipliers={"value": 4.01}, steps=2))
    return table


SUITE = Suite(run_case, _cases())
outcome = SUITE.outcome()


@SUITE.cases("values", "bf16_optimizer", "sub_groups", "zero_init", "by_role")
def test_autotp_trains_like_whole_tensors(outcome: Outcome, name: str) -> None:
    """Columns of a row-parallel weight would get each rank's own second moment, and uneven heads the wrong rows."""
    passes(outcome, name)


@SUITE.cases("granularity")
def test_blocks_over_several_ranks(outcome: Outcome, name: str) -> None:
    """One block for all of V, or for a bias, would be one block per rank."""
    passes(outcome, name)


@SUITE.cases("clip", "fused_step")
def test_clipping_uses_the_whole_norm(outcome: Outcome, name: str) -> None:
    """The norm would miss a rank or count replicas twice, so AutoTP would change the step size."""
    passes(outcome, name)


@SUITE.cases("mutant")
def test_the_comparison_notices_a_wrong_multiplier(outcome: Outcome, name: str) -> None:
    """The tests above would prove nothing."""
    notices_a_wrong_multiplier(outcome, name)
