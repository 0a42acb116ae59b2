# SPDX-License-Identifier: Apache-2.0
"""The checks that ``test_engine_parity`` runs on every rank: a real engine against the oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import models
import torch
from distributed import RankContext
from engines import (
    DTYPES,
    engine_config,
    feed_step,
    log,
    masters,
    model_weights,
    open_engine,
    prepare_deepspeed,
)
from models import GradientPlan
from oracle import (
    Hyper,
    Oracle,
    assert_same_update,
    clipped,
    gpt2_classes,
    hf_llama_classes,
    scheduled_lr,
)
from torch import Tensor, nn

LR = 1e-2
# A constant lr would hide an lr that is read too late. Rather rising than falling: a weight that
# grew at a larger lr rounds by more than 1e-6 of a smaller one's update.
LR_FACTORS = (0.4, 0.9, 0.7, 1.3, 1.0, 1.2)
DECAY_MULTIPLIERS = {"norm": 0.0, "key": 0.5}
BETAS, EPS, WEIGHT_DECAY = (0.9, 0.95), 1e-6, 0.1
FULL_NAME = {"mini": "BlockwiseAdamMini", "adamw": "BlockwiseAdamW"}


@dataclass(frozen=True)
class Case:
    """One engine, one model, a few steps; every field is something a user can configure."""

    optimizer: str = "mini"
    stage: int = 0
    dtype: str = "fp32"
    model: str = "qwen3"
    gas: int = 1
    steps: int = 4
    zero: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)
    zero_init: bool = False
    clip: float = 0.0
    poison: tuple[int, ...] = ()  # steps at which rank 1 (or 0, if alone) feeds a NaN
    frozen: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    two_groups: bool = False
    scheduler: str = ""
    scheduler_params: dict[str, Any] = field(default_factory=dict)
    oracle_multipliers: dict[str, float] = field(default_factory=dict)
    end_to_end: bool = False


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "llama": (
        models.llama,
        hf_llama_classes(
            layers=2, hidden=12, heads=2, kv_heads=1, head_dim=6, ffn=21, vocab=37
        ),
    ),
    "qwen3": (
        models.qwen3,
        hf_llama_classes(
            layers=2, hidden=15, heads=4, kv_heads=2, head_dim=6, ffn=21, vocab=37,
            biases=True, qk_norms=True,
        ),
    ),
    "nano": (
        models.NanoGPT,
        gpt2_classes(
            layers=2, hidden=15, heads=3, ffn=61, vocab=29, positions=11, conv1d=False
        ),
    ),
    "gpt2": (
        models.gpt2_conv1d,
        gpt2_classes(
            layers=1, hidden=10, heads=2, ffn=40, vocab=23, positions=7, conv1d=True
        ),
    ),
}  # fmt: skip


def run_case(context: RankContext, case: Case) -> None:
    """Entry of every rank."""
    prepare_deepspeed()
    import ds_blockwise  # noqa: F401 - registers the optimizers and schedules

    (check_end_to_end if case.end_to_end else check_fed)(context, case)


# ------------------------------------------------------------------------------------ construction


def _config(case: Case) -> dict[str, Any]:
    params = {"weight_decay_multipliers": DECAY_MULTIPLIERS} | case.params
    extra = dict(case.config)
    if case.scheduler:
        extra["scheduler"] = {"type": case.scheduler, "params": dict(case.scheduler_params)}
    if case.clip:
        extra["gradient_clipping"] = case.clip
    return engine_config(
        FULL_NAME[case.optimizer],
        stage=case.stage,
        dtype=case.dtype,
        gas=case.gas,
        params={"lr": LR, "betas": list(BETAS), "eps": EPS, "weight_decay": WEIGHT_DECAY} | params,
        zero=dict(case.zero),
        **extra,
    )


def _build(case: Case, config: dict[str, Any]) -> nn.Module:
    make, _ = MODELS[case.model]
    if case.zero_init:
        import deepspeed

        with deepspeed.zero.Init(config_dict_or_path=config, dtype=DTYPES[case.dtype]):
            model = make()
        for name, parameter in model.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
                parameter.copy_(models.small_weight(name, parameter.ds_shape))
    elif case.end_to_end:
        torch.manual_seed(7)
        model = make()
    else:
        model = models.set_small_weights(make())
    for name, parameter in model.named_parameters():
        if any(part in name for part in case.frozen):
            parameter.requires_grad_(False)
    return model


def _second_group(name: str) -> bool:
    """An arbitrary split that leaves both groups with whole and fused tensors."""
    return "norm" in name or "ln_" in name or "v_proj" in name or name.endswith("bias")


GROUP_2 = {"lr": 0.3 * LR, "weight_decay": 0.02, "betas": (0.8, 0.9), "eps": 1e-5}


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    named = list(model.named_parameters())
    return [
        {"params": [p for n, p in named if not _second_group(n)]},
        {"params": [p for n, p in named if _second_group(n)]} | GROUP_2,
    ]


def _hyper(case: Case, names: list[str]) -> dict[str, Hyper]:
    first = Hyper(LR, BETAS, EPS, WEIGHT_DECAY)
    second = Hyper(GROUP_2["lr"], GROUP_2["betas"], GROUP_2["eps"], GROUP_2["weight_decay"])
    return {n: second if case.two_groups and _second_group(n) else first for n in names}


def _whole_tensor_reference(case: Case, start: dict[str, Tensor]) -> SimpleNamespace:
    """Our own AdamW on whole fp32 tensors in this process: only the cut differs from the engine."""
    from ds_blockwise import BlockwiseAdamW, tag_parameters

    model = MODELS[case.model][0]()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in start:
                parameter.copy_(start[name])
            parameter.requires_grad_(name in start)
    settings = {"weight_decay_multipliers": DECAY_MULTIPLIERS}
    tag_parameters(model, **settings)
    chosen = _groups(model) if case.two_groups else [p for n, p in model.named_parameters()]
    optimizer = BlockwiseAdamW(chosen, lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, **settings)
    return SimpleNamespace(optimizer=optimizer, named=dict(model.named_parameters()))


# ------------------------------------------------------------------------------------ fed gradients


def check_fed(context: RankContext, case: Case) -> None:
    config = _config(case)
    plan = GradientPlan(context.world_size, case.gas, DTYPES[case.dtype])
    with open_engine(config, lambda: _build(case, config), groups=_groups if case.two_groups else None) as run:
        start = masters(run)
        for name, value in start.items():
            wanted = models.small_weight(name, value.shape).to(DTYPES[case.dtype]).float()
            assert torch.equal(value, wanted), f"{name} changed before the first step"
        frozen = {n: p for n, p in model_weights(run).items() if n not in start}
        assert len(frozen) == sum(any(f in n for f in case.frozen) for n in run.names.values())
        _Fed(context, case, run, plan, start).go()
        for name, value in model_weights(run).items():
            assert name not in frozen or torch.equal(value, frozen[name]), f"frozen {name} moved"
        log(f"{type(run.engine.optimizer).__name__} done")


class _Fed:
    """The loop of ``check_fed`` with what it carries from step to step."""

    def __init__(
        self,
        context: RankContext,
        case: Case,
        run: SimpleNamespace,
        plan: GradientPlan,
        start: dict[str, Tensor],
    ) -> None:
        self.context, self.case, self.run, self.plan = context, case, run, plan
        self.now = start
        self.hyper = _hyper(case, list(start))
        self.base = {name: h.lr for name, h in self.hyper.items()}
        self.oracle = Oracle(
            start,
            MODELS[case.model][1],
            case.optimizer == "mini",
            self.hyper,
            lr_multipliers=case.params.get("lr_multipliers", {}) | case.oracle_multipliers,
            weight_decay_multipliers=DECAY_MULTIPLIERS,
        )
        # Clipping factors are rounded differently by each wrapper; a NaN step is never fed to the
        # reference; both leave nothing to compare bit by bit.
        exact = case.optimizer == "adamw" and not (case.clip or case.scheduler)
        self.reference = _whole_tensor_reference(case, start) if exact else None
        self.expected_lr = _expected_scheduler(case)
        self.applied = 0

    def go(self) -> None:
        for step in range(self.case.steps):
            self._set_lr(step)
            poisoned = step in self.case.poison
            bad_rank = min(1, self.context.world_size - 1)
            value = float("nan") if poisoned and self.context.rank == bad_rank else None
            before = self.now
            feed_step(self.run, self.plan, step, self.context.rank, poison=value, absent=self.case.absent)
            self.now = masters(self.run)
            if poisoned:
                for name, weight in self.now.items():
                    assert torch.equal(weight, before[name]), f"{name} moved on an overflow"
            else:
                self._check_update(step, before)
                self.applied += 1
            check_counters(self.run, self.applied)
        weights = model_weights(self.run)
        for name, weight in self.now.items():
            stored = weight.to(DTYPES[self.case.dtype])
            assert torch.equal(weights[name], stored), f"{name}: model and master differ"

    def _set_lr(self, step: int) -> None:
        groups = self.run.engine.basic_optimizer.param_groups
        if not self.case.scheduler:
            for group, base in zip(groups, (LR, GROUP_2["lr"]), strict=False):
                group["lr"] = base * LR_FACTORS[step]
        for name, hyper in self.hyper.items():
            group = groups[1 if self.case.two_groups and _second_group(name) else 0]
            self.hyper[name] = Hyper(group["lr"], tuple(group["betas"]), hyper.eps, hyper.weight_decay)
        self.oracle.hyper = self.hyper
        if self.expected_lr is not None:
            wanted = self.expected_lr(self.applied)
            shown = self.run.engine.get_lr()
            assert len(shown) == len(groups), shown
            assert abs(shown[0] - wanted) <= 1e-12 * LR, (
                f"step {step}: engine.get_lr() is {shown}, the base lr is {wanted}"
            )

    def _check_update(self, step: int, before: dict[str, Tensor]) -> None:
        gradients = {n: self.plan.mean(n, tuple(p.shape), step) for n, p in before.items()}
        for name in self.case.absent:
            # DeepSpeed fills a missing gradient with zeros in every wrapper and at ZeRO-0.
            gradients[name] = torch.zeros_like(gradients[name])
        if self.case.clip:
            gradients = clipped(gradients, self.case.clip)
        block_lr, lr = None, next(iter(self.hyper.values())).lr
        if self.case.scheduler.startswith("Blockwise"):
            block_lr, lr = _own_block_lr(self.case, self.applied), LR
            self.oracle.hyper = _hyper(self.case, list(before))
        was = self.oracle.weights()
        self.oracle.step(gradients, block_lr)
        assert_same_update(
            (before, self.now),
            (was, self.oracle.weights()),
            lr or 1.0,  # a warm-up from 0 makes the first update exactly nothing
            # Decay and update each round a weight that has grown at up to 50 times the final lr.
            weight_roundings=2 if block_lr else 0,
            what=f"step {step}, {type(self.run.engine.optimizer).__name__}",
        )
        if self.reference is not None:
            self._check_bitwise(step, gradients)

    def _check_bitwise(self, step: int, gradients: dict[str, Tensor]) -> None:
        for group, base in zip(self.reference.optimizer.param_groups, (LR, GROUP_2["lr"]), strict=False):
            group["lr"] = base * LR_FACTORS[step]
        for name, parameter in self.reference.named.items():
            parameter.grad = gradients[name].clone() if name in gradients else None
        self.reference.optimizer.step()
        for name, weight in self.now.items():
            assert torch.equal(weight, self.reference.named[name].detach()), (
                f"step {step}: {name} differs from the same optimizer on whole tensors by "
                f"{(weight - self.reference.named[name]).abs().max():.1e}"
            )


def check_counters(run: SimpleNamespace, applied: int) -> None:
    """Our step ran once per optimizer step and flat tensor, and never for anything else."""
    base, wrapper = run.engine.basic_optimizer, run.engine.optimizer
    calls = {
        "DeepSpeedZeroOptimizer": lambda: len(wrapper.single_partition_of_fp32_groups),
        "DeepSpeedZeroOptimizer_Stage3": lambda: len(wrapper.fp32_partitioned_groups_flat),
    }.get(type(wrapper).__name__, lambda: 1)()
    assert base.step_calls == applied * calls, (
        f"{base.step_calls} calls of step() after {applied} optimizer steps, expected {calls} each"
    )
    steps = {state["step"] for state in base.state.values() if "step" in state}
    assert steps <= {applied}, f"state steps {steps} after {applied} optimizer steps"
    assert applied == 0 or steps, "no state was created: our step() never ran"


# ---------------------------------------------------------------------------------------- schedules


def _own_block_lr(case: Case, k: int) -> Callable[[float, float], float]:
    p = case.scheduler_params
    kinds = {"BlockwiseCosineLR": "cosine", "BlockwiseWSDLR": "wsd", "BlockwiseLinearLR": "linear"}
    return scheduled_lr(
        kinds[case.scheduler],
        k,
        warmup=p["warmup_num_steps"],
        total=p["total_num_steps"],
        min_lr=p.get("min_lr", 0.0),
        decay=p.get("decay_num_steps", 0),
    )


def _expected_scheduler(case: Case) -> Callable[[int], float] | None:
    """Base lr of update k: ours by formula, DeepSpeed's by running it on a plain torch AdamW."""
    if not case.scheduler:
        return None
    if case.scheduler.startswith("Blockwise"):
        return lambda k: _own_block_lr(case, k)(1.0, LR)
    from deepspeed.runtime import lr_schedules

    plain = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=LR, betas=BETAS)
    schedule = getattr(lr_schedules, case.scheduler)(plain, **case.scheduler_params)
    sequence = []
    for _ in range(case.steps):
        sequence.append(plain.param_groups[0]["lr"])
        schedule.step()
    return lambda k: sequence[k]


