# SPDX-License-Identifier: Apache-2.0
"""Blockwise Adam-mini: one second moment per block (arXiv 2406.16793), one learning rate per block type."""

from __future__ import annotations

import functools
import logging

from ds_blockwise.kernels.param_groups import ParamGroup
from ds_blockwise.optimizers.base import BlockwiseOptimizer
from ds_blockwise.optimizers.exchange import Exchange, settle_loaded_second_moments, sum_split_blocks
from ds_blockwise.parallel.agree import is_first_rank

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

    For an element of a block with multiplier r, with ``lr_b = r * lr``:

        p -= lr_b * weight_decay * p
        m  = beta1 * m + (1 - beta1) * g
        v  = beta2 * v + (1 - beta2) * mean of g^2 over the whole, unsharded block
        p -= lr_b * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    A block is a head of a query or key weight, an output row of any other weight, one element of a norm or of a
    linear's bias; ``granularity`` changes that per block type or role. The paper has one block for each norm vector:
    ``granularity="published"``.

    Args:
        params: parameters or param groups (each may have its own ``lr``, ``betas``, ``eps``, ``weight_decay``).
        lr: base learning rate: AdamW's; with ``"lr_multipliers": "paper"`` the rate of the norms, an eighth of it.
        betas: decay rates of the two moments; 0.999 for the second is known to ruin Adam-mini.
        eps: added to the root of the second moment.
        weight_decay: decoupled, multiplied by the block's learning rate.
        lr_multipliers: a preset (``"adamw_scale"``, the default, ``"paper"``, ``"tuned"``, ``"uniform"``), or numbers
            per block type (``emb head qk ffn vo norm other``) or role; a key ``"preset"`` beside them names what the
            others have: see `ds_blockwise.blocks.settings.defaults.LR_PRESETS`. ``"auto"``, or a key ``"auto"``,
            measures them: see `ds_blockwise.blocks.settings.auto_settings.AutoMultipliers`.
            ``{"norm": {"start": 1.0, "end": 0.25}}`` moves one over the decay of a schedule of ours (arXiv 2507.03526).
        weight_decay_multipliers: per block type or role; default 1.
        granularity: per block type, role or ``"bias"``: ``"head"``, ``"row"``, ``"tensor"`` or ``"element"``; or
            ``"published"``, the paper's partition.
        betas_by_type: pairs of betas per block type or role, null for the one of ``betas``:
            ``{"norm": [0.9, 0.99], "emb": [null, 0.99]}``.
        cautious_weight_decay: decay only those elements that the update does not move away from zero (arXiv
            2510.12402, algorithm 1). Default: false.
        rules: list of ``{"match": regex, "role" | "lr_multiplier" | ...}`` for single parameters.
        transfer: ``{"base_width": 256}``: rates that were tuned at that width move to this model's; see
            `ds_blockwise.blocks.settings.transfer.Transfer`. Default: off.
        momentum_dtype: ``"fp32"`` or ``"bf16"``: storage of ``exp_avg``. Arithmetic is fp32 (fp64 for fp64 parameters),
            sums over blocks are fp64.
        backend: ``"auto"`` (C++ for CPU tensors, Triton for CUDA), ``"cpp"``, ``"triton"`` or ``"reference"``.
        checkpoint_format: ``"expanded"`` (AdamW's keys and shapes) or ``"compact"`` (second moments per block; a third
            smaller, loads at the topology that wrote it, or anywhere after ``ds-blockwise convert``).
        telemetry: ``{"interval": 100, ...}``; see `ds_blockwise.measure.readings.TelemetrySettings`. Default: off.
        fused_step: under DeepSpeed's ZeRO 1 and 2, and in Megatron-core's ``DistributedOptimizer``, cast, clip, update
            and write the model's weights in one pass over memory, with the same results; refused by name elsewhere.
            Default: false.

    State on each rank: per stepped tensor ``step`` (int), ``exp_avg`` in the tensor's shape, and ``exp_avg_sq`` of
    shape ``(num_blocks,)``, one value per block with elements on this rank (equal on all ranks that share the block).
    ``state_dict()`` has ``exp_avg_sq`` in the tensor's shape, as AdamW does, unless it is compact.

    Raises:
        ValueError, TypeError: a setting outside its range, an unknown key, a group that does not fit.

    Source: arXiv 2406.16793, algorithms 1 and 2; arXiv 2502.19002, section 5.
    """

    second_moment = "block"
    keeps_adamw_rate = True

    @property
    def exchanges(self) -> tuple[Exchange, ...]:
        """Loaded second moments become one per block; sums of split blocks are completed."""
        return settle_loaded_second_moments, sum_split_blocks

    def add_param_group(self, param_group: ParamGroup) -> None:
        """As `BlockwiseOptimizer.add_param_group`; warns, once, of a beta2 that does not suit Adam-mini."""
        super().add_param_group(param_group)
        beta2 = self.param_groups[-1]["betas"][1]
        if beta2 >= _RUINOUS_BETA2 and is_first_rank():
            _warn_of_beta2(beta2)
