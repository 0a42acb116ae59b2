# SPDX-License-Identifier: Apache-2.0
"""Roles of rows: where queries, keys and values lie in each QKV layout, counted by hand on small weights."""

import json

import pytest

from ds_blockwise.blocks.roles import QKV_LAYOUTS, Role
from ds_blockwise.blocks.structure import HeadGeometry, RoleSpan, TensorStructure, fused_qkv, whole_tensor

Q, K, V, OUT = Role.QUERY, Role.KEY, Role.VALUE, Role.ATTN_OUT
GQA = HeadGeometry(num_heads=4, num_kv_heads=2, head_dim=2, source="Attention.num_heads=4")
LATENT = HeadGeometry(2, 2, 5, "Attention.num_heads=2", key_dim=3, value_dim=2, rope_dim=2)

# layout: head counts, rows, and the roles of consecutive rows as (role, rows, rows per head)
ROWS = {
    "concat": (GQA, 16, [(Q, 8, 2), (K, 4, 2), (V, 4, 2)]),
    "grouped": (GQA, 16, [(Q, 4, 2), (K, 2, 2), (V, 2, 2)] * 2),
    "grouped_gate": (GQA, 24, [(Q, 4, 2), (OUT, 4, None), (K, 2, 2), (V, 2, 2)] * 2),
    "query_gate": (GQA, 16, [(Q, 2, 2), (OUT, 2, None)] * 4),
    "key_value": (LATENT, 10, [(K, 3, 3), (V, 2, 2)] * 2),
    "key_value_concat": (GQA, 8, [(K, 4, 2), (V, 4, 2)]),
    "latent_rope": (LATENT, 7, [(V, 5, 1), (K, 2, 1)]),
}


def spans_of(rows):
    spans, at = [], 0
    for role, count, head_rows in rows:
        spans.append(RoleSpan(at, at + count, role, head_rows))
        at += count
    return tuple(spans)


def test_every_layout_has_a_table():
    """A layout without one would be split and never looked at."""
    assert set(ROWS) == set(QKV_LAYOUTS)


@pytest.mark.parametrize("layout", ROWS)
@pytest.mark.parametrize("kind", ["weight", "transposed weight", "bias"])
def test_rows_of_a_fused_weight(layout, kind):
    """A row read as another role trains at that role's rate. The bias of a fused linear has the rows of its weight."""
    heads, size, rows = ROWS[layout]
    shape, axis = {"weight": ((size, 3), 0), "transposed weight": ((3, size), 1), "bias": ((size,), 0)}[kind]
    structure = fused_qkv("w", shape, layout, heads, is_bias=kind == "bias", axis=axis)
    assert structure == TensorStructure("w", shape, axis, spans_of(rows), kind == "bias")
    assert (structure.axis_size, structure.numel_per_row) == (size, 1 if kind == "bias" else 3)


def test_rows_per_head_follow_from_the_rows_where_no_head_dim_is_given():
    """A rule gives head counts only."""
    unsaid = HeadGeometry(4, 2, None, "rule 'qkv'")
    assert fused_qkv("w", (16, 3), "grouped", unsaid, is_bias=False).spans == spans_of(ROWS["grouped"][2])
    halves = fused_qkv("w", (12, 3), "key_value", unsaid, is_bias=False)
    assert halves.spans == spans_of([(K, 3, 3), (V, 3, 3)] * 2)


BAD = {
    "rows": ((15, 3), "grouped", GQA, "has 15 rows, but 4 query heads and 2 key and value heads of 2 rows make 16"),
    "gates": ((16, 3), "grouped_gate", GQA, "4 query heads, 4 gates and 2 key and value heads of 2 rows make 24"),
    "groups": ((16, 3), "concat", HeadGeometry(3, 2, None, "rule"), "has 16 rows, but 3 query heads and 2 key"),
    "heads per group": ((14, 3), "concat", HeadGeometry(3, 2, 2, "rule"), "3 query heads do not divide into 2 query"),
    "pairs": ((10, 3), "key_value_concat", GQA, "has 10 rows, but 2 heads of 2 \\+ 2 rows .* make 8"),
}


@pytest.mark.parametrize("name", BAD)
def test_rows_that_do_not_divide_are_an_error_with_the_rule_to_write(name):
    """The error names the parameter, its shape, where the counts were read, and a rule that can be pasted."""
    shape, layout, heads, words = BAD[name]
    with pytest.raises(ValueError, match=words) as caught:
        fused_qkv("attn.qkv.weight", shape, layout, heads, is_bias=False)
    text = str(caught.value)
    assert f"'attn.qkv.weight' of shape {shape}" in text and f"({heads.source})" in text
    (rule,) = json.loads(text.partition('"rules": ')[2])
    given = {"role": "qkv", "layout": layout, "num_heads": "?", "num_kv_heads": "?"}
    assert rule == {"match": r"^attn\.qkv\.weight$", **given}


@pytest.mark.parametrize("rope_dim", [None, 0, 7])
def test_a_latent_without_the_size_of_its_rotary_key_is_an_error(rope_dim):
    """Where the latent ends cannot be seen from the shape."""
    heads = HeadGeometry(2, 2, None, "Attention.num_heads=2", rope_dim=rope_dim)
    with pytest.raises(ValueError, match=rf"'kv' of shape \(7, 3\).* must be 1 to 6, but .* is {rope_dim} .*\"value\""):
        fused_qkv("kv", (7, 3), "latent_rope", heads, is_bias=False)


def test_heads_of_a_weight_with_one_role():
    """Rows per head are counted along the block axis, whichever dimension that is."""
    assert whole_tensor("q", (8, 3), Q, is_bias=False, num_heads=4, head_dim=2).spans == (RoleSpan(0, 8, Q, 2),)
    transposed = whole_tensor("q", (3, 8), Q, is_bias=False, axis=1, num_heads=2)
    assert transposed.spans == (RoleSpan(0, 8, Q, 4),)
    assert whole_tensor("q_a", (8, 3), Q, is_bias=False, headless=True).spans == (RoleSpan(0, 8, Q, 1),)
    assert whole_tensor("o", (8, 3), OUT, is_bias=False).spans == (RoleSpan(0, 8, OUT, None),)
    for settings, words in (({"num_heads": 3}, "3 query heads"), ({"num_heads": 4, "head_dim": 3}, "heads of 3 rows")):
        with pytest.raises(ValueError, match=rf"'q' of shape \(8, 3\) has 8 rows, .*{words}.*\"role\": \"query\""):
            whole_tensor("q", (8, 3), Q, is_bias=False, **settings)


def test_shapes_that_are_no_matrix():
    """A scalar is one row; a row of a convolution's kernel is an output channel; experts are counted one by one."""
    scalar = whole_tensor("s", (), Role.OTHER, is_bias=False)
    assert (scalar.axis_size, scalar.numel_per_row, scalar.num_matrices) == (1, 1, 1)
    kernel = whole_tensor("conv", (6, 2, 5), Role.OTHER, is_bias=False)
    assert (kernel.axis_size, kernel.numel_per_row) == (6, 10)
    experts = whole_tensor("e", (3, 20), Role.FFN, is_bias=False, axis=2, matrices=(2, 3, 10))
    assert (experts.axis_size, experts.numel_per_row, experts.num_matrices) == (10, 3, 2)
    assert experts.stored_shape == (2, 3, 10) and experts.shape == (3, 20)
    heads = whole_tensor("q_norm", (4, 12), Role.NORM, is_bias=False)
    assert (heads.axis_size, heads.numel_per_row) == (4, 12)
