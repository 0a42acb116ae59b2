# SPDX-License-Identifier: Apache-2.0
"""Where the norms of a model stand, seen while it runs: what fed their input, and what their output feeds.

Knows no names. A tensor is recognised by its memory, which views of it share.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ds_blockwise.blocks.roles import Role
from ds_blockwise.blocks.tagged_parameter import tags_of


def norm_places(model: nn.Module, norms: list[nn.Module], **inputs: Tensor) -> dict[nn.Module, str | None]:
    """``norm_in``, ``norm_out`` or ``norm_qk`` of each norm that ran; None where the run does not tell.

    A norm whose input is what a query or key projection computed is ``norm_qk``. One whose output a matrix multiplies
    is ``norm_in``, unless its input is what attention or an FFN computed. If that input is, and no matrix takes the
    output, it is ``norm_out``.

    Args:
        model: tagged, with real weights.
        norms: modules of it.
        inputs: of its forward.
    """
    events: list[tuple[nn.Module, list[Tensor], list[Tensor]]] = []

    def record(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        events.append((module, list(_tensors([args, kwargs])), list(_tensors(output))))

    hooks = [m.register_forward_hook(record, with_kwargs=True) for m in model.modules()]
    try:
        model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    # tables and whole layers, which hold norms, give the residual stream; attention may hold norms of its heads
    wide = {m for m in model.modules() if any(p.dim() > 1 for p in m.parameters())}
    streams = {m for m in wide if isinstance(m, nn.Embedding) or any(child in norms for child in _below(m, norms))}
    places: dict[nn.Module, str | None] = {}
    for at, (norm, taken, given) in enumerate(events):
        if norm not in norms or not taken or not given:
            continue
        places[norm] = _place(norm, _memory(taken[0]), _memory(given[0]), events, at, wide, streams)
    return places


def _below(module: nn.Module, norms: list[nn.Module]) -> Iterator[nn.Module]:
    """The norms of a module as wide as its output: those of heads are in attention, which is no layer."""
    yield from (child for child in module.children() if child in norms and not _has_heads(module))
    for child in module.children():
        yield from _below(child, norms)


def _has_heads(module: nn.Module) -> bool:
    return any(_is_query_or_key(child) for child in module.children())


def _place(
    norm: nn.Module,
    source: int,
    result: int,
    events: list[Any],
    at: int,
    wide: set[nn.Module],
    streams: set[nn.Module],
) -> str | None:
    makers = [module for module, _, given in events[:at] if module in wide and source in map(_memory, given)]
    if any(module in streams for module in makers):
        makers = []
    if any(_is_query_or_key(module) for module in makers):
        return "norm_qk"
    feeds = any(module in wide and result in map(_memory, taken) for module, taken, _ in events if module is not norm)
    if makers and not feeds:
        return "norm_out"
    return "norm_in" if feeds and not makers else None


def _is_query_or_key(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    tags = None if weight is None else tags_of(weight)
    return tags is not None and any(part.role in (Role.QUERY, Role.KEY) for part in tags.block_spec.parts)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.numel() else 0


def token_inputs(model: nn.Module, length: int = 6) -> dict[str, Tensor]:
    """A few random tokens, for a decoder's forward."""
    generator = torch.Generator().manual_seed(0)
    return {"input_ids": torch.randint(1, 60, (1, length), generator=generator)}
