# SPDX-License-Identifier: Apache-2.0
"""Tags the parameters of Megatron-core's model chunks.

A chunk is one pipeline stage's (or virtual stage's) part of the model inside DDP and Float16Module. Layers are numbered
from 0 in every chunk, so the same name stands for another layer in each; nothing here needs unique names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.module import Float16Module
from torch import nn

from ds_blockwise.hosts.model_tags import tag_for
from ds_blockwise.hosts.pipeline_stages import TiedCopy, tied_copy
from ds_blockwise.optimizers.base import BlockwiseOptimizer
from ds_blockwise.tagging.names import canonical_fqn

_WRAPPERS = (DistributedDataParallel, Float16Module)
_EMBEDDING = "embedding.word_embeddings.weight"


def unwrapped(chunk: nn.Module) -> nn.Module:
    """The model inside Megatron-core's wrappers.

    Raises:
        ValueError: a wrapper that shards or moves parameters in a way that is not known.
    """
    while isinstance(chunk, _WRAPPERS):
        chunk = chunk.module
    if isinstance(getattr(chunk, "module", None), nn.Module):
        raise ValueError(
            f"a model chunk is wrapped in {type(chunk).__name__}, which ds_blockwise does not know. Known: "
            f"{', '.join(w.__name__ for w in _WRAPPERS)}. Megatron-FSDP (use_megatron_fsdp) and torch FSDP "
            f"(use_torch_fsdp2) are not supported; train with Megatron's DistributedDataParallel."
        )
    return chunk


def names_in(models: Sequence[nn.Module]) -> Iterator[str]:
    """Names of the parameters that rules may match; a copy of a tied embedding has the embedding's."""
    for model in models:
        for name, param in model.named_parameters(remove_duplicate=False):
            # a rule for the copy alone would let it drift away from the embedding
            yield _EMBEDDING if _is_tied_copy(name, param) else canonical_fqn(name)


def tag(models: Sequence[nn.Module], optimizer: BlockwiseOptimizer) -> None:
    """Set ``block_spec`` and ``block_shard`` on every trainable parameter, or take the tags that the user gave it.

    The last stage's copy of a tied embedding is tagged as an embedding: both copies must be stepped alike.

    Args:
        models: unwrapped chunks.
        optimizer: its settings apply.

    Raises:
        ValueError: see `ds_blockwise.tag_parameters`; a model that is tagged in part.
    """
    # a rule may match another stage only; `pipeline_stages.check_rules` looks at all
    tag_for(
        optimizer, [(model, _tied(model)) for model in models], is_stage=True, what_tags="convert_", place="megatron"
    )


def tied_copies(
    models: Sequence[nn.Module], group_of: Callable[[nn.Parameter], Mapping[str, object] | None]
) -> list[TiedCopy]:
    """This rank's copies of the embedding that other stages hold as well: tied, or for multi-token prediction.

    Args:
        models: unwrapped and tagged chunks.
        group_of: a parameter's param group.
    """
    return [
        tied_copy(_EMBEDDING, dist.get_process_group_ranks(group), name, param, group_of(param))
        for model in models
        if (group := getattr(model, "embd_group", None)) is not None
        for name, param in model.named_parameters()
        if getattr(param, "shared_embedding", False)
    ]


def _tied(model: nn.Module) -> dict[torch.Tensor, str]:
    return {param: _EMBEDDING for name, param in model.named_parameters() if _is_tied_copy(name, param)}


def _is_tied_copy(name: str, param: nn.Parameter) -> bool:
    return getattr(param, "shared_embedding", False) and canonical_fqn(name).startswith("output_layer.")
