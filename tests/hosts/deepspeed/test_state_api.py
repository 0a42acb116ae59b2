# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's functions that show and set optimizer state, move it, and write weights to files, with our optimizers."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers import models
from tests.helpers.deepspeed import autotp_engines, state_checks
from tests.helpers.deepspeed.autotp_models import classes_of, cut
from tests.helpers.deepspeed.compared import assert_same, hyper
from tests.helpers.deepspeed.engine_cases import Case, build, config_of, groups_of, hyper_of, oracle_of
from tests.helpers.deepspeed.engines import (
    DTYPES,
    feed_step,
    masters,
    model_weights,
    open_engine,
    prepare_deepspeed,
    true_shape,
)
from tests.helpers.distributed import Outcome, RankContext, passes
from tests.helpers.models import GradientPlan
from tests.helpers.oracle import Oracle
from tests.helpers.suites import Suite
from tests.helpers.tables.oracle_names import Classes, Classified, Span

_MISSING = [name for name in ("deepspeed", "transformers", "peft") if find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(_MISSING), reason="needs deepspeed, transformers and peft")


@dataclass(frozen=True)
class Check:
    """A function of this file and what it is about."""

    run: Callable[..., None]
    case: Any
    more: dict[str, Any] = field(default_factory=dict)


def run_check(context: RankContext, check: Check) -> None:
    """Entry of every rank."""
    prepare_deepspeed()
    import ds_blockwise  # noqa: F401 - registers the optimizers

    check.run(context, check.case, **check.more)


# ------------------------------------------------------------------------------------- the checks


def values(context: RankContext, case: Case) -> None:
    """See `state_checks.check_all`; with gradients, which are DeepSpeed's own, in the end."""
    config = config_of(case)
    plan = GradientPlan(context.world_size, 1, DTYPES[case.dtype])
    with open_engine(config, lambda: build(case, config), groups=groups_of(case)) as run:
        start = masters(run)
        shapes = {n: true_shape(p) for n, p in run.model.named_parameters()}
        engine = state_checks.Engine(
            run,
            oracle_of(case, start, hyper_of(case, list(start))),
            plan,
            shapes,
            lambda number: feed_step(run, plan, number, context.rank),
        )
        state_checks.check_all(engine)
        if case.stage and case.dtype == "fp32" and not case.zero.get("round_robin_gradients"):
            state_checks.check_gradients(engine, 3)


def tensor_parallel(context: RankContext, case: autotp_engines.Case) -> None:
    """Rows that all ranks hold a part of, weights that some ranks hold nothing of."""
    plan = GradientPlan(context.world_size // case.tp, 1, DTYPES[case.dtype])
    with autotp_engines.engine_of(context, case) as run:
        start = {n: models.small_weight(n, s).to(DTYPES[case.dtype]).float() for n, s in run.shapes.items()}
        oracle = Oracle(
            start,
            classes_of(case.model),
            case.optimizer == "mini",
            hyper(),
            weight_decay_multipliers=autotp_engines.DECAY_MULTIPLIERS,
        )
        engine = state_checks.Engine(
            run,
            oracle,
            plan,
            run.shapes,
            lambda number: autotp_engines.feed(run, plan, number),
            lambda name, whole: cut(case.model, name, whole, run.tp_rank, case.tp),
            autotp_engines.held,
        )
        state_checks.check_all(engine)


LLAMA = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2}


