# SPDX-License-Identifier: Apache-2.0
"""The base of every optimizer: its settings, the tensors bound to it, and the step, from top to bottom.

A subclass states its mathematics: what second moment it keeps, what ranks exchange in a step, and the update. A stepped
tensor is a whole parameter tagged with ``block_spec``, or whatever a host bound with `BlockwiseOptimizer.bind` (a flat
ZeRO partition).
"""

from __future__ import annotations

import logging
from abc import ABC
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import repeat
from typing import Any, ClassVar
from weakref import WeakSet

import torch
from torch.optim.optimizer import ParamsT

from ds_blockwise.blocks.segment_table import Placement, SegmentTable, whole_placement
from ds_blockwise.blocks.settings.block_settings import BlockSettings
from ds_blockwise.blocks.spec import BlockSpec, apply_settings
from ds_blockwise.blocks.tagged_parameter import as_tagged, is_tagged_by_host, user_tags_of
from ds_blockwise.checkpoint.record import settings_of
from ds_blockwise.checkpoint.record_changes import differences
from ds_blockwise.checkpoint.record_types import RunRecord, SecondMomentOf
from ds_blockwise.kernels.base import Hyper, Item, Kernels, StepState, wide_dtype
from ds_blockwise.kernels.bindings import Binding, Bindings, StepObserver, Work, non_finite
from ds_blockwise.kernels.param_groups import NO_HYPER, ParamGroup, StateDict, hyper_of
from ds_blockwise.kernels.select import kernels_for
from ds_blockwise.kernels.step_sets import GivenGradient, StepSet, StepSets
from ds_blockwise.kernels.tensor_checks import check_plain, check_whole
from ds_blockwise.measure.auto_multipliers import MeasuredMultipliers, RunState
from ds_blockwise.measure.first_steps import FirstSteps
from ds_blockwise.measure.meter import Listener, Meter
from ds_blockwise.measure.readings import Readings, TelemetrySettings
from ds_blockwise.optimizers.exchange import Exchange
from ds_blockwise.optimizers.second_moment import SecondMoment, mark_settled, to_blocks, unsettled, zeros_for
from ds_blockwise.optimizers.settings import (
    BLOCK_KEYS,
    CheckpointFormat,
    MomentumDtype,
    check_backend,
    check_checkpoint_format,
    check_extra_keys,
    check_fused_step,
    check_group,
    check_momentum_dtype,
    check_progress,
    check_switch,
)
from ds_blockwise.optimizers.state_dict import like, second_moment_to_save, to_load, to_save
from ds_blockwise.parallel.agree import any_peer, any_rank, any_rank_of_all, is_first_rank
from ds_blockwise.parallel.reduce import LOCAL, ReductionGroups

logger = logging.getLogger(__name__)

_LIVE: WeakSet[BlockwiseOptimizer] = WeakSet()


