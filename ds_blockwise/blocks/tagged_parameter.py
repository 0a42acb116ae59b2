# SPDX-License-Identifier: Apache-2.0
"""The tags of a parameter: its blocks and what this rank holds of it, kept as attributes of the tensor itself.

Tags are attributes because a tensor is all that ``torch.optim`` hands to an optimizer. PyTorch does not copy them:
whoever replaces a parameter by another tensor sets them again.
"""

from __future__ import annotations

from typing import Protocol, TypeGuard

import torch

from ds_blockwise.blocks.ranges import TensorShard
from ds_blockwise.blocks.spec import BlockSpec

_BY_HOST = "block_tags_by_host"


class TaggedParameter(Protocol):
    """What a tagged tensor carries.

    Attributes:
        block_spec: the blocks of the unsharded parameter.
        block_shard: what this tensor-parallel rank holds of it; None if the parameter is whole on every rank.
    """

    block_spec: BlockSpec
    block_shard: TensorShard | None


def is_tagged(tensor: object) -> TypeGuard[TaggedParameter]:
    """Whether a tensor has tags."""
    return isinstance(getattr(tensor, "block_spec", None), BlockSpec)


def tags_of(tensor: torch.Tensor) -> TaggedParameter | None:
    """The tensor as a tagged one; None if it has no tags."""
    return tensor if is_tagged(tensor) else None


def shard_of(tagged: TaggedParameter) -> TensorShard | None:
    """What this tensor-parallel rank holds; None also where somebody copied ``block_spec`` alone to a tensor."""
    shard: TensorShard | None = getattr(tagged, "block_shard", None)
    return shard


def as_tagged(tensor: object) -> TaggedParameter:
    """The tensor, which must have been tagged by now; setting an attribute sets the tensor's."""
    assert is_tagged(tensor), "the tensor has not been tagged"
    return tensor


def set_tags(tensor: torch.Tensor, spec: BlockSpec, shard: TensorShard | None, *, by_host: bool = False) -> None:
    """Set both tags of a tensor, whatever it carried before.

    Args:
        tensor: a parameter, or a view or copy that is stepped in its place.
        spec: the blocks of the unsharded parameter.
        shard: what this tensor-parallel rank holds of it; None if it is whole.
        by_host: a host sets them, with the settings of an optimizer.
    """
    for name, tag in (("block_spec", spec), ("block_shard", shard), (_BY_HOST, by_host)):
        setattr(tensor, name, tag)


def is_tagged_by_host(tensor: torch.Tensor) -> bool:
    """Whether a host set the tags: their settings are those of the optimizer that the host had then."""
    return bool(getattr(tensor, _BY_HOST, False))
