# SPDX-License-Identifier: Apache-2.0
"""Tags of model chunks: made anew by every conversion, with the rules that hold for its stage; the user's own stay."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import nn

from ds_blockwise import BlockwiseAdamMini, block_report, tag_parameters

pytestmark = pytest.mark.skipif(find_spec("megatron") is None, reason="needs megatron")


def chunk() -> nn.ModuleDict:
    return nn.ModuleDict({"mlp": nn.ModuleDict({"up_proj": nn.Linear(4, 3, bias=False)}), "norm": nn.LayerNorm(4)})


def tagged(models: list[nn.Module], **settings: object) -> dict[str, tuple[str, float]]:
    """What `chunks.tag` makes of two chunks for a new inner optimizer."""
    from megatron_patch import chunks

    chunks.tag(models, BlockwiseAdamMini([nn.Parameter(torch.empty(0))], **settings))
    return {row.fqn: (row.role, row.lr_multiplier) for model in models for row in block_report(model).rows}


def test_a_second_conversion_tags_anew():
    """The rules of the first one set roles, which a second one without them must not keep."""
    models = [chunk(), chunk()]
    role, of_another_stage = {"match": "up_proj", "role": "value"}, {"match": "layers.9", "lr_multiplier": 2}
    assert tagged(models, rules=[role, of_another_stage])["mlp.up_proj.weight"] == ("value", 0.5)
    assert tagged(models)["mlp.up_proj.weight"] == ("ffn", 0.75)
    assert tagged([*models, chunk()], lr_multipliers={"ffn": 2})["mlp.up_proj.weight"] == ("ffn", 2)


def test_the_users_tags_stay_and_are_not_filled_up():
    """Whoever tags one chunk tags all."""
    first, second = chunk(), chunk()
    tag_parameters(first, rules=[{"match": "up_proj", "role": "value"}])
    with pytest.raises(ValueError, match=r"'mlp\.up_proj\.weight' .* and 2 more: .*not at all \(convert_ does it\)"):
        tagged([first, second])
    tag_parameters(second, rules=[{"match": "up_proj", "role": "value"}])
    for _ in range(2):
        assert tagged([first, second])["mlp.up_proj.weight"] == ("value", 0.5)