def adapters(context: RankContext, case: Case) -> None:
    """LoRA of rank 1: vectors of one block, of many, and of which a rank holds nothing."""

    def make() -> nn.Module:
        import peft
        from transformers import LlamaConfig, LlamaForCausalLM

        base = LlamaForCausalLM(LlamaConfig(**models.hf_sizes(**LLAMA)))
        model = peft.get_peft_model(base, peft.LoraConfig(r=1, target_modules=["q_proj", "down_proj"]))
        return models.set_small_weights(model)

    plan = GradientPlan(context.world_size, 1, DTYPES[case.dtype])
    with open_engine(config_of(case), make) as run:
        start = masters(run)
        shapes = {n: true_shape(p) for n, p in run.model.named_parameters()}
        oracle = Oracle(
            start,
            _adapter_classes(),
            case.optimizer == "mini",
            hyper_of(case, list(start)),
            weight_decay_multipliers={"norm": 0.0, "key": 0.5},
        )
        engine = state_checks.Engine(
            run, oracle, plan, shapes, lambda number: feed_step(run, plan, number, context.rank)
        )
        state_checks.check_all(engine)


def _adapter_classes() -> Classes:
    """A's one row is a block; B's rows are the layer's outputs: four heads of six, and single rows."""
    classes = {}
    for layer in range(2):
        at = f"base_model.model.model.layers.{layer}."
        for path, role, size in (("self_attn.q_proj", "query", 6), ("mlp.down_proj", "ffn", 1)):
            classes[f"{at}{path}.lora_A.default.weight"] = Classified((Span(0, 1, role, 1),))
            classes[f"{at}{path}.lora_B.default.weight"] = Classified((Span(0, 24, role, size),))
    return classes


def gradients_are_refused(context: RankContext, case: Case) -> None:
    """DeepSpeed mixes up gradients under round_robin_gradients, and leaves a rank waiting."""
    from deepspeed.utils import safe_get_full_grad, safe_set_full_grad

    config = config_of(case)
    with open_engine(config, lambda: build(case, config)) as run:
        run.feed.gradients = {n: torch.ones_like(p) for n, p in run.model.named_parameters()}
        run.engine.backward(run.engine())
        for param in run.model.parameters():
            with pytest.raises(ValueError, match='Set "round_robin_gradients": false'):
                safe_get_full_grad(param)
            with pytest.raises(ValueError, match='Set "round_robin_gradients": false'):
                safe_set_full_grad(param, torch.zeros_like(param))


def moved(context: RankContext, case: Case) -> None:
    """``offload_states`` and ``reload_states`` between steps change no bit, and state is shown while it is away."""
    from deepspeed.runtime.zero import offload_states, stage_1_and_2
    from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum as Kind
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    from ds_blockwise.optimizers.second_moment import unsettled

    config = config_of(case)
    plan = GradientPlan(context.world_size, 1, DTYPES[case.dtype])

    def shown(run: Any) -> dict[str, torch.Tensor]:
        params = {run.names[id(p)]: p for p in run.model.parameters()}
        found = {
            f"{key} {n}": safe_get_full_optimizer_state(p, key)
            for (n, p), key in product(params.items(), state_checks.MOMENTS)
        }
        return found | {n: safe_get_full_fp32_param(p) for n, p in params.items()}

    def copies(optimizer: torch.optim.Optimizer, *_: Any, **__: Any) -> list[torch.Tensor]:
        # on an accelerator all of state moves; on a CPU nothing would
        for state in optimizer.state.values():
            state |= {key: value.clone() for key, value in state.items() if torch.is_tensor(value)}
        return []

    with open_engine(config, lambda: build(case, config)) as run:
        for step in range(3):
            feed_step(run, plan, step, context.rank)
        wanted = shown(run)
    with pytest.MonkeyPatch.context() as patch, open_engine(config, lambda: build(case, config)) as run:
        patch.setattr(stage_1_and_2, "offload_optimizer_states", copies)
        patch.setattr(stage_1_and_2, "reload_optimizer_states", copies)
        optimizer = run.engine.basic_optimizer
        for step, include in enumerate((None, [Kind.optim_states], [Kind.hp_params, Kind.contiguous_grad_buffer])):
            feed_step(run, plan, step, context.rank)
            before = shown(run)
            run.engine.offload_states(include=include, pin_memory=step != 1)
            away = {Kind.optim_states, Kind.hp_params} & set(include or Kind)
            assert run.engine.optimizer.offloaded_states >= away
            assert_same(shown(run), before, "state while it is away")
            if case.stage == 3:
                assert offload_states.get_state_devices(run.engine, Kind.optim_states) == {torch.device("cpu")}
            run.engine.reload_states()
            assert not run.engine.optimizer.offloaded_states
            assert not optimizer.shares_second_moment or not unsettled(optimizer.state, optimizer.bindings())
            assert_same(shown(run), before, "state that came back")
        assert_same(shown(run), wanted, "state after three steps")


