# SPDX-License-Identifier: Apache-2.0
"""Megatron-core's process groups, under the names that DeepSpeed asks its ``mpu`` for.

DeepSpeed was written against the first Megatron, where "model parallel" was all there was.
Megatron-core's `parallel_state` has groups for each kind of parallelism, but lacks
``get_model_parallel_rank`` and ``get_model_parallel_world_size``, so it can't be passed as it is.
Where a data-parallel function is missing, DeepSpeed assumes one data-parallel rank and says nothing
(deepspeed/runtime/config.py). So the adapter is a class with every name spelt out.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state

ProcessGroup = torch.distributed.ProcessGroup


class MpuAdapter:
    """The ``mpu`` object for ``deepspeed.initialize`` over `megatron.core.parallel_state`.

    *Model parallel* means tensor parallel x pipeline parallel: the ranks that together hold one
    copy of the model. DeepSpeed sums gradient norms and agrees on overflow over it, and numbers
    checkpoint files by the rank in it. Groups are looked up at each call, so the adapter holds no
    state. The three-letter name is DeepSpeed's.
    """

    def get_model_parallel_group(self) -> ProcessGroup:
        """The ranks that together hold one copy of the model."""
        group: ProcessGroup = parallel_state.get_model_parallel_group()
        return group

    def get_model_parallel_rank(self) -> int:
        """This process's place in its model-parallel group."""
        return torch.distributed.get_rank(self.get_model_parallel_group())

    def get_model_parallel_world_size(self) -> int:
        """Tensor-parallel size x pipeline-parallel size."""
        return torch.distributed.get_world_size(self.get_model_parallel_group())

    def get_data_parallel_group(self) -> ProcessGroup:
        """The ranks that hold the same part of the model and see different data."""
        group: ProcessGroup = parallel_state.get_data_parallel_group()
        return group

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Global ranks of the data-parallel group, in group order."""
        return torch.distributed.get_process_group_ranks(self.get_data_parallel_group())

    def get_data_parallel_rank(self) -> int:
        """This process's place in its data-parallel group."""
        return torch.distributed.get_rank(self.get_data_parallel_group())

    def get_data_parallel_world_size(self) -> int:
        """Number of copies of the model."""
        return torch.distributed.get_world_size(self.get_data_parallel_group())

    def get_tensor_model_parallel_group(self) -> ProcessGroup:
        """The ranks that share each tensor of a layer."""
        group: ProcessGroup = parallel_state.get_tensor_model_parallel_group()
        return group

    def get_tensor_model_parallel_rank(self) -> int:
        """This process's place in its tensor-parallel group."""
        return int(parallel_state.get_tensor_model_parallel_rank())

    def get_tensor_model_parallel_world_size(self) -> int:
        """Number of ranks that share each tensor."""
        return int(parallel_state.get_tensor_model_parallel_world_size())

    def get_tensor_model_parallel_src_rank(self) -> int:
        """Global rank of the first member of this tensor-parallel group."""
        return int(parallel_state.get_tensor_model_parallel_src_rank())

    def get_pipeline_model_parallel_group(self) -> ProcessGroup:
        """The ranks that hold consecutive layers of one copy of the model."""
        group: ProcessGroup = parallel_state.get_pipeline_model_parallel_group()
        return group

    def get_pipeline_model_parallel_rank(self) -> int:
        """This process's pipeline stage."""
        return int(parallel_state.get_pipeline_model_parallel_rank())

    def get_pipeline_model_parallel_world_size(self) -> int:
        """Number of pipeline stages."""
        return int(parallel_state.get_pipeline_model_parallel_world_size())


def mpu_adapter() -> MpuAdapter:
    """The ``mpu`` for ``deepspeed.initialize(model=gpt_model, mpu=mpu_adapter(), ...)``.

    Raises:
        ValueError: `parallel_state` isn't initialised. Or there is context parallelism, expert parallelism or an
            expert tensor size other than the tensor size: DeepSpeed would average gradients over the wrong ranks.
    """
    if not parallel_state.model_parallel_is_initialized():
        raise ValueError(
            "megatron.core.parallel_state is not initialised: call "
            "parallel_state.initialize_model_parallel(...) before mpu_adapter()"
        )
    for name, size in (
        ("context_parallel_size", parallel_state.get_context_parallel_world_size()),
        ("expert_model_parallel_size", parallel_state.get_expert_model_parallel_world_size()),
    ):
        if size != 1:
            raise ValueError(
                f"{name} = {size}: only 1 is supported under DeepSpeed's data-parallel averaging; "
                f"call initialize_model_parallel with {name}=1, or train with Megatron-core's own optimizer and "
                f"megatron_patch.convert_"
            )
    tp, etp = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_expert_tensor_parallel_world_size(),
    )
    if etp != tp:
        raise ValueError(
            f"expert_tensor_parallel_size = {etp}, tensor_model_parallel_size = {tp}: experts would be replicated over "
            f"other ranks than the data-parallel group over which DeepSpeed averages all gradients; call "
            f"initialize_model_parallel with expert_tensor_parallel_size={tp}, or train with Megatron-core's own "
            f"optimizer and megatron_patch.convert_"
        )
    return MpuAdapter()
