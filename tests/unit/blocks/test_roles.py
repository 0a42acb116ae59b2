# SPDX-License-Identifier: Apache-2.0
"""Roles, block types and QKV layouts: each list is complete, so that no role is without a multiplier."""

from ds_blockwise.blocks.roles import BLOCK_TYPE_OF, BLOCK_TYPES, LAYOUT_CHOICES, QKV_LAYOUTS, Role
from ds_blockwise.blocks.settings.defaults import DEFAULT_GRANULARITY, LR_PRESETS, PUBLISHED_GRANULARITY

# arXiv 2502.19002, section 3: what the paper calls Emb, QK, VO, FFN and Norm
PAPER = {
    "emb": {Role.EMBEDDING},
    "head": {Role.OUTPUT},
    "qk": {Role.QUERY, Role.KEY},
    "vo": {Role.VALUE, Role.ATTN_OUT},
    "ffn": {Role.FFN},
    "norm": {Role.NORM},
    "other": {Role.ROUTER, Role.OTHER},
}


def test_block_types_are_those_of_the_paper():
    """A role under another type trains at the multiplier of that type."""
    assert {kind: {r for r in Role if BLOCK_TYPE_OF[r] == kind} for kind in BLOCK_TYPES} == PAPER


def test_every_role_has_defaults():
    """A role without one would fail on the first model that has it."""
    assert all(set(multipliers) == set(BLOCK_TYPES) for multipliers in LR_PRESETS.values())
    assert set(DEFAULT_GRANULARITY) == set(PUBLISHED_GRANULARITY) == set(Role)


def test_the_layouts_that_an_error_offers_can_be_given():
    """That a layout is unknown is an answer of a naming rule, not a setting."""
    assert not set(LAYOUT_CHOICES) & set(QKV_LAYOUTS)
    assert all(set(choices) <= set(QKV_LAYOUTS) for choices in LAYOUT_CHOICES.values())