def files(context: RankContext, case: Case) -> None:
    """What DeepSpeed's tools make of a checkpoint with frozen parameters, and state after it was loaded."""
    from deepspeed.utils import safe_get_full_optimizer_state
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    config = config_of(case)
    plan = GradientPlan(context.world_size, 1, DTYPES[case.dtype])
    folder = context.tmp_path / f"files-{case.optimizer}-{case.stage}"
    with open_engine(config, lambda: build(case, config)) as run:
        for step in range(2):
            feed_step(run, plan, step, context.rank)
        trained, everything = masters(run), model_weights(run)
        fixed = {n: w.float() for n, w in everything.items() if n not in trained}
        assert fixed and trained

        def shown() -> dict[str, torch.Tensor]:
            params = {run.names[id(p)]: p for p in run.model.parameters() if p.requires_grad}
            return {n: safe_get_full_optimizer_state(p, "exp_avg_sq") for n, p in params.items()}

        before = shown()
        for exclude in (False, True):
            run.engine.save_checkpoint(str(folder), tag=f"t{exclude}", exclude_frozen_parameters=exclude)
        run.engine.save_16bit_model(str(folder), "half.bin", exclude_frozen_parameters=True)
        context.barrier()
        if context.rank == 0:
            read = partial(get_fp32_state_dict_from_zero_checkpoint, str(folder))
            # DeepSpeed leaves frozen parameters out at stage 1, with any optimizer
            assert_same(_numbers(read(tag="tFalse")), trained | (fixed if case.stage > 1 else {}), "zero_to_fp32")
            for tag in ("tFalse", "tTrue"):
                assert_same(_numbers(read(tag=tag, exclude_frozen_parameters=True)), trained, f"zero_to_fp32 of {tag}")
            half = torch.load(folder / "half.bin", weights_only=True)
            assert_same(half, {n: everything[n] for n in trained}, "save_16bit_model")
        context.barrier()
        feed_step(run, plan, 2, context.rank)
        run.engine.load_checkpoint(str(folder), tag="tFalse")
        assert_same(shown(), before, "state after a load")


def _numbers(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.float().clone() for name, value in found.items()}


def forgotten(context: RankContext, case: Case) -> None:
    """A destroyed engine leaves nothing on the model, and a pickled model takes nothing of an engine along."""
    from deepspeed.utils import safe_get_full_optimizer_state

    config = config_of(case)
    with open_engine(config, lambda: build(case, config)) as run:
        feed_step(run, GradientPlan(context.world_size, 1), 0, context.rank)
        model, param = run.model, next(run.model.parameters())
        assert safe_get_full_optimizer_state(param, "exp_avg") is not None
        if case.stage == 0:
            buffer = io.BytesIO()
            torch.save(param, buffer)
            buffer.seek(0)
            assert safe_get_full_optimizer_state(torch.load(buffer, weights_only=False), "exp_avg") is None
            with open_engine(config, lambda: model):
                run.engine.destroy()  # of the earlier engine: what the later one shows stays
                with pytest.raises(ValueError, match="no optimizer state"):
                    safe_get_full_optimizer_state(param, "exp_avg")
    assert all(safe_get_full_optimizer_state(p, "exp_avg") is None for p in model.parameters())


# -------------------------------------------------------------------------------------- the table

OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
FROZEN = ("embed_tokens", "layers.1.self_attn.q_proj")


