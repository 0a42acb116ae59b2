# SPDX-License-Identifier: Apache-2.0
"""The width rule: from the shapes of a model to the factor on each learning rate, and what it refuses."""

from __future__ import annotations

import math
import re

import pytest
from torch import nn

from ds_blockwise import tag_parameters
from ds_blockwise.blocks.roles import Role
from ds_blockwise.blocks.settings.block_settings import BlockSettings
from ds_blockwise.blocks.settings.transfer import Transfer, stream_widths, width_of
from ds_blockwise.blocks.structure import HeadGeometry, TensorStructure, fused_qkv, whole_tensor
from ds_blockwise.tagging import tag as tagging

WIDTH = 8  # of the residual stream; the FFN has 20, attention 2 heads of 6


def whole(shape: tuple[int, ...], role: Role, **settings: object) -> TensorStructure:
    return whole_tensor("w", shape, role, **{"is_bias": False, **settings})


HEADS = HeadGeometry(2, 1, 6, "test")
MODEL = {
    "embedding": whole((37, WIDTH), Role.EMBEDDING),
    "output": whole((37, WIDTH), Role.OUTPUT),
    "fused": fused_qkv("qkv", (24, WIDTH), "grouped", HEADS, is_bias=False),
    "fused, stored in x out": fused_qkv("qkv", (WIDTH, 24), "concat", HEADS, is_bias=False, axis=1),
    "fused, gated": fused_qkv("qkv", (36, WIDTH), "grouped_gate", HEADS, is_bias=False),
    "attn_out": whole((WIDTH, 12), Role.ATTN_OUT),
    "up": whole((20, WIDTH), Role.FFN),
    "down": whole((WIDTH, 20), Role.FFN),
    "down, stored in x out": whole((20, WIDTH), Role.FFN, axis=1),
    "experts": whole((3, 20, WIDTH), Role.FFN, axis=1, matrices=(3, 20, WIDTH)),
    "experts, grouped": whole((3 * 20, WIDTH), Role.FFN, axis=2, matrices=(3, 20, WIDTH)),
    "router": whole((3, WIDTH), Role.ROUTER),
    "class head": whole((5, WIDTH), Role.OTHER),
}
VECTORS = {
    "norm": whole((WIDTH,), Role.NORM),
    "bias": whole((20,), Role.FFN, is_bias=True),
    "norm of heads": whole((2, 6), Role.NORM),
}


@pytest.mark.parametrize("name", MODEL)
def test_the_width_is_read_from_shapes(name: str) -> None:
    """The side of a matrix that faces the residual stream, however it is stored and cut."""
    known = stream_widths([*MODEL.values(), *VECTORS.values()])
    assert known == {WIDTH} and width_of(MODEL[name], known) == WIDTH


@pytest.mark.parametrize(
    ("role", "shape", "mup", "sqrt"),
    [
        (Role.EMBEDDING, (37, 8), 1, 0.5),
        (Role.OUTPUT, (37, 8), 0.25, 0.25),
        (Role.QUERY, (12, 8), 0.25, 0.25),
        (Role.VALUE, (6, 8), 0.25, 0.25),
        (Role.ATTN_OUT, (8, 12), 0.25, 0.25),
        (Role.FFN, (20, 8), 0.25, 0.25),
        (Role.ROUTER, (3, 8), 0.25, 0.25),
        (Role.OTHER, (5, 8), 0.25, 0.25),
        (Role.NORM, (8,), 1, 1),
        (Role.NORM, (2, 6), 1, 1),
    ],
)
def test_the_factor_at_four_times_the_base_width(role: Role, shape: tuple[int, ...], mup: float, sqrt: float) -> None:
    """The table in the documentation; biases never move."""
    structure = whole(shape, role)
    assert Transfer(2, "mup").factor(structure, role, 8) == mup
    assert Transfer(2, "sqrt").factor(structure, role, 8) == sqrt
    assert Transfer(8, "sqrt").factor(structure, role, 8) == 1
    if role is not Role.NORM:
        assert Transfer(2, "sqrt").factor(whole((12,), role, is_bias=True), role) == 1


class Layer(nn.Module):
    """A layer of which only shapes matter."""

    def __init__(self, width: int, ffn: int) -> None:
        super().__init__()
        self.self_attn = nn.ModuleDict({"o_proj": nn.Linear(width, width)})
        shapes = {"up_proj": (width, ffn), "down_proj": (ffn, width)}
        self.mlp = nn.ModuleDict({name: nn.Linear(*shape, bias=False) for name, shape in shapes.items()})


