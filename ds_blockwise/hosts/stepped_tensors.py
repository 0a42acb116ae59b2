# SPDX-License-Identifier: Apache-2.0
"""The tensors that a host lets an optimizer step, what lies in them, and their comparison over all ranks.

Knows the optimizers and the tags on parameters, but no host. A host's own file maps its tensors to parameters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from ds_blockwise.blocks.segment_table import Placement, same_windows
from ds_blockwise.blocks.tagged_parameter import is_tagged
from ds_blockwise.kernels.select import why_reference
from ds_blockwise.optimizers.base import BlockwiseOptimizer
from ds_blockwise.parallel.agree import disagreement, first_error, gather


@dataclass(frozen=True)
class Stepped:
    """One tensor that the base optimizer steps.

    Attributes:
        tensor: the tensor; None if this rank holds nothing of these parameters but its peers do.
        placements: the parameters in it, in storage order.
        dp_group: ranks that it is cut over; None if each holds it whole.
    """

    tensor: torch.Tensor | None
    placements: tuple[Placement, ...]
    dp_group: dist.ProcessGroup | None


def group_of(
    param: nn.Parameter, optimizer: BlockwiseOptimizer, stepped: Sequence[Stepped]
) -> dict[str, object] | None:
    """The param group that a model's parameter is stepped in; None if this rank steps nothing of it.

    Args:
        param: of the model, tagged.
        optimizer: what steps.
        stepped: its tensors.
    """
    spec = getattr(param, "block_spec", None)
    holders = {id(item.tensor) for item in stepped if any(p.spec is spec for p in item.placements)}
    return next((g for g in optimizer.param_groups if any(id(t) in holders for t in g["params"])), None)


def tagged_placement(param: object, flat_start: int, param_start: int, numel: int, cuts: tuple[int, ...]) -> Placement:
    """`Placement` of a range of a tagged parameter.

    Raises:
        ValueError: the parameter is not one of the model's, which have been tagged.
    """
    if not is_tagged(param):
        shape = tuple(getattr(param, "ds_shape", getattr(param, "shape", ())))
        raise ValueError(
            f"the optimizer was given a parameter of shape {shape} that is not in the model. Put the module that has "
            f"it into the model (a wrapper around both), or train it by an optimizer of its own."
        )
    return Placement(param.block_spec, param.block_shard, flat_start, param_start, numel, cuts)


def window(offset: int, numel: int, rank: int, world_size: int, size: int) -> tuple[int, int, tuple[int, ...]]:
    """What one rank holds of a parameter in a flat buffer that is cut into ``world_size`` windows.

    Args:
        offset: of the parameter in the buffer.
        numel: of the parameter.
        rank: the rank's window is ``[rank * size, (rank + 1) * size)``.
        world_size: number of windows.
        size: elements of one window.

    Returns:
        Start and end of the held range in the buffer (start >= end: nothing is held), and the offsets in the
        parameter at which another rank's range begins.
    """
    low, end = rank * size, offset + numel
    cuts = tuple(k * size - offset for k in range(1, world_size) if offset < k * size < end)
    return max(offset, low), min(end, low + size), cuts


def fingerprint(placements: Sequence[Placement], *, of_shards: bool) -> str:
    """Digest of what ranks that share blocks must agree on.

    Args:
        placements: parameters of one stepped tensor in storage order.
        of_shards: True for data-parallel peers, which hold the same tensor-parallel shard and must know the same cuts;
            False for tensor-parallel peers, which share names, unsharded shapes and block settings, and the held ranges
            where the splits are even.
    """
    digest = hashlib.sha256()
    # a parameter that is whole under tensor parallelism may be partitioned over all ranks (zero.Init before AutoTP)
    windows = not of_shards and same_windows(placements) and any(p.shard is not None for p in placements)
    for p in placements:
        facts: tuple[object, ...] = (p.spec.fqn, p.spec.structure.stored_shape, p.spec.axis, p.spec.parts)
        facts += (p.shard.dim, p.shard.chunks) if p.shard else (None,)
        if of_shards:
            facts += (p.cuts, p.shard.rank if p.shard else 0)
        if windows:
            facts += (p.param_start, p.numel)
        digest.update(repr(facts).encode())
    return digest.hexdigest()


def check_agreement(
    optimizer: BlockwiseOptimizer,
    stepped: Sequence[Stepped],
    data_peers: dist.ProcessGroup | None,
    tensor_peers: dist.ProcessGroup | None,
    settings_are_in: str,
) -> None:
    """Collective over all ranks: compare parameters, blocks, settings and kernels with those of the peers.

    Args:
        optimizer: with ``stepped`` bound to it.
        stepped: its tensors, in the same order on every rank.
        data_peers: ranks that hold the same tensor-parallel shards; None if there are none.
        tensor_peers: ranks that hold other shards of the same tensors; None if there are none.
        settings_are_in: what every rank must be given alike, for the message.

    Raises:
        ValueError: on every rank, if any two peers differ.
    """
    settings = [
        (group["lr"], tuple(group["betas"]), group["eps"], group["weight_decay"], optimizer.cautious_weight_decay)
        for group in optimizer.param_groups
    ]
    _check_kernels(optimizer)
    for what, group, of_shards in (("data", data_peers, True), ("tensor", tensor_peers, False)):
        digests = [fingerprint(item.placements, of_shards=of_shards) for item in stepped]
        measured = None if optimizer.meter is None else optimizer.meter.facts()
        different = disagreement(repr((settings, digests, measured)), group)
        message = None
        if different:
            message = (
                f"{what}-parallel ranks {different} of the group disagree with its rank 0 about parameters, blocks or "
                f"settings. Every rank must build the same model with the same {settings_are_in}."
            )
        message = first_error(message)
        if message is not None:
            raise ValueError(message)


_NAMED = 4  # ranks; the others are counted


def _check_kernels(optimizer: BlockwiseOptimizer) -> None:
    """Collective over all ranks: refuse that ranks step their tensors with different kernels.

    Results differ by rounding, and copies of a weight would drift apart.

    Raises:
        ValueError: on every rank, with the ranks that cannot have the others' kernels, and why.
    """
    devices = {binding.tensor.device: binding.kernels.name for binding in optimizer.bindings()}
    mine = {d.type: (name, why_reference(optimizer.backend, d)) for d, name in devices.items() if name == "reference"}
    mine |= {d.type: (name, None) for d, name in devices.items() if name != "reference"}
    everyone = gather(mine)
    for kind in sorted({kind for found in everyone for kind in found}):
        by_rank = {rank: found[kind] for rank, found in enumerate(everyone) if kind in found}
        names = sorted({name for name, _ in by_rank.values()})
        if len(names) == 1:
            continue
        without = {rank: why for rank, (_, why) in by_rank.items() if why is not None}
        said = [f"rank {rank} cannot: {why}" for rank, why in list(without.items())[:_NAMED]]
        said += [f"{len(without) - _NAMED} more ranks cannot"] if len(without) > _NAMED else []
        raise ValueError(
            f"ranks would step their {kind} tensors with different kernels: {' and '.join(names)}. "
            f'{"; ".join(said) or "They were given different settings"}. Repair these machines, or set "backend": '
            f'"reference" for all.'
        )
