# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's sequence parallelism (Ulysses): ranks that share one sequence, its gradients and ZeRO's partitions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import models
from tests.helpers.deepspeed.compared import Compared, case_config, check_counters, check_resume, hyper
from tests.helpers.deepspeed.engine_cases import LR, MODELS, betas_of
from tests.helpers.deepspeed.engines import DTYPES, forget_groups, masters, open_engine, prepare_deepspeed, true_shape
from tests.helpers.distributed import Outcome, RankContext, passes
from tests.helpers.models import Feed, GradientPlan
from tests.helpers.muon_oracle import oracle_for, tolerance_for, trained_tolerance_for
from tests.helpers.optimizers import FULL_NAME
from tests.helpers.oracle import ROLE_SETTINGS, LionOracle, assert_same_update, told
from tests.helpers.suites import Suite, notices_a_wrong_multiplier
from tests.helpers.tables.oracle_names import hf_llama_classes

_MISSING = [name for name in ("deepspeed", "transformers") if find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(_MISSING), reason="needs deepspeed and transformers")
SP = 2


@dataclass(frozen=True)
class Case:
    """A model on two ranks per sequence; the rest of the world is data-parallel."""

    optimizer: str = "mini"
    stage: int = 1
    dtype: str = "fp32"
    steps: int = 3
    what: str = "fed"
    expected: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)
    oracle_multipliers: dict[str, float] = field(default_factory=dict)


def _config(case: Case) -> dict[str, Any]:
    # end to end an element far below eps keeps the noise of two runs below eps
    eps = {"eps": 1e-3} if case.what == "end_to_end" and case.optimizer == "adamw" else {}
    own = {"backend": "cpp", "betas": list(betas_of(case.optimizer))}
    return case_config(case, params=own | eps | case.params)


@contextmanager
def sequence_parallel() -> Iterator[Any]:
    """DeepSpeed's groups, as an mpu."""
    from deepspeed.runtime.sequence_parallel import parallel_state_sp as mpu

    mpu.initialize_sequence_parallel(SP)
    try:
        yield mpu
    finally:
        mpu._release_sequence_parallel_groups()


def run_case(context: RankContext, case: Case) -> None:
    """Entry of every rank."""
    prepare_deepspeed()
    import deepspeed

    import ds_blockwise  # noqa: F401 - registers the optimizers

    deepspeed.init_distributed()
    globals()[f"check_{case.what}"](context, case)


# ------------------------------------------------------------------------------------- the checks


def check_fed(context: RankContext, case: Case) -> None:
    make, classes = MODELS["qwen3"]
    plan = GradientPlan(context.world_size, 1, DTYPES[case.dtype])
    with (
        sequence_parallel() as mpu,
        open_engine(_config(case), lambda: models.set_small_weights(make()), mpu=mpu, feed=False) as run,
    ):
        run.feed = Feed(run.model)
        settings = told(case.params, case.oracle_multipliers)
        own = hyper(betas=betas_of(case.optimizer))
        pair = Compared(run, oracle_for(case.optimizer, masters(run), classes, own, **settings))
        for step in range(case.steps):
            pair.set_lr(step)
            shapes = _feed(context, run, plan, step)
            gradients = {n: _factor(run) * plan.mean(n, s, step) for n, s in shapes.items()}
            pair.check_step(gradients, what=f"step {step}", tolerance=tolerance_for(case.optimizer))


def _feed(context: RankContext, run: SimpleNamespace, plan: GradientPlan, step: int) -> dict[str, tuple[int, ...]]:
    """One step on this rank's share of the planned gradients; the shapes of what is trained."""
    shapes = {n: true_shape(p) for n, p in run.model.named_parameters()}
    run.feed.gradients = {n: plan.share(n, s, step, context.rank) for n, s in shapes.items()}
    run.engine.backward(run.engine())
    run.engine.step()
    return shapes


def _factor(run: SimpleNamespace) -> int:
    """A rank's gradient is that of its part of the sequence. DeepSpeed adds the parts; at ZeRO-3 it averages them."""
    return 1 if type(run.engine.optimizer).__name__ == "DeepSpeedZeroOptimizer_Stage3" else SP


