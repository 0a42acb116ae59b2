# SPDX-License-Identifier: Apache-2.0
"""One model in several engines, several engines with one JSON, and models of which nothing or not all is trained.

PPO and DPO scripts do all of that in one process: a policy, a wrapper with a value head, a frozen reference, a reward
model. Gradients are fed; updates divided by the rate are compared with the oracle's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_blockwise import BlockwiseAdamMini, block_report, tag_parameters
from tests.helpers import models
from tests.helpers.deepspeed.compared import Compared, case_config, hyper
from tests.helpers.deepspeed.engine_cases import LR, MODELS
from tests.helpers.deepspeed.engines import (
    DTYPES,
    feed_step,
    masters,
    model_weights,
    open_engine,
    prepare_deepspeed,
    true_shape,
)
from tests.helpers.distributed import RankContext, passes
from tests.helpers.models import GradientPlan
from tests.helpers.oracle import Oracle, assert_same_update
from tests.helpers.suites import Suite

pytest.importorskip("deepspeed", reason="needs DeepSpeed")

WRAPPER_RULE = {"match": r"^policy\.lm_head", "lr_multiplier": 0.5}
VALUE_RULE = {"match": r"^v_head\.", "role": "output", "lr_multiplier": 2.0, "optional": True}
FROZEN = ("embed_tokens", "layers.0.")


@dataclass(frozen=True)
class Case:
    check: Callable[[RankContext, Case], None]
    stage: int = 0
    dtype: str = "fp32"
    optimizer: str = "mini"
    config: dict[str, Any] = field(default_factory=dict)


class Wrapped(nn.Module):
    """A policy inside a module of the user's, as with a value head."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.policy = policy


def run_case(context: RankContext, case: Case) -> None:
    """Entry of every rank."""
    prepare_deepspeed()
    import ds_blockwise  # noqa: F401 - registers the optimizers

    case.check(context, case)


def policy() -> nn.Module:
    return models.set_small_weights(models.llama())


def everything(model: nn.Module) -> Any:
    """As the README's own call: frozen parameters among them."""
    return list(model.parameters())


def with_elements(run: SimpleNamespace) -> dict[str, Tensor]:
    return {name: value for name, value in masters(run).items() if value.numel()}


def oracle(run: SimpleNamespace, case: Case, prefix: str = "", **changes: Any) -> Oracle:
    start = with_elements(run)
    classes = {prefix + name: spans for name, spans in MODELS["llama"][1].items()}
    return Oracle(start, {name: classes[name] for name in start}, case.optimizer == "mini", hyper(), **changes)


def check_steps(context: RankContext, case: Case, run: SimpleNamespace, truth: Oracle, steps: int = 2) -> None:
    plan = GradientPlan(context.world_size, 1, DTYPES[case.dtype])
    compared = Compared(run, truth, read=with_elements)
    for step in range(steps):
        feed_step(run, plan, step, context.rank)
        gradients = {n: plan.mean(n, tuple(p.shape), step) for n, p in compared.now.items()}
        compared.check_step(gradients, what=f"step {step}")


# ------------------------------------------------------------------------------------------ one model, two engines


def wrapped_unfrozen_reused(context: RankContext, case: Case) -> None:
    """Train a part with role rules, destroy, unfreeze, wrap, compile: the second engine knows nothing of the first."""
    model = policy()
    for name, p in model.named_parameters():
        p.requires_grad_("embed" not in name)
    first = {"lr_multipliers": {"ffn": 2}, "rules": [{"match": "down_proj", "role": "attn_out"}]}
    with open_engine(case_config(case, params=first), lambda: model) as run:
        feed_step(run, GradientPlan(context.world_size), 0, context.rank)
    assert {row.role for row in block_report(model).rows if "down_proj" in row.fqn} == {"attn_out"}
    if case.stage == 3:
        model = policy()  # ZeRO-3 left its placeholders; the parameters are others, so only the process is reused
    models.set_small_weights(model).requires_grad_(True)  # the rounding of large weights would hide errors
    second = {"rules": [WRAPPER_RULE, {"match": r"norm\.weight$", "role": "norm", "lr_multiplier": 3.0}]}
    with open_engine(case_config(case, params=second), lambda: Wrapped(model)) as run:
        norms = {name: 3.0 for name in masters(run) if name.endswith("norm.weight")}
        truth = oracle(run, case, "policy.", overrides={"policy.lm_head.weight": 0.5, **norms})
        check_steps(context, case, run, truth)


