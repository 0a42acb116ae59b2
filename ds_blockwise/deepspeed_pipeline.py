# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's PipelineModule: the names and the tied weights of one stage, for the checks over all stages.

Facts of DeepSpeed 0.19.8, ``runtime/pipe/module.py`` (``tied_comms``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ds_blockwise.hosting import Stepped
from ds_blockwise.naming import canonical_fqn
from ds_blockwise.optimizer import BlockwiseOptimizer
from ds_blockwise.stages import TiedCopy, tied_copy


def is_staged(engine: Any) -> bool:
    """Whether an engine holds one stage of several."""
    return bool(engine.pipeline_parallelism) and int(engine.module.num_stages) > 1


def names_in(engine: Any) -> Iterator[str]:
    """Every name of this rank's parameters that a rule may match."""
    yield from (canonical_fqn(name) for name, _ in engine.module.named_parameters(remove_duplicate=False))
    yield from (canonical_fqn(name) for name in engine.param_names.values())


def tied_copies(engine: Any, optimizer: BlockwiseOptimizer, stepped: Sequence[Stepped]) -> list[TiedCopy]:
    """This rank's copies of weights that other stages hold as well.

    Args:
        engine: a ``DeepSpeedEngine`` whose parameters are tagged.
        optimizer: its basic optimizer.
        stepped: what that steps.
    """
    copies = []
    for key, comm in sorted((getattr(engine.module, "tied_comms", None) or {}).items()):
        for attribute in comm["weight_attr"]:
            param = comm["module"].get_parameter(attribute)
            group = _group_of(param, optimizer, stepped)
            # an attribute's own name may differ between the stages, the key and its position may not
            name = key if len(comm["weight_attr"]) == 1 else f"{key}[{comm['weight_attr'].index(attribute)}]"
            copies.append(tied_copy(name, comm["ranks"], engine.param_names[param], param, group))
    return copies


def _group_of(param: nn.Parameter, optimizer: BlockwiseOptimizer, stepped: Sequence[Stepped]) -> dict[str, Any] | None:
    spec = getattr(param, "block_spec", None)
    holders = [item.tensor for item in stepped if any(p.spec is spec for p in item.placements)]

    def holds(group: dict[str, Any]) -> bool:
        return any(_is_one_of(tensor, holders) for tensor in group["params"])

    return next((group for group in optimizer.param_groups if holds(group)), None)


def _is_one_of(tensor: torch.Tensor, tensors: Sequence[torch.Tensor | None]) -> bool:
    return any(tensor is other for other in tensors)
