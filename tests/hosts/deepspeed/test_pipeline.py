# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's PipelineModule in its own engine: values against the unpiped model, tied weights, rules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.helpers.deepspeed.compared import Compared, case_config, hyper
from tests.helpers.deepspeed.engine_cases import EPS, FULL_NAME, LR, betas_of
from tests.helpers.deepspeed.engines import DTYPES, masters, open_engine, prepare_deepspeed
from tests.helpers.deepspeed.guarded import raised
from tests.helpers.deepspeed.pipe_checks import check_checkpoint, check_experts, check_grid
from tests.helpers.deepspeed.pipe_models import (
    LAYERS,
    TIED,
    VOCAB,
    PipeFeed,
    Unpiped,
    loss_of,
    pipe,
    pipe_classes,
    train_step,
)
from tests.helpers.distributed import Outcome, RankContext, passes
from tests.helpers.models import GradientPlan
from tests.helpers.muon_oracle import oracle_for, tolerance_for, trained_tolerance_for
from tests.helpers.optimizers import SHORT_NAMES
from tests.helpers.oracle import ROLE_SETTINGS, LionOracle, clipped, told
from tests.helpers.suites import Suite, notices_a_wrong_multiplier

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")

STAGES, MICRO = 2, 2
FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}
UNIT_TOKENS = [torch.zeros(1, 4, dtype=torch.long)] * MICRO  # what is fed does not depend on tokens


@dataclass(frozen=True)
class Case:
    """A pipeline of two stages; the rest of the world is data-parallel."""

    optimizer: str = "mini"
    stage: int = 1
    dtype: str = "fp32"
    config: dict[str, Any] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)
    wrapper: str = "DeepSpeedZeroOptimizer"
    poison: tuple[int, ...] = ()  # steps at which rank 0, on the first stage, finds a NaN
    oracle_multipliers: dict[str, float] = field(default_factory=dict)


def config_of(case: Case) -> dict[str, Any]:
    return case_config(case, gas=MICRO, params={"betas": list(betas_of(case.optimizer))} | case.params)


def start(own_head: bool = False) -> Callable[[], nn.Module]:
    """Builds the pipeline; first thing in a worker."""
    prepare_deepspeed()
    import ds_blockwise  # noqa: F401 - registers the optimizers

    return lambda: pipe(own_head=own_head)


# ------------------------------------------------------------------------------------- the checks