def check_end_to_end(context: RankContext, case: Case) -> None:
    """Ulysses' attention in a Hugging Face model against the same sequences on whole ranks."""
    batches = _batches(case)
    with open_engine(_config(case), _llama, feed=False) as run:
        whole = _train(run, [(tokens[:, :-1], tokens[:, 1:]) for tokens in batches], None)
    with _split_llama(case) as run:
        part = _part(context)
        pieces = [(tokens[:, :-1][:, part], tokens[:, 1:][:, part]) for tokens in batches]
        parts = _train(run, pieces, torch.arange(8)[None, part])
    for step, (expected, actual) in enumerate(zip(whole, parts, strict=True)):
        # 1e-4: sums run in another order; an element far below eps keeps that noise below eps
        assert_same_update(actual, expected, LR, tolerance=1e-4, what=f"step {step}")


def check_by_autograd(context: RankContext, case: Case) -> None:
    """The same for updates that magnify the last bits of a gradient: each step begins with the engine's weights."""
    alone, part = _llama("eager"), _part(context)
    classes = hf_llama_classes(layers=2, hidden=12, heads=2, kv_heads=2, head_dim=6, ffn=21, vocab=37)
    with _split_llama(case) as run:
        own = hyper(betas=betas_of(case.optimizer))
        settings = told(case.params, case.oracle_multipliers)
        pair = Compared(run, oracle_for(case.optimizer, masters(run), classes, own, **settings))
        if isinstance(pair.oracle, LionOracle):
            pair.oracle.noise = 1e-9
        for step, tokens in enumerate(_batches(case)):
            pair.set_lr(step)
            pair.oracle.set_weights(pair.now)
            alone.load_state_dict(pair.now)
            alone.zero_grad()
            _loss(alone(input_ids=tokens[:, :-1]).logits, tokens[:, 1:]).backward()
            _step(run, tokens[:, :-1][:, part], tokens[:, 1:][:, part], torch.arange(8)[None, part])
            gradients = {n: p.grad for n, p in alone.named_parameters()}
            pair.check_step(gradients, what=f"step {step}", tolerance=trained_tolerance_for(case.optimizer))


def _batches(case: Case) -> list[Tensor]:
    return [torch.randint(1, 37, (1, 9), generator=torch.Generator().manual_seed(step)) for step in range(case.steps)]


def _part(context: RankContext) -> slice:
    return slice(4 * (context.rank % SP), 4 * (context.rank % SP) + 4)


def _llama(attention: str = "sdpa") -> nn.Module:
    return models.set_small_weights(models.llama(attn_implementation=attention, num_key_value_heads=2))


@contextmanager
def _split_llama(case: Case) -> Iterator[SimpleNamespace]:
    model = _llama()
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    usual = ALL_ATTENTION_FUNCTIONS["sdpa"]
    mpu = UlyssesSPAttentionHF.register_with_transformers(model, "sdpa", SP, 1, seq_length_is_variable=True)
    try:
        with open_engine(_config(case), lambda: model, mpu=mpu, feed=False) as run:
            yield run
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = usual
        mpu._release_sequence_parallel_groups()


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean over the whole sequence, of which a rank adds its tokens' share."""
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum") / 8


def _step(run: SimpleNamespace, tokens: Tensor, targets: Tensor, positions: Tensor | None) -> None:
    more = {} if positions is None else {"position_ids": positions}
    # parts that are averaged have to be as large as the whole
    scale = 1 if positions is None else SP // _factor(run)
    run.engine.backward(scale * _loss(run.engine(input_ids=tokens, **more).logits, targets))
    run.engine.step()


def _train(
    run: SimpleNamespace, batches: list[tuple[Tensor, Tensor]], positions: Tensor | None
) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    history = []
    now = masters(run)
    for step, (tokens, targets) in enumerate(batches):
        _step(run, tokens, targets, positions)
        before, now = now, masters(run)
        history.append((before, now))
        check_counters(run, step + 1)
    return history


def check_resumes(context: RankContext, case: Case) -> None:
    """The mpu calls sequence-parallel ranks model-parallel; files must not be looked for as if they were."""
    make, _ = MODELS["qwen3"]
    plan = GradientPlan(context.world_size, 1)
    folder = context.tmp_path / f"sp-{case.stage}"

    @contextmanager
    def opened() -> Iterator[SimpleNamespace]:
        with (
            sequence_parallel() as mpu,
            open_engine(_config(case), lambda: models.set_small_weights(make()), mpu=mpu, feed=False) as run,
        ):
            run.feed = Feed(run.model)
            yield run

    def look() -> None:
        from ds_blockwise.hosts.deepspeed.checkpoint.inspect import describe_checkpoint

        found = describe_checkpoint(folder)
        assert found["problems"] == [], found["problems"]

    check_resume(opened, lambda run, step: _feed(context, run, plan, step), folder, look)


