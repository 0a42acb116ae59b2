# SPDX-License-Identifier: Apache-2.0
"""Published rules for AdamW's best learning rate and batch, each with the runs that it was fitted on.

A rule is a power law through the optima of its authors' sweeps: with their data, schedule and betas. Outside of the
range that it was fitted on it is an extrapolation, and the rules differ by a factor of 2 to 4 even inside.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class TrainingSize:
    """What the rules know of a run.

    Attributes:
        layers: parameters but those of the embeddings and of the output layer ("non-embedding").
        output: parameters of an untied output layer, 0 without one.
        embedding: parameters of the embeddings.
        tokens: of the whole run, repeated ones counted again.
        batch: tokens of an optimizer step.
    """

    layers: int
    output: int
    embedding: int
    tokens: int
    batch: int

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.layers + self.output + self.embedding

    @property
    def multiplying(self) -> int:
        """Parameters that a token is multiplied with: an embedding is looked up, unless it is the output layer too."""
        return self.layers + (self.output or self.embedding)

    @property
    def flops(self) -> float:
        """Of the run, forward and backward: 6 for each multiplying parameter and token. Attention's products, which
        have no parameters, are left out: 10 to 20% at usual lengths.
        """
        return 6.0 * self.multiplying * self.tokens

    @property
    def steps(self) -> int:
        """Optimizer steps, the last one rounded up."""
        return -(-self.tokens // self.batch)


@dataclass(frozen=True, slots=True)
class FittedRange:
    """A quantity over which a rule was fitted.

    Attributes:
        name: ``N`` (parameters), ``D`` (tokens), ``C`` (FLOPs) or ``D/N``.
        low, high: its smallest and largest value among the runs.
        value: that of the run in question.
    """

    name: str
    low: float
    high: float
    value: float

    @property
    def holds(self) -> bool:
        """Whether the run lies inside, give or take a twentieth."""
        return self.low / 1.05 <= self.value <= self.high * 1.05


class ScalingRule(ABC):
    """One rule. ``source`` and ``read`` are for people: who published it, and what of it was read here."""

    name: ClassVar[str]
    source: ClassVar[str]
    formula: ClassVar[str]
    read: ClassVar[str]

    @abstractmethod
    def lr(self, size: TrainingSize) -> float:
        """AdamW's peak learning rate."""

    @abstractmethod
    def batch(self, size: TrainingSize) -> float:
        """Tokens of an optimizer step that go with it."""

    @abstractmethod
    def ranges(self, size: TrainingSize) -> Iterator[FittedRange]:
        """What the rule was fitted on, and where the run lies."""

    def outside(self, size: TrainingSize) -> list[FittedRange]:
        """The ranges that a run lies outside of; empty: the rule was fitted on such runs."""
        return [found for found in self.ranges(size) if not found.holds]


class StepLaw(ScalingRule):
    """arXiv 2503.04715: N without embeddings and output layer, cosine to a fixed 1e-5, beta2 0.95, weight decay 0.1."""

    name = "Step Law"
    source = "arXiv 2503.04715"
    formula = "lr = 1.79 N^-0.713 D^0.307, batch = 0.58 D^0.571 tokens; N parameters of the layers, D tokens"
    read = "abstract; the published fits, whose mean is this formula, and data/dense_lr_bs_loss.csv, whose runs are "
    read += "the range (github.com/step-law/steplaw, 32a8f4c)"

    def lr(self, size: TrainingSize) -> float:
        """See `formula`."""
        return float(1.79 * size.layers**-0.713 * size.tokens**0.307)

    def batch(self, size: TrainingSize) -> float:
        """See `formula`."""
        return float(0.58 * size.tokens**0.571)

    def ranges(self, size: TrainingSize) -> Iterator[FittedRange]:
        """1,911 dense runs."""
        yield FittedRange("N", 214_663_680, 1_073_741_824, size.layers)
        yield FittedRange("D", 4e9, 1e11, size.tokens)


class DeepSeekLaw(ScalingRule):
    """arXiv 2401.02954, equation 1: multi-step schedule, near-optimal runs from 1e17 to 2e19 FLOPs, checked at 1e20."""

    name = "DeepSeek LLM"
    source = "arXiv 2401.02954"
    formula = "lr = 0.3118 C^-0.1250, batch = 0.2920 C^0.3271 tokens; C training FLOPs without the embeddings'"
    read = "section 3.1; C is taken as 6 x parameters of the layers x tokens, without attention's products, which "
    read += "changes the rate by 2 to 3%"

    def lr(self, size: TrainingSize) -> float:
        """See `formula`."""
        return float(0.3118 * self._compute(size) ** -0.1250)

    def batch(self, size: TrainingSize) -> float:
        """See `formula`."""
        return float(0.2920 * self._compute(size) ** 0.3271)

    def ranges(self, size: TrainingSize) -> Iterator[FittedRange]:
        """Of the fit; its authors used it up to 67B parameters."""
        yield FittedRange("C", 1e17, 2e19, self._compute(size))

    def _compute(self, size: TrainingSize) -> float:
        return 6.0 * size.layers * size.tokens


class PorianLaw(ScalingRule):
    """arXiv 2406.19146, section 3.5: constant rate after warm-up, beta2 tuned, 20 tokens for each parameter."""

    name = "Porian et al."
    source = "arXiv 2406.19146"
    formula = "lr = 3.7 N^-0.36, batch = 0.76 N^0.703 tokens; N parameters with the output layer, D = 20 N"
    read = (
        "abstract, and other authors' accounts of section 3.5 and figure 3; batch = 0.00037 N^0.703 sequences of 2048"
    )

    def lr(self, size: TrainingSize) -> float:
        """See `formula`."""
        return float(3.7 * size.multiplying**-0.36)

    def batch(self, size: TrainingSize) -> float:
        """See `formula`."""
        return float(0.00037 * 2048 * size.multiplying**0.703)

    def ranges(self, size: TrainingSize) -> Iterator[FittedRange]:
        """Of the sweep. It knows no tokens, so a run is inside only near its own number of them."""
        yield FittedRange("N", 5e6, 221e6, size.multiplying)
        yield FittedRange("D/N", 10.0, 40.0, size.tokens / size.multiplying)


RULES: tuple[ScalingRule, ...] = (StepLaw(), DeepSeekLaw(), PorianLaw())
"""In the order in which they are taken where several were fitted on such runs, or none."""


def rule_for(size: TrainingSize) -> ScalingRule:
    """The first rule that was fitted on such runs; the first of all if none was."""
    return next((rule for rule in RULES if not rule.outside(size)), RULES[0])
