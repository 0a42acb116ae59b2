# SPDX-License-Identifier: Apache-2.0
"""An independent, slow definition of both optimizers on full tensors.

Written from the papers (AdamW arXiv 1711.05101, Adam-mini 2406.16793, multipliers per block type
2502.19002, cautious weight decay 2510.12402) and the project's contract. It shares no line and no
idea with ``ds_blockwise``: blocks are an integer label on every element; ``oracle_names`` says by
hand which rows are what.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.helpers.tables.oracle_names import BLOCK_TYPE, MULTIPLIERS, ROLE, Classes

# ------------------------------------------------------------------------------- the optimizers


@dataclass
class Hyper:
    """What a param group may set for one parameter."""

    lr: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-6
    weight_decay: float = 0.1


@dataclass
class State:
    """Moments of one parameter after ``step`` updates, of its full shape."""

    m: Tensor
    v: Tensor
    step: int = 0


@dataclass
class Oracle:
    """Both optimizers on {name: full tensor}.

    Attributes:
        params: Weights as given; kept (and returned by ``weights``) in ``arithmetic``.
        classes: Name -> spans. Every parameter must be there and its spans must tile it.
        mini: True for Blockwise Adam-mini, False for Blockwise AdamW.
        hyper: One for all, or name -> Hyper.
        overrides: Parameter name -> lr multiplier, whatever its role (a user's rule).
        betas_by_type: Role or block type -> two betas, None for the group's.
        end_multipliers: Role or block type -> lr multiplier at progress 1; linear in between.
        progress: How much of the schedule's decay is done in the next step.
        cautious: Decay an element only unless its first moment has the opposite sign.
        arithmetic: torch.float64 (the truth) or torch.float32 (the same formula, rounded).
        momentum: dtype that the first moment is stored in between updates.
        state: Moments by name, once a parameter has been updated.
        labels: The block number of every element, by name.
    """

    params: Mapping[str, Tensor]
    classes: Classes
    mini: bool
    hyper: Hyper | dict[str, Hyper] = field(default_factory=Hyper)
    lr_multipliers: Mapping[str, float] = field(default_factory=dict)
    weight_decay_multipliers: Mapping[str, float] = field(default_factory=dict)
    overrides: Mapping[str, float] = field(default_factory=dict)
    betas_by_type: Mapping[str, tuple[float | None, float | None]] = field(default_factory=dict)
    end_multipliers: Mapping[str, float] = field(default_factory=dict)
    progress: float = 0.0
    cautious: bool = False
    arithmetic: torch.dtype = torch.float64
    momentum: torch.dtype | None = None

    def __post_init__(self) -> None:
        self.set_weights(self.params)
        self.state: dict[str, State] = {}
        self.labels = {name: self._label(name, p.shape) for name, p in self._p.items()}

    def weights(self) -> dict[str, Tensor]:
        """A copy of the current weights."""
        return {name: p.clone() for name, p in self._p.items()}

    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Go on from these weights, e.g. those that a bf16 parameter was rounded to."""
        self._p = {name: p.detach().to(self.arithmetic).clone() for name, p in weights.items()}

    def multiplier(self, role: str) -> float:
        """A key that is a role wins over the key of its block type, and that over the default."""
        block_type = BLOCK_TYPE[role]
        chosen = self.lr_multipliers
        start = chosen.get(role, chosen.get(block_type, MULTIPLIERS[block_type]))
        end = self.end_multipliers.get(role, self.end_multipliers.get(block_type, start))
        return (1 - self.progress) * start + self.progress * end

    def betas(self, role: str, of_group: tuple[float, float]) -> list[float]:
        chosen = self.betas_by_type
        own = chosen.get(role, chosen.get(BLOCK_TYPE[role], (None, None)))
        return [g if o is None else o for o, g in zip(own, of_group, strict=True)]

    def decay_multiplier(self, role: str) -> float:
        chosen = self.weight_decay_multipliers
        return chosen.get(role, chosen.get(BLOCK_TYPE[role], 1.0))

    def _label(self, name: str, shape: torch.Size) -> Tensor:
        """The block number of every element."""
        classified = self.classes[name]
        assert classified.spans[0].start == 0, name
        assert classified.spans[-1].end == shape[classified.axis], (name, shape, classified)
        along = torch.zeros(shape[classified.axis], dtype=torch.long)
        element_wise = torch.zeros(shape[classified.axis], dtype=torch.bool)
        block, end = 0, 0
        shared: dict[str, int] = {}
        for span in classified.spans:
            assert span.start == end, (name, "spans must follow each other", classified)
            end = span.end
            if span.size == ROLE:
                along[span.start : span.end] = shared.setdefault(span.role, block)
                block += 1
                continue
            for row in range(span.start, span.end):
                if span.size and row > span.start and (row - span.start) % span.size == 0:
                    block += 1
                along[row] = block
                element_wise[row] = span.size == 0
            block += 1
        view = [1] * len(shape)
        view[classified.axis] = -1
        labels = along.view(view).expand(shape).clone()
        own = block + torch.arange(labels.numel()).view(shape)
        return torch.where(element_wise.view(view).expand(shape), own, labels)

    def per_element(self, name: str, value: Callable[[str], float]) -> Tensor:
        classified = self.classes[name]
        shape = self._p[name].shape
        along = torch.zeros(shape[classified.axis], dtype=self.arithmetic)
        for span in classified.spans:
            along[span.start : span.end] = value(span.role)
        view = [1] * len(shape)
        view[classified.axis] = -1
        return along.view(view).expand(shape)

    def mean_square(self, name: str, gradient: Tensor) -> Tensor:
        """Mean of g^2 over each element's block, summed in fp64 whatever the arithmetic is."""
        return self.block_mean(name, gradient.double().square())

    def block_mean(self, name: str, values: Tensor) -> Tensor:
        """The mean of fp64 values over each element's block; for AdamW the values themselves."""
        if not self.mini:
            return values
        labels = self.labels[name].flatten()
        total = torch.zeros(int(labels.max()) + 1, dtype=torch.float64)
        count = torch.zeros_like(total)
        total.index_add_(0, labels, values.flatten())
        count.index_add_(0, labels, torch.ones_like(values.flatten()))
        return (total[labels] / count[labels]).view(values.shape)

    def take_over(self, moments: Mapping[str, State]) -> None:
        """Go on with another optimizer's moments; second moments become means over this one's blocks."""
        for name, state in moments.items():
            second = self.block_mean(name, state.v.double()).to(self.arithmetic)
            self.state[name] = State(state.m.to(self.arithmetic).clone(), second.clone(), state.step)

    def step(
        self,
        gradients: Mapping[str, Tensor],
        block_lr: Callable[[float, float], float] | None = None,
    ) -> None:
        """One update of every parameter in ``gradients``; the others are left untouched.

        ``block_lr(multiplier, lr)`` gives a block type's lr; by default their product.
        """
        rate = block_lr or (lambda multiplier, lr: multiplier * lr)
        for name, gradient in gradients.items():
            h = self.hyper if isinstance(self.hyper, Hyper) else self.hyper[name]
            own = self.overrides.get(name)
            lr = self.per_element(
                name,
                lambda role, h=h, own=own: rate(self.multiplier(role) if own is None else own, h.lr),
            )
            decay = self.per_element(name, lambda role, h=h: h.weight_decay * self.decay_multiplier(role))
            self._update(name, gradient, h, lr, decay)

    def _update(self, name: str, gradient: Tensor, h: Hyper, lr: Tensor, decay: Tensor) -> None:
        p = self._p[name]
        g = gradient.to(self.arithmetic)
        state = self.state.setdefault(name, State(torch.zeros_like(p), torch.zeros_like(p)))
        state.step += 1
        beta1, beta2 = (self.per_element(name, lambda role, i=i: self.betas(role, h.betas)[i]) for i in (0, 1))
        state.m = beta1 * state.m + (1 - beta1) * g
        state.v = beta2 * state.v + (1 - beta2) * self.mean_square(name, gradient).to(p.dtype)
        m_hat = state.m / (1 - beta1**state.step)
        v_hat = state.v / (1 - beta2**state.step)
        decayed = p * (1 - lr * decay)
        p = torch.where(m_hat.sign() * p.sign() < 0, p, decayed) if self.cautious else decayed
        p = p - lr * m_hat / (v_hat.sqrt() + h.eps)
        if self.momentum is not None:
            state.m = state.m.to(self.momentum).to(self.arithmetic)
        self._p[name] = p


BY_ROLE: dict[str, Any] = {
    # 0.93: fed gradients have few bits, and with 0.9 some of an embedding cancel to a momentum of no sign
    "betas_by_type": {"norm": [0.8, 0.99], "ffn": [None, 0.9], "key": [0.5, None], "emb": [0.93, None]},
    "cautious_weight_decay": True,
}
"""Settings per role, as a JSON has them."""

ROLE_SETTINGS: dict[str, Any] = {
    **BY_ROLE,
    "lr_multipliers": {"norm": {"start": 1.0, "end": 0.25}, "value": {"start": 0.5, "end": 2}, "qk": 2},
}
"""With multipliers that move: something has to say how far the decay is."""


def told(params: Mapping[str, Any], multipliers: Mapping[str, float] | None = None) -> dict[str, Any]:
    """What the oracle is told of an optimizer's parameters in a JSON.

    Args:
        params: The JSON's.
        multipliers: What the oracle is told beside them, or instead.
    """
    given = params.get("lr_multipliers") or {}
    moving = {key: value for key, value in given.items() if isinstance(value, Mapping) and "start" in value}
    return {
        "lr_multipliers": {**given, **{key: value["start"] for key, value in moving.items()}, **(multipliers or {})},
        "end_multipliers": {key: value["end"] for key, value in moving.items()},
        "betas_by_type": params.get("betas_by_type") or {},
        "cautious": params.get("cautious_weight_decay", False),
    }


@dataclass
class LionOracle(Oracle):
    """Blockwise Lion (arXiv 2302.06675, algorithm 2); second moments stay zero.

    Attributes:
        noise: Below how much of the largest number of a tensor that decides a sign a number decides nothing, as with
            the bias of keys, whose gradient is what rounding leaves of 0.
        turned: Weights after the last step with the other sign wherever noise decides.
    """

    noise: float = 0.0
    turned: dict[str, Tensor] = field(default_factory=dict)

    def _update(self, name: str, gradient: Tensor, h: Hyper, lr: Tensor, decay: Tensor) -> None:
        p = self._p[name]
        g = gradient.to(self.arithmetic)
        state = self.state.setdefault(name, State(torch.zeros_like(p), torch.zeros_like(p)))
        state.step += 1
        beta1, beta2 = (self.per_element(name, lambda role, i=i: self.betas(role, h.betas)[i]) for i in (0, 1))
        decides = beta1 * state.m + (1 - beta1) * g
        open_signs = decides.abs() <= self.noise * decides.abs().max()

        def stepped(direction: Tensor) -> Tensor:
            decayed = torch.where(direction * p < 0, 0.0, decay) if self.cautious else decay
            return p - lr * (direction + decayed * p)

        self._p[name] = stepped(decides.sign())
        self.turned[name] = torch.where(open_signs, stepped(-decides.sign()), self._p[name])
        state.m = beta2 * state.m + (1 - beta2) * g
        if self.momentum is not None:
            state.m = state.m.to(self.momentum).to(self.arithmetic)


# ------------------------------------------------------------------- schedules, clipping, checks


def scheduled_lr(
    kind: str, k: int, *, warmup: int, total: int, min_lr: float = 0.0, decay: int = 0
) -> Callable[[float, float], float]:
    """``block_lr`` of update k = 0, 1, ...: every block type ends at the same absolute min_lr."""

    def fraction() -> float:
        if kind == "wsd":
            return min(1.0, max(0.0, (total - k) / decay))
        progress = min(1.0, (k - warmup) / (total - warmup))
        shapes = {
            "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
            "1-sqrt": 1 - progress**0.5,
            "linear": 1 - progress,
        }
        return shapes[kind]

    def block_lr(multiplier: float, peak: float) -> float:
        if k <= warmup and warmup > 0:
            return multiplier * peak * k / warmup
        return min_lr + fraction() * (multiplier * peak - min_lr)

    return block_lr


def clipped(gradients: Mapping[str, Tensor], max_norm: float) -> dict[str, Tensor]:
    """The gradients scaled to a global L2 norm of at most ``max_norm``, fp64."""
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
    return {name: g.double() * min(1.0, max_norm / norm) for name, g in gradients.items()}


Weights = Mapping[str, Tensor]


def update_errors(
    actual: tuple[Weights, Weights],
    expected: tuple[Weights, Weights],
    lr: float,
    weight_roundings: int = 0,
) -> dict[str, float]:
    """Worst error of (before - after) / lr per parameter, relative to its largest update.

    A parameter whose update nowhere exceeds 1 is judged in absolute terms: with Adam an update of
    order 1 is what every multiplier starts from.
    """
    errors = {}
    for name in expected[0]:
        was, now = (weights[name].detach().double() for weights in actual)
        true = (expected[0][name].double() - expected[1][name].double()) / lr
        forgiven = weight_roundings * 2.0**-24 * torch.maximum(was.abs(), now.abs()) / lr
        error = ((was - now) / lr - true).abs() - forgiven
        worst = (error / max(1.0, float(true.abs().max()))).max()
        errors[name] = float(worst) if bool(torch.isfinite(worst)) else math.inf
    return errors


def assert_same_update(
    actual: tuple[Weights, Weights],
    expected: tuple[Weights, Weights],
    lr: float,
    *,
    tolerance: float = 1e-6,
    weight_roundings: int = 0,
    what: str = "",
) -> None:
    """Compare updates divided by lr; weights themselves would hide errors at a small lr.

    ``weight_roundings`` times half an ulp of the weight is forgiven on top: for steps whose lr is
    so small next to the weights that storing them in fp32 costs more than the tolerance.
    """
    assert set(actual[0]) == set(actual[1]) == set(expected[0]), (
        f"{what}: parameters differ: {set(actual[0]) ^ set(expected[0])}"
    )
    errors = update_errors(actual, expected, lr, weight_roundings)
    bad = {name: error for name, error in errors.items() if error > tolerance}
    listing = "".join(f"\n  {n}: {e:.2e}" for n, e in sorted(bad.items(), key=lambda x: -x[1]))
    assert not bad, f"{what}: {len(bad)} of {len(errors)} parameters off by more than {tolerance}{listing}"
