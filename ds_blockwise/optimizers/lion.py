# SPDX-License-Identifier: Apache-2.0
"""Blockwise Lion: the sign of the momentum (arXiv 2302.06675), one learning rate per block type."""

from __future__ import annotations

from collections.abc import Sequence

from torch.optim.optimizer import ParamsT

from ds_blockwise.kernels.base import Item, Kernels
from ds_blockwise.optimizers.base import BlockwiseOptimizer
from ds_blockwise.optimizers.settings import CheckpointFormat, MomentumDtype


class BlockwiseLion(BlockwiseOptimizer):
    """Lion whose learning rate is multiplied per transformer block type: 4 state bytes a parameter.

    For an element of a block with multiplier r, with ``lr_b = r * lr``:

        c  = beta1 * m + (1 - beta1) * g
        m  = beta2 * m + (1 - beta2) * g
        p -= lr_b * (sign(c) + weight_decay * p)

    Every element moves by its block's learning rate, so ``lr`` is 3 to 10 times below AdamW's, and ``weight_decay`` as
    much above (arXiv 2302.06675, section 5). Kernels step it in one pass over memory, with the bits of torch's
    operations, which take about five.

    Args:
        params: parameters or param groups (each may have its own ``lr``, ``betas``, ``weight_decay``).
        lr: base learning rate.
        betas: weight of the momentum in the step's direction, and decay rate of the momentum.
        eps: accepted so that one JSON serves all optimizers; Lion divides by nothing.
        weight_decay: decoupled, multiplied by the block's learning rate.
        lr_multipliers: per block type (``emb head qk ffn vo norm other``) or role; the defaults of `BlockwiseAdamW`.
            ``"auto"`` is refused: it is measured on second moments, which Lion does not keep.
        weight_decay_multipliers: likewise; default 1.
        granularity: accepted so that one JSON serves all optimizers; there are no second moments.
        betas_by_type: pairs of betas per block type or role, null for the one of ``betas``.
        cautious_weight_decay: decay only those elements that the update does not move away from zero (arXiv
            2510.12402, algorithm 1). Default: false.
        rules: list of ``{"match": regex, "role" | "lr_multiplier" | ...}`` for single parameters.
        transfer: ``{"base_width": 256}``: rates that were tuned at that width move to this model's; see
            `ds_blockwise.blocks.settings.transfer.Transfer`. Default: off.
        momentum_dtype: ``"fp32"`` or ``"bf16"``: storage of ``exp_avg``. Arithmetic is fp32 (fp64 for fp64 parameters).
        backend: ``"auto"``, ``"cpp"``, ``"triton"`` or ``"reference"``, as of `BlockwiseAdamW`.
        checkpoint_format: accepted so that one JSON serves all optimizers; there are no second moments.
        telemetry: see `BlockwiseAdamMini`; there are no second moments to read.
        fused_step: of `BlockwiseAdamW` and `BlockwiseAdamMini`; true is refused.

    State on each rank: per stepped tensor ``step`` (int) and ``exp_avg`` in the tensor's shape. Nothing is
    communicated.

    Raises:
        ValueError, TypeError: a setting outside its range, an unknown key, a group that does not fit.

    Source: arXiv 2302.06675, algorithm 2; arXiv 2502.19002, section 5 (the multipliers).
    """

    second_moment = "none"
    can_be_measured = False
    supports_fused_step = False

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        lr_multipliers: object = None,
        weight_decay_multipliers: object = None,
        granularity: object = None,
        rules: object = None,
        betas_by_type: object = None,
        cautious_weight_decay: bool = False,
        transfer: object = None,
        momentum_dtype: MomentumDtype = "fp32",
        backend: str = "auto",
        checkpoint_format: CheckpointFormat = "expanded",
        telemetry: object = None,
        fused_step: bool = False,
        **extra: object,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            lr_multipliers=lr_multipliers,
            weight_decay_multipliers=weight_decay_multipliers,
            granularity=granularity,
            rules=rules,
            betas_by_type=betas_by_type,
            cautious_weight_decay=cautious_weight_decay,
            transfer=transfer,
            momentum_dtype=momentum_dtype,
            backend=backend,
            checkpoint_format=checkpoint_format,
            telemetry=telemetry,
            fused_step=fused_step,
            **extra,
        )

    def update_(self, kernels: Kernels, items: Sequence[Item]) -> None:
        """Lion's update in place; see `BlockwiseOptimizer.update_`."""
        kernels.step_by_sign_(items)
