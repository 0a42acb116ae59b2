# SPDX-License-Identifier: Apache-2.0
"""What `compare_optimizers.py` trains: optimizers, learning rates, seeds, lengths and ablations, as data.

A trial is one complete run with its own decay to the minimum learning rate; its name says everything that differs, so
finished trials are found again and never trained twice.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MIN_LR_SHARE = 0.05  # the paper's: every block decays to one twentieth of the base learning rate
COMMON = {"betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}
UNIFORM = {"lr_multipliers": {"emb": 1, "head": 1, "qk": 1, "ffn": 1, "vo": 1, "norm": 1, "other": 1}}


@dataclass(frozen=True)
class Arm:
    """One optimizer with its settings, and the learning rates to sweep.

    Attributes:
        label: For tables and figures.
        type: DeepSpeed's name of the optimizer.
        params: Its parameters but the learning rate.
        grid: Base learning rates, ascending by factors of 2.
    """

    label: str
    type: str
    params: Mapping[str, Any]
    grid: tuple[float, ...]


_HIGH = (2e-3, 4e-3, 8e-3, 1.6e-2)
_LOW = (2.5e-4, 5e-4, 1e-3, 2e-3)
ARMS = {
    "adamw": Arm("AdamW (torch)", "AdamW", {"torch_adam": True}, _HIGH),
    "blockwise_adamw": Arm("Blockwise AdamW", "BlockwiseAdamW", {}, _LOW),
    "adam_mini": Arm("Adam-mini (ours, multipliers 1)", "BlockwiseAdamMini", UNIFORM, _HIGH),
    "blockwise_adam_mini": Arm("Blockwise Adam-mini", "BlockwiseAdamMini", {}, _LOW),
    "muon": Arm("Muon + AdamW (torch)", "MuonAndAdamW", {}, _HIGH),
    "adamw_8bit": Arm("8-bit AdamW (torchao)", "AdamW8bit", {}, _HIGH),
}
BASELINE = "adamw"


@dataclass(frozen=True)
class Trial:
    """One run.

    Attributes:
        arm: Key of `ARMS`.
        lr: Base learning rate.
        seed: Of weights and data order.
        steps: Length, with a complete decay.
        change: Name of an ablation's change; empty for the arm as it is.
        params: What the change sets in the optimizer's parameters.
        scheduler: What it sets in the scheduler's section, whole.
        warmup: Share of the steps, if not the usual.
    """

    arm: str
    lr: float
    seed: int
    steps: int
    change: str = ""
    params: Mapping[str, Any] = field(default_factory=dict, hash=False)
    scheduler: Mapping[str, Any] | None = field(default=None, hash=False)
    warmup: float = 0.05

    @property
    def name(self) -> str:
        """Folder of its results."""
        change = f"_{self.change}" if self.change else ""
        return f"{self.arm}{change}_lr{self.lr:g}_steps{self.steps}_seed{self.seed}"

    def settings(self, vocab_size: int) -> dict[str, Any]:
        """The DeepSpeed JSON.

        Args:
            vocab_size: Of the model, by which Muon's companion knows its parameters.
        """
        arm = ARMS[self.arm]
        params = {**copy.deepcopy(COMMON), **copy.deepcopy(dict(arm.params)), **copy.deepcopy(dict(self.params))}
        if arm.type == "MuonAndAdamW":
            params["vocab_size"] = vocab_size
        scheduler = self.scheduler or {"type": "BlockwiseCosineLR", "params": {"min_lr": MIN_LR_SHARE * self.lr}}
        return {
            "optimizer": {"type": arm.type, "params": {"lr": self.lr, **params}},
            "scheduler": copy.deepcopy(dict(scheduler)),
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": 0},
            "csv_monitor": {"enabled": True},
        }


@dataclass(frozen=True)
class Plan:
    """How much is trained.

    Attributes:
        steps: Of a whole run.
        grid: How many learning rates of each arm's grid, from its middle.
        seeds: Of the best learning rate of each arm, the sweep's included.
        lengths: Shares of the steps at which arms are trained again with complete decays.
        widen: How often a grid may grow at an edge that turned out best.
        ablations: Whether those are trained too.
        arms: Keys of `ARMS`.
    """

    steps: int
    grid: int
    seeds: int
    lengths: tuple[float, ...]
    widen: int
    ablations: bool
    arms: tuple[str, ...] = tuple(ARMS)

    def learning_rates(self, arm: str) -> tuple[float, ...]:
        """The arm's grid; a shorter one loses its ends, the upper one first."""
        grid = ARMS[arm].grid
        surplus = len(grid) - self.grid
        return grid[surplus // 2 : len(grid) - (surplus + 1) // 2]


FULL = Plan(steps=800, grid=4, seeds=3, lengths=(0.5, 0.75), widen=2, ablations=True)
QUICK = Plan(steps=200, grid=3, seeds=2, lengths=(), widen=0, ablations=False)


def blockwise_schedule(kind: str, lr: float) -> dict[str, Any]:
    """A schedule of ours that decays every block to the same minimum."""
    return {"type": kind, "params": {"min_lr": MIN_LR_SHARE * lr}}


def ablations(plan: Plan, best: Mapping[str, float]) -> list[Trial]:
    """Changes of one thing at a time, at each arm's best learning rate and with its seeds.

    Args:
        plan: Its steps and seeds.
        best: Best learning rate by arm, from the sweep.
    """
    changes = [
        *_block_types(best),
        *_measured(best),
        *_schedules(best),
        *_second_moments(best),
        *_warmups(best),
    ]
    return [
        Trial(seed=seed, steps=plan.steps, **change) for change in changes for seed in range(1, change.pop("seeds") + 1)
    ]


def _change(arm: str, best: Mapping[str, float], name: str, seeds: int = 1, **what: Any) -> dict[str, Any]:
    return {"arm": arm, "lr": best[arm], "change": name, "seeds": seeds, **what}


def _block_types(best: Mapping[str, float]) -> list[dict[str, Any]]:
    """Each block type at the rate that tuned AdamW gives it, the others blockwise; and the head's multiplier."""
    ours = "blockwise_adamw"
    uniform = best[BASELINE] / best[ours]
    found = [
        _change(ours, best, f"uniform-{block_type}", params={"lr_multipliers": {block_type: uniform}})
        for block_type in ("emb", "head", "qk", "ffn", "vo", "norm")
    ]
    found += [_change(ours, best, f"head-{m}", params={"lr_multipliers": {"head": m}}) for m in (1, 4)]
    return found


def _measured(best: Mapping[str, float]) -> list[dict[str, Any]]:
    """Multipliers that the run measures itself; they are smaller than the fixed ones, so also at higher base rates."""
    auto = {"lr_multipliers": {"auto": {}}}
    return [
        _change(arm, {arm: factor * best[arm]}, "auto", params=auto)
        for arm in ("blockwise_adamw", "blockwise_adam_mini")
        for factor in (1, 2, 4)
    ]


def _schedules(best: Mapping[str, float]) -> list[dict[str, Any]]:
    """The minimum as a share of each block's own peak, and two other shapes, for the baseline and ours."""
    proportional = {"type": "WarmupCosineLR", "params": {"cos_min_ratio": MIN_LR_SHARE, "warmup_type": "linear"}}
    found = [_change("blockwise_adamw", best, "proportional-min-lr", scheduler=proportional)]
    for arm in (BASELINE, "blockwise_adamw"):
        for name, kind in (("wsd", "BlockwiseWSDLR"), ("linear", "BlockwiseLinearLR")):
            found.append(_change(arm, best, name, scheduler=blockwise_schedule(kind, best[arm])))
    return found


def _second_moments(best: Mapping[str, float]) -> list[dict[str, Any]]:
    """Where Adam-mini's second moments are cut, and how long they remember."""
    granularities = {
        "norm-elements": {"norm": "element"},
        "value-whole": {"value": "tensor"},
        "value-heads": {"value": "head"},
        "qk-rows": {"qk": "row"},
        "norm-elements-qk-rows": {"norm": "element", "qk": "row"},
    }
    found = []
    for arm in ("adam_mini", "blockwise_adam_mini"):
        for name, granularity in granularities.items():
            found.append(_change(arm, best, name, params={"granularity": granularity}))
        for beta2 in (0.9, 0.98):
            found.append(_change(arm, best, f"beta2-{beta2}", params={"betas": [0.9, beta2]}))
        found.append(_change(arm, best, "eps-1e-6", params={"eps": 1e-6}))
    return found


def _warmups(best: Mapping[str, float]) -> list[dict[str, Any]]:
    """Warm-up length at the best rate and at twice that: where Adam-mini is said to diverge."""
    found = []
    for arm in (BASELINE, "adam_mini", "blockwise_adam_mini"):
        for share in (0.01, 0.2):
            found.append(_change(arm, best, f"warmup-{share:g}", warmup=share))
            # the sweep has this rate with the usual warm-up
            found.append(_change(arm, {arm: 2 * best[arm]}, f"warmup-{share:g}", warmup=share))
    return found


def digest_of(trial: Trial, vocab_size: int, data: Mapping[str, Any]) -> str:
    """What decides a trial's result, as text: a finished trial is used again only if this is unchanged.

    Args:
        trial: The trial.
        vocab_size: Of the model.
        data: `metadata.json` of the prepared text.
    """
    facts = {
        "settings": trial.settings(vocab_size),
        "seed": trial.seed,
        "steps": trial.steps,
        "warmup": trial.warmup,
        "data": [data["tokenizer"]["sha256"], data["splits"]],
    }
    return json.dumps(facts, sort_keys=True)
