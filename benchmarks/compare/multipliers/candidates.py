# SPDX-License-Identifier: Apache-2.0
"""What is trained: AdamW with multipliers from a signal-to-noise ratio, and ``"tuned"`` with one thing more.

arXiv 2605.05794 (MoLS) scales Adam's updates by the signal-to-noise ratio of each module, so that nobody has to tune
the rates of modules. Its equations were not at hand, so the rule here follows the idea and is our own. For a block
type, with Adam's bias-corrected moments, SNR = sum(m_hat ** 2) / sum(v_hat). A constant gradient gives 1, noise alone
(1 - beta1) / (1 + beta1) = 0.05, and gradients that change sign from step to step give less. A multiplier is a power
of the SNR: -1/2 gives back to noisy types what averaging takes from their updates, 1/2 trusts the types with more
signal. Multipliers are divided by their geometric mean over the matrices; the sweep finds the rest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.compare.ablations import OURS
from benchmarks.compare.results import Results, at_best
from benchmarks.compare.trials import BASELINE, FULL, MIN_LR_SHARE, Trial
from benchmarks.provenance import PROVENANCE, provenance, read_csv, write_csv
from ds_blockwise.blocks.settings.defaults import ADAMW_RATE
from ds_blockwise.hosts.deepspeed.monitor import PREFIX
from ds_blockwise.runs.metrics import read_metric

MATRICES = ("emb", "head", "qk", "ffn", "vo")
TYPES = (*MATRICES, "norm")
READ_FROM, MEASURING_STEPS, SPACING = 100, 300, 10
COLUMNS = ("step", "block_type", "momentum_rms", "second_moment", *PROVENANCE)
EXPONENTS = {"snr-inverse": -0.5, "snr": 0.5}
ADAMW, SCALE, AUTO, TUNED = '`"uniform"` (AdamW)', '`"adamw_scale"`', '`"auto"`, from sharpness', '`"tuned"`'
_PUBLISHED_CHANGE = {AUTO: "auto-head", TUNED: "uniform-norm"}
ADDITIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "tuned-norm-beta2-0.99": ("second beta of norms 0.99 instead of 0.95", {"betas_by_type": {"norm": [None, 0.99]}}),
    "tuned-no-norm-decay": ("no weight decay on norms", {"weight_decay_multipliers": {"norm": 0}}),
    "tuned-cautious-decay": ("cautious weight decay", {"cautious_weight_decay": True}),
}


def published(results: Results) -> dict[str, list[Trial]]:
    """What the SNR is compared with: the published trials by preset, each at the best of its rates, every seed.

    Args:
        results: Of docs/compare/compare.csv.
    """
    found = {ADAMW: at_best(results, FULL, BASELINE), SCALE: at_best(results, FULL, OURS)}
    for name, change in _PUBLISHED_CHANGE.items():
        trials = [t for t in results if t.arm == OURS and t.change == change]
        found[name] = sorted(trials, key=lambda t: t.seed)
    return found


def _ours(change: str, lr: float, seed: int, steps: int, params: Mapping[str, Any]) -> Trial:
    """A run at a rate in AdamW's unit, with the minimum that the published runs have at this rate."""
    scheduler = {"type": "BlockwiseCosineLR", "params": {"min_lr": MIN_LR_SHARE * lr / ADAMW_RATE}}
    return Trial(OURS, lr, seed, steps, change, params, scheduler, FULL.warmup)


def measuring(lr: float) -> Trial:
    """The short run of AdamW whose moments are read."""
    params = {"lr_multipliers": {"preset": "uniform"}, "telemetry": {"interval": SPACING}}
    return _ours("snr-measured", lr, 1, MEASURING_STEPS, params)


def by_snr(change: str, multipliers: Mapping[str, float], lr: float, seed: int) -> Trial:
    """A whole run with fixed multipliers, named by a key of `EXPONENTS`."""
    return _ours(change, lr, seed, FULL.steps, {"lr_multipliers": {"preset": "uniform", **multipliers}})


def addition(change: str, tuned: Trial) -> Trial:
    """A run of ``"tuned"`` with one of `ADDITIONS`."""
    params = {**tuned.params, **ADDITIONS[change][1]}
    return Trial(tuned.arm, tuned.lr, tuned.seed, tuned.steps, change, params, tuned.scheduler, tuned.warmup)


def keep_readings(folder: Path, path: Path) -> None:
    """Write the moments of a measuring run beside the published results.

    Args:
        folder: Of the run's metrics.
        path: Of the CSV.
    """
    rows, source = [], provenance()
    for kind in TYPES:
        momentum, second = (
            read_metric(folder, f"{PREFIX}/{name}/{kind}") for name in ("momentum_rms", "second_moment")
        )
        for step in sorted(momentum):
            values = {"momentum_rms": f"{momentum[step]:.6g}", "second_moment": f"{second[step]:.6g}"}
            rows.append({"step": str(step), "block_type": kind, **values, **source})
    write_csv(path, COLUMNS, rows)


def ratios(path: Path) -> dict[str, float]:
    """The signal-to-noise ratio by block type: geometric means over the readings past the first `READ_FROM` steps."""
    logs: dict[str, list[float]] = {kind: [] for kind in TYPES}
    for row in read_csv(path):
        if int(row["step"]) >= READ_FROM:
            logs[row["block_type"]].append(math.log(float(row["momentum_rms"]) ** 2 / float(row["second_moment"])))
    return {kind: math.exp(math.fsum(values) / len(values)) for kind, values in logs.items()}


def multipliers(snr: Mapping[str, float], exponent: float) -> dict[str, float]:
    """Powers of the ratios, with a geometric mean of 1 over the matrices, to three digits.

    Args:
        snr: By block type.
        exponent: Of the ratios.
    """
    mean = math.fsum(math.log(snr[kind]) for kind in MATRICES) / len(MATRICES)
    return {kind: float(f"{math.exp(exponent * (math.log(snr[kind]) - mean)):.3g}") for kind in snr}
