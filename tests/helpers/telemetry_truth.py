# SPDX-License-Identifier: Apache-2.0
"""What telemetry must read, computed from the oracle's full tensors, and what "auto" must make of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.helpers.muon_oracle import MuonOracle
from tests.helpers.oracle import Hyper, Oracle
from tests.helpers.tables.oracle_names import BLOCK_TYPE

TYPES = ("emb", "head", "qk", "ffn", "vo", "norm", "other")
QUANTITIES = (
    "lr",
    "lr_multiplier",
    "update_ratio",
    "update_rms",
    "param_rms",
    "grad_rms",
    "second_moment",
    "momentum_rms",
)


def types_of(oracle: Oracle, name: str) -> Tensor:
    """The number of the block type of every element."""
    return oracle.per_element(name, lambda role: float(TYPES.index(BLOCK_TYPE[role])))


def mean_of(oracle: Oracle, values: Mapping[str, Tensor]) -> dict[str, float]:
    """Mean of full tensors over each block type, fp64."""
    total, count = dict.fromkeys(TYPES, 0.0), dict.fromkeys(TYPES, 0)
    for name, value in values.items():
        types = types_of(oracle, name)
        for index, kind in enumerate(TYPES):
            chosen = value.double()[types == index]
            total[kind] += float(chosen.sum())
            count[kind] += chosen.numel()
    return {kind: total[kind] / count[kind] for kind in TYPES if count[kind]}


def hyper(oracle: Oracle, name: str) -> Hyper:
    return oracle.hyper if isinstance(oracle.hyper, Hyper) else oracle.hyper[name]


def second_moments(oracle: Oracle) -> dict[str, float | None]:
    """Mean of the bias-corrected second moment of each block type; None where there is none of gradients."""
    if not by_adam(oracle):
        return dict.fromkeys(mean_of(oracle, oracle.weights()))
    return mean_of(oracle, {n: s.v / (1 - hyper(oracle, n).betas[1] ** s.step) for n, s in oracle.state.items()})


def by_adam(oracle: Oracle) -> bool:
    """Whether every element is stepped by Adam's update."""
    return type(oracle) is Oracle


def bias_correction(oracle: Oracle, name: str) -> Tensor | float:
    """What each element of the first moment is divided by in the update."""
    corrected = 1 - hyper(oracle, name).betas[0] ** oracle.state[name].step
    if by_adam(oracle):
        return corrected
    if not isinstance(oracle, MuonOracle):
        return 1.0
    found = torch.full_like(oracle.state[name].m, corrected).transpose(0, oracle.classes[name].axis)
    for rows in oracle.matrices(name):
        found[rows] = 1.0
    return found.transpose(0, oracle.classes[name].axis)


def truth(
    oracle: Oracle,
    was: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    block_lr: Callable[[float, float], float] | None = None,
) -> dict[str, dict[str, Any]]:
    """All readings after ``oracle.step(gradients, block_lr)``, which began with the weights ``was``."""
    rate = block_lr or (lambda multiplier, lr: multiplier * lr)
    now = oracle.weights()
    lr, multiplier, update, momentum = {}, {}, {}, {}
    for name in now:
        h = hyper(oracle, name)
        lr[name] = oracle.per_element(name, lambda role, h=h: rate(oracle.multiplier(role), h.lr))
        multiplier[name] = oracle.per_element(name, oracle.multiplier)
        decay = oracle.per_element(name, lambda role, h=h: h.weight_decay * oracle.decay_multiplier(role))
        update[name] = was[name] * (1 - lr[name] * decay) - now[name]
        momentum[name] = oracle.state[name].m / bias_correction(oracle, name)

    def rms(values: Mapping[str, Tensor]) -> dict[str, float]:
        return {
            k: math.sqrt(v) for k, v in mean_of(oracle, {n: t.double().square() for n, t in values.items()}).items()
        }

    found = {
        "lr": mean_of(oracle, lr),
        "lr_multiplier": mean_of(oracle, multiplier),
        "update_rms": rms(update),
        "param_rms": rms(now),
        "grad_rms": rms(gradients),
        "second_moment": second_moments(oracle),
        "momentum_rms": rms(momentum),
    }
    found["update_ratio"] = {k: found["update_rms"][k] / found["param_rms"][k] for k in found["lr"]}
    return {kind: {name: of[kind] for name, of in found.items()} for kind in found["lr"]}


def assert_reads(readings: Mapping[str, Any], expected: Mapping[str, Mapping[str, Any]], step: int, what: str) -> None:
    """Compare readings with the truth: fp32 weights and moments leave 1e-5."""
    assert readings.keys() == expected.keys(), (what, list(readings), list(expected))
    for kind, reading in readings.items():
        assert (reading.block_type, reading.step) == (kind, step), what
        for name in QUANTITIES:
            found, wanted = getattr(reading, name), expected[kind][name]
            if wanted is None:
                assert found is None and name not in reading.quantities(), f"{what}: {name} of {kind}"
                continue
            assert abs(found - wanted) <= 1e-5 * abs(wanted), f"{what}: {name} of {kind} is {found}, not {wanted}"


@dataclass
class AutoTruth:
    """Measured multipliers by hand, from the oracle's second moments.

    Attributes:
        reading_steps: the updates after which second moments are read.
        ramp: steps from the measurement to the full multipliers.
        exponent: of the ratio to norms.
        high: largest multiplier.
        pinned: multipliers that stay.
        unit: the multiplier of norms: lr is AdamW's rate, eight times that of the norms.
    """

    reading_steps: Iterable[int]
    ramp: int
    exponent: float = 0.7
    high: float = 16.0
    pinned: Mapping[str, float] = field(default_factory=dict)
    unit: float = 0.125

    def __post_init__(self) -> None:
        self._sums: dict[str, float] = {}
        self.target: dict[str, float] = {}
        self.steps = sorted(self.reading_steps)

    def after(self, step: int, oracle: Oracle) -> dict[str, float]:
        """The oracle's multipliers for the update that follows update number ``step``."""
        if step in self.steps:
            for kind, value in second_moments(oracle).items():
                self._sums[kind] = self._sums.get(kind, 0.0) + value
        if step == self.steps[-1]:
            norm = self._sums["norm"]
            for kind, value in self._sums.items():
                if kind not in self.pinned and kind != "other":
                    self.target[kind] = self.unit * min(self.high, max(1.0, (norm / value) ** self.exponent))
        share = 0.0
        if step >= self.steps[-1]:
            # ten equal stairs, the last one at the top
            share = min(10, math.floor(10 * (step - self.steps[-1]) / self.ramp)) / 10
        ones = dict.fromkeys(TYPES, 1.0)
        return {**ones, **{k: 1 + share * (r - 1) for k, r in self.target.items()}, **self.pinned}


def clone(gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: gradient.clone() for name, gradient in gradients.items()}


def set_gradients(model: torch.nn.Module, gradients: Mapping[str, Tensor]) -> None:
    """Give every parameter its gradient, without a backward pass."""
    for name, parameter in model.named_parameters():
        parameter.grad = gradients[name].to(parameter.dtype).clone() if name in gradients else None
