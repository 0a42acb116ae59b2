# SPDX-License-Identifier: Apache-2.0
"""How tensor parallelism splits the tensors of Megatron's modules; roles and heads are in `megatron_patch.roles`.

The class of a layer decides. Its attributes ``tensor_model_parallel`` and ``partition_dim`` cannot: Transformer Engine
also sets them on weights that are not split. Classes are recognised by their names, so Transformer Engine, Megatron-LM,
Megatron-DeepSpeed and GPT-NeoX need not be installed. Source: Megatron-core 0.16 to 0.19, ``transformer/mlp.py`` (gated
fc1) and ``extensions/transformer_engine.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Protocol, TypeGuard

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import nn

from ds_blockwise.blocks.ranges import TensorShard
from ds_blockwise.blocks.structure import HeadGeometry
from ds_blockwise.tagging.module_facts import class_names
from ds_blockwise.tagging.module_reader import TensorSplit
from ds_blockwise.tagging.names import NameMatch
from megatron_patch.roles import heads_of, match_of

_ROW_PARALLEL = re.compile(r"RowParallel(?:Grouped)?Linear$")
_COLUMN_PARALLEL = re.compile(r"(?:ColumnParallel(?:Grouped)?Linear|VocabParallelEmbedding)$")
_WEIGHT = re.compile(r"weight\d*")  # grouped linears of Transformer Engine number their experts' weights
_COLUMN_TENSOR = re.compile(r"(?:weight|bias)\d*")  # and not layer_norm_weight, which every rank holds whole


class _WholeGPT(Protocol):
    """A ``GPTModel`` or ``HybridModel`` with its embedding and its output layer."""

    vocab_size: int
    max_sequence_length: int

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def __call__(
        self, tokens: torch.Tensor, positions: torch.Tensor, attention_mask: None, *, labels: torch.Tensor
    ) -> torch.Tensor: ...


class MegatronReader:
    """Reads layers of Megatron-core (local and Transformer Engine specs) and older attention classes of Megatron-LM.

    `megatron_patch` registers it; see `ds_blockwise.tagging.module_reader.ModuleReader` for what each method answers.
    """

    exact_shards = False

    def match(self, owner: nn.Module, parent: nn.Module | None, param: nn.Parameter, name: str) -> NameMatch | None:
        """What a parameter of a Megatron-core module is; see `megatron_patch.roles.match_of`."""
        return match_of(owner, parent, param, name)

    def heads(self, attention: nn.Module) -> HeadGeometry | None:
        """Unsharded head counts of an attention module; see `megatron_patch.roles.heads_of`."""
        return heads_of(attention)

    def shard(self, owner: nn.Module, param: nn.Parameter, leaf: str) -> TensorShard | None:
        """The split of a tensor-parallel layer's weight or bias; None where every rank holds it whole.

        Raises:
            ValueError: the parameter is split in a way that cannot be followed, or over other ranks than the
                tensor-parallel group.
        """
        _refuse_rematerialised(owner, param, leaf)
        split = self.split(owner, param, leaf)
        if split is None:
            _refuse_unknown_split(owner, param, leaf)
            return None
        group = _group_of(owner)
        world_size, rank = _tensor_parallel() if group is None else (group.size(), group.rank())
        if world_size == 1:
            return None
        _check_group(owner, group, leaf)
        dim = split.dim
        local = tuple(getattr(param, "ds_shape", param.shape))
        size = local[dim] * world_size
        return TensorShard.even((*local[:dim], size, *local[dim + 1 :]), dim, rank, world_size, stride=split.parts)

    def split(self, owner: nn.Module, param: nn.Parameter, leaf: str) -> TensorSplit | None:
        """The dimension that a tensor-parallel layer is cut along, at any number of ranks.

        A single tensor for all experts (three dimensions) is cut along the same dimension of each matrix.
        """
        shift = len(tuple(getattr(param, "ds_shape", param.shape))) == 3
        for name in class_names(owner):
            if _ROW_PARALLEL.search(name):
                return TensorSplit(1 + shift) if _WEIGHT.fullmatch(leaf) else None
            if _COLUMN_PARALLEL.search(name):
                return TensorSplit(0 + shift, _parts(owner, param, name)) if _COLUMN_TENSOR.fullmatch(leaf) else None
        return None

    def outputs(self, model: nn.Module) -> torch.Tensor | None:
        """Losses [batch, sequence] of a whole ``GPTModel`` or ``HybridModel`` for 2 x 8 random tokens."""
        if not _is_whole_gpt(model):
            return None
        device = next(model.parameters()).device
        tokens = torch.randint(model.vocab_size, (2, min(8, model.max_sequence_length)), device="cpu").to(device)
        positions = torch.arange(tokens.shape[1], device=device).expand(2, -1)
        # with labels, because multi-token prediction takes part in the loss only
        return model(tokens, positions, None, labels=tokens.roll(-1, dims=1))


def _is_whole_gpt(model: nn.Module) -> TypeGuard[_WholeGPT]:
    ends = getattr(model, "pre_process", False) and getattr(model, "post_process", False)
    return bool(ends) and not {"GPTModel", "HybridModel"}.isdisjoint(class_names(model))


def _parts(owner: nn.Module, param: nn.Parameter, class_name: str) -> int:
    # Grouped linears of Transformer Engine leave the stride unset; their first one is gate and up, each split by itself
    if "Grouped" in class_name:
        config = getattr(owner, "config", None)
        return 2 if getattr(config, "gated_linear_unit", False) else 1
    return int(getattr(param, "partition_stride", 1))


def _tensor_parallel() -> tuple[int, int]:
    if not parallel_state.model_parallel_is_initialized():
        return 1, 0
    return (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_rank(),
    )


def _group_of(owner: nn.Module) -> dist.ProcessGroup | None:
    # Experts are split over the expert tensor-parallel group, which the layer itself knows
    group = getattr(owner, "tp_group", None)
    return getattr(owner, "_tp_group", None) if group is None else group


def _check_group(owner: nn.Module, group: dist.ProcessGroup | None, leaf: str) -> None:
    if group is None or not parallel_state.model_parallel_is_initialized():
        return
    own = dist.get_process_group_ranks(group)
    usual = dist.get_process_group_ranks(parallel_state.get_tensor_model_parallel_group())
    if own != usual:
        raise ValueError(
            f"{type(owner).__name__}.{leaf} is split over ranks {own}, but the tensor-parallel group, over which "
            f"blocks are summed, is {usual}. Set expert_tensor_parallel_size to 1 or to tensor_model_parallel_size."
        )


def _refuse_rematerialised(owner: nn.Module, param: nn.Parameter, leaf: str) -> None:
    """Refuse what Megatron-core 0.19 cuts along its outputs, beside tensor parallelism, and gathers for each use."""
    if getattr(param, "is_gtp_weight_remat", False):
        raise ValueError(
            f"{type(owner).__name__}.{leaf} is cut over the ranks that rematerialise weights, which ds_blockwise does "
            f"not follow. Set tensor_parallel_num_weight_shards to tensor_model_parallel_size, and "
            f"expert_tensor_parallel_num_weight_shards to expert_tensor_parallel_size."
        )


def _refuse_unknown_split(owner: nn.Module, param: nn.Parameter, leaf: str) -> None:
    """Refuse what is split although no rule says how: state-space mixers, the legacy grouped experts."""
    always_marked = "TELinear" in class_names(owner)  # as split on dimension 0, even where every rank holds it whole
    if (
        always_marked
        or any(_ROW_PARALLEL.search(name) for name in class_names(owner))
        or leaf.startswith("layer_norm_")
    ):
        return
    if not getattr(param, "tensor_model_parallel", False) and not (
        "GroupedMLP" in class_names(owner) and leaf in ("weight1", "weight2")
    ):
        return
    group = _group_of(owner)
    world_size = _tensor_parallel()[0] if group is None else group.size()
    if world_size > 1:
        raise ValueError(
            f"{type(owner).__name__}.{leaf} is split over {world_size} tensor-parallel ranks in parts that cannot be "
            f"followed (state-space mixers and the legacy grouped experts pack several tensors into one). Train this "
            f"model with tensor_model_parallel_size 1, or experts with SequentialMLP or TEGroupedMLP."
        )
