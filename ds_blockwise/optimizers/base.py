# SPDX-License-Identifier: Apache-2.0
"""The shared base of both optimizers: settings, binding of tensors to segment tables, the step loop.

A stepped tensor is a whole parameter tagged with ``block_spec``, or whatever a host bound with
`BlockwiseOptimizer.bind` (a flat ZeRO partition). Subclasses say what the second moment is and how it is applied.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast
from weakref import WeakSet

import torch
from torch.optim.optimizer import ParamsT

from ds_blockwise.blocks.block_settings import BlockSettings
from ds_blockwise.blocks.ranges import TensorShard
from ds_blockwise.blocks.segment_table import Placement, SegmentTable, build_table, whole_placement
from ds_blockwise.blocks.spec import BlockSpec, apply_settings
from ds_blockwise.kernels.base import Item
from ds_blockwise.kernels.binding import NO_HYPER, Binding, StepObserver, Work, by_kernels, hyper_of, non_finite
from ds_blockwise.kernels.select import kernels_for
from ds_blockwise.measure.readings import TelemetrySettings
from ds_blockwise.optimizers.measuring import Measuring
from ds_blockwise.optimizers.settings import (
    CheckpointFormat,
    MomentumDtype,
    check_backend,
    check_checkpoint_format,
    check_extra_keys,
    check_group,
    check_momentum_dtype,
)
from ds_blockwise.parallel.agree import any_rank
from ds_blockwise.parallel.reduce import LOCAL, ReductionGroups, reduce_block_sums_

_LIVE: WeakSet[BlockwiseOptimizer] = WeakSet()


class BlockwiseOptimizer(Measuring):
    """Base of `BlockwiseAdamW` and `BlockwiseAdamMini`; not to be used by itself.

    It is a ``torch.optim.AdamW`` by type only, because hosts (Megatron-core, DeepSpeed) accept nothing else.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        lr_multipliers: object = None,
        weight_decay_multipliers: object = None,
        granularity: object = None,
        rules: object = None,
        momentum_dtype: MomentumDtype = "fp32",
        backend: str = "auto",
        checkpoint_format: CheckpointFormat = "expanded",
        telemetry: object = None,
        **extra: object,
    ) -> None:
        check_extra_keys(type(self).__name__, extra)
        self.momentum_dtype = check_momentum_dtype(momentum_dtype)
        self.backend = check_backend(backend)
        self.checkpoint_format = check_checkpoint_format(checkpoint_format)
        self.block_settings = BlockSettings.parse(lr_multipliers, weight_decay_multipliers, granularity, rules)
        self.step_calls = 0
        self._bindings: dict[int, Binding] = {}
        self._absent: list[Binding] = []
        self._own_second_moment: dict[int, torch.Tensor] = {}
        self._copies: dict[int, torch.Tensor] = {}
        self._finite_over: ReductionGroups | None = None
        self._observers: list[StepObserver] = []
        self.overflow = False  # DeepSpeed reads it after each step, counts the skipped one and holds the schedule
        self._measure_from_now(TelemetrySettings.parse(telemetry))
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        check_group(defaults, "")
        # AdamW's own constructor would add switches (fused, foreach, ...) that mean nothing here
        torch.optim.Optimizer.__init__(self, params, defaults)
        _LIVE.add(self)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; see ``torch.optim.Optimizer.add_param_group``.

        Raises:
            ValueError: a hyper-parameter of the group is outside its range.
            TypeError: a parameter is not a real floating-point tensor.
        """
        super().add_param_group(param_group)
        index = len(self.param_groups) - 1
        group = self.param_groups[index]
        check_group(group, f"param_groups[{index}].")
        for tensor in group["params"]:
            if not tensor.is_floating_point():
                raise TypeError(
                    f"param_groups[{index}] holds a {tensor.dtype} tensor of shape {tuple(tensor.shape)}; "
                    f"only real floating-point parameters can be optimized"
                )

    def __getstate__(self) -> dict[str, Any]:
        # bindings are made anew: they are found by the ids of tensors, which a copy does not share
        kept = ("block_settings", "momentum_dtype", "backend", "checkpoint_format", "step_calls")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in kept}, **self._measuring_state()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # AdamW's version adds its switches to every group and turns step into a tensor
        torch.optim.Optimizer.__setstate__(self, state)
        for by_id in ("_bindings", "_own_second_moment", "_copies"):
            self.__dict__.setdefault(by_id, {})
        for plain_list in ("_absent", "_observers"):
            self.__dict__.setdefault(plain_list, [])
        self.__dict__.setdefault("_finite_over", None)
        self.__dict__.setdefault("overflow", False)
        self._measure_again()

    # ---------------------------------------------------------------- binding

    def bind(self, tensor: torch.Tensor, placements: Sequence[Placement], groups: ReductionGroups) -> SegmentTable:
        """Tell the optimizer what lies in a tensor that it steps (hosts only).

        Args:
            tensor: 1-D flat partition, or a whole parameter.
            placements: the parameters in it, in storage order.
            groups: process groups over which its split blocks are summed.

        Returns:
            The segment table, built once.
        """
        placements = self._with_present_multipliers(placements)
        table = build_table(tensor.numel(), placements, shares_second_moment=self.shares_second_moment)
        kernels = kernels_for(self.backend, tensor.device)
        plan = kernels.plan(table, tensor.device)
        self._bindings[id(tensor)] = Binding(tensor, table, groups, kernels, plan)
        return table

    def bind_absent(self, placements: Sequence[Placement], groups: ReductionGroups, device: torch.device) -> None:
        """Take part in the reductions of parameters of which this rank holds nothing (hosts only).

        For hosts whose ranks step a tensor per parameter: a rank without one would leave the others waiting. All
        ranks of a group must call `bind` and this in the same order of parameters.

        Args:
            placements: the parameters, each with ``numel`` 0.
            groups: process groups over which their split blocks are summed.
            device: of the tensors that this rank does step.
        """
        nothing = torch.empty(0, device=device)
        self.bind(nothing, placements, groups)
        self._absent.append(self._bindings[id(nothing)])

    def bindings(self) -> list[Binding]:
        """The tensors bound so far with their segment tables and process groups, in the order of binding."""
        return list(self._bindings.values())

    def placements_in(self, tensor: torch.Tensor) -> tuple[Placement, ...] | None:
        """The parameters in a tensor that this optimizer steps; None if it is neither bound nor tagged."""
        found = self._bindings.get(id(tensor))
        if found is not None:
            return found.table.placements
        spec = cast("BlockSpec | None", getattr(tensor, "block_spec", None))
        return None if spec is None else (whole_placement(self.spec_of(spec), getattr(tensor, "block_shard", None)),)

    def backend_of(self, tensor: torch.Tensor) -> str | None:
        """Name of the backend that steps a tensor; None if the tensor is unknown."""
        binding = self.binding_of(tensor)
        return None if binding is None else binding.kernels.name

    def write_copy(self, param: torch.Tensor, copy: torch.Tensor) -> None:
        """Round every new value of a parameter into a 16-bit tensor, in the pass that computes it.

        For your own training loops with fp32 master weights and a bf16 or fp16 model: saves reading the masters
        again. DeepSpeed's ZeRO makes its own copy.

        Args:
            param: one of this optimizer's parameters.
            copy: contiguous bf16 or fp16 tensor of its shape on its device; changed by every `step`.

        Raises:
            ValueError: the copy does not fit.
        """
        fits = copy.shape == param.shape and copy.device == param.device and copy.is_contiguous()
        if not fits or copy.dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(
                f"the copy of a parameter of shape {tuple(param.shape)} on {param.device} must be a contiguous bf16 or "
                f"fp16 tensor of that shape on that device, got {copy.dtype} {tuple(copy.shape)} on {copy.device}"
                f"{'' if copy.is_contiguous() else ', not contiguous'}."
            )
        self._copies[id(param)] = copy.detach()

    def skip_non_finite(self, groups: ReductionGroups) -> None:
        """Let `step` change nothing on any rank when a gradient of any rank is NaN or infinite (hosts only).

        For hosts that do not look for themselves. Costs one more read of the gradients and a wait for the device.

        Args:
            groups: ranks that must decide alike; every one of them steps every time.
        """
        self._finite_over = groups

    def observe(self, observer: StepObserver) -> None:
        """Let ``observer`` see every step from now on; `unobserve` ends it. Costs nothing while nobody does."""
        self._observers.append(observer)

    def unobserve(self, observer: StepObserver) -> None:
        """Leave out an observer that `observe` was given."""
        self._observers.remove(observer)

    @contextmanager
    def observed_only_by(self, observer: StepObserver) -> Iterator[None]:
        """Let ``observer`` alone see the steps inside: they belong to a measurement, not to training."""
        others, self._observers = self._observers, [observer]
        try:
            yield
        finally:
            self._observers = others

    def spec_of(self, spec: BlockSpec) -> BlockSpec:
        """Return ``spec`` with this optimizer's settings.

        Raises:
            ValueError: settings were given both to the optimizer and to ``tag_parameters``, and differ.
        """
        if self.block_settings.is_default or spec.block_settings == self.block_settings:
            if self.block_settings.auto is None and spec.block_settings.auto is not None:
                raise ValueError(
                    f'parameter {spec.fqn!r} was tagged with lr_multipliers "auto", but it is the optimizer that '
                    f'measures: give {type(self).__name__} lr_multipliers="auto".'
                )
            return spec
        if not spec.block_settings.is_default:
            raise ValueError(
                f"parameter {spec.fqn!r} was tagged with one set of multipliers, rules or granularity and "
                f"{type(self).__name__} was given another. Give them in one place: tag_parameters or the optimizer."
            )
        if any(rule.role or rule.qkv_layout or rule.num_heads or rule.storage for rule in self.block_settings.rules):
            raise ValueError(
                f"{type(self).__name__} was given rules that set roles, head counts or storage, but parameter "
                f"{spec.fqn!r} is already tagged. Give these rules to tag_parameters(model, rules=[...])."
            )
        return apply_settings(spec.structure, self.block_settings)

    def binding_of(self, tensor: torch.Tensor) -> Binding | None:
        """The binding of a stepped tensor; whole tagged parameters are bound on first sight."""
        found = self._bindings.get(id(tensor))
        if found is None:
            spec = cast("BlockSpec | None", getattr(tensor, "block_spec", None))
            if spec is None:
                return None
            shard = cast("TensorShard | None", getattr(tensor, "block_shard", None))
            if shard is not None and len(shard.chunks) > 1:
                raise ValueError(
                    f"parameter {spec.fqn!r} is split over {len(shard.chunks)} tensor-parallel ranks, but no host has "
                    f"told {type(self).__name__} their process group. Train it through deepspeed.initialize(mpu=...)."
                )
            self.bind(tensor, [whole_placement(self.spec_of(spec), shard)], LOCAL)
            found = self._bindings[id(tensor)]
        return found

    # ------------------------------------------------------------------- step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Apply one update to every tensor that has a gradient.

        Args:
            closure: re-evaluates the model and returns the loss, as in ``torch.optim``.

        Returns:
            What the closure returned, or None.

        Raises:
            ValueError: a tensor with a non-zero gradient is unknown (not tagged, not attached to a host).
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = self._collect()
        self.overflow = self._finite_over is not None and any_rank(
            non_finite(work), [self._finite_over], self._finite_over.device or torch.device("cpu")
        )
        # a list: every observer is asked, whatever the one before it said
        if not self.overflow and all([observer.before_update(work) for observer in self._observers]):
            if work:
                self._before_update(work)
                self._sum_split_blocks(work)
                self._update([w for w in work if w.item.grad is not None])
                self.step_calls += 1
            for observer in self._observers:
                observer.after_update(work)
        return loss

    def _collect(self) -> list[Work]:
        work: list[Work] = []
        for group in self.param_groups:
            hyper = hyper_of(group)
            for tensor in group["params"]:
                binding = self._bindings.get(id(tensor)) or self.binding_of(tensor)
                grad = tensor.grad
                if grad is None:
                    if binding is not None and binding.table.has_split_blocks:
                        state = self.state.get(tensor, {})
                        work.append(Work(binding, Item(binding.table, binding.plan, tensor, state, hyper)))
                    continue
                if binding is None:
                    # DeepSpeed's 16-bit wrappers step once with zero gradients inside their constructor
                    if bool(grad.any()):
                        raise ValueError(self._unknown(tensor))
                    continue
                if grad.is_sparse:
                    raise ValueError(
                        f"{type(self).__name__} does not support sparse gradients (shape {tuple(grad.shape)}). "
                        f"Build the embedding with sparse=False."
                    )
                state = self._state_of(tensor)
                copy = self._copies.get(id(tensor))
                item = Item(binding.table, binding.plan, tensor, state, hyper, grad.contiguous(), None, copy)
                work.append(Work(binding, item))
        for binding in self._absent:
            if binding.table.has_split_blocks:
                work.append(Work(binding, Item(binding.table, binding.plan, binding.tensor, {}, NO_HYPER)))
        return work

    def _sum_split_blocks(self, work: Sequence[Work]) -> None:
        split = [w for w in work if w.binding.table.has_split_blocks]
        if not split:
            return
        if self._absent:  # ranks then hold different tensors, and only the order of binding is common to all
            order = {key: index for index, key in enumerate(self._bindings)}
            split.sort(key=lambda w: order[id(w.binding.tensor)])
        for kernels, items in by_kernels(split):
            kernels.sum_split_blocks(items)
        # one call for all, so that every rank's collectives come in the same order
        reduce_block_sums_([(cast("torch.Tensor", w.item.sums), w.binding.table, w.binding.groups) for w in split])

    def _update(self, work: Sequence[Work]) -> None:
        scattered: list[tuple[Item, torch.Tensor]] = []
        for w in work:
            if not w.item.param.is_contiguous():
                scattered.append((w.item, w.item.param))
                w.item.param = w.item.param.contiguous()
        for kernels, items in by_kernels(work):
            kernels.step_(items)
        for item, original in scattered:
            original.copy_(item.param)

    def _unknown(self, tensor: torch.Tensor) -> str:
        return (
            f"{type(self).__name__} does not know the parameters in a tensor of shape {tuple(tensor.shape)}. "
            f"With plain PyTorch call ds_blockwise.tag_parameters(model) before the first step; with DeepSpeed import "
            f"ds_blockwise before deepspeed.initialize, or call ds_blockwise.attach(engine)."
        )

    def allocate_state(self) -> None:
        """Give every tensor that has no state zeros, as a first step would; hosts do it before they load."""
        for group in self.param_groups:
            for tensor in group["params"]:
                if self.binding_of(tensor) is not None:
                    self._state_of(tensor)

    def _state_of(self, tensor: torch.Tensor) -> dict[str, Any]:
        state = cast("dict[str, Any]", self.state[tensor])
        if "exp_avg" not in state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(
                tensor, dtype=self._momentum_dtype_of(tensor), memory_format=torch.contiguous_format
            )
            state["exp_avg_sq"] = self._new_second_moment(tensor)
        return state

    @abstractmethod
    def _new_second_moment(self, tensor: torch.Tensor) -> torch.Tensor:
        """Zeros in the form that this optimizer keeps in memory."""

    def _before_update(self, work: Sequence[Work]) -> None:
        """Called once a step before anything changes; may communicate."""


def built_from_ours(optimizer: torch.optim.Optimizer) -> str | None:
    """Class name of the live optimizer of ours whose param groups another one was built from; None if of none.

    A host that replaces an optimizer hands its ``param_groups`` to the new one, which keeps the very same dicts.

    Args:
        optimizer: any optimizer that is not of ours.
    """
    groups = {id(group) for group in optimizer.param_groups}
    replaced = (ours for ours in _LIVE if any(id(group) in groups for group in ours.param_groups))
    return next((type(ours).__name__ for ours in replaced), None)
