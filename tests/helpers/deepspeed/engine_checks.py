# SPDX-License-Identifier: Apache-2.0
"""The checks that ``test_parity`` runs on every rank: a real engine against the oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from tests.helpers import models
from tests.helpers.deepspeed.compared import Compared, check_counters
from tests.helpers.deepspeed.engine_cases import (
    BETAS,
    GROUP_2,
    LR,
    LR_FACTORS,
    SECOND_GROUP,
    Case,
    build,
    config_of,
    groups_of,
    hyper_of,
    oracle_of,
    whole_tensor_reference,
)
from tests.helpers.deepspeed.engines import (
    DTYPES,
    feed_step,
    log,
    masters,
    model_weights,
    open_engine,
    prepare_deepspeed,
)
from tests.helpers.distributed import RankContext
from tests.helpers.models import GradientPlan
from tests.helpers.muon_oracle import tolerance_for
from tests.helpers.oracle import assert_same_update, clipped, scheduled_lr


def run_case(context: RankContext, case: Case) -> None:
    """Entry of every rank."""
    prepare_deepspeed()
    import ds_blockwise  # noqa: F401 - registers the optimizers and schedules

    (check_end_to_end if case.end_to_end else check_fed)(context, case)


# ------------------------------------------------------------------------------------ fed gradients


def check_fed(context: RankContext, case: Case) -> None:
    config = config_of(case)
    plan = GradientPlan(context.world_size, case.gas, DTYPES[case.dtype])
    with open_engine(config, lambda: build(case, config), groups=groups_of(case)) as run:
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
        self.hyper = hyper_of(case, list(start))
        self.base = {name: h.lr for name, h in self.hyper.items()}
        self.oracle = oracle_of(case, start, self.hyper)
        # Clipping factors are rounded differently by each wrapper; a NaN step is never fed to the
        # reference; both leave nothing to compare bit by bit.
        exact = case.optimizer in ("adamw", "lion", "muon") and not (case.clip or case.scheduler)
        self.reference = whole_tensor_reference(case, start) if exact else None
        self.expected_lr = _expected_scheduler(case)
        self.applied = 0

    def go(self) -> None:
        for step in range(self.case.steps):
            self._set_lr(step)
            poisoned = step in self.case.poison
            bad_rank = min(1, self.context.world_size - 1)
            value = self.case.poison_value if poisoned and self.context.rank == bad_rank else None
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
            group = groups[SECOND_GROUP[self.case.groups](name)]
            self.hyper[name] = replace(hyper, lr=group["lr"], betas=tuple(group["betas"]))
        self.oracle.hyper = self.hyper
        if self.expected_lr is not None:
            wanted = self.expected_lr(self.applied)
            shown = self.run.engine.get_lr()
            assert len(shown) == len(wanted) == len(groups), (shown, wanted)
            for lr, base in zip(shown, wanted, strict=True):
                assert abs(lr - base) <= 1e-12 * LR, f"step {step}: engine.get_lr() is {shown}, the base lr is {wanted}"

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
            self.oracle.hyper = hyper_of(self.case, list(before))
            self.oracle.progress = _progress(self.case, self.applied)
        was = self.oracle.weights()
        self.oracle.step(gradients, block_lr)
        assert_same_update(
            (before, self.now),
            (was, self.oracle.weights()),
            lr or 1.0,  # a warm-up from 0 makes the first update exactly nothing
            # Decay and update each round a weight that has grown at up to 50 times the final lr.
            weight_roundings=2 if block_lr else 0,
            tolerance=self._tolerance(),
            what=f"step {step}, {type(self.run.engine.optimizer).__name__}",
        )
        if self.reference is not None:
            self._check_bitwise(step, gradients)

    def _tolerance(self) -> float:
        if self.oracle.momentum is not None:
            # bf16 keeps 8 bits: a stored momentum may fall on either side of a rounding border.
            return 2.0**-9
        return tolerance_for(self.case.optimizer)

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


# ---------------------------------------------------------------------------------------- schedules


def _own_block_lr(case: Case, k: int) -> Callable[[float, float], float]:
    p = case.scheduler_params
    kinds = {"BlockwiseCosineLR": "cosine", "BlockwiseWSDLR": "wsd", "BlockwiseLinearLR": "linear"}
    return scheduled_lr(
        p.get("shape") or kinds[case.scheduler],
        k,
        warmup=p["warmup_num_steps"],
        total=p["total_num_steps"],
        min_lr=p.get("min_lr", 0.0),
        decay=p.get("decay_num_steps", 0),
    )


def _progress(case: Case, k: int) -> float:
    """How much of the decay is done at update k."""
    p = case.scheduler_params
    decay = p.get("decay_num_steps", p["total_num_steps"] - p["warmup_num_steps"])
    return min(1.0, max(0.0, 1 - (p["total_num_steps"] - k) / decay))


def _expected_scheduler(case: Case) -> Callable[[int], list[float]] | None:
    """Groups' lr at update k: ours by formula, DeepSpeed's by running it on a plain AdamW."""
    if not case.scheduler:
        return None
    if case.scheduler.startswith("Blockwise"):
        peaks = [LR, GROUP_2["lr"]] if case.groups else [LR]
        return lambda k: [_own_block_lr(case, k)(1.0, peak) for peak in peaks]
    from deepspeed.runtime import lr_schedules

    plain = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=LR, betas=BETAS)
    schedule = getattr(lr_schedules, case.scheduler)(plain, **case.scheduler_params)
    sequence = []
    for _ in range(case.steps):
        sequence.append(plain.param_groups[0]["lr"])
        schedule.step()
    return lambda k: [sequence[k]]


# --------------------------------------------------------------------------------------- end to end


def check_end_to_end(context: RankContext, case: Case) -> None:
    """Real forward and backward; the oracle gets autograd's mean gradient of all ranks' batches."""
    config = config_of(case)
    shares = context.world_size * case.gas
    twin = build(case, config)
    loss_of = {
        "nano": lambda model, tokens: model(tokens),
        "llama": lambda model, tokens: model(input_ids=tokens, labels=tokens).loss,
    }[case.model]
    vocab = twin.config.vocab_size
    with open_engine(config, lambda: build(case, config), feed=False) as run:
        now = masters(run)
        pair = Compared(run, oracle_of(case, now, hyper_of(case, list(now))))
        for step in range(case.steps):
            pair.set_lr(step)
            generator = torch.Generator().manual_seed(100 + step)
            batches = torch.randint(vocab, (shares, 2, 9), generator=generator)
            for micro in range(case.gas):
                tokens = batches[context.rank * case.gas + micro]
                run.engine.backward(loss_of(run.engine, tokens))
                run.engine.step()
            with torch.no_grad():
                for name, parameter in twin.named_parameters():
                    parameter.copy_(pair.now[name])
            twin.zero_grad()
            for tokens in batches:
                (loss_of(twin, tokens) / shares).backward()
            # 1e-4: gradients come from two backward passes whose sums run in another order; an
            # element much smaller than eps keeps that noise below eps (see the case's eps).
            pair.check_step({n: p.grad for n, p in twin.named_parameters()}, tolerance=1e-4, what=f"step {step}")