def check_values(context: RankContext, case: Case) -> None:
    """Planned gradients through the real schedule, against the oracle on whole tensors of the unpiped model."""
    with open_engine(config_of(case), start(), feed=False) as run:
        assert type(run.engine).__name__ == "PipelineEngine"
        assert type(run.engine.optimizer).__name__ == (case.wrapper or FULL_NAME[case.optimizer])
        feed = PipeFeed(run.engine, GradientPlan(context.world_size // STAGES, MICRO, DTYPES[case.dtype]))
        shapes = {name: tuple(p.shape) for name, p in Unpiped().named_parameters()}
        own = masters(run)
        assert sorted({n for names in gathered(list(own)) for n in names}) == sorted(shapes)
        pair = beside_oracle(run, case)
        for step in range(4):
            feed.step, feed.poison = step, step in case.poison and context.rank == 0
            pair.set_lr(step)
            train_step(run, UNIT_TOKENS)
            if step in case.poison:
                pair.check_skipped()
                continue
            gradients = {name: feed.mean(name, shape, step) for name, shape in shapes.items()}
            clip = case.config.get("gradient_clipping")
            gradients = clipped(gradients, clip) if clip else gradients
            what = f"step {step}, rank {context.rank}"
            pair.check_step(gradients, what=what, tolerance=tolerance_for(case.optimizer))
            check_copies(run)


def beside_oracle(run: SimpleNamespace, case: Case) -> Compared:
    """The engine beside an oracle on the weights of all stages; each rank compares its own."""
    own = masters(run)
    own_hyper = hyper(eps=case.params.get("eps", EPS), betas=betas_of(case.optimizer))
    settings = told(case.params, case.oracle_multipliers)
    oracle = oracle_for(case.optimizer, of_all_stages(own), pipe_classes(), own_hyper, **settings)
    return Compared(run, oracle, lambda weights: {n: weights[n] for n in own})


def check_training(context: RankContext, case: Case) -> None:
    """Real forward and backward over 24 steps: the first against autograd's gradients, the copies after each."""
    dp, unpiped = context.world_size // STAGES, Unpiped()
    with open_engine(config_of(case), start(), feed=False) as run:
        pair = beside_oracle(run, case)
        first, magnifies = pair.now, case.optimizer in ("lion", "muon")  # the last bits of a gradient
        if isinstance(pair.oracle, LionOracle):
            pair.oracle.noise = 1e-9
        for step in range(24):
            batches = torch.randint(VOCAB, (dp * MICRO, 2, 9), generator=torch.Generator().manual_seed(step))
            mine = run.engine.grid.get_data_parallel_id() * MICRO
            train_step(run, list(batches[mine : mine + MICRO]))
            check_copies(run)
            if step < 2 and case.dtype == "fp32":
                if magnifies:
                    pair.oracle.set_weights(of_all_stages(pair.now))
                unpiped.load_state_dict(pair.oracle.weights())
                unpiped.zero_grad()
                for tokens in batches:
                    (loss_of(unpiped(tokens), tokens) / len(batches)).backward()
                gradients = {n: p.grad for n, p in unpiped.named_parameters()}
                pair.check_step(gradients, tolerance=trained_tolerance_for(case.optimizer), what=f"step {step}")
        now = masters(run)
        moved = (now[TIED] - first[TIED]).abs().max() if TIED in now else torch.ones(())
        assert float(moved) > 10 * LR, "the embedding hardly moved: its copies prove nothing"


def check_copies(run: SimpleNamespace) -> None:
    """Model weights and fp32 masters of the tied embedding are the same bits on every rank."""
    own = next(p for p in run.model.tied_modules.parameters())
    copies = gathered((own.detach().clone(), masters(run)[run.names[id(own)]]))
    for copy in copies:
        assert all(torch.equal(a, b) for a, b in zip(copy, copies[0], strict=True)), "the tied copies drifted apart"


def of_all_stages(own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: weight for weights in gathered(own) for name, weight in weights.items()}


def gathered(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


# ----------------------------------------------------------------------------------- rules, refusals


def check_rules(context: RankContext, _: None) -> None:
    """A rule for one stage reaches its parameter, and the other stage does not mind."""
    multiplier = 3.5
    case = Case(params={"rules": [{"match": r"^1\.mlp\.c_fc\.weight", "lr_multiplier": multiplier}]})
    with open_engine(config_of(case), start(), feed=False) as run:
        found = {
            part.update.lr_multiplier
            for name, p in run.model.named_parameters()
            if name == "1.mlp.c_fc.weight"
            for part in p.block_spec.parts
        }
        assert found == ({multiplier} if context.rank < context.world_size // STAGES else set())
    for match in ("no such layer", rf"^{LAYERS + 9}\."):
        case = Case(params={"rules": [{"match": match, "role": "ffn"}]})
        refused(case, f"rule {match!r} matches no parameter of any pipeline stage")


def check_tied_mismatch(context: RankContext, optimizer: str) -> None:
    """Copies that would be stepped differently are an error on every rank; one rule for both is the way out."""
    text = refused(Case(optimizer), "tied weight 'embed'", own_head=True)
    for words in ("tied_modules.embed.word_embeddings.weight' as embedding", "lm_head.weight' as output", '"rules"'):
        assert words in text, text
    one_only = {"rules": [{"match": "tied_modules.embed.lm_head", "role": "embedding", "lr_multiplier": 2}]}
    refused(Case(optimizer, params=one_only), "lr x2", own_head=True)
    both = {"rules": [{"match": r"tied_modules\.embed\.", "role": "embedding"}]}
    case = Case(optimizer, params=both)
    with open_engine(config_of(case), start(own_head=True), feed=False) as run:
        for step in range(3):
            train_step(run, [torch.randint(VOCAB, (1, 6), generator=torch.Generator().manual_seed(step))] * MICRO)
            check_copies(run)
    refused(Case(optimizer), "weight_decay 0.1", own_groups=True)


def check_stages(context: RankContext, optimizer: str) -> None:
    """ZeRO-2 and 3 cannot work, which upstream says after everything was built; ``fused_step`` was not compared."""
    for stage in (2, 3):
        refused(Case(optimizer, stage), f'"stage": {stage}', "PipelineModule", 'Set "stage": 1')
    if optimizer in SHORT_NAMES.values():
        fused = Case(optimizer, params={"fused_step": True})
        refused(fused, '"fused_step": true', "PipelineModule", '"fused_step": false')


def refused(case: Case, *words: str, own_head: bool = False, own_groups: bool = False) -> str:
    """The error of ``deepspeed.initialize``, which every rank must get."""

    def groups(model: nn.Module) -> list[dict[str, Any]]:
        tied = list(model.tied_modules.parameters())
        others = [p for p in model.parameters() if all(p is not t for t in tied)]
        decay = {} if dist.get_rank() < dist.get_world_size() // STAGES else {"weight_decay": 0.0}
        return [{"params": others}, {"params": tied, **decay}]

    def opened() -> None:
        with open_engine(config_of(case), start(own_head), feed=False, groups=groups if own_groups else None):
            pass

    text = raised(opened, ValueError)
    for word in words:
        assert word in text, text
    return text


# -------------------------------------------------------------------------------------- the table

CHECKS = {
    "values": check_values,
    "clip": check_values,
    "by_role": check_values,
    "overflow": check_values,
    "mutant": check_values,
    "training": check_training,
    "rules": check_rules,
    "tied": check_tied_mismatch,
    "stages": check_stages,
    "checkpoint": check_checkpoint,
    "grid": check_grid,
    "experts": check_experts,
}
WRAPPERS = {
    "z0-fp32": Case(stage=0, wrapper=""),
    "z0-bf16": Case(stage=0, dtype="bf16", wrapper="BF16_Optimizer"),
    "z1-fp32": Case(),
    "z1-bf16": Case(dtype="bf16"),
    "z1-bf16-fp32sums": Case(dtype="bf16", config=FP32_SUMS, wrapper="BF16_Optimizer"),
}


def run_case(context: RankContext, case: tuple[str, Any]) -> None:
    """Entry of every rank."""
    kind, what = case
    CHECKS[kind](context, what)


def _cases() -> dict[str, tuple[int, tuple[str, Any]]]:
    table: dict[str, tuple[int, tuple[str, Any]]] = {}

    def add(kind: str, wrapper: str, optimizer: str = "mini", dp: int = 1, **changes: Any) -> None:
        case = replace(WRAPPERS[wrapper], optimizer=optimizer, **changes)
        table[f"{kind}-{wrapper}-{optimizer}-pp{STAGES}-dp{dp}"] = (STAGES * dp, (kind, case))

    for optimizer in FULL_NAME:
        for wrapper in WRAPPERS:
            add("values", wrapper, optimizer)
    for optimizer, wrapper in (
        ("mini", "z1-fp32"),
        ("mini", "z1-bf16-fp32sums"),
        ("mini", "z0-bf16"),
        ("adamw", "z1-bf16"),
        ("muon", "z1-fp32"),
        ("lion", "z1-bf16"),
    ):
        add("values", wrapper, optimizer, dp=2)
    add("by_role", "z1-fp32", dp=2, params=ROLE_SETTINGS)
    add("by_role", "z0-bf16", "adamw", params=ROLE_SETTINGS)
    add("clip", "z1-fp32", dp=2, config={"gradient_clipping": 0.05})
    add("overflow", "z0-fp32", poison=(0, 2))
    for optimizer in ("mini", "lion", "muon"):
        add("overflow", "z1-bf16", optimizer, poison=(0, 2))
    for optimizer, value in (("mini", 4.01), ("lion", 0.501), ("muon", 1.01)):
        add("mutant", "z1-fp32", optimizer, oracle_multipliers={"value": value})
    for optimizer in FULL_NAME:
        add("training", "z1-bf16-fp32sums", optimizer)
    add("training", "z1-fp32", "adamw", params={"eps": 1e-3})
    add("training", "z1-fp32", dp=2)
    add("training", "z1-fp32", "lion")
    add("training", "z1-fp32", "muon", dp=2)
    table[f"rules-pp{STAGES}-dp1"] = (STAGES, ("rules", None))
    for kind, optimizer in product(("tied", "stages"), FULL_NAME):
        table[f"{kind}-{optimizer}-pp{STAGES}-dp1"] = (STAGES, (kind, optimizer))
    sums = {"stage": 1, "dtype": "bf16", **FP32_SUMS}
    for name, dp, what in (
        ("mini", 1, sums),
        ("adamw", 1, {"stage": 0}),
        ("mini", 2, {"stage": 1}),
        ("lion", 1, sums),
        ("muon", 2, {"stage": 1}),
    ):
        table[f"checkpoint-z{what['stage']}-{name}-pp{STAGES}-dp{dp}"] = (STAGES * dp, ("checkpoint", (name, what)))
    for name in FULL_NAME:
        table[f"experts-z1-{name}-dp2"] = (2, ("experts", name))
        table[f"grid-{name}-tp2-pp{STAGES}"] = (2 * STAGES, ("grid", name))
    return table


SUITE = Suite(run_case, _cases(), per_spawn=20)
outcome = SUITE.outcome()


@SUITE.cases("values", "clip", "by_role")
def test_values_of_a_pipeline(outcome: Outcome, name: str) -> None:
    """A stage would step with another stage's blocks, or sum blocks over the pipeline."""
    passes(outcome, name)


@SUITE.cases("overflow")
def test_overflow_on_one_stage(outcome: Outcome, name: str) -> None:
    """A NaN on one stage would let the other step alone: the halves of the model would be of different steps."""
    passes(outcome, name)


@SUITE.cases("training")
def test_training_keeps_tied_copies_alike(outcome: Outcome, name: str) -> None:
    """The embedding and the output layer would slowly become two weights."""
    passes(outcome, name)


@SUITE.cases("rules", "tied", "stages")
def test_what_stages_must_agree_on(outcome: Outcome, name: str) -> None:
    """A rule for one stage would be refused by the others, or tied copies drift apart without a word."""
    passes(outcome, name)


@SUITE.cases("checkpoint")
def test_checkpoints_of_a_pipeline(outcome: Outcome, name: str) -> None:
    """A stage would resume from damaged layers, or from another step than the others."""
    passes(outcome, name)


@pytest.mark.skipif(find_spec("megatron") is None, reason="needs megatron")
@SUITE.cases("grid")
def test_tensor_parallel_layers_in_a_pipeline(outcome: Outcome, name: str) -> None:
    """Blocks would be summed over the grid's model-parallel group, which spans the stages, and hang or be wrong."""
    passes(outcome, name)


@pytest.mark.skipif(find_spec("megatron") is None, reason="needs megatron")
@SUITE.cases("experts")
def test_experts_of_megatron(outcome: Outcome, name: str) -> None:
    """DeepSpeed would average different experts with each other."""
    passes(outcome, name)


@SUITE.cases("mutant")
def test_the_comparison_notices_a_wrong_multiplier(outcome: Outcome, name: str) -> None:
    """The tests above would prove nothing."""
    notices_a_wrong_multiplier(outcome, name)
