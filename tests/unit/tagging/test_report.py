# SPDX-License-Identifier: Apache-2.0
"""The block report: blocks and state bytes counted by hand on a small attention layer with grouped queries."""

import json

import pytest
from torch import nn

from ds_blockwise import block_report, tag_parameters
from ds_blockwise.tagging.report import BlockReport, ReportRow


class Attention(nn.Module):
    """4 query heads and 2 key and value heads of 2 rows, hidden size 3."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.num_key_value_heads, self.head_dim = 4, 2, 2
        self.q_proj, self.k_proj = nn.Linear(3, 8, bias=False), nn.Linear(3, 4, bias=False)
        self.v_proj, self.o_proj = nn.Linear(3, 4), nn.Linear(8, 3, bias=False)


def model():
    return nn.ModuleDict({"self_attn": Attention(), "norm": nn.RMSNorm(3)})


ROWS = [  # name, shape, role, type, multiplier, granularity, blocks, elements
    ("self_attn.q_proj.weight", (8, 3), "query", "qk", 1, "head", 4, 24),
    ("self_attn.k_proj.weight", (4, 3), "key", "qk", 1, "head", 2, 12),
    ("self_attn.v_proj.weight", (4, 3), "value", "vo", 0.5, "row", 4, 12),
    ("self_attn.v_proj.bias", (4,), "value bias", "vo", 0.5, "element", 4, 4),
    ("self_attn.o_proj.weight", (3, 8), "attn_out", "vo", 0.5, "row", 3, 24),
    ("norm.weight", (3,), "norm", "norm", 0.125, "element", 3, 3),
]


def test_rows_and_totals():
    """fp32 momentum for each element and one fp32 value for each block, beside the two of AdamW."""
    report = tag_parameters(model())
    assert list(report.rows) == [
        ReportRow(fqn, shape, role, kind, rate, 1.0, cut, blocks, numel, 4 * (numel + blocks))
        for fqn, shape, role, kind, rate, cut, blocks, numel in ROWS
    ]
    assert report.totals == {
        "parameters": 79,
        "num_blocks": 20,
        "adam_mini_state_bytes": 4 * 99,
        "adam_mini_state_bytes_per_parameter": 4 * 99 / 79,
        "adamw_state_bytes": 8 * 79,
        "adamw_state_bytes_per_parameter": 8,
    }


def test_the_table_and_the_json_say_the_same():
    """One is for people, the other for scripts."""
    report = tag_parameters(model(), lr_multipliers={"auto": {}, "vo": 3})
    lines = str(report).splitlines()
    assert lines.pop() == 'lr x: from the preset "adamw_scale", in which lr is the rate of AdamW'
    assert len(lines) == 2 + len(ROWS) + 1 and lines[-1].startswith("total: 79 parameters, 20 blocks; ")
    assert lines[2].split() == ["self_attn.q_proj.weight", "8x3", "query", "qk", "auto", "1", "head", "4", "112"]
    assert "396 bytes (5.013 per parameter), of AdamW 632 (8.000)" in lines[-1]
    found = json.loads(json.dumps(report.to_dict()))
    assert [row["is_measured"] for row in found["parameters"]] == [True, True, False, False, False, True]
    assert found["totals"] == report.totals and found["presets"] == ["adamw_scale"]


def test_a_fused_weight_has_a_row_for_each_role():
    """A role that recurs in every query group is one row; a block of the whole role counts once."""
    fused = nn.Module()
    fused.qkv = nn.Linear(3, 16, bias=False)
    rule = {"match": "qkv", "role": "qkv", "layout": "grouped", "num_heads": 4, "num_kv_heads": 2}
    report = tag_parameters(fused, rules=[rule], granularity={"value": "tensor"})
    assert [(r.role, r.num_blocks, r.numel) for r in report.rows] == [
        ("query", 4, 24),
        ("key", 2, 12),
        ("value", 1, 12),
    ]


def test_a_model_without_tags_is_an_error_and_frozen_parameters_are_left_out():
    """A report that skipped parameters would show a smaller model."""
    untagged = model()
    untagged["self_attn"].requires_grad_(False)
    with pytest.raises(ValueError, match=r"'norm.weight' of shape \(3,\) is not tagged.*tag_parameters\(model\)"):
        block_report(untagged)
    assert [row.fqn for row in tag_parameters(untagged).rows] == ["norm.weight"]


def _row(name: str, num_blocks: int = 1) -> ReportRow:
    return ReportRow(name, (2, 2), "ffn", "ffn", 6.0, 1.0, "row", num_blocks, 4, 20)


def _names_and_times(report: BlockReport) -> list[tuple[str, str]]:
    return [(line.split()[0], line.split()[-1]) for line in str(report).splitlines()[2:-1]]


def test_equal_layers_share_their_lines():
    """Of dense and sparse layers in turns, with experts in them; one odd layer stays by itself."""
    rows = [_row("emb.weight")]
    for layer in range(8):
        inner = [f"experts.{e}.w" for e in range(4)] if layer % 2 else ["w"]
        rows += [_row(f"layers.{layer}.mlp.{name}", 1 + (layer == 7)) for name in inner]
    rows += [_row("0.weight"), _row("1.weight"), _row("head.2")]
    report = BlockReport(tuple(rows))
    assert _names_and_times(report) == [
        ("emb.weight", "1"),
        ("layers.0,2,4,6.mlp.w", "4"),
        ("layers.1,3,5.mlp.experts.0-3.w", "12"),
        ("layers.7.mlp.experts.0-3.w", "4"),
        ("0-1.weight", "2"),
        ("head.2", "1"),
    ]
    full = report.table(full=True).splitlines()
    assert [line.split()[0] for line in full[2:-1]] == [row.fqn for row in rows]
    assert full[0].split()[-1] == "bytes"
    assert full[-1] == str(report).splitlines()[-1]


def test_many_odd_layers_do_not_make_a_long_name():
    report = BlockReport(tuple(_row(f"layers.{n}.w", 1 + n % 2) for n in range(40)))
    assert _names_and_times(report) == [("layers.0,2,4,6,...,38.w", "20"), ("layers.1,3,5,7,...,39.w", "20")]


def test_nothing_is_shared_where_nothing_is_equal():
    """No column of ones beside a table without layers."""
    report = BlockReport((_row("a.weight"), _row("b.0.weight")))
    assert str(report) == report.table(full=True)
