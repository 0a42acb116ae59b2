# SPDX-License-Identifier: Apache-2.0
"""What lies in the tensors that an optimizer steps: the one object that hosts, meters and checkpoints share with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch

from ds_blockwise.blocks.segment_table import Placement, SegmentTable, build_table
from ds_blockwise.blocks.settings.block_settings import BlockSettings
from ds_blockwise.blocks.spec import resolved
from ds_blockwise.kernels.base import Item, Kernels
from ds_blockwise.kernels.tensor_checks import check_bindable
from ds_blockwise.parallel.reduce import ReductionGroups


@dataclass(frozen=True)
class Binding:
    """A stepped tensor with its segments, the ranks that share its blocks and the kernels that step it.

    It holds the tensor, so that no other tensor gets its id, by which bindings are found.

    Attributes:
        tensor: a whole parameter, or a host's flat 1-D partition.
        table: the segments in it.
        kernel_table: those that kernels step: all, but for parts that are orthogonalised.
        groups: process groups over which its split blocks are summed.
        kernels: the backend that steps it.
        plan: what the backend made of the table.
        is_absent: this rank holds none of these parameters and only takes part in their reductions.
        shape: of the tensor when it was bound.
    """

    tensor: torch.Tensor
    table: SegmentTable
    kernel_table: SegmentTable
    groups: ReductionGroups
    kernels: Kernels
    plan: Any
    is_absent: bool = False
    shape: torch.Size = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", self.tensor.shape)


class Bindings:
    """The bound tensors of one optimizer, in the order of binding, which all ranks of a group share.

    Args:
        kernels_on: what steps the tensors of a device.
        shares_second_moment: whether blocks share one second moment; else tables hold no blocks to reduce.
    """

    def __init__(self, kernels_on: Callable[[torch.device], Kernels], *, shares_second_moment: bool) -> None:
        self._kernels_on = kernels_on
        self._shares_second_moment = shares_second_moment
        self._by_id: dict[int, Binding] = {}
        self._absent: tuple[Binding, ...] = ()
        self._lr_multipliers: dict[str, float] | None = None
        #: changes whenever a table is built
        self.version = 0

    def __iter__(self) -> Iterator[Binding]:
        return iter(self._by_id.values())

    def __len__(self) -> int:
        return len(self._by_id)

    def of(self, tensor: torch.Tensor) -> Binding | None:
        """The binding of a tensor; None if it is not bound."""
        return self._by_id.get(id(tensor))

    @property
    def absent(self) -> tuple[Binding, ...]:
        """The bindings of which this rank holds nothing."""
        return self._absent

    def bind(self, tensor: torch.Tensor, placements: Sequence[Placement], groups: ReductionGroups) -> Binding:
        """Bind a tensor, or bind it anew.

        Args:
            tensor: 1-D flat partition, or a whole parameter.
            placements: the parameters in it, in storage order.
            groups: process groups over which its split blocks are summed.
        """
        return self._bind(tensor, placements, groups, is_absent=False)

    def bind_absent(self, placements: Sequence[Placement], groups: ReductionGroups, device: torch.device) -> None:
        """Take part in the reductions of parameters of which this rank holds nothing.

        Args:
            placements: the parameters, each with ``numel`` 0.
            groups: process groups over which their split blocks are summed.
            device: of the tensors that this rank does step.
        """
        self._bind(torch.empty(0, device=device), placements, groups, is_absent=True)

    def _bind(
        self, tensor: torch.Tensor, placements: Sequence[Placement], groups: ReductionGroups, *, is_absent: bool
    ) -> Binding:
        placements = self._with_present_multipliers(placements)
        table = build_table(tensor.numel(), placements, shares_second_moment=self._shares_second_moment)
        check_bindable(tensor, table)
        kernels = self._kernels_on(tensor.device)
        kernel_table = table
        if any(part.orthogonalize is not None for p in placements for part in p.spec.parts):
            kernel_table = build_table(
                tensor.numel(), placements, shares_second_moment=self._shares_second_moment, orthogonalized=False
            )
        plan = kernels.plan(kernel_table, tensor.device)
        binding = Binding(tensor, table, kernel_table, groups, kernels, plan, is_absent)
        self._by_id[id(tensor)] = binding
        self.version += 1
        if is_absent:
            self._absent = tuple(b for b in self if b.is_absent)
        return binding

    def in_order_of_binding(self, work: Sequence[Work]) -> list[Work]:
        """The tensors of a step in the order of binding: the one order that is common to all ranks."""
        order = {key: index for index, key in enumerate(self._by_id)}
        return sorted(work, key=lambda w: order[id(w.binding.tensor)])

    @property
    def moves(self) -> bool:
        """Whether a multiplier in what is bound changes over the run."""
        return any(b.table.moves for b in self)

    @property
    def lr_multipliers(self) -> dict[str, float]:
        """The multipliers that replace those of the settings, by block type or role; empty if none do."""
        return dict(self._lr_multipliers or {})

    def change_lr_multipliers(self, multipliers: Mapping[str, float]) -> None:
        """Replace multipliers of the settings from the next step on; builds every segment table anew.

        Args:
            multipliers: by block type or role; those of an earlier call are forgotten.

        Raises:
            ValueError, TypeError: an unknown key, a value outside its range; nothing is changed then.
        """
        BlockSettings().with_lr_multipliers(multipliers)  # checks them
        if dict(multipliers) == self.lr_multipliers:
            return
        self._lr_multipliers = dict(multipliers)
        for b in list(self):
            self._bind(b.tensor, b.table.placements, b.groups, is_absent=b.is_absent)

    def _with_present_multipliers(self, placements: Sequence[Placement]) -> Sequence[Placement]:
        if self._lr_multipliers is None:
            return placements
        settings = {id(p.spec.block_settings): p.spec.block_settings for p in placements}
        present = {key: given.with_lr_multipliers(self._lr_multipliers) for key, given in settings.items()}
        return [_with_multipliers(p, present[id(p.spec.block_settings)]) for p in placements]


def _with_multipliers(placement: Placement, settings: BlockSettings) -> Placement:
    spec = placement.spec
    updates = [resolved(spec.structure, p.role, settings).update for p in spec.parts]
    if updates == [part.update for part in spec.parts]:
        return placement
    parts = tuple(replace(part, update=update) for part, update in zip(spec.parts, updates, strict=True))
    return replace(placement, spec=replace(spec, parts=parts))


class Work(NamedTuple):
    """One tensor in one step: what its kernels get, and whose memory it is."""

    binding: Binding
    item: Item


class StepObserver(Protocol):
    """Sees every step of an optimizer, on every rank alike; both methods may communicate."""

    def before_update(self, work: Sequence[Work]) -> bool:
        """Called with the gradients, before anything changes; False leaves everything as it is, on every rank."""
        ...

    def after_update(self, work: Sequence[Work]) -> None:
        """Called with the new weights and states, the gradients still there."""
        ...


def by_kernels(work: Sequence[Work]) -> list[tuple[Kernels, list[Item]]]:
    """The tensors of a step, sorted by what steps them, in order."""
    sorted_out: dict[Kernels, list[Item]] = {}
    for w in work:
        sorted_out.setdefault(w.binding.kernels, []).append(w.item)
    return list(sorted_out.items())


def non_finite(work: Sequence[Work]) -> torch.Tensor:
    """Whether any gradient holds a NaN or an infinity: a bool of no dimension on the first gradient's device."""
    by_kind: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for w in work:
        grad = w.item.grad
        if grad is not None and grad.numel():
            by_kind.setdefault((grad.device, grad.dtype), []).append(grad)
    found = [_all_finite(grads) for grads in by_kind.values()]
    if not found:
        return torch.tensor(False)
    return torch.stack([finite.to(found[0].device) for finite in found]).all().logical_not()


def _all_finite(grads: list[torch.Tensor]) -> torch.Tensor:
    """Whether tensors of one device and dtype are finite; the device decides, nobody waits for it."""
    return torch.isfinite(torch.stack(torch._foreach_norm(grads, ord=float("inf")))).all()
