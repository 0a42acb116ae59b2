# SPDX-License-Identifier: Apache-2.0
"""What the rules amount to for one run: a rate, the rates to try around it with their cost, a DeepSpeed JSON."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

from ds_blockwise.blocks.settings.defaults import ADAMW_RATE, DEFAULT_PRESET
from ds_blockwise.optimizers.registry import OPTIMIZERS
from ds_blockwise.runs.plan import COMPUTE_EFFICIENCY, GPUS
from ds_blockwise.runs.rates.scaling_rules import ScalingRule, TrainingSize, rule_for
from ds_blockwise.values import suggest, unknown

SAME_AS_ADAMW = tuple(sorted(name for name, cls in OPTIMIZERS.items() if cls.keeps_adamw_rate))
"""The optimizers whose base rate is AdamW's by default; for others no rule is known."""
PAPER_UNIT = 1 / ADAMW_RATE  # of AdamW's rate: that of the norms
SMALL = 100_000_000  # parameters; below, our sweeps found the best base rate at AdamW's
AROUND, UPWARD = (0.5, 1.0, 2.0), (1.0, 2.0, 4.0, 8.0)
LONGEST_WARMUP, WARMUP_SHARE = 2000, 0.2
MIN_LR_SHARE = 1 / 20
DEFAULT_CONFIG: dict[str, Any] = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}


@dataclass(frozen=True, slots=True)
class Suggestion:
    """A starting rate for a run.

    Attributes:
        size: the run.
        rule: what the rate comes from.
        lr: AdamW's rate, and so the base rate of ours by default, to two digits.
        bracket: the rates to try, in the same unit.
    """

    size: TrainingSize
    rule: ScalingRule
    lr: float
    bracket: tuple[float, ...]

    @property
    def bracket_flops(self) -> float:
        """Of complete runs at all rates of the bracket."""
        return len(self.bracket) * self.size.flops

    def gpu_hours(self, gpu: str) -> tuple[float, float]:
        """Best and worst GPU-hours of the bracket, by the model of time of `ds-blockwise plan`.

        Raises:
            ValueError: no such GPU is known.
        """
        if gpu not in GPUS:
            raise ValueError(unknown("gpu", gpu, GPUS))
        best, worst = (self.bracket_flops / (share * GPUS[gpu].flops) / 3600 for share in COMPUTE_EFFICIENCY)
        return best, worst

    @property
    def warmup_steps(self) -> int:
        """2,000 updates, but at most a fifth of the run: short runs bear a higher rate with it (docs/evidence.md)."""
        return min(LONGEST_WARMUP, int(WARMUP_SHARE * self.size.steps))

    @property
    def min_lr(self) -> float:
        """The absolute rate to which every block type decays."""
        return _two_digits(MIN_LR_SHARE * self.lr)


def suggest_for(size: TrainingSize) -> Suggestion:
    """The suggestion for a run.

    Raises:
        ValueError: a run without layers, or one whose batch holds more tokens than the run.
    """
    if size.layers < 1:
        raise ValueError("the model has no parameters beside its embeddings and output layer: no rule speaks of it")
    if not 1 <= size.batch <= size.tokens:
        raise ValueError(f"batch {size.batch:,} must be at least 1 token and at most the run's {size.tokens:,}")
    rule = rule_for(size)
    lr = _two_digits(rule.lr(size))
    factors = AROUND if size.parameters < SMALL else UPWARD
    return Suggestion(size, rule, lr, tuple(_two_digits(factor * lr) for factor in factors))


def deepspeed_json(
    found: Suggestion,
    optimizer: str | None,
    *,
    sequence_length: int | None = None,
    config: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """A DeepSpeed JSON with the suggested rate, its schedule and clipping.

    Args:
        found: the suggestion.
        optimizer: its type; None: that of ``config`` if its rate is AdamW's, else the first that has it.
        sequence_length: turns the batch into sequences; None leaves ``train_batch_size`` out.
        config: the JSON of a run file, whose other entries are kept. What the launcher of run files writes (batch,
            lengths) is left out then.

    Raises:
        ValueError: the batch is no whole number of sequences, or no rule is known for the optimizer.
    """
    own = (config or {}).get("optimizer", {})
    if optimizer is None:
        optimizer = own["type"] if own.get("type") in SAME_AS_ADAMW else SAME_AS_ADAMW[0]
    if optimizer not in SAME_AS_ADAMW:
        raise ValueError(
            f"no published rule gives a rate for optimizer {optimizer!r}{suggest(optimizer, SAME_AS_ADAMW)} Allowed: "
            f"{', '.join(SAME_AS_ADAMW)}"
        )
    params = {"lr": found.lr, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1, "lr_multipliers": DEFAULT_PRESET}
    schedule: dict[str, Any] = {"min_lr": found.min_lr}
    made = copy.deepcopy(DEFAULT_CONFIG if config is None else config)
    if config is None:
        schedule |= {"warmup_num_steps": found.warmup_steps, "total_num_steps": found.size.steps}
        if sequence_length is not None:
            sequences, rest = divmod(found.size.batch, sequence_length)
            if rest or not sequences:
                raise ValueError(f"a batch of {found.size.batch:,} tokens is no whole number of {sequence_length:,}")
            made["train_batch_size"] = sequences
    else:
        params = {**own.get("params", {}), **params}
    made["optimizer"] = {"type": optimizer, "params": params}
    made["scheduler"] = {"type": "BlockwiseCosineLR", "params": schedule}
    made.setdefault("gradient_clipping", 1.0)
    return made


def _two_digits(value: float) -> float:
    """Rounded to two significant digits: a rule says no more."""
    return round(value, 1 - math.floor(math.log10(value)))
