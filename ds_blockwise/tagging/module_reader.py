# SPDX-License-Identifier: Apache-2.0
"""Readers: what hosts know about the modules of their framework, and the register of them.

Nothing here decides a role; `tagging` asks the registered readers before it looks at names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from ds_blockwise.blocks.ranges import TensorShard
from ds_blockwise.blocks.spec import HeadGeometry
from ds_blockwise.tagging.names import NameMatch


@dataclass(frozen=True, slots=True)
class TensorSplit:
    """How tensor parallelism of any size cuts a parameter: ``parts`` equal parts of ``dim``, each split by itself."""

    dim: int
    parts: int = 1


class ModuleReader(Protocol):
    """Reads facts off the modules of one framework; registered with `register_reader`."""

    @property
    def exact_shards(self) -> bool:
        """Whether `shard` tells the very rows of a fused weight; else they are read as shares of each of its roles."""

    def match(self, owner: nn.Module, parent: nn.Module | None, param: nn.Parameter, name: str) -> NameMatch | None:
        """What a parameter is, from its owner and the module above.

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
        """The tensor-parallel split of ``owner.<leaf>``; None if it is whole or the module is unknown."""

    def split(self, owner: nn.Module, param: nn.Parameter, leaf: str) -> TensorSplit | None:
        """How ``owner.<leaf>`` would be cut over any number of ranks; None if never or the module is unknown."""

    def outputs(self, model: nn.Module) -> torch.Tensor | None:
        """Outputs of a whole model of this framework for a few random tokens; None if the model is another's."""


READERS: list[ModuleReader] = []
"""The registered readers, asked in this order."""


def register_reader(reader: ModuleReader) -> None:
    """Add a reader; it is asked before the built-in one. A second one of the same class is ignored."""
    if not any(type(known) is type(reader) for known in READERS):
        READERS.append(reader)


def tensor_splits(model: nn.Module) -> dict[nn.Parameter, TensorSplit]:
    """How the registered readers would cut each parameter over tensor-parallel ranks; whole ones are left out."""
    return {
        param: split
        for owner in model.modules()
        for leaf, param in owner.named_parameters(recurse=False)
        for reader in READERS
        if (split := reader.split(owner, param, leaf)) is not None
    }
