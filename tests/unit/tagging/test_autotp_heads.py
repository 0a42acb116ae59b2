# SPDX-License-Identifier: Apache-2.0
"""Head counts of models whose attention AutoTP cut and which keep no config, as its marks on a parameter tell them."""

import pytest
import torch
from torch import nn

from ds_blockwise import tag_parameters
from tests.helpers.tables.families import build
from tests.unit.tagging.test_families import EXPECTED, tags_of

pytest.importorskip("transformers", reason="the models are transformers' own")
pytest.importorskip("deepspeed", reason="the reader is that of DeepSpeed's AutoTP")


def split_rows(model, linear, counts):
    """Leave what AutoTP leaves on the first of two ranks: half of the rows of a linear, and local counts of heads."""
    for attention in model.modules():
        child = attention._modules.get(linear)
        if child is None:
            continue
        child.tp_world_size, child.tp_index = 2, 0
        for name, param in list(child.named_parameters(recurse=False)):
            half = nn.Parameter(torch.empty(param.shape[0] // 2, *param.shape[1:], device="meta"))
            half.ds_autotp_universal_checkpoint_meta = {
                "partition_type": "column",
                "partition_dim": 0,
                "logical_shape": tuple(param.shape),
                "original_shape": tuple(param.shape),
                "sub_param_shard_widths": [[param.shape[0] // 2] * 2],
                "partition_sizes": None,
                "replicated": False,
                "conversion": {},
            }
            setattr(child, name, half)
        for count in counts:
            setattr(attention, count, getattr(attention, count) // 2)
    return model


def test_bloom_under_autotp():
    """Its attention counts its own heads and keeps no config, and AutoTP makes that number the rank's. Taken for the
    whole model's, 144 rows do not divide into 2 heads."""
    import ds_blockwise.hosts.deepspeed.autotp  # noqa: F401 - registers its reader

    with torch.device("meta"):
        model = split_rows(build("Bloom"), "query_key_value", ("num_heads", "hidden_size"))
    assert tags_of(model) == EXPECTED["Bloom"]
    shard = model.transformer.h[0].self_attention.query_key_value.weight.block_shard
    assert (shard.global_shape, shard.local_shape) == ((144, 48), (72, 48))


def test_a_rank_without_a_head_is_refused():
    """More ranks than heads: nothing on this rank says how many there are."""
    import ds_blockwise.hosts.deepspeed.autotp  # noqa: F401 - registers its reader

    with torch.device("meta"):
        model = split_rows(build("Bloom"), "query_key_value", ("num_heads",))
    for attention in model.modules():
        if "query_key_value" in attention._modules:
            attention.num_heads = 0
            for name, param in list(attention.query_key_value.named_parameters(recurse=False)):
                empty = nn.Parameter(torch.empty(0, *param.shape[1:], device="meta"))
                said = dict(param.ds_autotp_universal_checkpoint_meta)
                said["sub_param_shard_widths"] = [[0, said["logical_shape"][0]]]
                empty.ds_autotp_universal_checkpoint_meta = said
                setattr(attention.query_key_value, name, empty)
    with pytest.raises(ValueError, match=r"BloomAttention: this tensor-parallel rank holds none of its 144 rows"):
        tag_parameters(model)
