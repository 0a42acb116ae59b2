# SPDX-License-Identifier: Apache-2.0
"""State dicts: what an optimizer writes, and what it takes in (its own, AdamW's, the published Adam-mini's)."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from ds_blockwise.blocks.block_settings import BlockSettings
from ds_blockwise.blocks.segment_table import Placement
from ds_blockwise.checkpoint.record import (
    KEY,
    PER_BLOCK_KEY,
    VERSION,
    differences,
    placements_of,
    record_in,
    record_of,
    same_blocks,
    same_ranges,
    settings_of,
    table_of,
)
from ds_blockwise.kernels.base import wide_dtype
from ds_blockwise.optimizers.foreign_state import (
    FOR_ADAMW,
    from_published_adam_mini,
    group_to_load,
    is_published_adam_mini,
    step_of,
)
from ds_blockwise.optimizers.settings import CheckpointFormat, MomentumDtype
from ds_blockwise.parallel.agree import is_first_rank
from ds_blockwise.parallel.reduce import ReductionGroups

logger = logging.getLogger(__name__)


class StoredState(torch.optim.AdamW, ABC):
    """The part of an optimizer that is written to files and read back; base of `BlockwiseOptimizer`."""

    #: whether the second moment is one value per block (and split blocks must be reduced)
    shares_second_moment: ClassVar[bool]

    block_settings: BlockSettings
    momentum_dtype: MomentumDtype
    checkpoint_format: CheckpointFormat
    _own_second_moment: dict[int, torch.Tensor]

    @abstractmethod
    def placements_in(self, tensor: torch.Tensor) -> tuple[Placement, ...] | None:
        """The parameters in a tensor that this optimizer steps; None if it is neither bound nor tagged."""

    def state_dict(self) -> dict[str, Any]:
        """State in AdamW's form: per tensor ``step`` (int), ``exp_avg`` and ``exp_avg_sq`` in the tensor's shape.

        With ``checkpoint_format="compact"`` Adam-mini's second moments are ``exp_avg_sq_blocks``, one per local block.
        The key ``ds_blockwise`` holds the settings and what lies where (`state_record`); other optimizers ignore it.
        """
        packed = super().state_dict()
        tensors = [tensor for group in self.param_groups for tensor in group["params"]]
        ids = [i for group in packed["param_groups"] for i in group["params"]]
        for index, tensor in zip(ids, tensors, strict=True):
            state = packed["state"].get(index)
            if state and "exp_avg_sq" in state:
                packed["state"][index] = {
                    "step": int(state["step"]),
                    "exp_avg": state["exp_avg"],
                    **self._saved_second_moment(tensor, state["exp_avg_sq"]),
                }
        packed["param_groups"] = [{**group, **FOR_ADAMW} for group in packed["param_groups"]]
        packed[KEY] = record_of(self, VERSION)
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of either optimizer, of AdamW (torch's or DeepSpeed's) or of the published Adam-mini.

        Multipliers, rules and granularity are this object's own and are not loaded; if the state was saved under others
        a warning says which. A second moment per element becomes one per block (its mean) at the next step.
        Nothing is changed if an error is raised.

        Raises:
            ValueError: the groups, the shapes or (compact state) the topology do not fit.
        """
        if is_published_adam_mini(state_dict):
            names = [self._name_of(tensor) for group in self.param_groups for tensor in group["params"]]
            state_dict = from_published_adam_mini(state_dict, self.param_groups, names)
        record = record_in(state_dict)
        saved_groups = state_dict["param_groups"]
        saved_sizes, own_sizes = ([len(g["params"]) for g in gs] for gs in (saved_groups, self.param_groups))
        if saved_sizes != own_sizes:
            raise ValueError(
                f"the state dict has param groups of {saved_sizes} tensors, this optimizer of {own_sizes}. Build the "
                f"optimizer with the same groups."
            )
        groups = [
            group_to_load(saved, own, index)
            for index, (saved, own) in enumerate(zip(saved_groups, self.param_groups, strict=True))
        ]
        tensors = [(tensor, group) for group in self.param_groups for tensor in group["params"]]
        ids = [(i, group) for group in saved_groups for i in group["params"]]
        states: dict[torch.Tensor, dict[str, Any]] = {}
        for position, ((number, group), (tensor, _)) in enumerate(zip(ids, tensors, strict=True)):
            saved = state_dict["state"].get(number)
            if saved and "exp_avg" in saved:
                states[tensor] = self._restored(tensor, saved, group, record, position)
        super().load_state_dict({"state": {}, "param_groups": groups})
        self.state.update(states)
        self._own_second_moment = {
            id(tensor): state["exp_avg_sq"]
            for tensor, state in states.items()
            if self.shares_second_moment and state["exp_avg_sq"].shape != tensor.shape
        }
        run = None if record is None else record["settings"].get("run")
        self.load_run_state(run, max((state["step"] for state in states.values()), default=0))
        self.report_changes(record)

    @property
    @abstractmethod
    def lr_multipliers(self) -> dict[str, float]:
        """The multipliers in effect where they are not those of the settings."""

    @abstractmethod
    def run_state(self) -> dict[str, Any] | None:
        """Position and measurements of the run, for a checkpoint."""

    @abstractmethod
    def load_run_state(self, state: Mapping[str, Any] | None, steps: int) -> None:
        """Go on from `run_state`, or from a number of updates if a checkpoint has none."""

    def report_changes(self, record: Mapping[str, Any] | None) -> None:
        """Warn, on the first rank, of settings in a loaded record (`state_record`) that differ from this object's."""
        changed = [] if record is None else differences(record["settings"], settings_of(self))
        if changed and is_first_rank():
            logger.warning(
                "the loaded optimizer state was saved under other settings; the present ones are used:\n  %s",
                "\n  ".join(changed),
            )

    def per_element_state(self, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """``exp_avg`` and ``exp_avg_sq`` of a bound tensor in its shape, zeros before its first step (hosts only).

        The first is the state itself, the second may be a copy on the CPU.
        """
        state = self._state_of(tensor)
        return {"exp_avg": state["exp_avg"], **self._saved_second_moment(tensor, state["exp_avg_sq"])}

    def set_per_element_state(self, tensor: torch.Tensor, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor) -> None:
        """Load moments with one value per element into a bound tensor's state; call `settle` after all (hosts only).

        Raises:
            ValueError: they have another number of elements.
        """
        state = self._state_of(tensor)
        state["exp_avg"] = _like("exp_avg", exp_avg, tensor, self._momentum_dtype_of(tensor))
        state["exp_avg_sq"] = _like("exp_avg_sq", exp_avg_sq, tensor, wide_dtype(tensor.dtype))
        self._own_second_moment.pop(id(tensor), None)

    @abstractmethod
    def _state_of(self, tensor: torch.Tensor) -> dict[str, Any]:
        """The state of a bound tensor, made if there is none."""

    def settle(self, over: Sequence[ReductionGroups] | None = None) -> None:
        """Bring loaded state into the form that steps use; a collective over all ranks after a load (hosts only).

        Args:
            over: the ranks that take part, if not all do.
        """

    def _momentum_dtype_of(self, tensor: torch.Tensor) -> torch.dtype:
        return torch.bfloat16 if self.momentum_dtype == "bf16" else wide_dtype(tensor.dtype)

    def _name_of(self, tensor: torch.Tensor) -> str | None:
        placements = self.placements_in(tensor)
        return placements[0].spec.fqn if placements and len(placements) == 1 else None

    def _restored(
        self,
        tensor: torch.Tensor,
        saved: dict[str, Any],
        group: dict[str, Any],
        record: dict[str, Any] | None,
        position: int,
    ) -> dict[str, Any]:
        # torch casts floating state to the parameter's dtype, which would round fp32 moments of bf16 parameters
        if record is not None and PER_BLOCK_KEY in saved:
            second = self._from_blocks(tensor, saved[PER_BLOCK_KEY], record, position)
        else:
            second = _like("exp_avg_sq", saved["exp_avg_sq"], tensor, wide_dtype(tensor.dtype))
        return {
            "step": step_of(saved, group),
            "exp_avg": _like("exp_avg", saved["exp_avg"], tensor, self._momentum_dtype_of(tensor)),
            "exp_avg_sq": second,
        }

    def _from_blocks(
        self, tensor: torch.Tensor, values: torch.Tensor, record: dict[str, Any], position: int
    ) -> torch.Tensor:
        """Second moments of a compact state: as they are if the blocks are the same, else one per element."""
        saved, own = placements_of(record, position), self.placements_in(tensor)
        if own is None or not same_ranges(saved, own):
            raise ValueError(
                f"tensor {position} of the compact state dict holds other parameters or ranges than this optimizer's: "
                f"compact checkpoints load at the topology that wrote them. Convert it: ds-blockwise convert "
                f"CHECKPOINT OUTPUT, and load OUTPUT."
            )
        table = table_of(record, position)
        if values.numel() != table.num_blocks:
            raise ValueError(
                f"{PER_BLOCK_KEY} of tensor {position} has {values.numel()} values for {table.num_blocks} blocks. The "
                f"file is damaged: ds-blockwise check CHECKPOINT"
            )
        dtype = wide_dtype(tensor.dtype)
        if self.shares_second_moment and same_blocks(saved, own):
            return values.detach().to(tensor.device, dtype, copy=True).contiguous()
        return _like("exp_avg_sq", table.expand(values), tensor, dtype)

    def _saved_second_moment(self, tensor: torch.Tensor, value: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"exp_avg_sq": value}

    def state_bytes(self) -> int:
        """Bytes of the state tensors that this rank holds."""
        return sum(
            value.numel() * value.element_size()
            for state in self.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor)
        )


def _like(key: str, value: torch.Tensor, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if value.numel() != tensor.numel():
        raise ValueError(
            f"state {key!r} has {value.numel()} elements but its parameter has {tensor.numel()} (shape "
            f"{tuple(tensor.shape)}). The checkpoint is of another model or another partition."
        )
    return value.detach().to(tensor.device, dtype, copy=True).reshape(tensor.shape).contiguous()
