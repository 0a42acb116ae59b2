# SPDX-License-Identifier: Apache-2.0
"""The tags of a parameter: its blocks and what this rank holds of it, kept as attributes of the tensor itself.

Tags are attributes because a tensor is all that ``torch.optim`` hands to an optimizer. PyTorch does not copy them:
whoever replaces a parameter by another tensor sets them again.

Tags belong to whoever made them. Those of a host (an engine, ``convert_``) hold the names and the settings of that
host's optimizer and show what it does. Every later host makes them anew, and no other optimizer reads them. Those of
the user's ``tag_parameters`` stay: a host writes its own over them, and they are kept beside these for the next host.
"""

from __future__ import annotations

from typing import Protocol, TypeGuard

import torch

from ds_blockwise.blocks.ranges import TensorShard
from ds_blockwise.blocks.spec import BlockSpec

_BY_HOST = "block_spec_by_host"
_OF_USER = "block_tags_of_user"

Tags = tuple[BlockSpec, TensorShard | None]
"""The blocks of a parameter and what this tensor-parallel rank holds of it (None: it is whole)."""


class TaggedParameter(Protocol):
    """What a tagged tensor carries.

    Attributes:
        block_spec: the blocks of the unsharded parameter.
        block_shard: what this tensor-parallel rank holds of it; None if the parameter is whole on every rank.
    """

    block_spec: BlockSpec
    block_shard: TensorShard | None


def is_tagged(tensor: object) -> TypeGuard[TaggedParameter]:
    """Whether a tensor has tags, whoever made them."""
    return isinstance(getattr(tensor, "block_spec", None), BlockSpec)


def tags_of(tensor: torch.Tensor) -> TaggedParameter | None:
    """The tensor as a tagged one, whoever tagged it last; None if it has no tags."""
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
    """Set both tags of a tensor.

    Args:
        tensor: a parameter, or a view or copy that is stepped in its place.
        spec: the blocks of the unsharded parameter.
        shard: what this tensor-parallel rank holds of it; None if it is whole.
        by_host: a host sets them, with the names and settings of its optimizer. The user's, if there are any, stay
            what `user_tags_of` returns; else the new ones are the user's.
    """
    of_user = user_tags_of(tensor) if by_host else None
    values = {"block_spec": spec, "block_shard": shard, _BY_HOST: spec if by_host else None, _OF_USER: of_user}
    for name, value in values.items():
        setattr(tensor, name, value)


def user_tags_of(tensor: torch.Tensor) -> Tags | None:
    """The tags that the user gave a tensor, by ``tag_parameters`` or as attributes; None if only a host tagged it."""
    if not is_tagged(tensor):
        return None
    if not is_tagged_by_host(tensor):
        return tensor.block_spec, shard_of(tensor)
    of_user: Tags | None = getattr(tensor, _OF_USER, None)
    return of_user


def is_tagged_by_host(tensor: object) -> bool:
    """Whether the tags that a tensor shows are a host's: they hold for the optimizer that the host had then."""
    # the object itself: who sets the attribute by hand afterwards sets a tag of the user's
    return is_tagged(tensor) and getattr(tensor, _BY_HOST, None) is tensor.block_spec
