# SPDX-License-Identifier: Apache-2.0
"""Which norms stand before projections, behind layers and on heads: by the modules, and as runs of the models show."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from ds_blockwise import BlockwiseAdamW, tag_parameters
from ds_blockwise.blocks.roles import Role
from ds_blockwise.blocks.tagged_parameter import tags_of
from ds_blockwise.tagging.facts import norm_places as known
from tests.helpers.norm_probe import norm_places, token_inputs
from tests.helpers.tables.families import FAMILIES, build
from tests.helpers.tables.text_families import build_text

pytest.importorskip("transformers", reason="needs transformers")

OTHERS = ("CohereForCausalLM", "KimiLinearForCausalLM", "Lfm2ForCausalLM", "Lfm2MoeForCausalLM")
OTHERS += ("RecurrentGemmaForCausalLM", "BambaForCausalLM")
# norms of theirs that stand in none of the three places, or whose place depends on settings
UNTOLD = {
    "StableLm": {f"norms.{head}" for head in range(4)},  # one for each head, a module further down
    "MiniMax": {"self_attn.norm"},
    "GptOss": {"self_attn"},
    "DeepseekV2": {"q_a_layernorm", "kv_a_layernorm"},
    "DeepseekV3": {"q_a_layernorm", "kv_a_layernorm"},
    "Qwen3Next": {"linear_attn.norm"},
    "Qwen3_5": {"linear_attn.norm"},
    "Jamba": {"dt_layernorm", "b_layernorm", "c_layernorm"},
    "KimiLinearForCausalLM": {"o_norm", "kv_a_layernorm"},
    "Lfm2ForCausalLM": {"embedding_norm"},
    "Lfm2MoeForCausalLM": {"embedding_norm"},
    "BambaForCausalLM": {"mamba.norm"},
}
NOT_READ = {"Bloom", "OPT", "Mamba2"}


def norms_of(model: nn.Module) -> Iterator[tuple[str, nn.Module, str | None]]:
    """Name, module and place by the tags."""
    for name, module in model.named_modules():
        for param in module.parameters(recurse=False):
            tags = tags_of(param)
            if tags is not None and tags.block_spec.parts[0].role is Role.NORM:
                yield name, module, tags.block_spec.structure.norm_place
                break


def small(family: str) -> nn.Module:
    model = (build if family in FAMILIES else build_text)(family).eval().to_empty(device="cpu")  # some are on "meta"
    torch.manual_seed(0)
    for param in model.parameters():
        nn.init.normal_(param, std=0.05)
    for buffer in model.buffers():
        buffer.zero_()
    tag_parameters(model)
    return model


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_a_run_shows_the_same_places(family: str) -> None:
    """A table of classes may be wrong, or a new version of a model may move its norms."""
    model = small(family)
    found = list(norms_of(model))
    shown = norm_places(model, [module for _, module, _ in found], **token_inputs(model))
    told = {name: place for name, _, place in found if place is not None}
    assert {name: shown.get(module) for name, module, place in found if place is not None} == told
    untold = {name for name, _, place in found if place is None}
    if family in NOT_READ:
        assert not told
    else:
        ends = UNTOLD.get(family, set())
        assert all(any(name.endswith(end) for end in ends) for name in untold), untold
        assert all(any(name.endswith(end) for name in untold) for end in ends), "told by now"


def test_every_class_of_the_tables_was_run() -> None:
    models = [(build if family in FAMILIES else build_text)(family) for family in [*FAMILIES, *OTHERS]]
    seen = {type(module).__name__ for model in models for module in model.modules()}
    for pattern in (known._BEFORE, known._MODELS, *(classes for classes, _ in known._BEHIND)):
        for name in _alternatives(pattern.pattern):
            assert name in seen, name


def _alternatives(pattern: str) -> Iterator[str]:
    for choice in re.split(r"\|(?![^(]*\))", pattern):
        start, inner, end = re.fullmatch(r"([^(]*)(?:\(\?:([^)]*)\))?(.*)", choice).groups()  # type: ignore[union-attr]
        yield from (f"{start}{word}{end}" for word in (inner or "").split("|"))


PLACES = {"norm_in": 0.5, "norm_out": 0.0, "norm_qk": 0.25}


def test_a_setting_by_place_wins_over_norm() -> None:
    model = small("Gemma3")
    report = tag_parameters(model, weight_decay_multipliers={"norm": 7, **PLACES})
    found = {row.fqn.split(".", 3)[-1]: (row.role, row.weight_decay_multiplier) for row in report.rows}
    assert found["input_layernorm.weight"] == ("norm_in", 0.5)
    assert found["post_attention_layernorm.weight"] == found["post_feedforward_layernorm.weight"] == ("norm_out", 0.0)
    assert found["self_attn.q_norm.weight"] == ("norm_qk", 0.25)
    assert {row.block_type for row in report.rows if row.role.startswith("norm")} == {"norm"}
    assert "norm_out" in str(report)
    plain = tag_parameters(model, weight_decay_multipliers={"norm": 7})
    assert {row.weight_decay_multiplier for row in plain.rows if row.block_type == "norm"} == {7}
    assert {row.role for row in plain.rows if row.block_type == "norm"} == {"norm"}
    optimizer = BlockwiseAdamW(small("Gemma3").parameters(), betas_by_type={"norm_qk": [None, 0.99]})
    tables = [optimizer.binding_of(p).table for p in optimizer.param_groups[0]["params"]]
    groups = {run.update.beta2 for table in tables for run in table.multiplier_runs}
    assert groups == {None, 0.99}


class Own(nn.Module):
    """A user's layer, which no table knows."""

    def __init__(self) -> None:
        super().__init__()
        self.post_attention_layernorm = nn.LayerNorm(4)
        self.mlp = nn.ModuleDict({"up_proj": nn.Linear(4, 4, bias=False)})


def test_a_norm_whose_place_is_not_known_is_no_silent_exception() -> None:
    model = nn.ModuleDict({"layer": Own()})
    tag_parameters(model, weight_decay_multipliers={"norm": 0})
    with pytest.raises(ValueError, match=r"(?s)do not tell where it stands.*post_attention_layernorm.*norm_out"):
        tag_parameters(model, weight_decay_multipliers={"norm_out": 0})
    for role, expected in (("norm_in", 1.0), ("norm_out", 0.0), ("norm", 1.0)):
        rules = [{"match": "layernorm", "role": role}]
        report = tag_parameters(model, weight_decay_multipliers={"norm_out": 0}, rules=rules)
        assert {r.weight_decay_multiplier for r in report.rows if r.block_type == "norm"} == {expected}
    tag_parameters(model)
    optimizer = BlockwiseAdamW(model.parameters(), weight_decay_multipliers={"norm_out": 0})
    model["layer"].post_attention_layernorm.weight.grad = torch.ones(4)
    with pytest.raises(ValueError, match="do not tell where it stands"):
        optimizer.step()
