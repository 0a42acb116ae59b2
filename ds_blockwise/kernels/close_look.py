# SPDX-License-Identifier: Apache-2.0
"""Whether the tensors of a step are as they were when they were last looked at closely.

A close look at a tensor reads a dozen facts, which costs as much as stepping some thousand elements. They stay the same
unless somebody replaces the tensor, its memory or its metadata. Torch compares all but the memory in one call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch._C._dynamo.guards import TensorGuards

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
        memory: the facts of memory that decide, of tensors whose other facts are known to be the same.
    """

    def __init__(self, memory: Callable[[Sequence[torch.Tensor]], list[object]]) -> None:
        self._memory_of = memory
        self._guards: TensorGuards | None = None
        self._count = 0
        self._memory: list[object] = []

    def still_holds(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether a close look would find what it found last.

        Args:
            tensors: to be looked at, in the same order every time.
        """
        return (
            self._guards is not None
            and len(tensors) == self._count
            and self._guards.check(*tensors)
            and self._memory_of(tensors) == self._memory
        )

    def forget(self) -> None:
        """Look closely the next time."""
        self._guards = None

    def remember(self, tensors: Sequence[torch.Tensor]) -> None:
        """Remember plain tensors that a close look found nothing wrong with; arguments as of `still_holds`."""
        if GUARDS is not None:
            guards = GUARDS(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
            self._guards, self._count, self._memory = guards, len(tensors), self._memory_of(tensors)
