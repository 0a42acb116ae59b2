# SPDX-License-Identifier: Apache-2.0
"""Blockwise Adam-mini: one second moment per block (arXiv 2406.16793), one learning rate per block type."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ds_blockwise.optimizer import BlockwiseOptimizer, wide_dtype
from ds_blockwise.reduce import any_rank, reduce_block_sums_
from ds_blockwise.update import block_sums
from ds_blockwise.work import Binding, Work


class BlockwiseAdamMini(BlockwiseOptimizer):
    """Adam-mini whose learning rate is multiplied per transformer block type: about 4 state bytes a parameter.

    For an element of a block with multiplier r, with ``lr_b = r * lr``::

        p -= lr_b * weight_decay * p
        m  = beta1 * m + (1 - beta1) * g
        v  = beta2 * v + (1 - beta2) * mean of g^2 over the whole, unsharded block
        p -= lr_b * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    A block is a head of a query or key weight, an output row of any other weight, a whole norm vector, one element of a
    linear's bias; ``granularity`` changes that per block type or role.

    Args:
        params: parameters or param groups (each may have its own ``lr``, ``betas``, ``eps``, ``weight_decay``).
        lr: base learning rate: the one of norms, several times below AdamW's usual best.
        betas: decay rates of the two moments; 0.999 for the second is known to ruin Adam-mini.
        eps: added to the root of the second moment.
        weight_decay: decoupled, multiplied by the block's learning rate.
        lr_multipliers: per block type (``emb head qk ffn vo norm other``) or role; defaults 10, 10, 8, 6, 4, 1, 1.
        weight_decay_multipliers: likewise; default 1.
        granularity: per block type, role or ``"bias"``: ``"head"``, ``"row"``, ``"tensor"`` or ``"element"``.
        rules: list of ``{"match": regex, "role" | "lr_multiplier" | ...}`` for single parameters.
        momentum_dtype: ``"fp32"`` or ``"bf16"``: storage of ``exp_avg``. Arithmetic is fp32 (fp64 for fp64 parameters),
            sums over blocks are fp64.
        backend: ``"auto"`` (C++ for CPU tensors, Triton for CUDA), ``"cpp"``, ``"triton"`` or ``"reference"``.

    State on each rank: per stepped tensor ``step`` (int), ``exp_avg`` in the tensor's shape, and ``exp_avg_sq`` of
    shape ``(num_blocks,)``, one value per block with elements on this rank (equal on all ranks that share the block).
    ``state_dict()`` has ``exp_avg_sq`` in the tensor's shape, as AdamW does.

    Raises:
        ValueError, TypeError: a setting outside its range, an unknown key, a group that does not fit.

    Source: arXiv 2406.16793, algorithms 1 and 2; arXiv 2502.19002, section 5.
    """

    shares_second_moment = True

    def _new_second_moment(self, tensor: torch.Tensor) -> torch.Tensor:
        table = self._bindings[id(tensor)].table
        value = torch.zeros(table.num_blocks, dtype=wide_dtype(tensor.dtype), device=tensor.device)
        self._own_second_moment[id(tensor)] = value
        return value

    # ------------------------------------------------- one value per element <-> one value per block

    def _before_update(self, work: Sequence[Work]) -> None:
        """Turn second moments that somebody else wrote (a loaded checkpoint) into one value per block.

        Universal checkpoints write per-element values straight into ``state``, so a load is noticed here and not
        only in ``load_state_dict``.
        """
        own = self._own_second_moment
        foreign = [
            w
            for w in work
            if "exp_avg_sq" in w.item.state and own.get(id(w.item.param)) is not w.item.state["exp_avg_sq"]
        ]
        if not foreign:
            return
        per_element = [w.item.state["exp_avg_sq"].numel() != w.binding.table.num_blocks for w in foreign]
        groups = [w.binding.groups for w in foreign]
        device = groups[0].device or foreign[0].item.param.device
        if any_rank(any(per_element), groups, device):
            # one element per block on this rank means that both forms are the same vector, so it can join the rest
            self._compact([(w.item.state, w.binding) for w in foreign])
        for w in foreign:
            self._own_second_moment[id(w.item.param)] = w.item.state["exp_avg_sq"]

    def _compact(self, items: Sequence[tuple[dict[str, Any], Binding]]) -> None:
        sums = []
        for state, binding in items:
            value, table = state["exp_avg_sq"].reshape(-1), binding.table
            if value.numel() != table.numel:
                raise ValueError(
                    f"exp_avg_sq has {value.numel()} values for a tensor of {table.numel} elements and "
                    f"{table.num_blocks} blocks: the checkpoint is of another model or another granularity."
                )
            sums.append(block_sums(value, table, square=False))
        reduce_block_sums_([(s, binding.table, binding.groups) for s, (_, binding) in zip(sums, items, strict=True)])
        for total, (state, binding) in zip(sums, items, strict=True):
            table = binding.table
            numel = table.on(total.device).slot_numel[: table.num_blocks]
            # the fp64 mean of equal fp32 values is that value exactly, so a resumed run is bitwise the same
            state["exp_avg_sq"] = (total[: table.num_blocks] / numel).to(state["exp_avg_sq"].dtype)

    def _saved_second_moment(self, tensor: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        binding = self.binding_of(tensor)
        if binding is None or value.numel() != binding.table.num_blocks:
            return value  # loaded and not stepped yet: still one value per element
        return binding.table.expand(value).reshape(tensor.shape)
