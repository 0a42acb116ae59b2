# SPDX-License-Identifier: Apache-2.0
"""Tags on tensors: how they are read and set, and what does not count as a tag."""

import torch
from torch import nn

from ds_blockwise.blocks.ranges import TensorShard
from ds_blockwise.blocks.roles import Role
from ds_blockwise.blocks.settings.block_settings import BlockSettings
from ds_blockwise.blocks.spec import apply_settings
from ds_blockwise.blocks.structure import whole_tensor
from ds_blockwise.blocks.tagged_parameter import set_tags, tags_of

SPEC = apply_settings(whole_tensor("w", (4, 2), Role.FFN, is_bias=False), BlockSettings())


def test_tags_are_read_as_they_were_set():
    """The names of the attributes are public: benchmarks and users copy them to other tensors."""
    param, shard = nn.Parameter(torch.zeros(2, 2)), TensorShard.even((4, 2), 0, 1, 2)
    assert tags_of(param) is None
    set_tags(param, SPEC, shard)
    assert tags_of(param) is param
    assert param.block_spec is SPEC and param.block_shard is shard
    set_tags(param, SPEC, None)
    assert tags_of(param).block_shard is None


def test_an_attribute_of_another_library_is_no_tag():
    """Some library may use the name ``block_spec`` for something of its own."""
    param = nn.Parameter(torch.zeros(2))
    param.block_spec = "3x3"
    assert tags_of(param) is None


def test_torch_copies_no_tags():
    """Whoever replaces a parameter must set its tags again; if torch copied them, views would be stepped twice."""
    param = nn.Parameter(torch.zeros(4, 2))
    set_tags(param, SPEC, None)
    assert tags_of(param.detach()) is None and tags_of(param.view(2, 4)) is None