def _table() -> dict[str, tuple[int, Check]]:
    table: dict[str, tuple[int, Check]] = {}

    def add(kind: str, run: Callable[..., None], case: Any, ranks: int = 2) -> None:
        name = f"{kind}-{case.model}-z{case.stage}-{case.dtype}-{case.optimizer}-ranks{ranks}"
        assert name not in table, name
        table[name] = (ranks, Check(run, case))

    for stage in range(4):
        add("values", values, Case("mini", stage, "fp32" if stage % 2 else "bf16"))
        add("adapters", adapters, Case("mini", stage))
    add("values", values, Case("adamw", 1, "bf16"))
    add("values", values, Case("adamw", 3))
    add("adapters", adapters, Case("adamw", 3))
    for stage in (2, 3):
        add("offload", values, Case("mini", stage, "bf16", zero=OFFLOAD))
    for stage in (1, 3):
        add("vector", values, Case("mini", stage, model="slim", granularity="published", groups="vector"))
        add("moved", moved, Case("mini", stage, "bf16"))
        gather = {"stage3_gather_16bit_weights_on_model_save": True} if stage == 3 else {}
        add("files", files, Case("mini", stage, "bf16", zero=gather, frozen=FROZEN))
    for model, stage in (("nano", 0), ("nano", 1), ("gpt2", 3)):
        add("fused", values, Case("mini", stage, model=model))
    add("bf16_optimizer", values, Case("mini", 1, "bf16", config={"data_types": {"grad_accum_dtype": "fp32"}}))
    add("sub_groups", values, Case("mini", 3, zero={"sub_group_size": 700}, granularity="mixed"))
    add("zero_init", values, Case("mini", 3, "bf16", zero_init=True, frozen=FROZEN))
    add("momentum", values, Case("mini", 2, params={"momentum_dtype": "bf16"}, groups="mixed", frozen=FROZEN))
    add("round_robin", values, Case("mini", 2, zero={"round_robin_gradients": True}))
    add("refused", gradients_are_refused, Case("adamw", 2, zero={"round_robin_gradients": True}))
    for model, stage in (("mqa", 0), ("even", 3)):
        add("tensor_parallel", tensor_parallel, autotp_engines.Case("mini", stage, model=model))
    add("tensor_parallel", tensor_parallel, autotp_engines.Case("mini", 1), ranks=4)
    for stage in (0, 1):
        add("forgotten", forgotten, Case("mini", stage))
    return table


SUITE = Suite(run_check, _table())
outcome = SUITE.outcome()


@SUITE.cases("values", "adapters", "offload", "vector", "fused", "bf16_optimizer", "sub_groups", "zero_init")
def test_state_has_a_value_per_element(outcome: Outcome, name: str) -> None:
    """Adam-mini's second moments were read at the offsets of elements: numbers of other parameters, or a hang."""
    passes(outcome, name)


@SUITE.cases("momentum", "round_robin", "tensor_parallel")
def test_state_of_every_layout(outcome: Outcome, name: str) -> None:
    """A block of several ranks would be set to each rank's own mean, and be another value on each."""
    passes(outcome, name)


@SUITE.cases("refused")
def test_gradients_that_deepspeed_mixes_up_are_refused(outcome: Outcome, name: str) -> None:
    """One rank raised, the other waited for it."""
    passes(outcome, name)


@SUITE.cases("moved")
def test_state_moves_and_comes_back(outcome: Outcome, name: str) -> None:
    """Programs that generate between steps move the optimizer's memory; ZeRO-3 did it for FusedAdam alone."""
    passes(outcome, name)


@SUITE.cases("files")
def test_files_without_frozen_parameters(outcome: Outcome, name: str) -> None:
    """An adapter's checkpoint and the tools that read it must hold the trained weights, bit by bit."""
    passes(outcome, name)


@SUITE.cases("forgotten")
def test_a_destroyed_engine_is_forgotten(outcome: Outcome, name: str) -> None:
    """The next engine over the model would show the old one's state, and its memory would stay."""
    passes(outcome, name)