# --------------------------------------------------------------------------------------- end to end


def check_end_to_end(context: RankContext, case: Case) -> None:
    """Real forward and backward; the oracle gets autograd's mean gradient of all ranks' batches."""
    config = _config(case)
    shares = context.world_size * case.gas
    twin = _build(case, config)
    loss_of = {
        "nano": lambda model, tokens: model(tokens),
        "llama": lambda model, tokens: model(input_ids=tokens, labels=tokens).loss,
    }[case.model]
    vocab = twin.config.vocab_size
    with open_engine(config, lambda: _build(case, config), feed=False) as run:
        now = masters(run)
        hyper = Hyper(LR, BETAS, case.params.get("eps", EPS), WEIGHT_DECAY)
        oracle = Oracle(
            now, MODELS[case.model][1], case.optimizer == "mini", hyper,
            weight_decay_multipliers=DECAY_MULTIPLIERS,
        )  # fmt: skip
        for step in range(case.steps):
            hyper.lr = LR * LR_FACTORS[step]
            for group in run.engine.basic_optimizer.param_groups:
                group["lr"] = hyper.lr
            generator = torch.Generator().manual_seed(100 + step)
            batches = torch.randint(vocab, (shares, 2, 9), generator=generator)
            for micro in range(case.gas):
                tokens = batches[context.rank * case.gas + micro]
                run.engine.backward(loss_of(run.engine, tokens))
                run.engine.step()
            before, now, was = now, masters(run), oracle.weights()
            with torch.no_grad():
                for name, parameter in twin.named_parameters():
                    parameter.copy_(before[name])
            twin.zero_grad()
            for tokens in batches:
                (loss_of(twin, tokens) / shares).backward()
            oracle.step({n: p.grad for n, p in twin.named_parameters()})
            # 1e-4: gradients come from two backward passes whose sums run in another order; an
            # element much smaller than eps keeps that noise below eps (see the case's eps).
            assert_same_update(
                (before, now),
                (was, oracle.weights()),
                hyper.lr,
                tolerance=1e-4,
                what=f"step {step}",
            )
            check_counters(run, step + 1)
