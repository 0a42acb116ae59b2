# SPDX-License-Identifier: Apache-2.0
"""Blocks of one parameter: their number and their rows, counted by hand on small weights."""

import pytest

from ds_blockwise.blocks.ranges import AxisSpan, Batch
from ds_blockwise.blocks.roles import Role
from ds_blockwise.blocks.settings.block_settings import BlockSettings
from ds_blockwise.blocks.spec import apply_settings
from ds_blockwise.blocks.structure import HeadGeometry, fused_qkv, whole_tensor

GQA = HeadGeometry(num_heads=4, num_kv_heads=2, head_dim=2, source="test")


def qkv(layout, granularity=None, *, is_bias=False):
    rows = 24 if layout == "grouped_gate" else 16
    structure = fused_qkv("qkv", (rows,) if is_bias else (rows, 3), layout, GQA, is_bias=is_bias)
    return apply_settings(structure, BlockSettings.parse(granularity=granularity))


def one(shape, role, *, granularity=None, is_bias=False, **structure):
    return apply_settings(
        whole_tensor("w", shape, role, is_bias=is_bias, **structure), BlockSettings.parse(granularity=granularity)
    )


def blocks_along_axis(spec):
    """The block id of each index of the block axis; None where elements have no block."""
    return [
        None if span.rows_per_block == 0 else span.first_block + (index - span.start) // span.rows_per_block
        for span in spec.axis_spans()
        for index in range(span.start, span.end)
    ]


WHOLE = {"query": "tensor", "key": "tensor", "value": "tensor"}
FUSED = {
    "concat, default: heads of Q and K, rows of V": (
        ("concat", None),
        [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 7, 8, 9],
    ),
    "grouped, default": (("grouped", None), [0, 0, 1, 1, 2, 2, 3, 4, 5, 5, 6, 6, 7, 7, 8, 9]),
    "grouped, a head of values is a block": (
        ("grouped", {"value": "head"}),
        [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7],
    ),
    "grouped, one block per role in all groups": (
        ("grouped", WHOLE),
        [0] * 4 + [1] * 2 + [2] * 2 + [0] * 4 + [1, 1, 2, 2],
    ),
    "grouped, values element-wise": (
        ("grouped", {"value": "element"}),
        [0, 0, 1, 1, 2, 2, None, None, 3, 3, 4, 4, 5, 5, None, None],
    ),
    "output gates are rows": (
        ("grouped_gate", {"value": "tensor"}),
        [0, 0, 1, 1, 2, 3, 4, 5, 6, 6, 7, 7, 8, 8, 9, 9, 10, 11, 12, 13, 14, 14, 7, 7],
    ),
}


@pytest.mark.parametrize("name", FUSED)
def test_blocks_of_fused_weights(name):
    """Ids count up along the rows; a block of a whole role has rows in every query group."""
    (layout, granularity), expected = FUSED[name]
    spec = qkv(layout, granularity)
    assert blocks_along_axis(spec) == expected
    ids = [block for block in expected if block is not None]
    assert spec.num_blocks == len(set(ids))
    assert spec.block_rows() == [ids.count(block) for block in range(spec.num_blocks)]


@pytest.mark.parametrize(
    ("shape", "role", "settings", "num_blocks"),
    [
        ((11, 3), Role.EMBEDDING, {}, 11),
        ((8, 3), Role.QUERY, {"num_heads": 4}, 4),
        ((4, 3), Role.KEY, {"num_heads": 2}, 2),
        ((4, 3), Role.VALUE, {"num_heads": 2}, 4),
        ((4, 3), Role.VALUE, {"num_heads": 2, "granularity": {"value": "head"}}, 2),
        ((3, 8), Role.QUERY, {"axis": 1, "num_heads": 4}, 4),
        ((8, 3), Role.QUERY, {"headless": True}, 8),
        ((8, 3), Role.FFN, {"granularity": {"ffn": "tensor"}}, 1),
        ((6, 2, 5), Role.OTHER, {}, 6),
        # element-wise: nothing to count
        ((8, 3), Role.FFN, {"granularity": {"ffn": "element"}}, 0),
        ((8,), Role.NORM, {}, 0),
        ((8,), Role.QUERY, {"is_bias": True}, 0),
        ((8, 1), Role.FFN, {}, 0),
        ((), Role.OTHER, {}, 0),
        ((8,), Role.NORM, {"granularity": "published"}, 1),
        ((8,), Role.FFN, {"is_bias": True, "granularity": {"bias": "tensor"}}, 1),
        # experts: each matrix has blocks of its own
        ((2, 6, 4), Role.FFN, {"axis": 1, "matrices": (2, 6, 4)}, 12),
        ((2, 4, 6), Role.FFN, {"axis": 2, "matrices": (2, 4, 6)}, 12),
        ((4, 12), Role.FFN, {"axis": 2, "matrices": (2, 4, 6)}, 12),
        ((2, 6, 4), Role.FFN, {"axis": 1, "matrices": (2, 6, 4), "granularity": {"ffn": "tensor"}}, 2),
    ],
)
def test_number_of_blocks(shape, role, settings, num_blocks):
    """What the report and the memory planner add up."""
    spec = one(shape, role, **settings)
    assert spec.num_blocks == num_blocks and len(spec.block_rows()) == num_blocks


def test_a_bias_has_the_multipliers_of_its_rows():
    """The bias of a fused linear: queries, keys and values at their own rates, element by element."""
    spec = qkv("concat", is_bias=True)
    assert [(p.start, p.end, p.update.lr_multiplier, p.granularity) for p in spec.parts] == [
        (0, 8, 1, "element"),
        (8, 12, 1, "element"),
        (12, 16, 0.5, "element"),
    ]
    assert spec.num_blocks == 0


def test_experts_are_handed_on_as_a_batch():
    """The ids of one matrix, and how many matrices follow each other."""
    spec = one((3, 6, 4), Role.FFN, axis=1, matrices=(3, 6, 4))
    assert spec.axis_spans() == (AxisSpan(0, 6, 0, 1, 0),)
    assert spec.batch == Batch(count=3, blocks_per_matrix=6) and spec.block_rows() == [1] * 18
    assert one((6, 4), Role.FFN).batch is None


def test_heads_that_nothing_counts_are_an_error_with_the_rule_to_write():
    """Values need no head count until the user wants a block per head."""
    with pytest.raises(ValueError) as caught:
        one((8, 3), Role.VALUE, granularity={"value": "head"})
    for words in ("'w' of shape (8, 3) (role value)", '"match": "^w$", "role": "value", "num_heads": "?"'):
        assert words in str(caught.value)
