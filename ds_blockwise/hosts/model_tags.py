# SPDX-License-Identifier: Apache-2.0
"""Tags a model for the optimizer of one host: always anew, but the user's own tags stay.

Tags that an earlier host made are not looked at: they have the names that the parameters had in its model and the
settings of its optimizer. Knows no host.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ds_blockwise.blocks.tagged_parameter import set_tags, user_tags_of
from ds_blockwise.optimizers.base import BlockwiseOptimizer
from ds_blockwise.tagging.registered import RegisteredParameter, registered_parameters
from ds_blockwise.tagging.rule_hints import Place
from ds_blockwise.tagging.tag import is_stepped, read_tags

Named = tuple[nn.Module, Mapping[torch.Tensor, str] | None]
"""A model, and a host's own names of its parameters."""


def tag_for(
    optimizer: BlockwiseOptimizer, models: Sequence[Named], *, is_stage: bool, what_tags: str, place: Place
) -> list[nn.Parameter]:
    """Tag the trained parameters of a host's models with an optimizer's settings.

    Args:
        optimizer: its settings apply.
        models: the models that it trains.
        is_stage: they are a part of a larger model: a rule may match nothing in them.
        what_tags: the user's call that comes here, for messages.
        place: where the user writes rules, for messages.

    Returns:
        The tagged parameters; frozen ones and those without elements are left out.

    Raises:
        ValueError: as `ds_blockwise.tag_parameters`; the user tagged a part of the parameters only, or tagged them
            before the model was changed so that their tags do not fit any more.
    """
    every = [named for model, names in models for named in registered_parameters(model, names)]
    users = [named for named in every if user_tags_of(named.param) is not None and is_stepped(named)]
    if not users:
        read = [
            tags
            for model, names in models
            for tags in read_tags(model, optimizer.block_settings, names, is_stage=is_stage, place=place)
        ]
        for param, spec, shard in read:
            set_tags(param, spec, shard, by_host=True)
        return [param for param, _, _ in read]
    stepped = [named for named in every if is_stepped(named)]
    missing = [named for named in stepped if user_tags_of(named.param) is None]
    if missing:
        raise ValueError(
            f"parameter {missing[0].fqn!r} of shape {missing[0].shape} is not tagged although others are"
            f"{f', and {len(missing) - 1} more' if len(missing) > 1 else ''}: it was frozen, or not in the model, when "
            f"tag_parameters was called, or it has replaced one that was. Call tag_parameters(model) after the last "
            f"change to the model, or not at all ({what_tags} does it)."
        )
    for named in stepped:
        _take_users_tags(named, optimizer, what_tags)
    return [named.param for named in stepped]


def _take_users_tags(named: RegisteredParameter, optimizer: BlockwiseOptimizer, what_tags: str) -> None:
    tags = user_tags_of(named.param)
    assert tags is not None
    spec, shard = tags
    held = spec.shape if shard is None else shard.local_shape
    if held != named.shape:
        raise ValueError(
            f"parameter {named.fqn!r} has shape {named.shape}, but it had {held} when tag_parameters was called. Call "
            f"tag_parameters(model) after the last change to the model, or not at all ({what_tags} does it)."
        )
    set_tags(named.param, optimizer.spec_of(spec, named.fqns), shard, by_host=True)
