# SPDX-License-Identifier: Apache-2.0
"""Changes of one thing at a time, trained after the comparison itself."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.compare.trials import ARMS, BASELINE, MIN_LR_SHARE, OUR_CUTS, PUBLISHED_CUTS, Plan, Trial
from ds_blockwise.blocks.settings.defaults import ADAMW_RATE, LR_PRESETS

ADAMW, OURS, MINI, OUR_MINI = BASELINE, "blockwise_adamw", "adam_mini", "blockwise_adam_mini"
_TYPE_NAMES = {
    "emb": "the embedding",
    "head": "the output layer",
    "qk": "queries and keys",
    "ffn": "FFN",
    "vo": "values and output",
    "norm": "norms",
}
_PAPER = LR_PRESETS["paper"]


WORTH_CONFIRMING = 0.03  # nats: more than the seeds of one change differ from each other


@dataclass(frozen=True)
class Ablation:
    """One change of one arm.

    Attributes:
        arm: Key of `trials.ARMS`.
        change: Name, part of the trials' folders.
        words: The same for readers.
        lr: Base learning rate; the arm's best unless the change is about the rate.
        params: What it sets in the optimizer's parameters.
        scheduler: The scheduler's section, if another.
        warmup: Share of the steps, if not the plan's.
        all_seeds: Whether a decision hangs on it: trained with every seed of the plan.
        of_blocks: Whether it is about where second moments are cut.
    """

    arm: str
    change: str
    words: str
    lr: float
    params: Mapping[str, Any] = field(default_factory=dict)
    scheduler: Mapping[str, Any] | None = None
    warmup: float | None = None
    all_seeds: bool = False
    of_blocks: bool = False

    def trial(self, plan: Plan, seed: int) -> Trial:
        """Its run with this seed, as long as the plan's whole runs."""
        warmup = self.warmup or plan.warmup
        return Trial(self.arm, self.lr, seed, plan.steps, self.change, self.params, self.scheduler, warmup)

    def trials(self, plan: Plan) -> list[Trial]:
        """Its runs with the first seed, or all; with another warm-up also the usual one at this rate."""
        found = [self.trial(plan, seed) for seed in range(1, (plan.seeds if self.all_seeds else 1) + 1)]
        return [*found, plan.plain(self.arm, self.lr, 1)] if self.warmup else found


def ablations(best: Mapping[str, float], plan: Plan) -> list[Ablation]:
    """Those the plan asks for, of the arms that were trained; those that decide a default first.

    Args:
        best: Best learning rate by arm, from the sweep.
        plan: What is trained.
    """
    rates = {arm: best.get(arm, math.nan) for arm in ARMS}
    found = [*_second_moments(rates), *_block_types(rates), *_schedules(rates), *_measured(rates), *_warmups(rates)]
    wanted = {a.change for a in found} if plan.ablations == "all" else set(plan.ablations)
    return [ablation for ablation in found if ablation.arm in best and ablation.change in wanted]


def confirmation(
    plan: Plan, asked: Iterable[Ablation], losses: Mapping[Trial, float], arms: tuple[str, ...]
) -> list[Trial]:
    """The other seeds of what looks good with the first one: one lucky seed decides nothing.

    That is the best cut of second moments, and whatever ends `WORTH_CONFIRMING` below the arm as it is.

    Args:
        plan: Its seeds.
        asked: The ablations that were trained.
        losses: Final losses by trial.
        arms: Whose best cut to confirm, whatever it gains.
    """

    def gain(ablation: Ablation) -> float:
        plain = losses.get(plan.plain(ablation.arm, ablation.lr, 1), -math.inf)
        return plain - losses[ablation.trial(plan, 1)]

    found = [a for a in asked if gain(a) >= WORTH_CONFIRMING]
    for arm in arms:
        cuts = [a for a in asked if a.arm == arm and a.of_blocks]
        found += sorted(cuts, key=gain)[-1:]
    return list(dict.fromkeys(a.trial(plan, seed) for a in found for seed in range(2, plan.seeds + 1)))


