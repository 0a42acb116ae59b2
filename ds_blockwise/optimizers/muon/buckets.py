# SPDX-License-Identifier: Apache-2.0
"""What a rank does in a step, bucket by bucket: data, made once by `plan`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ds_blockwise.kernels.bindings import Binding
from ds_blockwise.optimizers.muon.elements import Held
from ds_blockwise.optimizers.muon.matrices import Rectangle
from ds_blockwise.parallel.owners import Routes


@dataclass(frozen=True)
class Share:
    """What one rank holds of a matrix that is put together: elements, then a second moment for each row it touches.

    Attributes:
        rectangles: the elements, from that vector to the flattened matrix.
        rows: which rows, on the device of the exchange.
    """

    rectangles: tuple[Rectangle, ...]
    rows: torch.Tensor

    @property
    def size(self) -> int:
        """Numbers in the vector."""
        return sum(r.numel for r in self.rectangles) + self.rows.numel()


@dataclass(frozen=True)
class Form:
    """A matrix, or a shard of one, as it is stored: elements, then a second moment for each row, in one vector.

    Attributes:
        shape: ``(height, width)``.
        row_dim: the dimension that counts rows.
    """

    shape: tuple[int, int]
    row_dim: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.shape[0] * self.shape[1]

    @property
    def size(self) -> int:
        """Numbers in the vector."""
        return self.numel + self.shape[self.row_dim]


@dataclass(frozen=True)
class Trip:
    """Matrices, or shards of them, that come together in one exchange and go back in another.

    Attributes:
        routes: what travels; its things are numbers.
        held: per thing what this rank puts in of its own tensors.
        passed_on: per thing that the exchange before this one put together on this rank its number there.
        forms: per thing that this rank owns what it is.
        shares: per thing that this rank owns what each rank holds of it.
        whole: the things that this rank owns and that are whole then; of others tensor parallelism has more shards.
    """

    routes: Routes
    held: Mapping[int, Held]
    passed_on: Mapping[int, int]
    forms: Mapping[int, Form]
    shares: Mapping[int, Mapping[int, Share]]
    whole: tuple[int, ...]


@dataclass(frozen=True)
class Bucket:
    """Matrices whose memory is needed at the same time.

    Attributes:
        over_dp: brings together what data-parallel ranks hold.
        over_tp: then brings together the shards of tensor-parallel ranks.
        here: matrices that lie whole on this rank; done one after the other.
    """

    over_dp: Trip | None = None
    over_tp: Trip | None = None
    here: tuple[tuple[Form, Held], ...] = ()


@dataclass(frozen=True)
class Plan:
    """What this rank does in a step.

    Attributes:
        bindings: the stepped tensors, in the order common to all ranks.
        buckets: one after the other; the exchanges of all ranks of a group come in the same order.
    """

    bindings: tuple[Binding, ...]
    buckets: tuple[Bucket, ...]


def cut_at(loads: Iterable[torch.Tensor], limit: int) -> list[int]:
    """Lengths of the runs of a list in which no rank has more than a limit; a run has at least one member.

    Args:
        loads: of each member what it is for each rank.
        limit: of their sum.
    """
    lengths: list[int] = []
    total: torch.Tensor | None = None
    for load in loads:
        more = load if total is None else total + load
        if total is None or int(more.max()) > limit:
            lengths.append(1)
            total = load
        else:
            lengths[-1] += 1
            total = more
    return lengths


def in_order(rectangles: Sequence[Rectangle]) -> tuple[tuple[Rectangle, ...], tuple[Rectangle, ...]]:
    """Rectangles one after the other in a vector: from their first tensor to it, and from it to their second."""
    to, of, at = [], [], 0
    for r in rectangles:
        to.append(replace(r, other_start=at, other_stride=r.width))
        of.append(replace(r, start=at, stride=r.width))
        at += r.numel
    return tuple(to), tuple(of)
