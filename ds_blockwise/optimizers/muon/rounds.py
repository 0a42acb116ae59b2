# SPDX-License-Identifier: Apache-2.0
"""One round of orthogonalisation: parts to the owners, whole matrices to updates, parts back.

Every matrix is multiplied as a whole on one rank, so no bit depends on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from ds_blockwise.optimizers.muon.matrices import LocalMatrix, Rectangle
from ds_blockwise.optimizers.muon.plan import Part, Plan, Task

Direct = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
"""From a matrix as it is stored, its rows' second moments (changed in place) and the dimension of rows: its update."""

_Local = tuple[torch.Tensor, torch.Tensor]
"""A matrix, or a shard of one, as it is stored, 2-D; and the second moments of its rows."""


def orthogonalize_(
    plan: Plan, updates: Sequence[torch.Tensor], second_moments: Sequence[torch.Tensor], direct: Direct
) -> None:
    """Replace momentum by updates; a collective over the groups in the plan.

    Args:
        plan: see `Plan`.
        updates: per stepped tensor of the plan, 1-D, fp32 or fp64: what is orthogonalised; changed in place, the
            elements of other parts stay.
        second_moments: per stepped tensor its block vector; the values of rows are changed in place.
        direct: see `Direct`.
    """
    flats = list(zip(updates, second_moments, strict=True))
    for task in plan.whole:
        _put(task, flats, _directed(task, _taken(task, flats), direct))
    shards: dict[Task, _Local] = {}
    owned: list[dict[int, list[torch.Tensor]]] = []
    for routes, tasks in plan.over_dp:
        parts = {i: _packed(task, flats) for i, task in enumerate(tasks) if task.slots.numel()}
        arrived = routes.to_owners({i: part.to(routes.dtype) for i, part in parts.items()})
        owned.append(arrived)
        for i, by_rank in arrived.items():
            whole = _joined(tasks[i], by_rank)
            if tasks[i].is_split:
                shards[tasks[i]] = whole
            else:
                arrived[i] = _cut(tasks[i], _directed(tasks[i], whole, direct), routes.dtype)
    for routes, tasks in plan.over_tp:
        own = [shards[task] if task in shards else _taken(task, flats) for task in tasks]
        parts = {i: _flat(*pair).to(routes.dtype) for i, pair in enumerate(own) if tasks[i].local.size}
        results = routes.back(
            {
                i: _split(tasks[i], _directed(tasks[i], _united(tasks[i], by_rank), direct), routes.dtype)
                for i, by_rank in routes.to_owners(parts).items()
            }
        )
        for i, result in results.items():
            task = tasks[i]
            shard = _unflat(task.local, result.to(task.dtype))
            if task in shards:
                shards[task] = shard
            else:
                _put(task, flats, shard)
    for (routes, tasks), arrived in zip(plan.over_dp, owned, strict=True):
        for i in arrived:
            if tasks[i].is_split:
                arrived[i] = _cut(tasks[i], shards[tasks[i]], routes.dtype)
        for i, part in routes.back(arrived).items():
            _unpack(tasks[i], flats, part)


def _directed(task: Task, whole: _Local, direct: Direct) -> _Local:
    matrix, second = (values.to(task.dtype) for values in whole)
    return direct(matrix, second, task.local.row_dim).contiguous(), second


# ------------------------------------------------------------- this rank's elements in its stepped tensors

_Flats = Sequence[tuple[torch.Tensor, torch.Tensor]]


def _own(task: Task) -> Part:
    part = task.parts[task.mine]
    assert part is not None, "a rank is asked for what it holds"
    return part


def _views(task: Task, flats: _Flats) -> tuple[torch.Tensor, torch.Tensor]:
    """What of a tensor follows the beginning of the task's parameter, and the block vector."""
    flat, second = flats[task.binding]
    return flat[task.flat_start :], second


def _taken(task: Task, flats: _Flats) -> _Local:
    """A local matrix that lies whole on this rank; a view where its elements follow each other."""
    if not task.local.size:
        flat, second = flats[task.binding]
        return flat.new_empty(task.local.shape), second.new_empty(task.local.shape[task.local.row_dim])
    (flat, second), rectangles = _views(task, flats), _own(task).rectangles
    first, numel = rectangles[0], task.local.shape[0] * task.local.shape[1]
    if len(rectangles) == 1 and first.numel == numel and first.stride == first.width:
        matrix = flat.narrow(0, first.start, numel).view(task.local.shape)
    else:
        matrix = flat.new_empty(task.local.shape)
        for r in rectangles:
            r.of_other(matrix.view(-1)).copy_(r.of(flat))
    return matrix, second[task.slots.to(second.device)]


