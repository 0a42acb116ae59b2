# SPDX-License-Identifier: Apache-2.0
"""``DistributedOptimizer`` with what it does to gradients and weights inside the optimizer's kernels.

Megatron-core casts this rank's gradients to fp32 where its buffer holds 16 bits, reads them for the norm, scales them
in place, and copies the new fp32 weights into the model's. Here the kernels read the buffer, scale, and write both
copies of the weights. Norm, clipping factor, loss scale, the decision to skip a step, counts, timers and gathers stay
Megatron-core's own code, in the order of its ``step``, which is not replaced.

Its code learns nothing of this. For the norm the gradients are cast as ever, and let go of afterwards: the norm has the
bits that it always had. What is clipped is one number, 1, in the place of all gradients: it becomes the factor.

Read in Megatron-core 0.16 to 0.19, ``megatron/core/optimizer/{optimizer,distrib_optimizer,clip_grads}.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from ds_blockwise.hosts.fused_step import handed_over
from ds_blockwise.kernels.step_sets import GivenGradient
from megatron_patch.checkpoint import BlockwiseDistributedOptimizer
from megatron_patch.partitions import gradient_of, shards_of, weights_of


class FusedDistributedOptimizer(BlockwiseDistributedOptimizer):
    """``DistributedOptimizer`` that steps with one of our optimizers, which has ``fused_step``."""

    #: what Megatron-core clips in this step; None: the gradients themselves, or no step is in progress
    _stand_in: torch.Tensor | None = None
    #: whether the copies of the weights were written; None outside of a step
    _has_updated: Callable[[], bool] | None = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """See ``DistributedOptimizer.zero_grad``; ends a step that was skipped."""
        self._stand_in = None
        super().zero_grad(set_to_none)

    def get_parameters(self) -> list[torch.Tensor]:
        """What is clipped: during a step one number in the place of this rank's shards, else those."""
        return self._stepped() if self._stand_in is None else [self._stand_in]

    def get_main_grads_for_grad_norm(self) -> list[torch.Tensor]:
        """See ``MegatronOptimizer.get_main_grads_for_grad_norm``, of Megatron-core before 0.19."""
        with self._gradients_in_place():
            found: list[torch.Tensor] = super().get_main_grads_for_grad_norm()
        return found

    def get_grads_for_grad_norm(self, *args: object) -> list[torch.Tensor]:
        """See ``MegatronOptimizer.get_grads_for_grad_norm``, of Megatron-core 0.19."""
        with self._gradients_in_place():
            found: list[torch.Tensor] = super().get_grads_for_grad_norm(*args)
        return found

    def step_with_ready_grads(self) -> bool:
        """See ``DistributedOptimizer.step_with_ready_grads``."""
        scale = self._factor()
        self._stand_in = None
        with self.optimizer.given_gradients(self._handed_over(scale)) as self._has_updated:
            is_successful: bool = super().step_with_ready_grads()
        self._has_updated = None
        return is_successful

    def _stepped(self) -> list[torch.Tensor]:
        """This rank's shards."""
        shards: list[torch.Tensor] = super().get_parameters()
        return shards

    def _factor(self) -> float | None:
        """What Megatron-core would have multiplied every gradient by; None: it left them alone, or has done it."""
        if self._stand_in is None or self._stand_in.grad is None:
            return None
        factor = float(self._stand_in.grad)
        return None if factor == 1.0 else factor

    def _copy_model_grads_to_main_grads(self) -> None:
        """Begin a step: cast gradients only where Megatron-core itself looks at more than their norm."""
        shards = self._stepped()
        if self._has_main_grads:
            super()._copy_model_grads_to_main_grads()
        self._stand_in = None
        if shards and not self.config.log_num_zeros_in_grad:  # it counts zeros of clipped gradients
            self._stand_in = torch.zeros(1, dtype=torch.float32, device=shards[0].device)
            self._stand_in.grad = torch.ones_like(self._stand_in)

    @property
    def _has_main_grads(self) -> bool:
        """Whether every shard has a ``grad`` in fp32 during the whole step: it is unscaled in place, or counted."""
        return self.grad_scaler is not None or bool(self.config.log_num_zeros_in_grad)

    @contextmanager
    def _gradients_in_place(self) -> Iterator[None]:
        """Inside, every shard is a parameter and has the ``grad`` that upstream would have given it."""
        stand_in, self._stand_in = self._stand_in, None
        is_lent = stand_in is not None and not self._has_main_grads
        if is_lent:
            super()._copy_model_grads_to_main_grads()
        try:
            yield
        finally:
            self._stand_in = stand_in
            for shard in self._stepped() if is_lent else ():
                shard.grad = None

    def _handed_over(self, scale: float | None) -> dict[torch.Tensor, GivenGradient]:
        """Each shard's gradient, and the model's weights if they have 16 bits."""
        found = {}
        for param, shard in shards_of(self).items():
            grad = shard.grad if self._has_main_grads else gradient_of(self, param, shard)
            assert grad is not None, "prepare_grads gives every shard one"
            found[shard] = handed_over(grad, scale, weights_of(self, param))
        return found

    def _copy_main_params_to_model_params(self) -> None:
        """Copy what the kernels have not written: fp32 weights that lie elsewhere, or all after no update."""
        if self._has_updated is None or not self._has_updated():
            super()._copy_main_params_to_model_params()
            return
        for param, shard in shards_of(self).items():
            weights = weights_of(self, param)
            if weights.dtype == shard.dtype and weights.data_ptr() != shard.data_ptr():
                weights.copy_(shard.detach())
