# SPDX-License-Identifier: Apache-2.0
"""The interface through which a host describes the modules of its framework, and the list of registered readers.

`tag.read_tags` asks the registered readers first; what no reader knows is read from the parameter's name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from ds_blockwise.blocks.ranges import TensorShard
from ds_blockwise.blocks.structure import HeadGeometry
from ds_blockwise.tagging.names import NameMatch


@dataclass(frozen=True, slots=True)
class TensorSplit:
    """How tensor parallelism over any number of ranks cuts a parameter.

    Attributes:
        dim: the dimension that is cut.
        parts: equal parts of ``dim``, each cut by itself (2 for a fused gate and up projection).
    """

    dim: int
    parts: int = 1


class ModuleReader(Protocol):
    """Reads facts off the modules of one framework; registered with `register_reader`."""

    @property
    def exact_shards(self) -> bool:
        """Whether `shard` gives the exact rows of a fused weight that each rank holds.

        If False, `shard` knows only the number of ranks. A rank then holds an equal share of the rows of each role.
        """

    def match(self, owner: nn.Module, parent: nn.Module | None, param: nn.Parameter, name: str) -> NameMatch | None:
        """What a parameter is, read from its owner and the module above it.

        Args:
            owner: the module that registers the parameter.
            parent: the module that holds the owner; None at the top.
            param: the parameter, for marks that a framework puts on it.
            name: the owner's name in its parent, a dot, the parameter's name in the owner.

        Returns:
            None if this reader does not know these modules; the parameter's name then decides.
        """

    def heads(self, attention: nn.Module) -> HeadGeometry | None:
        """Unsharded head counts of an attention module; None if this reader does not know the module."""

    def shard(self, owner: nn.Module, param: nn.Parameter, leaf: str) -> TensorShard | None:
        """What this tensor-parallel rank holds of ``owner.<leaf>``; None if it is whole or the module is unknown."""

    def split(self, owner: nn.Module, param: nn.Parameter, leaf: str) -> TensorSplit | None:
        """How ``owner.<leaf>`` would be cut over any number of ranks; None if never or the module is unknown."""

    def outputs(self, model: nn.Module) -> torch.Tensor | None:
        """Outputs of a whole model for a few random tokens; None if the model is not of this framework."""


READERS: list[ModuleReader] = []
"""The registered readers, asked in this order."""


def register_reader(reader: ModuleReader) -> None:
    """Add a reader. Readers are asked in the order of registration; a second one of the same class is ignored."""
    if not any(type(known) is type(reader) for known in READERS):
        READERS.append(reader)


def tensor_splits(model: nn.Module) -> dict[nn.Parameter, TensorSplit]:
    """How each parameter would be cut over tensor-parallel ranks; parameters that stay whole are left out."""
    return {
        param: split
        for owner in model.modules()
        for leaf, param in owner.named_parameters(recurse=False)
        for reader in READERS
        if (split := reader.split(owner, param, leaf)) is not None
    }


def is_split(model: nn.Module) -> bool:
    """Whether this rank holds a part of any parameter only, trained or frozen.

    Raises:
        ValueError: a reader knows a module but not how its parameter is cut.
    """
    return any(
        (shard := reader.shard(owner, param, leaf)) is not None and len(shard.chunks) > 1
        for owner in model.modules()
        for leaf, param in owner.named_parameters(recurse=False)
        for reader in READERS
    )
