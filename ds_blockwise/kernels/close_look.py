# SPDX-License-Identifier: Apache-2.0
"""Whether the tensors of a step are as they were when they were last looked at closely.

A close look at a tensor reads a dozen facts, which costs as much as stepping some thousand elements. They stay the same
unless somebody replaces the tensor, its memory or its metadata. Torch compares all but the memory in one call.
"""

from __future__ import annotations

from operator import itemgetter
from typing import TYPE_CHECKING

import torch

from ds_blockwise.kernels.base import StepState

if TYPE_CHECKING:
    from torch._C._dynamo.guards import TensorGuards

    from ds_blockwise.kernels.cpp.look import CompiledLook

Tensors = list[torch.Tensor]
States = list[StepState]

_EXP_AVG = itemgetter("exp_avg")
DATA_PTR = torch.Tensor.data_ptr
OFFSET = torch.Tensor.storage_offset
STORAGE = torch.Tensor.untyped_storage
STORAGE_NBYTES = torch.UntypedStorage.nbytes


def _guards() -> type[TensorGuards] | None:
    """What compiled functions are guarded with; None where torch has it no longer, or in another form.

    It compares class, dispatch keys (device type, layout, sign bit), dtype, device index, shape and strides of many
    tensors. It has no public name: a torch without it looks closely in every step.
    """
    try:
        from torch._C._dynamo.guards import TensorGuards

        tensors = [torch.empty(1), torch.empty(2)]
        probe = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        works = probe.check(*tensors) and not probe.check(*reversed(tensors))
    except (ImportError, AttributeError, TypeError):
        return None
    return TensorGuards if works else None


GUARDS = _guards()


class CloseLook:
    """What a close look at the tensors of a step found, as numbers: it keeps no tensor alive and knows none by its id.

    Args:
        compiled: reads all facts in one call; None: torch's guards compare them, and Python the memory.
    """

    def __init__(self, compiled: CompiledLook | None) -> None:
        self._compiled = compiled
        self._facts: bytes | None = None
        self._guards: TensorGuards | None = None
        self._count = 0
        self._memory: list[object] = []

    def still_holds(self, tensors: Tensors, states: States, grads: Tensors) -> bool:
        """Whether a close look would find what it found last.

        Args:
            tensors: parameters, and copies of them: they stay, and their memory moves when it is freed or replaced.
            states: of which the moments are looked at; they stay likewise.
            grads: gradients, which may be others that happen to lie elsewhere.
        """
        if self._facts is not None:
            assert self._compiled is not None
            return self._compiled.facts_hold(self._facts, tensors, states, grads)
        if self._guards is None:
            return False
        staying = tensors + _moments(states)
        all_of_them = staying + grads
        return (
            len(all_of_them) == self._count
            and self._guards.check(*all_of_them)
            and _memory(staying, grads) == self._memory
        )

    def forget(self) -> None:
        """Look closely the next time."""
        self._facts = self._guards = None

    def remember(self, tensors: Tensors, states: States, grads: Tensors) -> None:
        """Remember plain tensors that a close look found nothing wrong with; arguments as of `still_holds`."""
        self.forget()
        if self._compiled is not None:
            self._facts = self._compiled.facts(tensors, states, grads)
        if self._facts is None and GUARDS is not None:
            staying = tensors + _moments(states)
            self._guards = GUARDS(*staying, *grads, dynamic_dims_sizes=None, dynamic_dims_strides=None)
            self._count, self._memory = len(staying) + len(grads), _memory(staying, grads)


def _moments(states: States) -> Tensors:
    return [*map(_EXP_AVG, states), *[s["exp_avg_sq"] for s in states if "exp_avg_sq" in s]]


def _memory(staying: Tensors, grads: Tensors) -> list[object]:
    """The facts of memory that decide where all others are the same."""
    return [*map(DATA_PTR, staying), *map(STORAGE_NBYTES, map(STORAGE, grads)), *map(OFFSET, grads)]