def two_live_engines(context: RankContext, case: Case) -> None:
    """The first engine goes on with its own names and multipliers while a second one over the same weights lives."""
    model = policy()
    with (
        open_engine(case_config(case, params={"lr_multipliers": {"ffn": 2}}), lambda: model, feed=False) as one,
        open_engine(case_config(case, params={"rules": [WRAPPER_RULE]}), lambda: Wrapped(model), feed=False) as two,
    ):
        truths = (
            (one, oracle(one, case, lr_multipliers={"ffn": 2})),
            (two, oracle(two, case, "policy.", overrides={"policy.lm_head.weight": 0.5})),
        )
        plan = GradientPlan(1)
        for step in range(4):
            run, truth = truths[step % 2]
            before = masters(run)
            truth.set_weights(before)
            gradients = {n: plan.mean(n, tuple(p.shape), step) for n, p in before.items()}
            was = truth.weights()
            for p in model.parameters():
                p.grad = gradients[run.names[id(p)]]
            run.engine.basic_optimizer.step()
            truth.step(gradients)
            moved, expected = (before, masters(run)), (was, truth.weights())
            assert_same_update(moved, expected, LR, weight_roundings=2, what=f"step {step}")
        names = {p.spec.fqn for b in one.engine.basic_optimizer.bindings() for p in b.table.placements}
        assert names == set(one.names.values())


def the_users_tags(context: RankContext, case: Case) -> None:
    """They stay through engines with other settings; an untagged rest is refused; plain PyTorch takes no engine's."""
    model = policy()
    tag_parameters(model)
    for ffn in (2, 3):
        with open_engine(case_config(case, params={"lr_multipliers": {"ffn": ffn}}), lambda: model) as run:
            check_steps(context, case, run, oracle(run, case, lr_multipliers={"ffn": ffn}), steps=1)
    model.extra = nn.ModuleDict({"lm_head": nn.Linear(12, 5, bias=False)})
    with pytest.raises(ValueError, match=r"'extra.lm_head.weight' .* is not tagged although others are"):
        with open_engine(case_config(case), lambda: model):
            pass
    untagged = policy()
    with open_engine(case_config(case), lambda: untagged) as run:
        feed_step(run, GradientPlan(context.world_size), 0, context.rank)
    plain = BlockwiseAdamMini(untagged.parameters())
    for p in untagged.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="was tagged by an engine for the engine's own optimizer"):
        plain.step()


# ----------------------------------------------------------------------------- frozen parts, and nothing to train


def frozen_parts(context: RankContext, case: Case) -> None:
    """``model_parameters=model.parameters()`` with frozen layers: the others are stepped rightly, these stay."""

    def build() -> nn.Module:
        model = policy()
        for name, p in model.named_parameters():
            p.requires_grad_(not any(part in name for part in FROZEN))
        return model

    with open_engine(case_config(case), build, groups=everything) as run:
        trained = masters(run)
        before = {n: p for n, p in model_weights(run).items() if n not in trained}
        assert before and all(any(part in name for part in FROZEN) for name in before)
        check_steps(context, case, run, oracle(run, case))
        now = model_weights(run)
        assert all(torch.equal(now[name], value) for name, value in before.items())


def nothing_to_train(context: RankContext, case: Case) -> None:
    """A frozen reference model with the policy's JSON, its rules and its schedule."""
    rule = {"match": r"^v_head\.", "role": "output"}  # not optional: of a model that trains
    schedule = {"type": "BlockwiseCosineLR", "params": {"total_num_steps": 10, "warmup_num_steps": 2}}
    reference = policy().requires_grad_(False)
    wanted = reference(TOKENS).logits
    with open_engine(
        case_config(case, params={"rules": [rule]}, scheduler=schedule),
        lambda: reference,
        groups=everything,
        feed=False,
    ) as run:
        run.engine.eval()
        with torch.no_grad():
            found = run.engine(TOKENS).logits
        assert torch.allclose(found.float(), wanted, atol=1e-6 if case.dtype == "fp32" else 1e-2)
        assert len(run.engine.get_lr()) == 1
        if case.stage:
            for act in (lambda: run.engine.backward(found.sum()), lambda: run.engine.save_checkpoint("nowhere")):
                with pytest.raises(ValueError, match="every parameter of this engine's model was frozen"):
                    act()


TOKENS = torch.arange(10).view(1, 10)


def one_json(context: RankContext, case: Case) -> None:
    """Policy, value, reference and reward engines in one process: each trains rightly or need not."""
    config = case_config(case, params={"rules": [VALUE_RULE]})

    def value() -> nn.Module:
        model = models.llama()
        model.v_head = nn.Linear(12, 1, bias=False)
        return models.set_small_weights(model)

    def reward() -> nn.Module:
        model = policy()
        model.judge = nn.Bilinear(3, 2, 1)  # a name and a class that nobody knows
        return model.eval()

    with open_engine(config, reward, groups=everything, feed=False) as judge:
        with torch.no_grad():
            judge.engine(TOKENS)
        with open_engine(config, lambda: policy().requires_grad_(False), groups=everything, feed=False) as reference:
            with torch.no_grad():
                reference.engine(TOKENS)
        with open_engine(config, policy) as run:
            check_steps(context, case, run, oracle(run, case))
        with open_engine(config, value) as run:
            start = masters(run)
            classes = {**MODELS["llama"][1], "v_head.weight": MODELS["llama"][1]["lm_head.weight"]}
            classes["v_head.weight"] = type(classes["v_head.weight"])((ONE_ROW,))
            truth = Oracle(start, classes, case.optimizer == "mini", hyper(), overrides={"v_head.weight": 2.0})
            check_steps(context, case, run, truth)
        loss = judge.engine(TOKENS).logits.sum()
        acts: dict[str, Callable[[], object]] = {
            "backward": lambda: judge.engine.backward(loss),
            "step": judge.engine.step,
            "base": judge.engine.basic_optimizer.step,
            "save": lambda: judge.engine.save_checkpoint(str(context.tmp_path / "judge")),
            "load": lambda: judge.engine.load_checkpoint(str(context.tmp_path / "judge")),
        }
        for what, act in acts.items():
            with pytest.raises(ValueError, match=r"cannot cut the model into blocks:\n.*'judge\.weight'") as caught:
                act()
            assert what != "load" or "load_module_only=True" in str(caught.value)
    with pytest.raises(ValueError, match=r"'judge\.weight'(.|\n)*never stepped, call model.eval\(\) before"):
        with open_engine(config, lambda: reward().train(), feed=False):
            pass


