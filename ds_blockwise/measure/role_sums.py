# SPDX-License-Identifier: Apache-2.0
"""Sums over what each role holds of each parameter, of the unsharded tensor, whatever part of it a rank steps.

Sharpness, telemetry and measured multipliers look at gradients, states and updates through these sums only. The host
has already told the optimizer what lies in the tensors that it steps. So they need not know ZeRO partitions,
tensor-parallel shards, fused weights or padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from ds_blockwise.blocks.ranges import runs_of_range
from ds_blockwise.blocks.roles import BLOCK_TYPE_OF, BlockType, Role
from ds_blockwise.blocks.segment_table import Placement
from ds_blockwise.blocks.table_runs import MultiplierRun, TableRun
from ds_blockwise.kernels.bindings import Binding
from ds_blockwise.parallel.agree import gather


@dataclass(frozen=True, slots=True)
class RolePart:
    """Elements of one role in one stepped tensor, with their settings.

    Attributes:
        piece: number of the piece that they belong to, as the sums count.
        elements: where they lie.
        blocks: the same with their slots in the block vector; None if second moments are element-wise.
        is_matrix: whether they are orthogonalised.
    """

    piece: int
    elements: MultiplierRun
    blocks: TableRun | None
    is_matrix: bool


ValuesOf = Callable[[Binding], torch.Tensor | None]
"""The values of a stepped tensor, 1-D with one per element; None if there are none, which counts as zeros."""


@dataclass(frozen=True, slots=True)
class RoleOf:
    """One role in one parameter: the query rows of a fused weight, a whole FFN weight, a bias."""

    fqn: str
    role: Role
    is_bias: bool

    @property
    def block_type(self) -> BlockType:
        """The block type that the role belongs to."""
        return BLOCK_TYPE_OF[self.role]


@dataclass(frozen=True, slots=True)
class RoleStatistics:
    """Sums over all elements of one role in one unsharded parameter.

    Attributes:
        of: which.
        numel: its elements.
        sums: by name, what was asked for.
    """

    of: RoleOf
    numel: int
    sums: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class _Piece:
    """What one rank holds of a role. Ranks with equal pieces hold copies (or equally cut experts)."""

    of: RoleOf
    shard_rank: int
    start: int
    numel: int


class RoleSums:
    """Sums by role over the tensors that an optimizer steps.

    Args:
        bindings: `BlockwiseOptimizer.bindings`, on every rank.
    """

    def __init__(self, bindings: Iterable[Binding]) -> None:
        self._pieces: list[_Piece] = []
        self._runs: list[tuple[Binding, list[RolePart]]] = []
        for binding in bindings:
            runs: list[RolePart] = []
            blocks = iter(binding.table.runs)  # made from the same runs in the same order
            for placement in binding.table.placements:
                for piece, of_piece in _pieces(placement, blocks):
                    runs += [RolePart(len(self._pieces), *run) for run in of_piece]
                    self._pieces.append(piece)
            self._runs.append((binding, runs))

    def squares(self, values_of: ValuesOf) -> torch.Tensor:
        """Sums of squares of what this rank holds.

        Args:
            values_of: the values of each stepped tensor, any floating dtype.

        Returns:
            fp64 on the CPU, one for each piece held here, in a fixed order.
        """
        return self._over_runs(values_of, lambda part: torch.linalg.vector_norm(part, dtype=torch.float64).square())

    def totals(self, values_of: ValuesOf) -> torch.Tensor:
        """As `squares`, but sums of the values themselves."""
        return self._over_runs(values_of, lambda part: part.sum(dtype=torch.float64))

    @property
    def parts(self) -> list[tuple[Binding, list[RolePart]]]:
        """Per stepped tensor what it holds of each role."""
        return self._runs

    @property
    def block_types(self) -> list[BlockType]:
        """The block type of each piece held here, in the order of the sums."""
        return [piece.of.block_type for piece in self._pieces]

    def numels(self) -> torch.Tensor:
        """Elements of each piece held here, fp64."""
        return torch.tensor([float(piece.numel) for piece in self._pieces], dtype=torch.float64)

    def copies(self) -> torch.Tensor:
        """Collective over all ranks: how many ranks hold each piece that is held here, fp64."""
        held: dict[_Piece, int] = {}
        for of_rank in gather(self._pieces):
            for piece in of_rank:
                held[piece] = held.get(piece, 0) + 1
        return torch.tensor([float(held[piece]) for piece in self._pieces], dtype=torch.float64)

    def merged(self, **local: torch.Tensor) -> list[RoleStatistics]:
        """Collective over all ranks: the sums of the unsharded parameters, the same list on every rank.

        Copies are averaged, not added: what every data- or tensor-parallel rank holds whole, and tied weights. So are
        expert-parallel ranks, whose experts have the same names: a mean per element is then one over all experts, while
        ``numel`` is that of one rank.

        Args:
            **local: by name, what `squares` or `totals` returned.
        """
        mine = [(piece, [float(values[i]) for values in local.values()]) for i, piece in enumerate(self._pieces)]
        copies: dict[_Piece, list[list[float]]] = {}
        for of_rank in gather(mine):
            for piece, sums in of_rank:
                copies.setdefault(piece, []).append(sums)
        found: dict[RoleOf, tuple[int, list[float]]] = {}
        for piece, held in copies.items():
            mean = [math.fsum(column) / len(held) for column in zip(*held, strict=True)]
            numel, sums = found.get(piece.of, (0, [0.0] * len(local)))
            found[piece.of] = (numel + piece.numel, [a + b for a, b in zip(sums, mean, strict=True)])
        return [
            RoleStatistics(of, numel, dict(zip(local, sums, strict=True)))
            for of, (numel, sums) in sorted(found.items(), key=lambda item: (item[0].fqn, item[0].role.value))
        ]

    def _over_runs(self, values_of: ValuesOf, total: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        sums = torch.zeros(len(self._pieces), dtype=torch.float64)
        for binding, runs in self._runs:
            values = values_of(binding) if runs else None
            if values is not None:
                flat = values.detach().reshape(-1)
                # one copy to the host for all runs of a tensor
                parts = torch.stack([total(part.elements.of(flat)) for part in runs]).cpu()
                sums.index_add_(0, torch.tensor([part.piece for part in runs]), parts)
        return sums


def by_block_type(statistics: Sequence[RoleStatistics]) -> dict[BlockType, RoleStatistics]:
    """Add up the statistics of each block type; ``of`` is the first role that was met."""
    found: dict[BlockType, RoleStatistics] = {}
    for one in statistics:
        before = found.get(one.of.block_type)
        if before is not None:
            sums = {name: value + before.sums[name] for name, value in one.sums.items()}
            one = RoleStatistics(before.of, before.numel + one.numel, sums)
        found[one.of.block_type] = one
    return found


_Run = tuple[MultiplierRun, TableRun | None, bool]


def _pieces(placement: Placement, blocks: Iterator[TableRun]) -> list[tuple[_Piece, list[_Run]]]:
    if not placement.numel:
        return []
    spec, start = placement.spec, placement.param_start
    by_role: dict[Role, list[_Run]] = {}
    for run in runs_of_range(placement.view(), start, start + placement.numel):
        at, part = placement.flat_start + run.start, spec.parts[run.tag]
        whole = MultiplierRun(at, run.count * run.numel, run.repeat, run.repeat_stride, part.update)
        by_role.setdefault(part.role, []).append((whole, next(blocks, None), part.orthogonalize is not None))
    shard = 0 if placement.shard is None else placement.shard.rank
    return [
        (
            _Piece(
                RoleOf(spec.fqn, role, spec.structure.is_bias), shard, start, sum(r.count * r.repeat for r, *_ in runs)
            ),
            runs,
        )
        for role, runs in by_role.items()
    ]
