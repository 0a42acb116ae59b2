# SPDX-License-Identifier: Apache-2.0
"""Tags the parameters of Megatron-core's model chunks.

A chunk is one pipeline stage's (or virtual stage's) part of the model inside DDP and Float16Module. Layers are numbered
from 0 in every chunk, so the same name stands for another layer in each; nothing here needs unique names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from weakref import WeakSet

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.module import Float16Module
from torch import nn

from ds_blockwise.blocks.block_settings import BlockSettings
from ds_blockwise.blocks.spec import apply_settings
from ds_blockwise.blocks.tagged_parameter import as_tagged
from ds_blockwise.hosts.pipeline_stages import TiedCopy, rules_matched, tied_copy
from ds_blockwise.optimizers.base import BlockwiseOptimizer
from ds_blockwise.tagging.names import canonical_fqn
from ds_blockwise.tagging.tag import tag_with_settings

_WRAPPERS = (DistributedDataParallel, Float16Module)
_TAGGED_HERE: WeakSet[nn.Module] = WeakSet()
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
    """Set ``block_spec`` and ``block_shard`` on every trainable parameter, or take the tags that it has.

    The last stage's copy of a tied embedding is tagged as an embedding: both copies must be stepped alike.

    Args:
        models: unwrapped chunks.
        optimizer: its settings apply.

    Raises:
        ValueError: see `ds_blockwise.tag_parameters`; a model that is tagged in part.
    """
    params = [p for model in models for p in model.parameters() if p.requires_grad]
    # tags that an earlier call made are not a user's wish and give way to the present settings
    tagged = [] if all(m in _TAGGED_HERE for m in models) else [p for p in params if hasattr(p, "block_spec")]
    if tagged and len(tagged) < len(params):
        name = next(n for m in models for n, p in m.named_parameters() if p.requires_grad and p not in set(tagged))
        raise ValueError(
            f"parameter {name!r} is not tagged although others are. Call tag_parameters for every chunk after the "
            f"last change to the model, or not at all (convert_ does it)."
        )
    if not tagged:
        for model in models:
            _tag_model(model, optimizer.block_settings)
            _TAGGED_HERE.add(model)
    for param in params:
        tags = as_tagged(param)
        if not tagged:
            # a rule of another stage would be called unused in this one, so it was left out; it is part of the settings
            tags.block_spec = apply_settings(tags.block_spec.structure, optimizer.block_settings)
        tags.block_spec = optimizer.spec_of(tags.block_spec)


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


def _tag_model(model: nn.Module, block_settings: BlockSettings) -> None:
    here = rules_matched(names_in([model]), block_settings)
    used = tuple(rule for rule, matches in zip(block_settings.rules, here, strict=True) if matches)
    tied: dict[torch.Tensor, str] = {
        param: _EMBEDDING for name, param in model.named_parameters() if _is_tied_copy(name, param)
    }
    tag_with_settings(model, replace(block_settings, rules=used), tied, by_host=True, place="megatron")


def _is_tied_copy(name: str, param: nn.Parameter) -> bool:
    return getattr(param, "shared_embedding", False) and canonical_fqn(name).startswith("output_layer.")
