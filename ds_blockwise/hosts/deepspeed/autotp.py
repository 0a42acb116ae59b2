# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's AutoTP: which rows or columns of which parameter this tensor-parallel rank holds.

Read from what AutoTP leaves on each Parameter for universal checkpoints, never from names or ``dim / ranks``: its
shards are uneven where heads do not divide, and a fused weight is split part by part. Checked with DeepSpeed 0.19.8
(``module_inject/layers.py``, ``module_inject/auto_tp.py``). Needs no DeepSpeed to be imported.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Protocol, TypedDict, TypeGuard

import torch
import torch.distributed as dist
from torch import nn

from ds_blockwise.blocks.ranges import TensorShard
from ds_blockwise.blocks.structure import HeadGeometry
from ds_blockwise.blocks.tagged_parameter import as_tagged
from ds_blockwise.hosts.deepspeed.engine import whole_numel
from ds_blockwise.hosts.stepped_tensors import Stepped, tagged_placement
from ds_blockwise.tagging.module_facts import generic_heads
from ds_blockwise.tagging.module_reader import TensorSplit, register_reader
from ds_blockwise.tagging.names import NameMatch

AUTOTP_MARK = "ds_autotp_universal_checkpoint_meta"
# Applied to the heads of one rank, whatever the model calls them
_HEAD_NORM = re.compile(r"(?:q|k|query|key)_(?:layer_?)?norm(?:\.|$)|(?:q|k)_ln(?:\.|$)")


class AutoTPShard(TypedDict):
    """What AutoTP leaves on a parameter for universal checkpoints (``module_inject/layers.py``), as far as we read it.

    Attributes:
        partition_type: ``row`` or ``column``.
        partition_dim: dimension of the view that is cut.
        logical_shape: of the view.
        original_shape: of the weight, if the view has another shape.
        sub_param_shard_widths: per part of a fused weight, the elements of ``partition_dim`` of each rank.
        partition_sizes: the same for a weight that is not fused.
        replicated: every rank holds the whole parameter.
        conversion: says why the universal converter cannot join the shards, if it cannot.
    """

    partition_type: str
    partition_dim: int
    logical_shape: Sequence[int]
    original_shape: Sequence[int] | None
    sub_param_shard_widths: Sequence[Sequence[int]] | None
    partition_sizes: Sequence[int] | None
    replicated: bool
    conversion: Mapping[str, str | None]


class _TensorParallelLayer(Protocol):
    tp_world_size: int
    tp_index: int


def _is_tensor_parallel(owner: object) -> TypeGuard[_TensorParallelLayer]:
    return hasattr(owner, "tp_world_size")


class AutoTPReader:
    """Reads the layers that AutoTP put in place of linears and embeddings."""

    exact_shards = True

    def match(self, owner: nn.Module, parent: nn.Module | None, param: nn.Parameter, name: str) -> NameMatch | None:
        """None: AutoTP keeps names and parents, so they go on telling what a parameter does."""
        return None

    def heads(self, attention: nn.Module) -> HeadGeometry | None:
        """Unsharded head counts: AutoTP makes a module's own attributes local and leaves its config alone.

        Where the attention keeps no config (BLOOM, MPT), its own counts are scaled by what a cut weight was before.

        Raises:
            ValueError: this rank holds no head of such an attention.
        """
        params = [(child, n, p) for child in attention.children() for n, p in child.named_parameters(recurse=False)]
        if not any(_said(param) for _, _, param in params):
            return None
        heads = generic_heads(attention, config_first=True)
        if heads is None or not heads.source.startswith(f"{type(attention).__name__}."):
            return heads
        shards = (self.shard(child, param, name) for child, name, param in params)
        rows = next(((s.global_shape[0], s.local_shape[0]) for s in shards if s is not None and s.dim == 0), None)
        if rows is None:
            return heads
        whole, local = rows
        if not local:
            raise ValueError(
                f"{type(attention).__name__}: this tensor-parallel rank holds none of its {whole} rows, and the class "
                f"keeps no config that counts its heads. Use at most as many tensor-parallel ranks as heads."
            )
        return replace(
            heads,
            num_heads=heads.num_heads * whole // local,
            num_kv_heads=heads.num_kv_heads * whole // local,
            source=f"{heads.source} of a tensor-parallel rank that holds {local} of {whole} rows",
        )

    def shard(self, owner: nn.Module, param: nn.Parameter, leaf: str) -> TensorShard | None:
        """The ranges that each rank holds; None where every rank holds the whole parameter.

        Raises:
            ValueError: AutoTP does not say which elements a rank holds, or they are not ranges of one dimension.
        """
        said = _said(param)
        if said is None or said["replicated"]:
            return None
        where = f"{type(owner).__name__}.{leaf}"
        if not _is_tensor_parallel(owner):
            raise ValueError(
                f"{where} is cut by AutoTP along dimension {said['partition_dim']} and nothing puts its outputs "
                f"together again. Take it out of the partition_config (embeddings stay whole)."
            )
        widths = said["sub_param_shard_widths"] or ([said["partition_sizes"]] if said["partition_sizes"] else None)
        if widths is None:
            reason = said["conversion"].get("unsupported_reason") or "its rows are packed or held several times"
            raise ValueError(
                f"{where} is split by AutoTP in a way that cannot be followed: {reason}. Give a partition_config that "
                f"leaves it whole or lists its parts."
            )
        if owner.tp_world_size == 1:
            return None
        return _shard_of(said, widths, tuple(getattr(param, "ds_shape", param.shape)), owner.tp_index)

    def split(self, owner: nn.Module, param: nn.Parameter, leaf: str) -> TensorSplit | None:
        """None: AutoTP writes what universal checkpoints need itself."""
        return None

    def outputs(self, model: nn.Module) -> torch.Tensor | None:
        """None: the model is run as it is without AutoTP."""
        return None


