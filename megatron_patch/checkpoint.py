# SPDX-License-Identifier: Apache-2.0
"""Megatron-core's optimizer wrappers with the state of our optimizers in their checkpoints.

Every format looks as if AdamW had written it: ``exp_avg`` and ``exp_avg_sq`` with one value per element, ``step`` once.
So AdamW's checkpoints load (Adam-mini takes the mean over each block), and ours load into AdamW. A load is a collective
over the data-parallel and tensor-parallel ranks, as it is upstream.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Concatenate, ParamSpec, Protocol, SupportsInt, TypedDict, TypeVar

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer
from torch import nn

from ds_blockwise.blocks.tagged_parameter import as_tagged
from ds_blockwise.checkpoint.record import FORMAT, KEY, VERSION, run_record_in, settings_of
from ds_blockwise.checkpoint.record_types import RunRecord
from ds_blockwise.checkpoint.state_dicts import check_kind
from ds_blockwise.optimizers.base import BlockwiseOptimizer
from ds_blockwise.optimizers.foreign_state import FOR_ADAMW, group_to_load
from ds_blockwise.optimizers.second_moment import start_matrices_anew
from ds_blockwise.parallel.agree import first_error
from megatron_patch.guard import MEGATRON_VERSION
from megatron_patch.wrappers import Buffer

_KIND = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")  # how Megatron-core tells groups apart

P = ParamSpec("P")
R = TypeVar("R")
Group = dict[str, object]  # a param group without its tensors, as checkpoints hold it


class Converted(Protocol):
    """What all converted wrappers have."""

    optimizer: BlockwiseOptimizer


class InnerState(TypedDict):
    """What the state dict of a ``DistributedOptimizer`` holds of the inner optimizer: nothing that is per element."""

    param_groups: list[Group]


class DistributedState(TypedDict):
    """That state dict; it may also hold ``grad_scaler``."""

    optimizer: InnerState


class SavedTensor(Protocol):
    """A ``ShardedTensor`` of a distributed checkpoint."""

    data: torch.Tensor


def allocate_state(optimizer: BlockwiseOptimizer, config: object = None) -> None:
    """Zeros for tensors without state; takes the place of a wrapper's ``init_state_fn``.

    Args:
        optimizer: with all its tensors bound.
        config: the wrapper's; not used.
    """
    optimizer.allocate_state()


def settings_record(optimizer: BlockwiseOptimizer) -> RunRecord:
    """What of `checkpoint.record` is the same on all ranks, so that a distributed checkpoint can hold it."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "optimizer": type(optimizer).__name__,
        "second_moment_of": optimizer.second_moment_of,
        "shares_second_moment": bool(optimizer.shares_second_moment),
        "settings": {**settings_of(optimizer), "layout": ""},  # each stage of a pipeline has its own layout
    }


def same_kinds(own: Sequence[Mapping[str, object]], saved: Sequence[Mapping[str, object]]) -> bool:
    """Whether saved param groups are ours one by one, as far as Megatron-core can tell.

    Its own search looks at four keys only, which groups that differ in their learning rates (``decoupled_lr``,
    overrides of ``max_lr``) share: after a load, all would have the rates of the last of them.
    """
    return len(own) == len(saved) and all(_kind(a) == _kind(b) for a, b in zip(own, saved, strict=True))


def _kind(group: Mapping[str, object]) -> tuple[object, ...]:
    # NeMo renames two of the keys
    return tuple(group.get(key, group.get(f"pre_{key}")) for key in _KIND)


def _step_in(groups: Sequence[Group]) -> int:
    """Steps that saved param groups have seen; where torch's AdamW wrote them, the number is a float."""
    steps = (group["step"] for group in groups if "step" in group)
    return next((int(step) for step in steps if isinstance(step, SupportsInt)), 0)


def matching_groups(current_groups: list[Group], state_dict_groups: list[Group]) -> list[Group]:
    """Saved param groups in the order of the current ones; see `same_kinds`."""
    if same_kinds(current_groups, state_dict_groups):
        return state_dict_groups
    found: list[Group] = FP32Optimizer._filter_and_reorder_param_groups(current_groups, state_dict_groups)
    return found


def settle(wrapper: Converted) -> None:
    """Bring loaded moments into the form that steps use; all ranks that share tensors with this one take part."""
    wrapper.optimizer.settle([binding.groups for binding in wrapper.optimizer.bindings()])


