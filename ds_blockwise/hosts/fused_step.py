# SPDX-License-Identifier: Apache-2.0
"""What the hosts' fused steps share: a gradient handed to the kernels as the host holds it, and the check of these."""

from __future__ import annotations

import torch

from ds_blockwise.kernels.self_check import disagreement
from ds_blockwise.kernels.step_sets import GivenGradient
from ds_blockwise.optimizers.base import BlockwiseOptimizer

_SOME_SCALE = 0.37
_16_BIT = (torch.bfloat16, torch.float16)


def check_kernels(optimizer: BlockwiseOptimizer) -> None:
    """Refuse kernels that were compiled on this machine and scale gradients in another way than the reference.

    Args:
        optimizer: with every tensor bound.

    Raises:
        ValueError: they differ; with the difference.
    """
    for kernels, device in {(b.kernels, b.tensor.device) for b in optimizer.bindings()}:
        problem = disagreement(kernels, device, _SOME_SCALE) if device.type != "cpu" else None
        if problem is not None:
            raise ValueError(f'"fused_step": true: {problem}. Write "fused_step": false.')


def handed_over(grad: torch.Tensor, scale: float | None, weights: torch.Tensor) -> GivenGradient:
    """What a kernel gets for one tensor of fp32 master weights; it writes the model's weights if they have 16 bits.

    Args:
        grad: in the shape of the masters, bf16 or fp32.
        scale: what it is multiplied by where it is read; None: nothing.
        weights: the model's, in the shape of the masters. Where they are not of 16 bits the host copies.
    """
    return GivenGradient(grad, scale, weights.detach() if weights.dtype in _16_BIT else None)
