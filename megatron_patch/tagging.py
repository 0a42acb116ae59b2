# SPDX-License-Identifier: Apache-2.0
"""Head counts and tensor-parallel splits of Megatron-core modules, derived from their classes.

Classes, not attributes: Transformer Engine sets ``tensor_model_parallel`` and ``partition_dim`` on weights that
are not split.
Layouts: Megatron-core 0.16, ``transformer/attention.py`` (fused QKV per query group), ``transformer/mlp.py``
(gated fc1).
"""

from __future__ import annotations

from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from megatron.core.transformer.attention import Attention
from torch import nn

from ds_blockwise.blocks import HeadGeometry
from ds_blockwise.layout import TensorShard
from ds_blockwise.tagging import TensorSplit, register_reader


class MegatronReader:
    """Reads Megatron-core's attention and tensor-parallel layers (local spec)."""

    def heads(self, attention: nn.Module) -> HeadGeometry | None:
        """Unsharded head counts of a Megatron-core attention module.

        Raises:
            ValueError: the module has an output gate, whose rows this version does not know.
        """
        if not isinstance(attention, Attention):
            return None
        config = attention.config
        if getattr(config, "attention_output_gate", False):
            raise ValueError(
                "attention_output_gate=True puts gate rows into linear_qkv, which this version cannot tell apart. "
                "Train without the gate."
            )
        return HeadGeometry(
            config.num_attention_heads,
            config.num_query_groups or config.num_attention_heads,
            attention.hidden_size_per_attention_head,
            f"{type(attention).__name__}.config",
        )

    def shard(self, owner: nn.Module, param: nn.Parameter, leaf: str) -> TensorShard | None:
        """The split of a tensor-parallel layer's weight or bias; None where every rank holds it whole."""
        split = self.split(owner, param, leaf)
        if split is None:
            return None
        world_size = parallel_state.get_tensor_model_parallel_world_size()
        if world_size == 1:
            return None
        dim = split.dim
        local = tuple(getattr(param, "ds_shape", param.shape))
        size = local[dim] * world_size
        return TensorShard.even(
            (*local[:dim], size, *local[dim + 1 :]),
            dim,
            parallel_state.get_tensor_model_parallel_rank(),
            world_size,
            stride=split.parts,
        )

    def split(self, owner: nn.Module, param: nn.Parameter, leaf: str) -> TensorSplit | None:
        """The dimension that a tensor-parallel layer is cut along, at any number of ranks."""
        if isinstance(owner, RowParallelLinear):
            return TensorSplit(1) if leaf == "weight" else None
        if isinstance(owner, (ColumnParallelLinear, VocabParallelEmbedding)):
            return TensorSplit(0, getattr(param, "partition_stride", 1))
        return None


register_reader(MegatronReader())
