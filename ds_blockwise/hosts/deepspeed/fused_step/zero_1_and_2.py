# SPDX-License-Identifier: Apache-2.0
"""The step of ZeRO stages 1 and 2, with what DeepSpeed does to gradients and weights inside the optimizer's kernels.

DeepSpeed reads a gradient for the overflow check (twice), casts it to fp64 for the norm, to fp32 for the optimizer,
scales that in place, and copies the new fp32 weights into the model's. Here a gradient is read once for norm and check,
and once by the kernel, which scales it and writes both copies of the weights. Collectives, their order and the decision
to skip a step stay DeepSpeed's own: its methods are called, on norms in the place of gradients.

Its ``step`` is replaced as a whole, so its text must be the one that this was written for: DeepSpeed 0.19.8.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime import utils  # not its functions: older releases lack some, and are refused by `check_known`
from deepspeed.runtime.zero import stage_1_and_2
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from ds_blockwise.hosts.deepspeed.engine import Engine, ZeroStep
from ds_blockwise.hosts.fused_step import check_kernels, handed_over
from ds_blockwise.kernels.tensor_checks import dense
from ds_blockwise.optimizers.base import BlockwiseOptimizer

_KNOWN_TEXTS: Mapping[str, tuple[str, ...]] = {  # SHA-256 of the methods whose lines are done here, or relied on
    "step": ("9520884fd916d178728985781674b3c26241dde23e71043dc0beabe507b63b5c",),
    "_optimizer_step": ("d7e21affbbf9b696584576042b21bc6147bc15e7ff0baa35b78140da4a484347",),
    "unscale_and_clip_grads": ("6bf2ce6f97eafcc24c08a0355e7c180992c8e86da5b7f02026eef6fbd68efa74",),
    "scaled_global_norm": ("63c6a6fe100c4e4920efb081b642a7473bca628c7f98516044f77a0ea7334471",),
    "get_grad_norm_direct": ("72af0993ad8cde2c5bc83a38b1040c7b90e84f07bd5ce72399c144a07ec4ba9a",),
    "has_overflow_partitioned_grads_serial": ("03c4bba82790422d05586d7c34df7b656b7e80c83ee94c1dc50037be9cdd1725",),
}


def check_known(engine: Engine) -> None:
    """Refuse ``fused_step`` where DeepSpeed steps in another way than this file does.

    Args:
        engine: a ``DeepSpeedEngine`` with its optimizer built; configurations were looked at before.

    Raises:
        ValueError: another class, or other lines in one of its methods, than are known here.
    """
    kind = type(engine.optimizer)
    if kind is not DeepSpeedZeroOptimizer:
        raise ValueError(
            f'"fused_step": true: DeepSpeed {deepspeed.__version__} steps in {kind.__name__}, and only '
            f'DeepSpeedZeroOptimizer (ZeRO stages 1 and 2) is supported. Write "fused_step": false.'
        )
    changed = [name for name, known in _KNOWN_TEXTS.items() if _text_of(name) not in known]
    if changed:
        raise ValueError(
            f'"fused_step": true: DeepSpeed {deepspeed.__version__} has another DeepSpeedZeroOptimizer.'
            f"{', '.join(changed)} than 0.19.8, whose step is the one that was compared. Install deepspeed==0.19.8, or "
            f'write "fused_step": false.'
        )


def _text_of(name: str) -> str:
    try:
        text = inspect.getsource(getattr(DeepSpeedZeroOptimizer, name))
    except (OSError, TypeError, AttributeError):  # no source was installed, or no such method
        return ""
    return hashlib.sha256(text.encode()).hexdigest()


def fuse_step(wrapper: ZeroStep, optimizer: BlockwiseOptimizer) -> None:
    """Let a wrapper step in one pass over memory.

    Args:
        wrapper: an engine's, `check_known`; only this object is changed.
        optimizer: its basic optimizer, with every tensor bound.

    Raises:
        ValueError: this device's compiled kernels scale gradients in another way than the reference.
    """
    check_kernels(optimizer)
    wrapper.step = _FusedStep(wrapper, optimizer)


class _FusedStep:
    """In the place of ``DeepSpeedZeroOptimizer.step`` of one wrapper."""

    def __init__(self, wrapper: ZeroStep, optimizer: BlockwiseOptimizer) -> None:
        self._wrapper, self._optimizer = wrapper, optimizer

    def __call__(self, closure: None = None) -> None:
        wrapper = self._wrapper
        wrapper.micro_step_id = stage_1_and_2.INITIAL_MICRO_STEP_ID
        norm = self._norm()
        scale_of_gradients = wrapper.loss_scale
        wrapper._update_scale(wrapper.overflow)
        if wrapper.overflow:
            self._skip()
            return
        if norm is not None:
            wrapper._global_grad_norm = norm / scale_of_gradients
        scale = self._scale(norm)
        for group in range(len(wrapper.bit16_groups)):
            self._step_group(group, scale)
        self._gather()

    def _norm(self) -> torch.Tensor | None:
        """The norm of all gradients, by DeepSpeed's arithmetic; decides whether the step is skipped."""
        wrapper = self._wrapper
        wrapper.overflow = False
        if not wrapper.compute_grad_norm:
            wrapper._global_grad_norm = None
        with self._norms_for_gradients():
            if wrapper.check_grad_overflow:
                wrapper.check_overflow(partition_gradients=wrapper.partition_gradients)
            if not wrapper.compute_grad_norm or wrapper.overflow:
                return None
            norm = wrapper.scaled_global_norm()
        if (wrapper.dtype != torch.bfloat16 or wrapper.check_grad_overflow) and utils.is_invalid_grad_norm(norm):
            wrapper.overflow = True
        return norm

    @contextmanager
    def _norms_for_gradients(self) -> Iterator[None]:
        """Inside, the wrapper has a vector of one element for each gradient: of the same norm, and as finite."""
        wrapper = self._wrapper
        gradients = wrapper.averaged_gradients
        norms = {group: None if of is None else self._norms_of(group, of) for group, of in gradients.items()}
        wrapper.averaged_gradients = norms
        try:
            yield
        finally:
            wrapper.averaged_gradients = gradients

    def _norms_of(self, group: int, gradients: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        binding = self._optimizer.binding_of(self._wrapper.single_partition_of_fp32_groups[group])
        assert binding is not None, "attach binds every partition"
        norms = list(binding.kernels.norms([dense(gradient.detach()) for gradient in gradients]).unsqueeze(1))
        for norm, gradient in zip(norms, gradients, strict=True):
            if getattr(gradient, _PADDING, False):  # of no parameter: left out of the norm
                setattr(norm, _PADDING, True)
        return norms

    def _skip(self) -> None:
        """Forget the gradients of a step that changes nothing."""
        wrapper = self._wrapper
        if wrapper.compute_grad_norm:
            wrapper._global_grad_norm = float("inf")
        wrapper.zero_grad()
        wrapper._release_preflattened_grad_buffers()
        for group in wrapper.averaged_gradients:
            wrapper.averaged_gradients[group] = wrapper.all_grad_tensors[group] = None
        for name in stage_1_and_2.OPTIMIZER_TIMERS:
            wrapper.timers(name).start()
            wrapper.timers(name).stop()

    def _scale(self, norm: torch.Tensor | None) -> float | None:
        """What DeepSpeed would multiply every gradient by, to the bit; None: it would leave them alone."""
        wrapper = self._wrapper
        one = torch.ones(1, dtype=torch.float32, device=wrapper.single_partition_of_fp32_groups[0].device)
        wrapper.unscale_and_clip_grads([one], norm)
        return None if wrapper.clip_grad == 0 and float(one) == 1.0 else float(one)

    def _step_group(self, group: int, scale: float | None) -> None:
        wrapper = self._wrapper
        timer = wrapper.timers(stage_1_and_2.OPTIMIZER_GRADIENTS_TIMER)
        timer.start()
        wrapper.free_grad_in_param_list(wrapper.params_not_in_partition[group])
        gradient = self._flat_gradient(group)
        wrapper.free_grad_in_param_list(wrapper.params_in_partition[group])
        timer.stop()
        timer = wrapper.timers(stage_1_and_2.OPTIMIZER_STEP_TIMER)
        timer.start()
        masters = wrapper.single_partition_of_fp32_groups[group]
        weights = wrapper.parallel_partitioned_bit16_groups[group][_rank_in(wrapper, group)].detach()
        given = {masters: handed_over(gradient, scale, weights)}
        with self._optimizer.given_gradients(given) as has_updated:
            wrapper._optimizer_step(group)
        wrapper._release_preflattened_grad_buffers(group)
        wrapper.averaged_gradients[group] = wrapper.all_grad_tensors[group] = None
        if given[masters].copy is None or not has_updated():
            weights.copy_(masters.detach())
        timer.stop()

    def _flat_gradient(self, group: int) -> torch.Tensor:
        """This rank's partition of the gradient, padded, in the dtype in which it was accumulated."""
        wrapper = self._wrapper
        size, gradients = int(wrapper.partition_size[group]), wrapper.averaged_gradients[group]
        assert gradients is not None, "the engine steps after a backward pass"
        flat = wrapper._get_preflattened_grad_partition(group)
        if flat is None:
            is_last = _rank_in(wrapper, group) == dist.get_world_size(wrapper.real_dp_process_group[group]) - 1
            flat = wrapper.flatten_dense_tensors_aligned(gradients, size) if is_last else wrapper.flatten(gradients)
        assert flat.numel() == size, (flat.numel(), size)
        return flat.detach()

    def _gather(self) -> None:
        """Send every rank's new weights to all."""
        wrapper = self._wrapper
        timer = wrapper.timers(stage_1_and_2.OPTIMIZER_ALLGATHER_TIMER)
        timer.start()
        utils.all_gather_dp_groups(
            groups_flat=wrapper.bit16_groups_flat,
            partitioned_param_groups=wrapper.parallel_partitioned_bit16_groups,
            dp_process_group=wrapper.real_dp_process_group,
            start_alignment_factor=wrapper.nccl_start_alignment_factor,
            allgather_bucket_size=wrapper.allgather_bucket_size,
        )
        timer.stop()
        for group in range(len(wrapper.bit16_groups)):
            wrapper._update_model_bit16_weights(group)
        wrapper.timers.log(stage_1_and_2.OPTIMIZER_TIMERS)


_PADDING = "_zero_padding"  # DeepSpeed's mark


def _rank_in(wrapper: ZeroStep, group: int) -> int:
    return dist.get_rank(wrapper.real_dp_process_group[group])
