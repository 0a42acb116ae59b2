# SPDX-License-Identifier: Apache-2.0
"""One step of all matrices: bucket by bucket momentum to the owners, updates back, weights changed, memory freed.

Every matrix is multiplied as a whole on one rank, so no bit depends on the number of ranks, nor on the buckets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ds_blockwise.optimizers.muon.buckets import Bucket, Form, Plan, Share, Trip
from ds_blockwise.optimizers.muon.elements import Elements, Held

Direct = Callable[[torch.Tensor, torch.Tensor, int], None]
"""Replaces a matrix as it is stored by its update; its rows' second moments, which it changes too, and the dimension
of rows are given beside it."""


def step_matrices_(plan: Plan, elements: Sequence[Elements], direct: Direct) -> None:
    """Update momentum, second moments and weights of matrices; a collective over the groups in the plan.

    Args:
        plan: see `Plan`.
        elements: per stepped tensor of the plan.
        direct: see `Direct`.
    """
    for bucket in plan.buckets:
        _step_bucket_(bucket, elements, direct)


def _step_bucket_(bucket: Bucket, elements: Sequence[Elements], direct: Direct) -> None:
    trips: list[_Moving] = []
    for trip in (bucket.over_dp, bucket.over_tp):
        if trip is not None:
            trips.append(_Moving(trip, trips[-1] if trips else None))
            trips[-1].go(elements)
    # after the first exchange: until then ranks with less of this would wait for those with more
    for form, held in bucket.here:
        _step_here_(form, held, elements, direct)
    for moving in trips:
        for thing in moving.trip.whole:
            vector = moving.joined(thing)
            _direct_(moving.trip.forms[thing], vector, direct)
            moving.cut_(thing, vector)
    for moving in reversed(trips):
        moving.come_back(elements)


def _step_here_(form: Form, held: Held, elements: Sequence[Elements], direct: Direct) -> None:
    of = elements[held.binding]
    if not of.has_gradient:
        return
    vector = of.new_vector(form.size)
    of.take_(held, vector)
    _direct_(form, vector, direct)
    of.put_(held, vector)


def _direct_(form: Form, vector: torch.Tensor, direct: Direct) -> None:
    direct(vector[: form.numel].view(form.shape), vector[form.numel :], form.row_dim)


class _Moving:
    """A trip under way, with the memory of both exchanges.

    Args:
        trip: what travels.
        before: the trip over data-parallel ranks, of one over tensor-parallel ranks.
    """

    def __init__(self, trip: Trip, before: _Moving | None) -> None:
        self.trip, self.before = trip, before
        self.sent, self.own = trip.routes.own_parts()

    def go(self, elements: Sequence[Elements]) -> None:
        """Bring all parts to the owners."""
        for thing, held in self.trip.held.items():
            elements[held.binding].take_(held, self.own[thing])
        for thing, number in self.trip.passed_on.items():
            assert self.before is not None, "shards come from the exchange before"
            self.before.joined(number, self.own[thing])
        self.arrived, self.parts = self.trip.routes.to_owners(self.sent)

    def joined(self, thing: int, into: torch.Tensor | None = None) -> torch.Tensor:
        """What this rank owns, from the parts of all ranks; see `Form`."""
        form = self.trip.forms[thing]
        vector = self.sent.new_empty(form.size) if into is None else into
        vector[form.numel :] = 0
        for rank, part in self.parts[thing].items():
            _join_(self.trip.shares[thing][rank], part, vector[: form.numel], vector[form.numel :])
        return vector

    def cut_(self, thing: int, vector: torch.Tensor) -> None:
        """The inverse of `joined`."""
        numel = self.trip.forms[thing].numel
        for rank, part in self.parts[thing].items():
            _cut_(self.trip.shares[thing][rank], part, vector[:numel], vector[numel:])

    def come_back(self, elements: Sequence[Elements]) -> None:
        """Bring all parts back, and use them."""
        self.trip.routes.back_(self.sent, self.arrived)
        for thing, number in self.trip.passed_on.items():
            assert self.before is not None, "shards go to the exchange before"
            self.before.cut_(number, self.own[thing])
        for thing, held in self.trip.held.items():
            elements[held.binding].put_(held, self.own[thing])


def _join_(share: Share, part: torch.Tensor, matrix: torch.Tensor, second: torch.Tensor) -> None:
    for r in share.rectangles:
        r.of_other(matrix).copy_(r.of(part))
    # a rank without state of a row that it shares has 0
    second[share.rows] = torch.maximum(second[share.rows], part[part.numel() - share.rows.numel() :])


def _cut_(share: Share, part: torch.Tensor, matrix: torch.Tensor, second: torch.Tensor) -> None:
    for r in share.rectangles:
        r.of(part).copy_(r.of_other(matrix))
    part[part.numel() - share.rows.numel() :] = second[share.rows]