def check_refused(context: RankContext, case: Case) -> None:
    """With DeepSpeed's mpu, or with the JSON's own groups."""
    from deepspeed.utils import groups

    make, _ = MODELS["qwen3"]
    own_groups = sequence_parallel() if "sequence_parallel_size" not in case.config else nullcontext()
    try:
        with (
            own_groups as mpu,
            pytest.raises(ValueError, match=case.expected),
            open_engine(_config(case), make, mpu=mpu, feed=False),
        ):
            pass
    finally:
        groups.mesh_device = None
        forget_groups()


# -------------------------------------------------------------------------------------- the table


def _cases() -> dict[str, tuple[int, Case]]:
    table: dict[str, tuple[int, Case]] = {}

    def add(kind: str, dp: int, case: Case) -> None:
        table[f"{kind}-z{case.stage}-{case.dtype}-{case.optimizer}-sp2-dp{dp}"] = (SP * dp, case)

    for optimizer, stage, dp in product(("adamw", "mini"), (0, 1, 2, 3), (1, 2)):
        add("fed", dp, Case(optimizer, stage, "bf16" if (stage + dp) % 2 else "fp32"))
    for optimizer, (stage, dp) in product(("lion", "muon"), ((0, 1), (1, 1), (1, 2), (2, 1), (3, 1), (3, 2))):
        add("fed", dp, Case(optimizer, stage, "bf16" if (stage + dp) % 2 else "fp32"))
    add("by_role", 2, Case("mini", 2, params=ROLE_SETTINGS))
    add("fused_step", 2, Case("mini", 2, "bf16", params={"fused_step": True}))
    for optimizer, stage in (("mini", 1), ("adamw", 2), ("mini", 3)):
        add("end_to_end", 1, Case(optimizer, stage, what="end_to_end"))
    for optimizer, stage in product(("lion", "muon"), (2, 3)):
        add("end_to_end", 1, Case(optimizer, stage, what="by_autograd"))
    add("resume", 1, Case("mini", 2, what="resumes"))
    accumulate = {"data_types": {"grad_accum_dtype": "fp32"}}
    for optimizer in FULL_NAME:
        for dp in (1, 2):
            json = {"sequence_parallel_size": SP, "data_parallel_size": dp}
            add("refused", dp, Case(optimizer, 1, what="refused", config=json, expected="drift apart.*register_with"))
        add("refused", 2, Case(optimizer, 1, "bf16", what="refused", config=accumulate, expected="BF16_Optimizer"))
    add("mutant", 1, Case("mini", 2, oracle_multipliers={"value": 4.01}, steps=2))
    for optimizer, value in (("lion", 0.51), ("muon", 1.1)):
        wrong = Case(optimizer, 2, what="by_autograd", oracle_multipliers={"value": value}, steps=1)
        add("mutant", 1, wrong)
    return table


SUITE = Suite(run_case, _cases())
outcome = SUITE.outcome()


@SUITE.cases("fed", "by_role", "fused_step")
def test_sequence_parallel_values(outcome: Outcome, name: str) -> None:
    """Blocks would be summed over the ranks of one sequence as if each held other columns, or over too few ranks."""
    passes(outcome, name)


@SUITE.cases("end_to_end")
def test_half_a_sequence_per_rank_trains_like_whole_ones(outcome: Outcome, name: str) -> None:
    """Turning sequence parallelism on would change the trained model."""
    passes(outcome, name)


@SUITE.cases("resume")
def test_resume_is_bitwise(outcome: Outcome, name: str) -> None:
    """A long-context run could not be resumed."""
    passes(outcome, name)


@SUITE.cases("refused")
def test_what_does_not_share_gradients_is_refused(outcome: Outcome, name: str) -> None:
    """Every rank of a sequence would train a model of its own without any sign, or wait for one that has failed."""
    passes(outcome, name)


@SUITE.cases("mutant")
def test_the_comparison_notices_a_wrong_multiplier(outcome: Outcome, name: str) -> None:
    """The tests above would prove nothing."""
    notices_a_wrong_multiplier(outcome, name)