def then_settle(load: Callable[Concatenate[Converted, P], R]) -> Callable[Concatenate[Converted, P], R]:
    """A wrapper's own method that replaces state tensors, followed by `settle`."""

    @functools.wraps(load)
    def load_and_settle(wrapper: Converted, /, *args: P.args, **kwargs: P.kwargs) -> R:
        result = load(wrapper, *args, **kwargs)
        settle(wrapper)
        return result

    return load_and_settle


# One base each: with a second one Python would not let a wrapper change its class in place.


class BlockwiseFP32Optimizer(FP32Optimizer):  # type: ignore[misc]  # megatron has no types
    """``FP32Optimizer`` that steps with one of our optimizers."""

    optimizer: BlockwiseOptimizer

    _filter_and_reorder_param_groups = staticmethod(matching_groups)
    load_state_dict = then_settle(FP32Optimizer.load_state_dict)
    restore_from_cpu = then_settle(FP32Optimizer.restore_from_cpu)

    def sharded_state_dict(self, *args: object, **kwargs: object) -> dict[str, object]:
        """See ``FP32Optimizer.sharded_state_dict``."""
        return {**super().sharded_state_dict(*args, **kwargs), KEY: settings_record(self.optimizer)}


class BlockwiseFloat16Optimizer(Float16OptimizerWithFloat16Params):  # type: ignore[misc]  # megatron has no types
    """``Float16OptimizerWithFloat16Params`` that steps with one of our optimizers."""

    optimizer: BlockwiseOptimizer

    _filter_and_reorder_param_groups = staticmethod(matching_groups)
    load_state_dict = then_settle(Float16OptimizerWithFloat16Params.load_state_dict)
    restore_from_cpu = then_settle(Float16OptimizerWithFloat16Params.restore_from_cpu)

    def sharded_state_dict(self, *args: object, **kwargs: object) -> dict[str, dict[str, object]]:
        """See ``Float16OptimizerWithFloat16Params.sharded_state_dict``."""
        sharded: dict[str, dict[str, object]] = super().sharded_state_dict(*args, **kwargs)
        sharded["optimizer"][KEY] = settings_record(self.optimizer)
        return sharded


