# SPDX-License-Identifier: Apache-2.0
"""Which rows of a fused weight each tensor-parallel rank holds, and which splits are refused; counted by hand."""

import pytest

from ds_blockwise.blocks.ranges import TensorShard
from ds_blockwise.blocks.roles import Role
from ds_blockwise.blocks.structure import HeadGeometry, fused_qkv, whole_tensor
from ds_blockwise.tagging.tensor_parallel_cuts import check_cut, cut_by_role

GQA = HeadGeometry(num_heads=4, num_kv_heads=2, head_dim=2, source="test")  # rows: 8 of Q, 4 of K, 4 of V


def qkv(layout):
    return fused_qkv("qkv", (16, 3), layout, GQA, is_bias=False)


def shard(*chunks, dim=0, rows=16):
    return TensorShard((rows, 3), dim, 0, chunks)


def test_a_rank_holds_its_share_of_each_role_of_a_concatenated_weight():
    """Half of Q, then half of K, then half of V: three runs of the whole weight, not its first half."""
    cut = cut_by_role(qkv("concat"), TensorShard.even((16, 3), 0, 1, 2), "concat")
    assert cut.chunks == (((0, 4), (8, 10), (12, 14)), ((4, 8), (10, 12), (14, 16))) and cut.rank == 1


@pytest.mark.parametrize(("layout", "dim"), [("grouped", 0), ("concat", 1)])
def test_other_splits_stay_as_they_are(layout, dim):
    """A half of a grouped weight is whole groups; a row-parallel split cuts no rows."""
    even = TensorShard((16, 3), dim, 0, (((0, 8),), ((8, 16),)))
    assert cut_by_role(qkv(layout), even, layout) is even
    assert cut_by_role(qkv(layout), None, layout) is None


def test_roles_that_do_not_divide_are_an_error():
    """4 key rows on 3 ranks: the error names the parameter, its shape and what to change."""
    three = shard(((0, 6),), ((6, 11),), ((11, 16),))
    with pytest.raises(ValueError, match=r"'qkv' of shape \(16, 3\).*8, 4, 4 rows do not all divide by 3.*size that"):
        cut_by_role(qkv("concat"), three, "concat")


ALLOWED = {
    "concatenated, a share of each": ("concat", shard(((0, 4), (8, 10), (12, 14)), ((4, 8), (10, 12), (14, 16)))),
    "whole groups": ("grouped", shard(((0, 8),), ((8, 16),))),
    "uneven groups": ("grouped", shard(((0, 16),), ())),
    "columns": ("concat", shard(((0, 1),), ((1, 3),), dim=1)),
    "whole": ("concat", None),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_allowed_splits(name):
    """Each rank computes attention with whole heads; a rank may hold nothing."""
    layout, held = ALLOWED[name]
    check_cut(qkv(layout), held, layout)


REFUSED = {
    "a cut head": ("concat", ((0, 3), (8, 10), (12, 14)), "a query head of 2 rows lies on two ranks"),
    "only queries": ("concat", ((0, 8),), "not the same share of the rows of each role"),
    "another order": ("concat", ((8, 10), (0, 4), (12, 14)), "the roles are not in the order of the whole weight"),
    "half a group": ("grouped", ((0, 4),), "not whole query groups"),
    "a group without values": ("grouped", ((0, 6),), "not whole query groups"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_splits(name):
    """Rows that a rank's attention takes for others train as others, and the model is not the one of a single rank."""
    layout, rows, words = REFUSED[name]
    with pytest.raises(ValueError, match=words) as caught:
        check_cut(qkv(layout), shard(rows), layout)
    text = str(caught.value)
    first = f"{rows[0][0]} to {rows[0][1] - 1}"
    assert f"rank 0 holds rows {first}" in text and "'qkv' of shape (16, 3)" in text and "partition_config" in text


def test_weights_of_one_role():
    """Heads of separate projections must be whole; rows of other roles may be cut anywhere."""
    query = whole_tensor("q", (8, 3), Role.QUERY, is_bias=False, num_heads=2)
    check_cut(query, shard(((0, 4),), ((4, 8),), rows=8), None)
    with pytest.raises(ValueError, match=r"rank 1 .* a query head of 4 rows"):
        check_cut(query, shard(((0, 4),), ((4, 6),), rows=8), None)
    check_cut(whole_tensor("o", (8, 3), Role.FFN, is_bias=False), shard(((0, 3),), ((3, 8),), rows=8), None)
