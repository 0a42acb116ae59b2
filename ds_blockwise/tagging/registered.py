# SPDX-License-Identifier: Apache-2.0
"""The parameters of a model with every module that registers them: tied weights have several names and owners."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from ds_blockwise.blocks.plain_tensor import USE_ZERO, wrapper_problem
from ds_blockwise.blocks.structure import TensorStructure
from ds_blockwise.tagging.module_facts import class_names
from ds_blockwise.tagging.module_reader import READERS
from ds_blockwise.tagging.names import adapted_path, canonical_fqn, is_factor, is_low_rank_input

_GATE_AND_UP = "gate_up_proj"  # of transformers, a linear or the parameter of all experts
_ALTERNATING = frozenset({"GptOssExperts"})  # rows of gate and up take turns there only


@dataclass(frozen=True)
class Registration:
    """One name of a parameter, and the modules around it.

    Attributes:
        fqn: fully qualified name, without what wrappers add.
        owner: the module that registers the parameter.
        parent: the module that holds the owner; of a PEFT adapter, the one that holds the adapted linear. None at the
            top.
        linear: the owner's name in its parent.
        is_low_rank_input: the parameter is LoRA's A, whose rows are the low rank.
    """

    fqn: str
    owner: nn.Module
    parent: nn.Module | None
    linear: str
    is_low_rank_input: bool = False


@dataclass(frozen=True)
class RegisteredParameter:
    """One parameter with all its registrations, in the order of the module tree."""

    param: nn.Parameter
    registrations: tuple[Registration, ...]

    @property
    def first(self) -> Registration:
        """The registration whose name is shown."""
        return self.registrations[0]

    @property
    def fqns(self) -> tuple[str, ...]:
        """All names, each once."""
        return tuple(dict.fromkeys(found.fqn for found in self.registrations))

    @property
    def fqn(self) -> str:
        """The name that is shown."""
        return self.first.fqn

    @property
    def leaf(self) -> str:
        """The parameter's own name in its module."""
        return self.fqn.rpartition(".")[2]

    @property
    def shape(self) -> tuple[int, ...]:
        """This rank's shape; ZeRO-3 keeps it in ``ds_shape`` while the parameter itself is empty."""
        return tuple(getattr(self.param, "ds_shape", self.param.shape))


def registered_parameters(
    model: nn.Module, names: Mapping[torch.Tensor, str] | None = None
) -> list[RegisteredParameter]:
    """All parameters of a model, each once, in the order in which ``model.parameters()`` gives them.

    Args:
        model: any module.
        names: a host's own names, which come first; parameters without one keep the module tree's.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    registrations: dict[nn.Parameter, list[Registration]] = {}
    for path, module in modules.items():
        above, _, linear = adapted_path(path).rpartition(".")
        parent = modules.get(above) if path else None
        for leaf, param in module.named_parameters(recurse=False):
            fqn = canonical_fqn(f"{path}.{leaf}" if path else leaf)
            found = Registration(fqn, module, parent, linear, is_low_rank_input(path))
            registrations.setdefault(param, []).append(found)
    for param, known in registrations.items():
        own = names.get(param) if names is not None else None
        if own is not None and canonical_fqn(own) not in {found.fqn for found in known}:
            known.insert(0, replace(known[0], fqn=canonical_fqn(own)))
    return [RegisteredParameter(param, tuple(known)) for param, known in registrations.items()]


def check_plain(model: nn.Module) -> None:
    """Refuse a model whose trained parameters are not plain tensors.

    Raises:
        ValueError: a module of FSDP1, or a trained parameter of a class that keeps its elements elsewhere.
    """
    for path, module in model.named_modules():
        if "FullyShardedDataParallel" in class_names(module):
            raise ValueError(f"module {path or 'model'!r} is a FullyShardedDataParallel (FSDP1). {USE_ZERO}.")
    for name, param in model.named_parameters():
        check_plain_parameter(canonical_fqn(name), param)


def check_plain_parameter(fqn: str, param: nn.Parameter) -> None:
    """Refuse a trained parameter that is not a plain tensor.

    Raises:
        ValueError: its class keeps its elements elsewhere, or it has none yet.
    """
    problem = wrapper_problem(param) if param.requires_grad else None
    if problem is not None:
        raise ValueError(f"parameter {fqn!r} cannot be cut into blocks: {problem}.")


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