def test_a_tower_as_wide_as_the_others_ffn_needs_a_rule() -> None:
    """Both sides of the narrow tower's FFN are widths of the model: which it is, the user says."""
    model = nn.ModuleDict({"vision": Layer(4, 16), "text": Layer(16, 64)})
    transfer = {"base_width": 4}
    with pytest.raises(ValueError) as error:
        tag_parameters(model, transfer=transfer)
    assert '"transfer" needs the width of the residual stream' in str(error.value)
    proposed = re.findall(r'\{"match": (r?".*?"), "width": "\?"\}', str(error.value))
    assert len(proposed) == 2 and all("vision" in match for match in proposed)
    assert "write the width of the residual stream, a whole number" in str(error.value)
    rules = [{"match": r"vision\..*(up|down)_proj", "width": 4}]
    rates = {row.fqn: row.transfer for row in tag_parameters(model, transfer=transfer, rules=rules).rows}
    assert {name for name, factor in rates.items() if factor == 1} == {
        *(f"vision.self_attn.o_proj.{leaf}" for leaf in ("weight", "bias")),
        *(f"vision.mlp.{name}_proj.weight" for name in ("up", "down")),
        "text.self_attn.o_proj.bias",
    }
    assert {factor for factor in rates.values() if factor != 1} == {0.25}
    tag_parameters(model)  # without the rule nothing has to be known


def test_a_report_says_the_rate_and_the_factor_in_it() -> None:
    model = nn.ModuleDict({"text": Layer(16, 64)})
    report = tag_parameters(model, lr_multipliers={"ffn": 3}, transfer={"base_width": 4})
    (row,) = (row for row in report.rows if row.fqn == "text.mlp.down_proj.weight")
    assert (row.lr_multiplier, row.transfer) == (0.75, 0.25)
    assert "rates moved to this model's width: x0.25 (vo, ffn)" in str(report)
    assert "moved" not in str(tag_parameters(model))


def test_the_unsharded_width_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor-parallel rank holds a part; the rule speaks of the whole."""
    from ds_blockwise.blocks.ranges import TensorShard

    model = nn.ModuleDict({"lm_head": nn.Linear(4, 3, bias=False), "self_attn": Layer(8, 4).self_attn})
    model["self_attn"].o_proj = nn.Linear(4, 8, bias=False)
    whole_shapes = {"lm_head": (6, 4), "self_attn": (8, 8)}

    def shard(named):
        dim = 0 if "lm_head" in named.fqn else 1
        shape = whole_shapes[named.fqn.partition(".")[0]]
        half = shape[dim] // 2
        return TensorShard(shape, dim, 0, (((0, half),), ((half, 2 * half),))), False

    monkeypatch.setattr(tagging, "_shard", shard)
    rows = tag_parameters(model, transfer={"base_width": 2}).rows
    assert {row.fqn: row.transfer for row in rows} == {"lm_head.weight": 0.5, "self_attn.o_proj.weight": 0.25}


@pytest.mark.parametrize(
    ("transfer", "words"),
    [
        ({}, 'transfer needs "base_width"'),
        ({"rule": "mup"}, '"transfer": {"base_width": 256}'),
        ({"base_width": 0}, "transfer['base_width'] must be an integer >= 1, got 0"),
        ({"base_width": "256"}, "transfer['base_width'] must be an integer >= 1, got '256'"),
        ({"base_width": 256, "rule": "linear"}, "transfer['rule'] must be one of mup, sqrt, got 'linear'"),
        ({"basewidth": 256}, "transfer has an unknown key 'basewidth'; did you mean 'base_width'?"),
    ],
)
def test_a_wrong_setting_is_named(transfer: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError) as error:
        BlockSettings.parse(transfer=transfer)
    assert words in str(error.value)


def test_it_is_a_map_and_does_not_go_with_measured_multipliers() -> None:
    with pytest.raises(TypeError, match="transfer must be a mapping, got 256"):
        BlockSettings.parse(transfer=256)
    with pytest.raises(ValueError, match=r'lr_multipliers is "auto".*Remove one of the two'):
        BlockSettings.parse("auto", transfer={"base_width": 256})


def test_factors_are_powers_of_the_ratio() -> None:
    structure = whole((37, 48), Role.EMBEDDING)
    assert math.isclose(Transfer(256, "sqrt").factor(structure, Role.EMBEDDING, 48), math.sqrt(256 / 48))
