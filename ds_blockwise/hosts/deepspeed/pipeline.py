# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's PipelineModule: the names and the tied weights of one pipeline stage, for the checks over all.

Facts of DeepSpeed 0.19.8, ``runtime/pipe/module.py`` (``tied_comms``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypedDict

from torch import nn

from ds_blockwise.hosts.deepspeed.engine import Engine
from ds_blockwise.hosts.pipeline_stages import TiedCopy, tied_copy
from ds_blockwise.hosts.stepped_tensors import Stepped, group_of
from ds_blockwise.optimizers.base import BlockwiseOptimizer
from ds_blockwise.tagging.names import canonical_fqn


class TiedWeights(TypedDict):
    """One entry of ``PipelineModule.tied_comms``: weights that several pipeline stages hold a copy of.

    Attributes:
        ranks: global ranks that hold a copy.
        weight_attr: names of the weights in the module.
        module: this pipeline stage's copy of the module.
    """

    ranks: list[int]
    weight_attr: list[str]
    module: nn.Module


def is_staged(engine: Engine) -> bool:
    """Whether an engine holds one pipeline stage of several."""
    return engine.pipeline_parallelism and int(getattr(engine.module, "num_stages", 1)) > 1


def names_in(engine: Engine) -> Iterator[str]:
    """Every name of this rank's parameters that a rule may match."""
    yield from (canonical_fqn(name) for name, _ in engine.module.named_parameters(remove_duplicate=False))
    yield from (canonical_fqn(name) for name in engine.param_names.values())


def tied_copies(engine: Engine, optimizer: BlockwiseOptimizer, stepped: Sequence[Stepped]) -> list[TiedCopy]:
    """This rank's copies of weights that other pipeline stages hold as well.

    Args:
        engine: a ``DeepSpeedEngine`` whose parameters are tagged.
        optimizer: its basic optimizer.
        stepped: what that steps.
    """
    copies = []
    tied: Mapping[str, TiedWeights] = getattr(engine.module, "tied_comms", None) or {}
    for key, comm in sorted(tied.items()):
        # an attribute's own name may differ between the stages, the key and its position may not
        for index, attribute in enumerate(comm["weight_attr"]):
            param = comm["module"].get_parameter(attribute)
            name = f"{key}[{index}]" if index else key
            group = group_of(param, optimizer, stepped)
            copies.append(tied_copy(name, comm["ranks"], engine.param_names[param], param, group))
    return copies