def _said(param: nn.Parameter) -> AutoTPShard | None:
    said: AutoTPShard | None = getattr(param, AUTOTP_MARK, None) or None
    return said


def _shard_of(said: AutoTPShard, widths: Sequence[Sequence[int]], local: tuple[int, ...], rank: int) -> TensorShard:
    """From a split of a view of the weight to ranges of the weight's own dimensions."""
    view = tuple(said["logical_shape"])
    whole = tuple(said["original_shape"] or view)
    cut = said["partition_dim"]
    if len(whole) > 1 and cut == len(view) - 1:
        outer, inner, dim = 1, 1, len(whole) - 1
    else:  # the view splits the rows into several dimensions; the last one is the weight's columns
        rows = view if len(whole) == 1 else view[:-1]
        outer, inner, dim = math.prod(rows[:cut]), math.prod(rows[cut + 1 :]), 0
    sizes = [sum(per_rank) for per_rank in widths]
    if sum(sizes) * outer * inner != whole[dim] or len(local) != len(whole):
        raise ValueError(f"AutoTP says that parts of {sizes} of a view {view} are split, which do not make {whole}")
    chunks = []
    for r in range(len(widths[0])):
        ranges: list[tuple[int, int]] = []
        for lead in range(outer):
            at = lead * sum(sizes)
            for per_rank, size in zip(widths, sizes, strict=True):
                start = at + sum(per_rank[:r])
                at += size
                if not per_rank[r]:
                    continue
                if ranges and ranges[-1][1] == start * inner:
                    ranges[-1] = (ranges[-1][0], (start + per_rank[r]) * inner)
                else:
                    ranges.append((start * inner, (start + per_rank[r]) * inner))
        chunks.append(tuple(ranges))
    return TensorShard(whole, dim, rank, tuple(chunks))


def check_marks(model: nn.Module, release: str) -> None:
    """Refuse AutoTP of a release that does not say which rows or columns a rank holds; 0.19.6 is the first that does.

    Args:
        model: as AutoTP left it.
        release: of DeepSpeed.

    Raises:
        ValueError: the marks on its parameters lack the sizes of the ranks' parts, or its layers are split and no
            parameter is marked (before 0.18.9).
    """
    marks = [mark for param in model.parameters() if (mark := _said(param)) is not None]
    is_split = any(_is_tensor_parallel(layer) and layer.tp_world_size > 1 for layer in model.modules())
    if (is_split and not marks) or any(AutoTPShard.__required_keys__ - mark.keys() for mark in marks):
        raise ValueError(
            f"AutoTP of DeepSpeed {release} does not say which part of a weight a rank holds. Install "
            f'deepspeed>=0.19.6, or remove "tensor_parallel" from the JSON.'
        )


