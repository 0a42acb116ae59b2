# SPDX-License-Identifier: Apache-2.0
"""Which matrices a weight is made of, beside its roles: gate and up in one tensor, factors of adapters."""

from __future__ import annotations

from dataclasses import replace

from ds_blockwise.blocks.structure import TensorStructure
from ds_blockwise.tagging.module_facts import class_names
from ds_blockwise.tagging.module_reader import READERS
from ds_blockwise.tagging.names import is_factor
from ds_blockwise.tagging.registered import RegisteredParameter

_GATE_AND_UP = "gate_up_proj"  # of transformers, a linear or the parameter of all experts
_ALTERNATING = frozenset({"GptOssExperts"})  # rows of gate and up take turns there only


def with_matrices(structure: TensorStructure, named: RegisteredParameter) -> TensorStructure:
    """A parameter's structure with its other names and what its matrices are.

    Args:
        structure: its roles.
        named: the parameter.
    """
    others = tuple(fqn for fqn in named.fqns if fqn != structure.fqn)
    parts = 1 if structure.is_bias else _parts(named)
    if structure.axis_size % parts:
        parts = 1
    return replace(structure, other_names=others, is_factor=is_factor(named.fqn), fused_parts=parts)


def _parts(named: RegisteredParameter) -> int:
    owner = named.first.owner
    found = (reader.split(owner, named.param, named.leaf) for reader in READERS)
    split = next((each for each in found if each is not None), None)
    if split is not None:
        return split.parts
    is_fused = _GATE_AND_UP in (named.leaf, named.first.linear)
    return 2 if is_fused and not _ALTERNATING.intersection(class_names(owner)) else 1
