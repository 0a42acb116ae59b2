# SPDX-License-Identifier: Apache-2.0
"""Blockwise Adam-mini: one second moment per block (arXiv 2406.16793), one learning rate per block type."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any, cast

import torch

from ds_blockwise.checkpoint.record import PER_BLOCK_KEY
from ds_blockwise.kernels.base import wide_dtype
from ds_blockwise.kernels.binding import Binding, Work
from ds_blockwise.kernels.update import block_sums
from ds_blockwise.optimizers.base import BlockwiseOptimizer
from ds_blockwise.parallel.agree import any_rank, any_rank_of_all, is_first_rank
from ds_blockwise.parallel.reduce import ReductionGroups, reduce_block_sums_

logger = logging.getLogger(__name__)

_RUINOUS_BETA2 = 0.999  # AdamW's usual value, and what HF Trainer fills in for "auto"


@functools.cache
def _warn_of_beta2(beta2: float) -> None:
    logger.warning(
        "BlockwiseAdamMini with betas[1] = %g: 0.999 and above is known to ruin Adam-mini; 0.95 is the default here. "
        'HF Trainer fills 0.999 in for "auto" unless it is given --adam_beta2 0.95.',
        beta2,
    )


class BlockwiseAdamMini(BlockwiseOptimizer):
    """Adam-mini whose learning rate is multiplied per transformer block type: about 4 state bytes a parameter.

    For an element of a block with multiplier r, with ``lr_b = r * lr``::

        p -= lr_b * weight_decay * p
        m  = beta1 * m + (1 - beta1) * g
        v  = beta2 * v + (1 - beta2) * mean of g^2 over the whole, unsharded block
        p -= lr_b * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    A block is a head of a query or key weight, an output row of any other weight, one element of a norm or of a
    linear's bias; ``granularity`` changes that per block type or role. The paper has one block for each norm vector:
    ``granularity="published"``.

    Args:
        params: parameters or param groups (each may have its own ``lr``, ``betas``, ``eps``, ``weight_decay``).
        lr: base learning rate: the one of norms, several times below AdamW's usual best.
        betas: decay rates of the two moments; 0.999 for the second is known to ruin Adam-mini.
        eps: added to the root of the second moment.
        weight_decay: decoupled, multiplied by the block's learning rate.
        lr_multipliers: per block type (``emb head qk ffn vo norm other``) or role; defaults 10, 10, 8, 6, 4, 1, 1.
            ``"auto"``, or a key ``"auto"``, measures them: see `ds_blockwise.blocks.auto_settings.AutoMultipliers`.
        weight_decay_multipliers: likewise; default 1.
        granularity: per block type, role or ``"bias"``: ``"head"``, ``"row"``, ``"tensor"`` or ``"element"``; or
            ``"published"``, the paper's partition.
        rules: list of ``{"match": regex, "role" | "lr_multiplier" | ...}`` for single parameters.
        momentum_dtype: ``"fp32"`` or ``"bf16"``: storage of ``exp_avg``. Arithmetic is fp32 (fp64 for fp64 parameters),
            sums over blocks are fp64.
        backend: ``"auto"`` (C++ for CPU tensors, Triton for CUDA), ``"cpp"``, ``"triton"`` or ``"reference"``.
        checkpoint_format: ``"expanded"`` (AdamW's keys and shapes) or ``"compact"`` (second moments per block; a third
            smaller, loads at the topology that wrote it, or anywhere after ``ds-blockwise convert``).
        telemetry: ``{"interval": 100, ...}``; see `ds_blockwise.measure.readings.TelemetrySettings`. Default: off.

    State on each rank: per stepped tensor ``step`` (int), ``exp_avg`` in the tensor's shape, and ``exp_avg_sq`` of
    shape ``(num_blocks,)``, one value per block with elements on this rank (equal on all ranks that share the block).
    ``state_dict()`` has ``exp_avg_sq`` in the tensor's shape, as AdamW does, unless it is compact.

    Raises:
        ValueError, TypeError: a setting outside its range, an unknown key, a group that does not fit.

    Source: arXiv 2406.16793, algorithms 1 and 2; arXiv 2502.19002, section 5.
    """

    shares_second_moment = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As `BlockwiseOptimizer.add_param_group`; warns, once, of a beta2 that does not suit Adam-mini."""
        super().add_param_group(param_group)
        beta2 = self.param_groups[-1]["betas"][1]
        if beta2 >= _RUINOUS_BETA2 and is_first_rank():
            _warn_of_beta2(beta2)

    def _new_second_moment(self, tensor: torch.Tensor) -> torch.Tensor:
        table = self._bindings[id(tensor)].table
        value = torch.zeros(table.num_blocks, dtype=wide_dtype(tensor.dtype), device=tensor.device)
        self._own_second_moment[id(tensor)] = value
        return value

    # ------------------------------------------------- one value per element <-> one value per block

    def _before_update(self, work: Sequence[Work]) -> None:
        """Turn second moments that somebody else wrote (a loaded checkpoint) into one value per block.

        Universal checkpoints write per-element values straight into ``state``, so a load is noticed here and not
        only in ``load_state_dict``. Hosts call `settle` after a load; then nothing is left to do.
        """
        foreign = [w for w in work if self._is_foreign(w.item.param)]
        if not foreign:
            return
        groups = [w.binding.groups for w in foreign]
        device = groups[0].device or foreign[0].item.param.device
        per_element = any(w.item.state["exp_avg_sq"].numel() != w.binding.table.num_blocks for w in foreign)
        # one element per block on this rank means that both forms are the same vector, so it can join the rest
        self._adopt([w.binding for w in foreign], compact=any_rank(per_element, groups, device))

    def settle(self, over: Sequence[ReductionGroups] | None = None) -> None:
        """Bring loaded second moments into one value per block; a collective over all ranks after a load (hosts only).

        A tensor without state on some rank takes part with zeros, so that no rank is left waiting.

        Args:
            over: the groups of all bound tensors, if only their ranks take part (a pipeline stage may have none).
        """
        bindings = self.bindings()
        if not bindings:
            return
        device = bindings[0].groups.device or bindings[0].tensor.device
        foreign = any(self._is_foreign(b.tensor) for b in bindings)
        compact = any_rank_of_all(foreign, device) if over is None else any_rank(foreign, over, device)
        self._adopt(bindings, compact=compact)

    def _is_foreign(self, tensor: torch.Tensor) -> bool:
        value = self.state.get(tensor, {}).get("exp_avg_sq")
        return value is not None and self._own_second_moment.get(id(tensor)) is not value

    def _adopt(self, bindings: Sequence[Binding], *, compact: bool) -> None:
        if compact:
            self._compact(bindings)
        for binding in bindings:
            state = self.state.get(binding.tensor, {})
            if "exp_avg_sq" in state:
                self._own_second_moment[id(binding.tensor)] = state["exp_avg_sq"]

    def _compact(self, bindings: Sequence[Binding]) -> None:
        sums = [block_sums(self._per_element(binding), binding.table, square=False) for binding in bindings]
        reduce_block_sums_([(total, b.table, b.groups) for total, b in zip(sums, bindings, strict=True)])
        for total, binding in zip(sums, bindings, strict=True):
            table, state = binding.table, self.state.get(binding.tensor, {})
            if "exp_avg_sq" in state:
                numel = table.on(total.device).slot_numel[: table.num_blocks]
                # the fp64 mean of equal fp32 values is that value exactly, so a resumed run is bitwise the same
                state["exp_avg_sq"] = (total[: table.num_blocks] / numel).to(state["exp_avg_sq"].dtype)

    def _per_element(self, binding: Binding) -> torch.Tensor:
        table, tensor = binding.table, binding.tensor
        value = self.state.get(tensor, {}).get("exp_avg_sq")
        if value is None:
            return torch.zeros(table.numel, dtype=wide_dtype(tensor.dtype), device=tensor.device)
        if self._is_in_blocks(binding, value):
            return table.expand(value).to(tensor.device)
        if value.numel() != table.numel:
            raise ValueError(
                f"exp_avg_sq has {value.numel()} values for a tensor of {table.numel} elements and "
                f"{table.num_blocks} blocks: the checkpoint is of another model or another granularity."
            )
        return cast("torch.Tensor", value).reshape(-1)

    def _is_in_blocks(self, binding: Binding, value: torch.Tensor) -> bool:
        # where both forms have the same length, only a tensor of our own making is known to be in block order
        ours = not self._is_foreign(binding.tensor) or value.numel() != binding.table.numel
        return ours and value.numel() == binding.table.num_blocks

    def _saved_second_moment(self, tensor: torch.Tensor, value: torch.Tensor) -> dict[str, torch.Tensor]:
        binding = self.binding_of(tensor)
        if binding is None or not self._is_in_blocks(binding, value):
            return {"exp_avg_sq": value}  # loaded and not stepped yet: still one value per element
        if self.checkpoint_format == "compact":
            return {PER_BLOCK_KEY: value}
        return {"exp_avg_sq": binding.table.expand(value).reshape(tensor.shape)}
