# SPDX-License-Identifier: Apache-2.0
"""Blockwise AdamW: element-wise second moments, one learning rate per block type (arXiv 2502.19002, section 5)."""

from __future__ import annotations

from ds_blockwise.optimizers.base import BlockwiseOptimizer


class BlockwiseAdamW(BlockwiseOptimizer):
    """AdamW whose learning rate is multiplied per transformer block type, also inside a fused QKV weight.

    For an element of a block with multiplier r, with ``lr_b = r * lr``:

        p -= lr_b * weight_decay * p
        m  = beta1 * m + (1 - beta1) * g
        v  = beta2 * v + (1 - beta2) * g^2
        p -= lr_b * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    Args:
        params: parameters or param groups (each may have its own ``lr``, ``betas``, ``eps``, ``weight_decay``).
        lr: base learning rate: AdamW's; with ``"lr_multipliers": "paper"`` the rate of the norms, an eighth of it.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled, multiplied by the block's learning rate.
        lr_multipliers: a preset (``"adamw_scale"``, the default, ``"paper"``, ``"tuned"``, ``"uniform"``), or numbers
            per block type (``emb head qk ffn vo norm other``) or role; a key ``"preset"`` beside them names what the
            others have: see `ds_blockwise.blocks.settings.defaults.LR_PRESETS`. ``"auto"``, or a key ``"auto"``,
            measures them: see `ds_blockwise.blocks.settings.auto_settings.AutoMultipliers`.
            ``{"norm": {"start": 1.0, "end": 0.25}}`` moves one over the decay of a schedule of ours (arXiv 2507.03526).
        weight_decay_multipliers: per block type or role; default 1.
        granularity: accepted so that one JSON serves both optimizers; second moments are element-wise.
        betas_by_type: pairs of betas per block type or role, null for the one of ``betas``:
            ``{"norm": [0.9, 0.99], "emb": [null, 0.99]}``.
        cautious_weight_decay: decay only those elements that the update does not move away from zero (arXiv
            2510.12402, algorithm 1). Default: false.
        rules: list of ``{"match": regex, "role" | "lr_multiplier" | ...}`` for single parameters.
        transfer: ``{"base_width": 256}``: rates that were tuned at that width move to this model's; see
            `ds_blockwise.blocks.settings.transfer.Transfer`. Default: off.
        momentum_dtype: ``"fp32"`` or ``"bf16"``: storage of ``exp_avg``. Arithmetic is fp32 (fp64 for fp64 parameters).
        backend: ``"auto"`` (C++ for CPU tensors, Triton for CUDA), ``"cpp"``, ``"triton"`` or ``"reference"``.
        checkpoint_format: accepted so that one JSON serves both optimizers; second moments are element-wise.
        telemetry: ``{"interval": 100, ...}``; see `ds_blockwise.measure.readings.TelemetrySettings`. Default: off.
        fused_step: under DeepSpeed's ZeRO 1 and 2, and in Megatron-core's ``DistributedOptimizer``, cast, clip, update
            and write the model's weights in one pass over memory, with the same results; refused by name elsewhere.
            Default: false.

    State on each rank: per stepped tensor ``step`` (int), ``exp_avg`` and ``exp_avg_sq`` in the tensor's shape.
    Nothing is communicated, but in the steps that telemetry or measured multipliers read.

    Raises:
        ValueError, TypeError: a setting outside its range, an unknown key, a group that does not fit.

    Source: arXiv 2502.19002, section 5; arXiv 1711.05101, algorithm 2.
    """

    second_moment = "element"
    keeps_adamw_rate = True