ONE_ROW = MODELS["llama"][1]["lm_head.weight"].spans[0].__class__(0, 1, "output", 1)


def one_rank_has_a_problem(context: RankContext, case: Case) -> None:
    """In evaluation mode: no rank may go on to train while another one refuses."""

    def build() -> nn.Module:
        model = policy().eval()
        if context.rank == 1:
            model.model.layers[0].self_attn.config.num_attention_heads = 5
            model.model.layers[0].self_attn.num_heads = 5
        return model

    with open_engine(case_config(case), build, feed=False) as run:
        loss = run.engine(TOKENS).logits.sum() if context.rank == 0 else torch.zeros((), requires_grad=True)
        with pytest.raises(ValueError, match="cannot cut the model into blocks"):
            run.engine.backward(loss)


def without_elements(context: RankContext, case: Case) -> None:
    """A parameter without elements is in the model, and in the gradients; at ZeRO-3 DeepSpeed cannot use it."""

    def build() -> nn.Module:
        model = models.llama()
        model.adapter = nn.Linear(12, 0, bias=False)  # rank 0
        return models.set_small_weights(model)

    with open_engine(case_config(case), build, groups=everything) as run:
        if case.stage == 3:
            with pytest.raises(ValueError, match=r"'adapter\.weight' of Linear has no elements.*ZeRO stage 2"):
                run.model.adapter(torch.zeros(()))
            run.feed.leave_out(run.model.adapter)
        check_steps(context, case, run, oracle(run, case))
        folder = str(context.tmp_path / f"empty{case.stage}{case.dtype}")
        run.engine.save_checkpoint(folder)
        assert run.engine.load_checkpoint(folder)[0] is not None
        assert true_shape(run.model.adapter.weight) == (0, 12)


FP32_GRADIENTS = {"data_types": {"grad_accum_dtype": "fp32"}}
WRAPPERS = {
    "zero0 fp32": (0, "fp32", {}),
    "zero0 bf16": (0, "bf16", {}),
    "zero1 fp32": (1, "fp32", {}),
    "zero1 bf16 fp32 gradients": (1, "bf16", FP32_GRADIENTS),
    "zero2 bf16": (2, "bf16", {}),
    "zero3 fp32": (3, "fp32", {}),
    "zero3 bf16": (3, "bf16", {}),
}
CASES: dict[str, tuple[int, Case]] = {
    **{f"second engine {s}": (2, Case(wrapped_unfrozen_reused, s)) for s in (0, 2, 3)},
    "second engine adamw": (2, Case(wrapped_unfrozen_reused, 2, optimizer="adamw")),
    "two live engines": (2, Case(two_live_engines)),
    **{f"user's tags {s}": (2, Case(the_users_tags, s)) for s in (0, 2)},
    **{f"frozen parts {name}": (2, Case(frozen_parts, *how[:2], config=how[2])) for name, how in WRAPPERS.items()},
    "frozen parts adamw": (2, Case(frozen_parts, optimizer="adamw")),
    **{f"reference {name}": (2, Case(nothing_to_train, *how[:2], config=how[2])) for name, how in WRAPPERS.items()},
    **{f"one JSON {s}": (2, Case(one_json, s)) for s in (0, 2, 3)},
    "problem on one rank": (2, Case(one_rank_has_a_problem)),
    **{f"empty {name}": (2, Case(without_elements, *how[:2], config=how[2])) for name, how in WRAPPERS.items()},
}
SUITE = Suite(run_case, CASES)
outcome = SUITE.outcome()


@SUITE.cases("second engine", "two live", "user's tags")
def test_an_engines_tags_are_its_own_and_the_users_stay(outcome, name):
    """A rule of the second engine was accepted and not applied: the head moved 20 times too far."""
    passes(outcome, name)


@SUITE.cases("frozen parts", "reference", "empty")
def test_what_is_not_trained_does_not_matter(outcome, name):
    """ZeRO-0 in fp32 knew no frozen parameter, no stage above it a model without any other."""
    passes(outcome, name)


@SUITE.cases("one JSON", "problem on one rank")
def test_one_json_serves_engines_that_train_and_engines_that_do_not(outcome, name):
    """A model in evaluation mode may never be stepped; if it is, that is refused on every rank before it changes."""
    passes(outcome, name)