def _second_moments(best: Mapping[str, float]) -> list[Ablation]:
    """Where Adam-mini's second moments are cut, how long they remember, and eps."""
    cuts: dict[str, tuple[str, dict[str, str]]] = {
        "published-cuts": ("one second moment for each norm, as published", PUBLISHED_CUTS),
        "norm-elements": ("one second moment for each element of a norm", OUR_CUTS),
        "value-whole": ("one for the whole value projection", {"value": "tensor"}),
        "qk-rows": ("one for each row of queries and keys", {"qk": "row"}),
        "norm-elements-qk-rows": (
            "for each element of a norm, each row of queries and keys",
            {**OUR_CUTS, "qk": "row"},
        ),
    }
    chosen = {
        MINI: ("norm-elements", "value-whole", "qk-rows", "norm-elements-qk-rows"),
        OUR_MINI: ("published-cuts", "value-whole", "qk-rows"),
    }
    found = []
    for arm, names in chosen.items():
        for name in names:
            words, change = cuts[name]
            granularity = {**ARMS[arm].params["granularity"], **change}
            decides = name in ("norm-elements", "published-cuts")
            found.append(
                Ablation(arm, name, words, best[arm], {"granularity": granularity}, all_seeds=decides, of_blocks=True)
            )
    for beta2 in (0.9, 0.98):
        found.append(Ablation(MINI, f"beta2-{beta2}", f"beta2 = {beta2}", best[MINI], {"betas": [0.9, beta2]}))
    found.append(Ablation(MINI, "eps-1e-6", "eps = 1e-6", best[MINI], {"eps": 1e-6}))
    return found


def _block_types(best: Mapping[str, float]) -> list[Ablation]:
    """Each block type at the rate that tuned AdamW gives it, the others blockwise; and the head's multiplier."""
    uniform = best[ADAMW] / best[OURS]
    found = [
        Ablation(
            OURS,
            f"uniform-{block_type}",
            f"{name} at AdamW's best rate ({_in_adamw_unit(uniform)} instead of {_in_adamw_unit(_PAPER[block_type])})",
            best[OURS],
            {"lr_multipliers": {block_type: uniform}},
        )
        for block_type, name in _TYPE_NAMES.items()
        if uniform != _PAPER[block_type]
    ]
    for multiplier in (1, 4):
        words = f"output layer at {_in_adamw_unit(multiplier)} instead of {_in_adamw_unit(_PAPER['head'])}"
        found.append(Ablation(OURS, f"head-{multiplier}", words, best[OURS], {"lr_multipliers": {"head": multiplier}}))
    return found


def _in_adamw_unit(multiplier: float) -> str:
    return f"{multiplier / ADAMW_RATE:.3g}"


def _measured(best: Mapping[str, float]) -> list[Ablation]:
    """Multipliers that the run measures itself; they are smaller than the fixed ones, so at higher base rates.

    Measured in the warm-up, where the order of sharpness is another one, and from the step on where it holds
    (docs/sharpness/tiny.csv).
    """
    early: dict[str, Any] = {"auto": {"not_before": 1, "head": True}}
    late: dict[str, Any] = {"auto": {"not_before": 300, "head": True}}
    without_head: dict[str, Any] = {"auto": {"not_before": 300}, "head": 10}
    chosen = [
        ("auto-early", "measured from step 16 on, the output layer's too", 2, early),
        ("auto", "measured from step 300 on, the output layer's too", 2, late),
        ("auto", "measured from step 300 on, the output layer's too", 4, late),
        ("auto-head", "measured from step 300 on, the output layer at 1.25", 2, without_head),
    ]
    return [
        Ablation(
            OURS,
            change,
            f"multipliers {words}; {factor}x the best base rate",
            factor * best[OURS],
            {"lr_multipliers": multipliers},
            all_seeds=multipliers is without_head,  # the package's default
        )
        for change, words, factor, multipliers in chosen
    ]


def _schedules(best: Mapping[str, float]) -> list[Ablation]:
    """The minimum as a share of each block's own peak, and two other shapes, for the baseline and ours."""
    proportional = {"type": "WarmupCosineLR", "params": {"cos_min_ratio": MIN_LR_SHARE, "warmup_type": "linear"}}
    words = f"every block decays to {MIN_LR_SHARE:g} of its own peak"
    found = [Ablation(OURS, "proportional-min-lr", words, best[OURS], scheduler=proportional)]
    kinds = {"wsd": ("BlockwiseWSDLR", "warm-up, stable, decay"), "linear": ("BlockwiseLinearLR", "linear decay")}
    for arm in (ADAMW, OURS):
        for name, (kind, shape) in kinds.items():
            scheduler = {"type": kind, "params": {"min_lr": MIN_LR_SHARE * best[arm]}}
            words = f"{shape} instead of cosine"
            found.append(Ablation(arm, name, words, best[arm], scheduler=scheduler))
    return found


def _warmups(best: Mapping[str, float]) -> list[Ablation]:
    """Warm-up length at the best rate and at twice that: where Adam-mini is said to diverge."""
    factors = {ADAMW: (2,), MINI: (1, 2), OURS: (1,)}
    return [
        Ablation(
            arm,
            f"warmup-{share:g}",
            f"warm-up of {share:.0%} instead of 5%, {factor}x the best base rate",
            factor * best[arm],
            warmup=share,
        )
        for arm, chosen in factors.items()
        for factor in chosen
        for share in (0.01, 0.2)
    ]