def _put(task: Task, flats: _Flats, local: _Local) -> None:
    if not task.local.size:
        return
    (flat, second), (matrix, values) = _views(task, flats), local
    for r in _own(task).rectangles:
        r.of(flat).copy_(r.of_other(matrix.view(-1)))
    second[task.slots.to(second.device)] = values.to(second.device, second.dtype)


def _packed(task: Task, flats: _Flats) -> torch.Tensor:
    flat, second = _views(task, flats)
    return torch.cat([*(r.of(flat).reshape(-1) for r in _own(task).rectangles), second[task.slots.to(second.device)]])


def _unpack(task: Task, flats: _Flats, part: torch.Tensor) -> None:
    (flat, second), own = _views(task, flats), _own(task)
    for r, values in _pieces(own.rectangles, part):
        r.of(flat).copy_(values)
    second[task.slots.to(second.device)] = part[part.numel() - own.rows.numel() :].to(second.dtype)


def _pieces(rectangles: Sequence[Rectangle], packed: torch.Tensor) -> Iterable[tuple[Rectangle, torch.Tensor]]:
    at = 0
    for r in rectangles:
        yield r, packed.narrow(0, at, r.numel).view(r.height, r.width)
        at += r.numel


# ------------------------------------------------------------- parts of data-parallel ranks, and a local matrix


def _joined(task: Task, by_rank: Sequence[torch.Tensor]) -> _Local:
    """A local matrix from the parts of all data-parallel ranks."""
    like = by_rank[0]
    matrix, second = like.new_zeros(task.local.shape), like.new_zeros(task.local.shape[task.local.row_dim])
    for part, packed in zip(task.parts, by_rank, strict=True):
        if part is not None:
            for r, values in _pieces(part.rectangles, packed):
                r.of_other(matrix.view(-1)).copy_(values)
            rows, values = part.rows.to(like.device), packed[packed.numel() - part.rows.numel() :]
            # a rank without state of a row that it shares has 0
            second[rows] = torch.maximum(second[rows], values)
    return matrix, second


def _cut(task: Task, local: _Local, dtype: torch.dtype) -> list[torch.Tensor]:
    """The inverse of `_joined`."""
    matrix, second = (values.to(dtype) for values in local)
    found = []
    for part in task.parts:
        pieces = [matrix.new_empty(0)]
        if part is not None:
            pieces += [r.of_other(matrix.view(-1)).reshape(-1) for r in part.rectangles]
            pieces.append(second[part.rows.to(second.device)])
        found.append(torch.cat(pieces))
    return found


# ------------------------------------------------------------- shards of tensor-parallel ranks, and a matrix


def _flat(matrix: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return torch.cat([matrix.reshape(-1), second])


def _unflat(local: LocalMatrix, packed: torch.Tensor) -> _Local:
    numel = local.shape[0] * local.shape[1]
    return packed[:numel].reshape(local.shape), packed[numel:]


def _united(task: Task, by_rank: Sequence[torch.Tensor]) -> _Local:
    """A whole matrix from its shards."""
    sizes = (task.matrix.rows, task.matrix.columns)
    like, row_dim = by_rank[0], task.local.row_dim
    matrix, second = like.new_zeros(sizes if row_dim == 0 else sizes[::-1]), like.new_zeros(task.matrix.rows)
    for shard, packed in zip(task.shards, by_rank, strict=True):
        if shard.size:
            part, values = _unflat(shard, packed)
            for r in shard.in_whole():
                r.of_other(matrix.view(-1)).copy_(r.of(part.reshape(-1)))
            rows = shard.rows_in_whole().to(like.device)
            second[rows] = torch.maximum(second[rows], values)
    return matrix, second


def _split(task: Task, whole: _Local, dtype: torch.dtype) -> list[torch.Tensor]:
    """The inverse of `_united`."""
    matrix, second = (values.to(dtype) for values in whole)
    found = []
    for shard in task.shards:
        part = matrix.new_empty(shard.shape if shard.size else (0, 0))
        for r in shard.in_whole() if shard.size else ():
            r.of(part.view(-1)).copy_(r.of_other(matrix.view(-1)))
        rows = shard.rows_in_whole() if shard.size else torch.empty(0, dtype=torch.int64)
        found.append(_flat(part, second[rows.to(second.device)]))
    return found
