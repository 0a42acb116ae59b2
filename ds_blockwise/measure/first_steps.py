# SPDX-License-Identifier: Apache-2.0
"""A look at the first updates: a base learning rate that was meant for another unit is said once.

Somebody who writes ``"lr_multipliers": "paper"`` and keeps AdamW's rate trains every block type at eight times the rate
that it bears. Nothing fails: the loss is only worse.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence

import torch

from ds_blockwise.blocks.roles import BlockType
from ds_blockwise.kernels.bindings import Binding, Work
from ds_blockwise.measure.role_sums import RolePart, RoleSums
from ds_blockwise.parallel.agree import is_first_rank

logger = logging.getLogger(__name__)

LARGEST_RATIO = 0.1
"""RMS of an update over the RMS of the weights. Set by hand, on one small model: it catches gross mistakes only."""
LOOKED_AT = frozenset({8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048})
"""Numbers of the updates. From 2048 on a run is past its warm-up."""
_SAMPLE = 1024  # elements of a run; a few thousand of each type tell an RMS well enough
_REPEATS = 4
# Norms and biases may start at zero, and so may an output layer and whatever fits no type: their ratio says nothing.
_KINDS: frozenset[BlockType] = frozenset({"emb", "qk", "ffn", "vo"})


class FirstSteps:
    """Compares samples of the weights before and after some early updates; warns once, on the first rank.

    Nothing is communicated: the first rank looks at what it holds. Other ranks look at nothing. Between the updates of
    `LOOKED_AT` a step costs one comparison of integers.

    Args:
        preset: of ``lr_multipliers``; it decides the likely cause.
    """

    def __init__(self, preset: str) -> None:
        self._preset = preset
        self._turns: dict[int, int] = {}  # by the first tensor: hosts may step group by group
        self._parts: dict[int, tuple[Binding, list[tuple[BlockType, RolePart]]]] = {}
        self._before: list[tuple[BlockType, torch.Tensor, torch.Tensor]] = []
        self._is_done = False

    def before_update(self, work: Sequence[Work]) -> bool:
        """See `StepObserver`: keeps samples of the weights if this update is looked at."""
        self._before = []
        if self._is_done or not work:
            return True
        first = id(work[0].binding.tensor)
        turn = self._turns[first] = self._turns.get(first, 0) + 1
        if turn > max(LOOKED_AT):
            self._is_done = True
        elif turn in LOOKED_AT and is_first_rank() and not _is_capturing():
            self._before = [(kind, view, view.clone()) for kind, view in self._samples(work)]
        return True

    def after_update(self, work: Sequence[Work]) -> None:
        """See `StepObserver`."""
        if not self._before:
            return
        moved, size = dict[BlockType, float](), dict[BlockType, float]()
        for kind, now, was in self._before:
            moved[kind] = moved.get(kind, 0.0) + _squares(now - was)
            size[kind] = size.get(kind, 0.0) + _squares(was)
        self._before = []
        ratios = {kind: math.sqrt(moved[kind] / size[kind]) for kind in moved if size[kind]}
        if ratios and max(ratios.values()) > LARGEST_RATIO:
            self._is_done = True
            logger.warning("%s", self._message(self._turns[id(work[0].binding.tensor)], ratios))

    def _samples(self, work: Sequence[Work]) -> Iterator[tuple[BlockType, torch.Tensor]]:
        for w in work:
            if w.item.grad is None or not w.item.param.is_contiguous():
                continue
            flat = w.item.param.detach().view(-1)
            for kind, part in self._parts_of(w.binding):
                yield kind, part.elements.of(flat)[:_REPEATS, :_SAMPLE]

    def _parts_of(self, binding: Binding) -> list[tuple[BlockType, RolePart]]:
        if id(binding) not in self._parts:
            sums = RoleSums([binding])
            kinds = sums.block_types
            found = [(kinds[part.piece], part) for _, parts in sums.parts for part in parts]
            # the binding too: while it is kept here no other one has its id
            self._parts[id(binding)] = binding, [(kind, part) for kind, part in found if kind in _KINDS]
        return self._parts[id(binding)][1]

    def _message(self, turn: int, ratios: dict[BlockType, float]) -> str:
        largest = max(ratios, key=lambda kind: ratios[kind])
        cause = (
            'Under "lr_multipliers": "paper" lr is the rate of the norms: give an eighth of AdamW\'s best rate, or '
            'leave "paper" out and keep AdamW\'s rate.'
            if self._preset == "paper"
            else "lr is AdamW's rate here, and the multipliers stand around 1: lower lr, or lengthen the warm-up."
        )
        return (
            f"update {turn} changed the weights of block type {largest!r} by {ratios[largest]:.2g} of their size "
            f"(RMS), above {LARGEST_RATIO:g}: lr is probably too high. {cause} This is said once."
        )


def _squares(values: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