class BlockwiseDistributedOptimizer(DistributedOptimizer):  # type: ignore[misc]  # megatron has no types
    """``DistributedOptimizer`` that steps with one of our optimizers."""

    optimizer: BlockwiseOptimizer
    #: of what is being loaded: moments may come in a second call
    matrices_start_anew = False
    buffers: Sequence[Buffer]
    model_param_group_index_map: MutableMapping[nn.Parameter, tuple[int, int]]

    restore_from_cpu = then_settle(DistributedOptimizer.restore_from_cpu)

    def state_dict(self) -> dict[str, object]:
        """What is not per element: param groups with ``step``, our settings, the gradient scaler.

        The same keys as upstream, which reads ``step`` off tensors and only after a first step.

        Raises:
            ValueError: tensors have seen different numbers of steps, which the format cannot say.
        """
        optimizer = self.optimizer
        steps = {int(state["step"]) for state in optimizer.state.values() if "step" in state}
        if len(steps) > 1:
            raise ValueError(
                f"tensors of one optimizer have seen {sorted(steps)} steps; Megatron-core's checkpoints hold one "
                f"number for all. Give every parameter a gradient in every step."
            )
        step = steps.pop() if steps else 0
        groups = [
            {**{key: value for key, value in group.items() if key != "params"}, **FOR_ADAMW, "step": step}
            for group in optimizer.param_groups
        ]
        packed: dict[str, object] = {"optimizer": {"param_groups": groups, KEY: settings_record(optimizer)}}
        if self.grad_scaler:
            packed["grad_scaler"] = self.grad_scaler.state_dict()
        return packed

    def load_state_dict(self, state_dict: DistributedState) -> None:
        """See ``DistributedOptimizer.load_state_dict``; takes AdamW's checkpoints too.

        Raises:
            ValueError: the moments do not fit, or a later version of ds_blockwise wrote them.
        """
        optimizer, saved = self.optimizer, state_dict["optimizer"]
        record = run_record_in(saved)
        started_anew = check_kind(optimizer, record)
        self.matrices_start_anew = started_anew is not None
        optimizer.allocate_state()  # upstream would make its own, uninitialised
        in_order = same_kinds(optimizer.param_groups, saved["param_groups"])
        with optimizer.given_its_own_state():  # upstream hands it back in a state dict of its own
            super().load_state_dict(state_dict)
        if in_order:
            for index, (own, group) in enumerate(zip(optimizer.param_groups, saved["param_groups"], strict=True)):
                own.update(group_to_load(group, own, index))
        step = _step_in(saved["param_groups"])
        for state in optimizer.state.values():
            state["step"] = step
        # upstream hands on neither the record nor, before its files are read, any moments
        optimizer.load_run_state(None if record is None else record["settings"].get("run"), step)
        self._settle()
        optimizer.report_changes(record, started_anew)

    def load_parameter_state_from_dp_zero(
        self, state_dict: Mapping[str, object] | None, *, update_legacy_format: bool = False
    ) -> None:
        """See ``DistributedOptimizer.load_parameter_state_from_dp_zero``.

        Raises:
            ValueError: the checkpoint is of before February 2024, whose loader writes into state by itself.
        """
        if update_legacy_format:
            raise ValueError(
                "--ckpt-convert-update-legacy-dist-opt-format is not supported with ds_blockwise: convert the "
                "checkpoint with the stock optimizer and load the result."
            )
        super().load_parameter_state_from_dp_zero(state_dict)
        self._settle()

    def _settle(self) -> None:
        if self.matrices_start_anew:
            start_matrices_anew(self.optimizer.state, self.optimizer.bindings())
        settle(self)

    def sharded_param_state_fully_reshardable(
        self, model_sharded_state_dict: object, is_loading: bool = False, metadata: object = None
    ) -> Mapping[int, Mapping[str, SavedTensor]] | None:
        """See ``DistributedOptimizer.sharded_param_state_fully_reshardable``.

        Raises:
            ValueError: on every rank, if upstream mixed up parameters. It does where several buckets end in padding
                (0.16 to 0.19), without a word.
        """
        state: Mapping[int, Mapping[str, SavedTensor]] | None
        state = super().sharded_param_state_fully_reshardable(model_sharded_state_dict, is_loading, metadata)
        if is_loading:
            return state
        wrong = [] if state is None else list(self._misplaced(state))
        message = None
        if wrong:
            message = (
                f"megatron-core {MEGATRON_VERSION} would write other parameters' state as that of {wrong[0]!r} and "
                f"{len(wrong) - 1} more: with several padded buckets its fully_reshardable format is wrong. Save with "
                f"distrib_optim_sharding_type='dp_reshardable', or use one bucket "
                f"(DistributedDataParallelConfig.bucket_size larger than the model)."
            )
        message = first_error(message)
        if message is not None:
            raise ValueError(message)
        return state

    def _misplaced(self, state: Mapping[int, Mapping[str, SavedTensor]]) -> Iterator[str]:
        """Names of parameters under which other values than their own would be saved."""
        params = [param for buffer in self.buffers for param in buffer.param_index_map]
        for index, param in enumerate(params):
            shard = self._shard_of(param)
            if shard is None:
                continue
            start = self._get_model_param_range_map(param)["param"].start
            saved = state[index]["param"].data.flatten()[start : start + shard.numel()]
            if not torch.equal(saved.cpu(), shard.detach().float().cpu()):
                yield as_tagged(param).block_spec.fqn

    def _shard_of(self, param: nn.Parameter) -> torch.Tensor | None:
        """What this rank steps of a model parameter; None if it steps nothing of it."""
        found = self.model_param_group_index_map.get(param)
        if found is None:
            return None
        group, place = found
        shard: torch.Tensor = self.optimizer.param_groups[group]["params"][place]
        return shard

    def _get_main_param_and_optimizer_states(self, model_param: nn.Parameter) -> dict[str, torch.Tensor]:
        shard = self._shard_of(model_param)
        assert shard is not None
        return {"param": shard, **self.optimizer.per_element_state(shard)}

    def _set_main_param_and_optimizer_states(
        self, model_param: nn.Parameter, tensors: Mapping[str, torch.Tensor]
    ) -> None:
        shard = self._shard_of(model_param)
        assert shard is not None
        shard.detach().copy_(tensors["param"])
        self.optimizer.set_per_element_state(shard, tensors["exp_avg"], tensors["exp_avg_sq"])


#: the class that a wrapper gets
CONVERTED: dict[type, type] = {
    FP32Optimizer: BlockwiseFP32Optimizer,
    Float16OptimizerWithFloat16Params: BlockwiseFloat16Optimizer,
    DistributedOptimizer: BlockwiseDistributedOptimizer,
}
