# SPDX-License-Identifier: Apache-2.0
"""Ranks decide and fail together; a process alone decides for itself."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from ds_blockwise.parallel import agree
from ds_blockwise.parallel.reduce import LOCAL, ReductionGroups
from tests.helpers.distributed import RankContext, run_cases

CPU = torch.device("cpu")


def check(context: RankContext, what: str) -> None:
    rank = context.rank
    if what == "flags":
        assert agree.any_rank_of_all(rank == 2, CPU)
        assert not agree.any_rank_of_all(False, CPU)
        assert agree.gather(f"r{rank}") == ["r0", "r1", "r2"]
        assert agree.is_first_rank() == (rank == 0)
        assert agree.place_in(None) == (rank, 3)
    elif what == "chain":
        # a flag of rank 0 reaches rank 2, with which it shares no group, through rank 1
        pairs = [dist.new_group([0, 1]), dist.new_group([1, 2])]
        mine = {0: [pairs[0]], 1: pairs, 2: [pairs[1]]}[rank]
        assert agree.any_rank(rank == 0, [ReductionGroups(dp_group=group) for group in mine], CPU)
        assert agree.if_many(dist.new_group([rank], use_local_synchronization=True)) is None
    elif what == "peers":
        # ranks 0 and 1 share a group, 2 is alone: one message each
        pair, alone = dist.new_group([0, 1]), dist.new_group([2])
        groups = ReductionGroups(dp_group=alone if rank == 2 else pair)
        assert agree.any_peer(torch.tensor(rank == 1), groups) == (rank != 2)
        sent: list[int] = []
        with pytest.MonkeyPatch.context() as patch:
            original = dist.all_reduce
            patch.setattr(dist, "all_reduce", lambda t, **k: (sent.append(t.numel()), original(t, **k)))
            assert not agree.any_peer(torch.tensor(False), groups)
        assert sent == [1]
    elif what == "digests":
        assert agree.disagreement("a" if rank < 2 else "b", dist.group.WORLD) == [2]
        assert agree.disagreement("a", dist.group.WORLD) == []
    elif what == "errors":
        said = agree.first_error(None if rank == 0 else f"rank {rank} is full")
        assert said == ("rank 1 is full" if rank == 1 else "rank 1: rank 1 is full")
    else:
        # the failing rank raises its own error, the others raise its text: nobody waits
        def act() -> int:
            if rank == 1:
                raise OSError("no space")
            return rank

        with pytest.raises(OSError if rank == 1 else ValueError, match="no space"):
            agree.together(act)
        assert agree.together(lambda: rank) == rank


def test_three_ranks() -> None:
    results = run_cases(check, 3, {name: name for name in ("flags", "chain", "peers", "digests", "errors", "together")})
    assert not [f"{name}\n{text}" for name, text in results.items() if text is not None]


def test_a_process_alone() -> None:
    assert agree.gather(7) == [7]
    assert agree.any_rank_of_all(True, CPU) and not agree.any_rank_of_all(False, CPU)
    assert agree.any_rank(True, [LOCAL], CPU)
    assert agree.any_peer(torch.tensor(True), LOCAL) and not agree.any_peer(torch.tensor(False), LOCAL)
    assert agree.first_error("full") == "full"
    assert agree.place_in(None) == (0, 1)
    assert agree.disagreement("a", None) == []
    with pytest.raises(KeyError):
        agree.together(lambda: {}["missing"])
