# SPDX-License-Identifier: Apache-2.0
"""Sums of split blocks: complete on every rank that holds a part, and nothing else travels."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from ds_blockwise.blocks.ranges import TensorShard
from ds_blockwise.blocks.roles import Role
from ds_blockwise.blocks.segment_table import Placement, SegmentTable, build_table, whole_placement
from ds_blockwise.kernels.update import block_sums
from ds_blockwise.parallel.reduce import LOCAL, ReductionGroups, reduce_block_sums_
from tests.helpers.counting import Operations
from tests.helpers.distributed import RankContext, run_cases
from tests.helpers.kernel_cases import spec

ROWS, COLUMNS = 6, 5
WHOLE = torch.arange(ROWS * COLUMNS, dtype=torch.float64).view(ROWS, COLUMNS).sin()
FFN = spec((ROWS, COLUMNS), Role.FFN)


def zero_window(rank: int) -> tuple[SegmentTable, torch.Tensor]:
    """Two ranks cut the flat weight in the middle of its fourth row."""
    start, end = ((0, 17), (17, 30))[rank]
    table = build_table(end - start, [Placement(FFN, None, 0, start, end - start, (17,))], shares_second_moment=True)
    return table, WHOLE.view(-1)[start:end]


def column_shard(rank: int) -> tuple[SegmentTable, torch.Tensor]:
    """Two tensor-parallel ranks hold 3 and 2 columns of every row."""
    shard = TensorShard((ROWS, COLUMNS), 1, rank, (((0, 3),), ((3, 5),)))
    table = build_table(ROWS * (3, 2)[rank], [whole_placement(FFN, shard)], shares_second_moment=True)
    return table, WHOLE[:, ((0, 3), (3, 5))[rank][0] : ((0, 3), (3, 5))[rank][1]].reshape(-1)


def count_operations(rank: int) -> None:
    """Eight tensors must not cost more operations than two, and are complete in the second step, too."""
    counts = []
    for tensors in (2, 8):
        made = [column_shard(rank) for _ in range(tensors)]
        groups = ReductionGroups(tp_group=dist.group.WORLD)
        for _ in range(2):
            sums = [block_sums(values * (i + 1), table, square=True) for i, (table, values) in enumerate(made)]
            with Operations() as operations:
                reduce_block_sums_([(s, table, groups) for s, (table, _) in zip(sums, made, strict=True)])
        counts.append(operations.names)
        for i, s in enumerate(sums):
            torch.testing.assert_close(s, WHOLE.square().sum(1) * (i + 1) ** 2)
    assert counts[0] == counts[1], counts
    assert len(counts[0]) <= 6, counts


def check(context: RankContext, how: str) -> None:
    if how == "operations":
        count_operations(context.rank)
        return
    table, values = zero_window(context.rank) if how == "zero" else column_shard(context.rank)
    world = dist.group.WORLD
    groups = ReductionGroups(dp_group=world) if how == "zero" else ReductionGroups(tp_group=world)
    travelled: list[int] = []
    original = dist.all_reduce

    def counting(tensor: torch.Tensor, *args: object, **keywords: object) -> object:
        travelled.append(tensor.numel())
        return original(tensor, *args, **keywords)

    sums = block_sums(values, table, square=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", counting)
        reduce_block_sums_([(sums, table, groups)])
    expected = WHOLE.square().sum(1)
    rows = range(ROWS) if how == "tp" else ((0, 1, 2, 3), (3, 4, 5))[context.rank]
    torch.testing.assert_close(sums[: table.num_blocks], expected[list(rows)])
    assert travelled == [1 if how == "zero" else ROWS], "one message, one number for each split block"


def test_sums_are_complete_and_only_split_blocks_travel() -> None:
    results = run_cases(check, 2, {"zero": "zero", "tp": "tp", "operations": "operations"})
    assert not [f"{name}\n{text}" for name, text in results.items() if text is not None]


def test_without_groups_nothing_is_communicated() -> None:
    """A process alone may have no process group at all."""
    table, values = zero_window(0)
    sums = block_sums(values, table, square=True)
    before = sums.clone()
    reduce_block_sums_([(sums, table, LOCAL)])
    assert torch.equal(sums, before)
