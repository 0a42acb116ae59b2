# SPDX-License-Identifier: Apache-2.0
"""What stays from step to step: the work of tensors that are stepped together, and what close looks at them found.

Making a tensor's work and looking at it closely cost as much as stepping some thousand elements. Both stay while the
same tensors have gradients, with the same segment tables and the same memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import compress
from operator import is_
from typing import NamedTuple, cast

import torch

from ds_blockwise.kernels.base import Hyper, Item, StepState
from ds_blockwise.kernels.bindings import Work, by_kernels
from ds_blockwise.kernels.close_look import CloseLook
from ds_blockwise.kernels.cpp.look import compiled_look
from ds_blockwise.kernels.tensor_checks import check_states, check_stepped, dense, is_dense

Tensors = Sequence[torch.Tensor]
Gradients = Sequence[torch.Tensor | None]


class GivenGradient(NamedTuple):
    """What a host hands over for one tensor in one step, in the place of ``tensor.grad``.

    Attributes:
        grad: the gradient, in the shape of the tensor, bf16 or fp32; may have another dtype. Not changed.
        scale: `Item.grad_scale`.
        copy: `Item.param_copy`, detached.
    """

    grad: torch.Tensor
    scale: float | None
    copy: torch.Tensor | None


class StepSet:
    """The work of tensors that are stepped together.

    From `begin` to `end` it holds what belongs to one step: gradients, settings, states. Outside of a step it keeps
    nothing alive but the parameters, and the memory that `BlockwiseOptimizer.write_copy` was given.

    Args:
        tensors: all of the param groups, in order.
        has_work: which of them are stepped, or take part in reductions.
        own: the work of these; an item has a gradient if it is stepped.
        absent: work of tensors of which this rank holds nothing.

    Attributes:
        work: ``own``, then ``absent``.
        split: those with blocks that lie on several ranks.
        by_kernels: the items with a gradient, by what steps them.
    """

    def __init__(self, tensors: Tensors, has_work: Sequence[bool], own: Sequence[Work], absent: Sequence[Work]) -> None:
        self.tensors = tensors
        self.work = [*own, *absent]
        self.split = [w for w in self.work if w.item.table.has_split_blocks]
        stepped = [w for w in own if w.item.grad is not None]
        self.by_kernels = by_kernels(stepped)
        self._has_work, self._own = has_work, [w.item for w in own]
        self._items, self._shapes = [w.item for w in stepped], [w.binding.shape for w in stepped]
        self._with_grad = [item.grad is not None for item in self._own]
        self._grads: list[torch.Tensor] = []  # of the items, in one step
        self._given_to: list[Item] = []
        self._params = [item.param for item in self._items]
        self._copies = [item.param_copy for item in self._items if item.param_copy is not None]
        compiled = compiled_look()
        self._of_stepped, self._of_states = CloseLook(compiled), CloseLook(compiled)
        self._params_are_dense = self._grads_are_dense = False

    def begin(self, grads: Gradients, hypers: Sequence[Hyper], given: Mapping[int, GivenGradient]) -> None:
        """Take what is other in this step.

        Args:
            grads: in the order of ``tensors``.
            hypers: likewise.
            given: what a host handed over, by the id of the tensor.
        """
        own = [*compress(grads, self._has_work)]
        for item, grad, hyper in zip(self._own, own, compress(hypers, self._has_work), strict=True):
            item.grad, item.hyper = grad, hyper
        self._grads = cast("list[torch.Tensor]", [*compress(own, self._with_grad)])
        self._given_to = [item for item in self._items if id(item.param) in given] if given else []
        for item in self._given_to:
            _, item.grad_scale, item.param_copy = given[id(item.param)]

    def end(self) -> None:
        """Let go of what belongs to one step, whether or not it came to its end."""
        nothing: StepState = {}
        self._grads = []
        for w in self.work:
            item = w.item
            item.state, item.grad, item.sums, item.update, item.keeps_update = nothing, None, None, None, False
            item.grad_scale = None
        for item in self._given_to:
            item.param_copy = None
        if not self._params_are_dense:
            for item, param in zip(self._items, self._params, strict=True):
                item.param = param

    def look_at_stepped(self) -> None:
        """`check_stepped`; then replaces gradients whose memory does not hold their elements in order by copies."""
        grads = self._grads
        if not self._of_stepped.still_holds(self._params, [], grads):
            check_stepped(self._items, self._shapes)
            self._of_stepped.remember(self._params, [], grads)
            self._of_states.forget()  # they fit to these parameters
            self._vouch(None)
            self._params_are_dense, self._grads_are_dense = (all(map(is_dense, each)) for each in (self._params, grads))
        if not self._grads_are_dense:
            for item, grad in zip(self._items, grads, strict=True):
                item.grad = dense(grad)

    def look_at_states(self) -> None:
        """`check_states` of the stepped tensors."""
        copies = self._copies + [item.param_copy for item in self._given_to if item.param_copy is not None]
        states = [item.state for item in self._items]
        if not self._of_states.still_holds(copies, states, []):
            check_states(self._items)
            self._of_states.remember(copies, states, [])
            self._vouch(b"" if self._params_are_dense else None)

    def _vouch(self, kept: bytes | None) -> None:
        for item in self._items:
            item.kept = kept

    def make_params_dense(self) -> None:
        """Give kernels copies of the parameters whose memory does not hold their elements in order."""
        if not self._params_are_dense:
            for item in self._items:
                item.param = dense(item.param)

    def write_params_back(self) -> None:
        """Write the copies of `make_params_dense` into the parameters."""
        if not self._params_are_dense:
            for item, param in zip(self._items, self._params, strict=True):
                if item.param is not param:
                    param.copy_(item.param)


class StepSets:
    """The sets of one optimizer.

    Hosts may step another set of tensors in each call (sub-groups, groups of layers, experts without a token): those
    that were stepped last `REMEMBERED` of them are kept.
    """

    REMEMBERED = 64

    def __init__(self) -> None:
        self._kept: dict[tuple[int, int, bytes], StepSet] = {}
        self._version = -1

    def __len__(self) -> int:
        return len(self._kept)

    def of(self, tensors: Tensors, grads: Gradients, version: int) -> StepSet | None:
        """The set that was stepped with these tensors and gradients of the same of them; None if none is kept.

        Args:
            tensors: all of the param groups, in order.
            grads: theirs.
            version: `Bindings.version`.
        """
        if version != self._version:
            self.forget()
            return None
        key = _key(tensors, grads)
        found = self._kept.get(key)
        if found is None or not all(map(is_, tensors, found.tensors)):
            return None
        self._kept[key] = self._kept.pop(key)  # the last one again
        return found

    def keep(self, made: StepSet, grads: Gradients, version: int) -> None:
        """Keep a set that was made; arguments as of `of`."""
        self._kept[_key(made.tensors, grads)], self._version = made, version
        if len(self._kept) > self.REMEMBERED:
            del self._kept[next(iter(self._kept))]

    def forget(self) -> None:
        """Make all sets anew: what is bound or written has changed."""
        self._kept.clear()


def _key(tensors: Tensors, grads: Gradients) -> tuple[int, int, bytes]:
    return id(tensors[0]) if tensors else 0, len(tensors), bytes([grad is not None for grad in grads])