class BlockwiseOptimizer(torch.optim.AdamW, ABC):
    """Base of `BlockwiseAdamW` and `BlockwiseAdamMini`; not to be used by itself.

    It is a ``torch.optim.AdamW`` by type only, because hosts (Megatron-core, DeepSpeed) accept nothing else.
    """

    #: the form in which ``exp_avg_sq`` is kept in memory
    second_moment: ClassVar[SecondMoment]
    #: whether a rate that was tuned, or published, for AdamW holds for it with the default settings
    keeps_adamw_rate: ClassVar[bool] = False
    #: whether multipliers can be measured: on Adam's second moments, of every block
    can_be_measured: ClassVar[bool] = True
    #: whether its kernels take gradients before a host casts and clips them
    supports_fused_step: ClassVar[bool] = True

    # --------------------------------------------------------------- settings

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
        transfer: object = None,
        betas_by_type: object = None,
        cautious_weight_decay: bool = False,
        momentum_dtype: MomentumDtype = "fp32",
        backend: str = "auto",
        checkpoint_format: CheckpointFormat = "expanded",
        telemetry: object = None,
        fused_step: bool = False,
        **extra: object,
    ) -> None:
        check_extra_keys(type(self).__name__, extra, self.own_settings)
        self.momentum_dtype = check_momentum_dtype(momentum_dtype)
        self.backend = check_backend(backend)
        self.checkpoint_format = check_checkpoint_format(checkpoint_format)
        self.cautious_weight_decay = check_switch("cautious_weight_decay", cautious_weight_decay)
        name = type(self).__name__
        self.fused_step = check_fused_step(name, fused_step, is_supported=self.supports_fused_step)
        self.block_settings = BlockSettings.parse(
            lr_multipliers, weight_decay_multipliers, granularity, rules, transfer, betas_by_type
        )
        self.step_calls = 0
        telemetry_settings = TelemetrySettings.parse(telemetry)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        check_group(defaults, "")
        self._forget_tensors()
        # AdamW's own constructor would add switches (fused, foreach, ...) that mean nothing here
        torch.optim.Optimizer.__init__(self, params, defaults)
        if self.block_settings.is_default:
            self.block_settings = self._settings_of_tags()
        self.block_settings = self.completed(self.block_settings)
        self._measure_with(telemetry_settings)
        _LIVE.add(self)

    def completed(self, settings: BlockSettings) -> BlockSettings:
        """The user's settings with what this class sets where the user set nothing."""
        return settings

    def _forget_tensors(self) -> None:
        """Start without bound tensors and without whoever looks at steps."""
        self._bindings = Bindings(self.kernels_on, shares_second_moment=self.shares_second_moment)
        self._sets = StepSets()
        self._copies: dict[int, torch.Tensor] = {}
        self._given: dict[int, GivenGradient] | None = None
        self._finite_over: ReductionGroups | None = None
        self._observers: list[StepObserver] = []
        self._refusal: str | None = None
        self.is_given_its_own_state = False
        self._moving, self._moving_of = False, -1
        self._meter: Meter | None = None
        self.overflow = False  # DeepSpeed reads it after each step, counts the skipped one and holds the schedule

    def _settings_of_tags(self) -> BlockSettings:
        """The settings that were given to ``tag_parameters``; they are passed on to an optimizer without its own.

        Not those of an earlier optimizer, with which a host tagged the same model. Parameters that were tagged with
        different settings keep theirs.
        """
        given = [tags[0].block_settings for tensor in self._tensors() if (tags := user_tags_of(tensor)) is not None]
        if not given:
            return self.block_settings
        return given[0] if all(settings == given[0] for settings in given) else self.block_settings

    def _tensors(self) -> Iterator[torch.Tensor]:
        return (tensor for group in self.param_groups for tensor in group["params"])

    @property
    def shares_second_moment(self) -> bool:
        """Whether the second moment is one value per block, and sums of split blocks travel."""
        return self.second_moment == "block"

    #: names of settings that only this class has
    own_settings: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def block_arguments(cls, params: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of `BlockSettings.parse` that the constructor's (a JSON's ``"params"``) mean for this class."""
        return {key: params[key] for key in BLOCK_KEYS if key in params}

    @property
    def exchanges(self) -> tuple[Exchange, ...]:
        """What ranks send each other in a step before weights change, in this order."""
        return ()

    @property
    def second_moment_of(self) -> SecondMomentOf:
        """What the second moment is the mean square of; state of one kind is never taken for that of another."""
        return "nothing" if self.second_moment == "none" else "gradients"

    def add_param_group(self, param_group: ParamGroup) -> None:
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

    def spec_of(self, spec: BlockSpec, names: tuple[str, ...] = ()) -> BlockSpec:
        """Return the blocks in a tag of the user's with this optimizer's settings.

        Args:
            spec: the tag.
            names: all names that the parameter has now, the one to show first; empty: those of the tag.

        Raises:
            ValueError: the parameter was tagged under settings that this optimizer does not have, or the rules mean
                something else for its present names.
        """
        own, tagged = self.block_settings, self.completed(spec.block_settings)
        is_default = own == self.completed(BlockSettings())
        structure = spec.structure
        if names:
            structure = replace(structure, fqn=names[0], other_names=names[1:])
        if tagged == own or (is_default and tagged.auto is None):
            if not names:
                return spec if tagged == spec.block_settings else apply_settings(structure, tagged)
            # the rules were given for the names of then
            others = tuple(dict.fromkeys(name for name in (*names[1:], *spec.structure.names) if name != structure.fqn))
            kept = apply_settings(replace(structure, other_names=others), tagged)
            if kept.parts != apply_settings(spec.structure, tagged).parts:
                raise ValueError(
                    f"parameter {spec.fqn!r} is called {structure.fqn!r} by now, and the rules set something else for "
                    f"that name. Call tag_parameters(model, rules=[...]) after the last change to the model."
                )
            return kept
        if not spec.block_settings.is_default:
            raise ValueError(
                f"parameter {structure.fqn!r} was tagged with other multipliers, betas, rules or granularity than "
                f"{type(self).__name__} has. Give them in one place: the optimizer (tag_parameters(model) then needs "
                f"none), or tag_parameters before the optimizer is built (the optimizer then takes them over)."
            )
        rule = own.rule_for(*structure.names)
        if rule is not None and (rule.role or rule.qkv_layout or rule.num_heads or rule.storage):
            raise ValueError(
                f"{type(self).__name__} was given the rule {rule.match!r}, which sets a role, head counts or storage, "
                f"but parameter {structure.fqn!r} is already tagged. Give such rules to "
                f"tag_parameters(model, rules=[...])."
            )
        return apply_settings(structure, own)

    def __getstate__(self) -> dict[str, Any]:
        # bindings are made anew: they are found by the ids of tensors, which a copy does not share
        kept = (
            "block_settings",
            "momentum_dtype",
            "backend",
            "checkpoint_format",
            "cautious_weight_decay",
            "fused_step",
            "step_calls",
            *self.own_settings,
        )
        settings = None if self._meter is None else self._meter.settings
        return {
            **super().__getstate__(),
            **{name: getattr(self, name) for name in kept},
            "_measured": (settings, self.run_state(), self.lr_multipliers),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        # AdamW's version adds its switches to every group and turns step into a tensor
        torch.optim.Optimizer.__setstate__(self, state)
        if "_measured" not in state:
            return  # torch's load_state_dict comes here too, with groups and states alone
        settings, run, multipliers = self.__dict__.pop("_measured")
        self._forget_tensors()
        self._measure_with(settings)
        self._bindings.change_lr_multipliers(multipliers)
        self.load_run_state(run, 0)

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
        return self._bindings.bind(tensor, placements, groups).table

    def bind_absent(self, placements: Sequence[Placement], groups: ReductionGroups, device: torch.device) -> None:
        """Take part in the reductions of parameters of which this rank holds nothing (hosts only).

        For hosts whose ranks step a tensor per parameter: a rank without one would leave the others waiting. All
        ranks of a group must call `bind` and this in the same order of parameters. Arguments: `Bindings.bind_absent`.
        """
        self._bindings.bind_absent(placements, groups, device)

    def bindings(self) -> Bindings:
        """What lies in the tensors bound so far."""
        return self._bindings

    def binding_of(self, tensor: torch.Tensor) -> Binding | None:
        """The binding of a stepped tensor; whole parameters with tags of the user's are bound on first sight."""
        found = self._bindings.of(tensor)
        if found is not None:
            return found
        tags = user_tags_of(tensor)
        if tags is None:
            return None
        spec, shard = self.spec_of(tags[0]), tags[1]
        if shard is not None and len(shard.chunks) > 1:
            raise ValueError(
                f"parameter {spec.fqn!r} is split over {len(shard.chunks)} tensor-parallel ranks, but no host has "
                f"told {type(self).__name__} their process group. Train it through deepspeed.initialize(mpu=...)."
            )
        check_whole(spec, shard, tensor)
        return self._bindings.bind(tensor, [whole_placement(spec, shard)], LOCAL)

    def placements_in(self, tensor: torch.Tensor) -> tuple[Placement, ...] | None:
        """The parameters in a tensor that this optimizer steps; None if it is neither bound nor tagged."""
        found = self._bindings.of(tensor)
        if found is not None:
            return found.table.placements
        tags = user_tags_of(tensor)
        return None if tags is None else (whole_placement(self.spec_of(tags[0]), tags[1]),)

    def kernels_on(self, device: torch.device) -> Kernels:
        """What steps the tensors of a device: Adam's kernels of the setting ``backend``.

        Raises:
            ValueError: the backend that was asked for by name cannot be had there.
        """
        return kernels_for(self.backend, device)

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
        self._sets.forget()

    @contextmanager
    def given_gradients(self, given: Mapping[torch.Tensor, GivenGradient]) -> Iterator[Callable[[], bool]]:
        """Inside, `step` takes these gradients of tensors and not their ``grad`` (hosts only).

        Args:
            given: by tensor, which is bound and fp32; empty where this rank steps nothing. Not kept alive.

        Yields:
            Whether a step inside has updated, and so written the copies: not if an observer held it back.
        """
        calls = self.step_calls
        self._given = {id(tensor): gradient for tensor, gradient in given.items()}
        try:
            yield lambda: self.step_calls > calls
        finally:
            self._given = None

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
        if self._refusal is not None:
            raise ValueError(self._refusal)
        if self.fused_step and self._given is None:
            raise ValueError(
                f"{type(self).__name__} was given fused_step=True, and nobody hands it gradients in that form: only "
                f"DeepSpeed's engine at ZeRO stage 1 or 2 and Megatron-core's DistributedOptimizer (convert_) do. "
                f'Write "fused_step": false, or leave it out.'
            )
        now = self._set_of_step()
        try:
            self._step(now)
        finally:
            now.end()
        return loss

    def _step(self, now: StepSet) -> None:
        now.look_at_stepped()
        self._put_in_states(now)
        if not self._may_update(now.work):
            return
        if now.work:
            if self._moves():
                check_progress(self.param_groups, type(self).__name__)
            for exchange in self.exchanges:
                exchange(now, self._bindings, self.state)
            self._update(now)
            self.step_calls += 1
        for observer in self._observers:
            observer.after_update(now.work)

    def _moves(self) -> bool:
        """Whether a multiplier changes over the run; the same on ranks that hold none of its blocks."""
        if self._moving_of != self._bindings.version:
            self._moving_of, self._moving = self._bindings.version, self.block_settings.moves or self._bindings.moves
        return self._moving

    def _set_of_step(self) -> StepSet:
        """The tensors of a step, with those that only other ranks may have gradients of."""
        tensors = [*self._tensors()]
        given = self._given or {}
        grads = [given[id(tensor)].grad if id(tensor) in given else tensor.grad for tensor in tensors]
        hypers = [
            hyper
            for group in self.param_groups
            for hyper in repeat(hyper_of(group, cautious=self.cautious_weight_decay), len(group["params"]))
        ]
        found = self._sets.of(tensors, grads, self._bindings.version)
        if found is None:
            found = self._new_set(tensors, grads, hypers)
            self._sets.keep(found, grads, self._bindings.version)
        found.begin(grads, hypers, given)
        return found

    def _new_set(
        self, tensors: Sequence[torch.Tensor], grads: Sequence[torch.Tensor | None], hypers: Sequence[Hyper]
    ) -> StepSet:
        work = [self._new_work(*of_tensor) for of_tensor in zip(tensors, grads, hypers, strict=True)]
        absent = [
            Work(binding, Item(binding.kernel_table, binding.plan, binding.tensor, {}, NO_HYPER))
            for binding in self._bindings.absent
            if self._is_shared(binding)
        ]
        return StepSet(tensors, [w is not None for w in work], [w for w in work if w is not None], absent)

    def _new_work(self, tensor: torch.Tensor, grad: torch.Tensor | None, hyper: Hyper) -> Work | None:
        """The work of a tensor; None if nothing is to be done."""
        binding = self._bindings.of(tensor) or self.binding_of(tensor)
        if binding is None:
            # DeepSpeed's 16-bit wrappers step once with zero gradients inside their constructor
            if grad is not None and bool(grad.any()):
                check_plain(tensor)
                raise ValueError(self._unknown(tensor))
            return None
        if grad is None and not self._is_shared(binding):
            return None
        copy = self._copies.get(id(tensor))
        return Work(binding, Item(binding.kernel_table, binding.plan, tensor, {}, hyper, grad, None, copy))

    def _put_in_states(self, now: StepSet) -> None:
        """Give the items the states of their tensors; what is stepped for the first time gets zeros."""
        for binding, item in now.work:
            if item.grad is not None:
                state = self.state[item.param]
                item.state = state if "exp_avg" in state else self._state_of(item.param, binding)
            elif not binding.is_absent:
                item.state = self.state.get(item.param, {})

    def _is_shared(self, binding: Binding) -> bool:
        """Whether other ranks may wait for this one in the exchanges of a tensor."""
        return binding.kernel_table.has_split_blocks

    def _may_update(self, work: Sequence[Work]) -> bool:
        """Whether this step changes anything, decided alike on every rank."""
        self.overflow = self._finite_over is not None and any_peer(non_finite(work), self._finite_over)
        # a list: every observer is asked, whatever the one before it said
        return not self.overflow and all([observer.before_update(work) for observer in self._observers])

    def _update(self, now: StepSet) -> None:
        now.look_at_states()
        now.make_params_dense()
        for kernels, items in now.by_kernels:
            self.update_(kernels, items)
        self.update_together_(now.work)
        now.write_params_back()

    def update_(self, kernels: Kernels, items: Sequence[Item]) -> None:
        """Update parameters and states in place: Adam's update, with the second moment that tables say.

        Args:
            kernels: steps these items.
            items: tensors with a gradient, their parameters contiguous. The exchanges are complete.
        """
        kernels.step_(items)

    def update_together_(self, work: Sequence[Work]) -> None:
        """Update, after `update_`, what ranks exchange while they update it; nothing for most optimizers.

        Args:
            work: all tensors of the step, those that only other ranks have a gradient of too. Parameters with a
                gradient are contiguous.
        """

    def _unknown(self, tensor: torch.Tensor) -> str:
        shape, plain = tuple(tensor.shape), "ds_blockwise.tag_parameters(model)"
        if is_tagged_by_host(tensor):
            return (
                f"{as_tagged(tensor).block_spec.fqn!r} of shape {shape} was tagged by an engine for the engine's own "
                f"optimizer, and {type(self).__name__} is another one. Call {plain} to use it in plain PyTorch."
            )
        if any(self._bindings.of(known) is not None or user_tags_of(known) is not None for known in self._tensors()):
            return (
                f"{type(self).__name__} does not know {self._place_of(tensor)} of shape {shape}, although it knows "
                f"others: that parameter was frozen, or not in the model, when they were tagged, or it has replaced "
                f"one of them. In plain PyTorch call {plain} again, with the arguments of the first call; training "
                f"then goes on as it was. An engine needs it unfrozen before deepspeed.initialize: build a new engine."
            )
        return (
            f"{type(self).__name__} does not know the parameters in a tensor of shape {shape}. "
            f"With plain PyTorch call ds_blockwise.tag_parameters(model) before the first step; with DeepSpeed import "
            f"ds_blockwise before deepspeed.initialize, or call ds_blockwise.attach(engine)."
        )

    def _place_of(self, tensor: torch.Tensor) -> str:
        for number, group in enumerate(self.param_groups):
            for index, known in enumerate(group["params"]):
                if known is tensor:
                    names = group.get("param_names")  # where torch was given named parameters
                    return repr(names[index]) if names else f"param_groups[{number}]['params'][{index}]"
        return "a tensor"

    def skip_non_finite(self, groups: ReductionGroups) -> None:
        """Let `step` change nothing on any rank when a gradient of any rank is NaN or infinite (hosts only).

        For hosts that do not look for themselves. Costs one more read of the gradients and a wait for the device.

        Args:
            groups: ranks that must decide alike; every one of them steps every time.
        """
        self._finite_over = groups

    def refuse_to_step(self, reason: str) -> None:
        """Let every `step` raise a `ValueError`, on every rank alike: the optimizer of an engine that may never be
        stepped, and cannot be (hosts only).

        Args:
            reason: the message.
        """
        self._refusal = reason

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

    # ------------------------------------------------------------------ state

    def _state_of(self, tensor: torch.Tensor, binding: Binding) -> StepState:
        state: StepState = self.state[tensor]
        if "exp_avg" not in state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(
                tensor, dtype=self.momentum_dtype_of(tensor), memory_format=torch.contiguous_format
            )
            second = zeros_for(tensor, binding, self.second_moment)
            if second is not None:
                state["exp_avg_sq"] = second
        return state

    def _state_of_bound(self, tensor: torch.Tensor) -> StepState:
        binding = self.binding_of(tensor)
        if binding is None:
            raise ValueError(self._unknown(tensor))
        return self._state_of(tensor, binding)

    def momentum_dtype_of(self, tensor: torch.Tensor) -> torch.dtype:
        """The dtype of a tensor's ``exp_avg``."""
        return torch.bfloat16 if self.momentum_dtype == "bf16" else wide_dtype(tensor.dtype)

    def allocate_state(self) -> None:
        """Give every tensor that has no state zeros, as a first step would; hosts do it before they load."""
        for group in self.param_groups:
            for tensor in group["params"]:
                binding = self.binding_of(tensor)
                if binding is not None:
                    self._state_of(tensor, binding)

    def state_bytes(self) -> int:
        """Bytes of the state tensors that this rank holds."""
        return sum(
            value.numel() * value.element_size()
            for state in self.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor)
        )

    def state_dict(self) -> StateDict:
        """State in AdamW's form: per tensor ``step`` (int), ``exp_avg`` and ``exp_avg_sq`` in the tensor's shape.

        With ``checkpoint_format="compact"`` Adam-mini's second moments are ``exp_avg_sq_blocks``, one per local block.
        The key ``ds_blockwise`` holds the settings and what lies where (`checkpoint.record`); other optimizers ignore
        it.
        """
        return to_save(self, super().state_dict())

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load a state of one of ours, of AdamW (torch's or DeepSpeed's) or of the published Adam-mini.

        Multipliers, rules and granularity are this object's own and are not loaded; if the state was saved under others
        a warning says which. A second moment per element becomes one per block (its mean) at the next step.
        Nothing is changed if an error is raised.

        Raises:
            ValueError: the groups, the shapes or (compact state) the topology do not fit.
        """
        loaded = to_load(self, state_dict)
        super().load_state_dict({"state": {}, "param_groups": loaded.groups})
        self.state.update(loaded.states)
        run = None if loaded.record is None else loaded.record["settings"].get("run")
        self.load_run_state(run, max((int(state["step"]) for state in loaded.states.values()), default=0))
        self.report_changes(loaded.record, loaded.started_anew)

    @contextmanager
    def given_its_own_state(self) -> Iterator[None]:
        """Inside, a state dict without a record is taken for this optimizer's own: its host leaves the record out."""
        self.is_given_its_own_state = True
        try:
            yield
        finally:
            self.is_given_its_own_state = False

    def report_changes(self, record: RunRecord | None, started_anew: str | None = None) -> None:
        """Warn, on the first rank, of settings in a loaded record that differ from this object's.

        Args:
            record: of what was loaded; None if another optimizer wrote it.
            started_anew: what of the loaded state starts anew (`check_kind`), to be said too.
        """
        if started_anew is not None and is_first_rank():
            logger.warning("%s", started_anew)
        changed = [] if record is None else differences(record["settings"], settings_of(self))
        if changed and is_first_rank():
            logger.warning(
                "the loaded optimizer state was saved under other settings; the present ones are used:\n  %s",
                "\n  ".join(changed),
            )

    def per_element_state(self, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """``exp_avg`` and ``exp_avg_sq`` of a bound tensor in its shape, zeros before its first step (hosts only).

        The first is the state itself, the second may be a copy on the CPU. With ``checkpoint_format="compact"`` the
        second moment has the key and the form of compact files. An optimizer without one gives the squares of the
        first: such formats ask for both, and Adam, which might load them, would divide by zeros.
        """
        state = self._state_of_bound(tensor)
        exp_avg = state["exp_avg"]
        if "exp_avg_sq" not in state:
            return {"exp_avg": exp_avg, "exp_avg_sq": exp_avg.to(wide_dtype(tensor.dtype)).square()}
        return {"exp_avg": exp_avg, **second_moment_to_save(self, tensor, state["exp_avg_sq"])}

    def set_per_element_state(self, tensor: torch.Tensor, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor) -> None:
        """Load moments with one value per element into a bound tensor's state; call `settle` after all (hosts only).

        Raises:
            ValueError: they have another number of elements.
        """
        state = self._state_of_bound(tensor)
        state["exp_avg"] = like("exp_avg", exp_avg, tensor, self.momentum_dtype_of(tensor))
        if self.second_moment != "none":
            state["exp_avg_sq"] = like("exp_avg_sq", exp_avg_sq, tensor, wide_dtype(tensor.dtype))

    def settle(self, over: Sequence[ReductionGroups] | None = None) -> None:
        """Bring loaded second moments into the form that steps use; a collective over all ranks after a load.

        For hosts only. A tensor without state on some rank takes part with zeros, so that no rank is left waiting.

        Args:
            over: the groups of all bound tensors, if only their ranks take part (a pipeline stage may have none).
        """
        bindings = list(self._bindings)
        if not self.shares_second_moment or not bindings:
            return
        device = bindings[0].groups.device or bindings[0].tensor.device
        foreign = bool(unsettled(self.state, bindings))
        if any_rank_of_all(foreign, device) if over is None else any_rank(foreign, over, device):
            to_blocks(self.state, bindings)
        mark_settled(self.state, bindings)

    # ---------------------------------------------------------- what it measures

    def _measure_with(self, settings: TelemetrySettings | None) -> None:
        auto = MeasuredMultipliers.of(self.block_settings)
        if not self.can_be_measured and auto is not None:
            raise ValueError(
                f'{type(self).__name__} does not support "lr_multipliers": "auto": it is measured on second moments of '
                f"gradients. Leave it out, or use BlockwiseAdamMini."
            )
        if settings is not None or auto is not None:
            self._meter = Meter(self, settings, auto)
            self.observe(self._meter)
        self.observe(FirstSteps(self.block_settings.preset))

    @property
    def meter(self) -> Meter | None:
        """What measures during steps; None without telemetry and measured multipliers (hosts only)."""
        return self._meter

    @property
    def has_telemetry(self) -> bool:
        """Whether the setting ``telemetry`` was given."""
        return self._meter is not None and self._meter.settings is not None

    def telemetry(self) -> Readings:
        """The last reading per block type, the same on every rank; empty before the first, or without the setting."""
        return {} if self._meter is None else dict(self._meter.last)

    def on_telemetry(self, listener: Listener) -> None:
        """Call ``listener`` with every new reading, on every rank, at the end of the step.

        Args:
            listener: gets `TypeTelemetry` by block type. What it raises ends the step; all ranks must decide alike.

        Raises:
            ValueError: telemetry is off.
        """
        if self._meter is None or not self.has_telemetry:
            raise ValueError(
                f'telemetry is off. Give {type(self).__name__} telemetry={{"interval": 100}} (in a DeepSpeed JSON '
                f'under "optimizer": {{"params": ...}}).'
            )
        self._meter.listeners.append(listener)

    @property
    def lr_multipliers(self) -> dict[str, float]:
        """The multipliers that were measured, or given to `set_lr_multipliers`, in effect now; empty: the settings'."""
        return self._bindings.lr_multipliers

    def set_lr_multipliers(self, multipliers: Mapping[str, float]) -> None:
        """Change multipliers from the next step on; all state is kept.

        Every rank must make the same call between the same steps; nothing is communicated. Checkpoints hold moments
        and not multipliers: after a resume call it again (a load under other multipliers is reported). Costs building
        the segment tables anew, so not for every step; a captured CUDA graph must be captured again.

        Args:
            multipliers: by block type or role, as the setting ``lr_multipliers``. What is not named stays; a role's
                multiplier wins over its type's, and a rule's over both.

        Raises:
            ValueError, TypeError: an unknown key, a value outside its range; ``lr_multipliers`` is ``"auto"``.
        """
        if self._meter is not None and self._meter.auto is not None:
            raise ValueError(
                'lr_multipliers is "auto", which sets them itself. Pin types in the settings ({"auto": {...}, "head": '
                "10}), or give fixed multipliers and change these."
            )
        self._bindings.change_lr_multipliers({**self.lr_multipliers, **multipliers})

    def run_state(self) -> RunState | None:
        """Position and measurements of the run, plain containers for a checkpoint; None if nothing is measured."""
        return None if self._meter is None else self._meter.state()

    def load_run_state(self, state: RunState | None, steps: int) -> None:
        """Go on from `run_state`.

        Args:
            state: what was saved; None if that run measured nothing.
            steps: updates that the loaded state has seen, for that case.
        """
        if self._meter is not None:
            self._meter.load(state, steps)


def built_from_ours(optimizer: torch.optim.Optimizer) -> str | None:
    """Class name of the live optimizer of ours whose param groups another one was built from; None if of none.

    A host that replaces an optimizer hands its ``param_groups`` to the new one, which keeps the very same dicts.

    Args:
        optimizer: any optimizer that is not of ours.
    """
    groups = {id(group) for group in optimizer.param_groups}
    replaced = (ours for ours in _LIVE if any(id(group) in groups for group in ours.param_groups))
    return next((type(ours).__name__ for ours in replaced), None)