def check_splits(model: nn.Module, names: Mapping[torch.Tensor, str], zero_stage: int) -> None:
    """Refuse what AutoTP would train wrongly, or not at all, with any optimizer.

    Args:
        model: after AutoTP, tagged.
        names: the engine's names of its parameters.
        zero_stage: of the engine.

    Raises:
        ValueError: norms of heads whose gradient nobody sums: they are whole on every rank but see the rank's own
            heads only, so each rank would train another copy. Or ranks without any part of a weight at ZeRO-3.
    """
    found = list(_unsummed_norms(model))
    if found:
        raise ValueError(
            f"{_few(found, names)}: norms of attention heads, which every tensor-parallel rank holds whole and applies "
            f"to its own heads. AutoTP sums their gradients only if it is told to, so with any optimizer the ranks' "
            f"copies drift apart. Remove the partition_config if the model has a plan of its own, or add to its "
            f'layer_specs: {{"patterns": [".*_norm\\\\.weight$"], "partition_type": "skip", "grad_allreduce": true}}'
        )
    shards = ((p, getattr(p, "block_shard", None)) for p in model.parameters())
    empty = [p for p, shard in shards if shard is not None and not all(shard.chunks)]
    if empty and zero_stage == 3:
        raise ValueError(
            f"{_few(empty, names)}: some tensor-parallel ranks hold no part of it (more ranks than key and value "
            f"heads), which DeepSpeed's ZeRO-3 cannot gather, with any optimizer. Use ZeRO stage 2 or fewer "
            f"tensor-parallel ranks."
        )


def _few(params: Sequence[nn.Parameter], names: Mapping[torch.Tensor, str]) -> str:
    more = f" and {len(params) - 3} more" if len(params) > 3 else ""
    return ", ".join(repr(names.get(p, "?")) for p in params[:3]) + more


def _unsummed_norms(model: nn.Module) -> Iterator[nn.Parameter]:
    for attention in model.modules():
        children = list(attention.children())
        local = any(
            (said := _said(param)) is not None
            and said["partition_type"] == "column"
            and not said["replicated"]
            and not getattr(child, "gather_output", False)
            for child in children
            for param in child.parameters(recurse=False)
        )
        for name, param in attention.named_parameters() if local else ():
            summed = getattr(param, "_ds_grad_allreduce_registered", False)
            if param.requires_grad and _HEAD_NORM.match(name) and not summed:
                yield param


def with_empty_shards(
    stepped: Sequence[Stepped], params: Sequence[nn.Parameter], tp_group: dist.ProcessGroup | None
) -> list[Stepped]:
    """Add the parameters of which this rank holds no element, which DeepSpeed's wrappers leave out.

    With more ranks than key and value heads AutoTP gives some ranks no part of attention. Their peers' blocks are
    still summed over all ranks, in one order. A collective over ``tp_group``.

    Args:
        stepped: what DeepSpeed's wrapper steps here.
        params: the model's trained parameters, tagged.
        tp_group: the tensor-parallel ranks.

    Returns:
        The same, with an empty placement for each parameter that this rank lacks and a peer has. Unchanged if that
        cannot be done; the comparison of the ranks then says so.
    """
    if tp_group is None:
        return list(stepped)
    own = [[p.spec.fqn for p in item.placements] for item in stepped]
    every: list[list[list[str]]] = [[] for _ in range(dist.get_world_size(tp_group))]
    dist.all_gather_object(every, own, group=tp_group)
    full = max(every, key=lambda names: sum(map(len, names)))
    empty = {as_tagged(p).block_spec.fqn: p for p in params if not whole_numel(p)}
    missing = {name for names in full for name in names} - {name for names in own for name in names}
    rest = [[name for name in names if name not in missing] for names in full]
    per_parameter = len(full) != len(own) and all(item.dp_group is None for item in stepped)
    kept = [names for names in rest if names] if per_parameter else rest
    if not missing or not missing <= empty.keys() or kept != own:
        return list(stepped)
    waiting = iter(stepped)
    filled: list[Stepped] = []
    for names, held in zip(full, rest, strict=True):
        item = None if per_parameter and not held else next(waiting)
        placements = list(item.placements) if item is not None else []
        for index, name in enumerate(names):
            if name in missing:
                before = placements[index - 1] if index else None
                at = before.flat_start + before.numel if before is not None else 0
                placements.insert(index, tagged_placement(empty[name], at, 0, 0, ()))
        filled.append(
            Stepped(None, tuple(placements), None) if item is None else replace(item, placements=tuple(placements))
        )
    return filled


register_reader(AutoTPReader())
