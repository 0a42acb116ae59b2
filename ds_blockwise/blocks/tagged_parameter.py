# SPDX-License-Identifier: Apache-2.0
"""The tags of a parameter: its blocks and what this rank holds of it, kept as attributes of the tensor itself.

Tags are attributes because a tensor is all that ``torch.optim`` hands to an optimizer. PyTorch does not copy them:
whoever replaces a parameter by another tensor sets them again.
"""

from __future__ import annotations

from typing import Protocol, cast

import torch

from ds_blockwise.blocks.ranges import TensorShard
from ds_blockwise.blocks.spec import BlockSpec


class TaggedParameter(Protocol):
    """What a tagged tensor carries.

    Attributes:
        block_spec: the blocks of the unsharded parameter.
        block_shard: what this tensor-parallel rank holds of it; None if the parameter is whole on every rank.
    """

    block_spec: BlockSpec
    block_shard: TensorShard | None


def tags_of(tensor: torch.Tensor) -> TaggedParameter | None:
    """The tensor as a tagged one; None if it has no tags."""
    return _as_tagged(tensor) if isinstance(getattr(tensor, "block_spec", None), BlockSpec) else None


def set_tags(tensor: torch.Tensor, spec: BlockSpec, shard: TensorShard | None) -> None:
    """Set both tags of a tensor, whatever it carried before.

    Args:
        tensor: a parameter, or a view or copy that is stepped in its place.
        spec: the blocks of the unsharded parameter.
        shard: what this tensor-parallel rank holds of it; None if it is whole.
    """
    tagged = _as_tagged(tensor)
    tagged.block_spec, tagged.block_shard = spec, shard


def _as_tagged(tensor: torch.Tensor) -> TaggedParameter:
    return cast("TaggedParameter", tensor)
