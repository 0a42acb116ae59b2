# SPDX-License-Identifier: Apache-2.0
"""What the stages of a pipeline must agree on, though no process group of the optimizer spans them.

A rule may match parameters of one stage only, and a weight that several stages hold a copy of (a tied embedding) must
be stepped alike by all of them, or the copies drift apart. Knows no host.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ds_blockwise.blocks.settings.block_settings import BlockSettings
from ds_blockwise.blocks.tagged_parameter import is_tagged
from ds_blockwise.parallel.agree import gather

# of a param group; the last four are what Megatron-core's scheduler makes the first and the fourth of
_SETTINGS = ("lr", "betas", "eps", "weight_decay", "max_lr", "min_lr", "lr_mult", "wd_mult")


@dataclass(frozen=True)
class TiedCopy:
    """One rank's copy of a weight that several ranks hold and step by themselves.

    Attributes:
        key: what the copies have in common: the weight's name for the user, and the ranks that hold it.
        fqn: the copy's name on this rank.
        text: how it is stepped, for the message.
        facts: its blocks and multipliers, for the comparison.
        settings: of its param group, likewise; empty if this rank steps nothing of it.
    """

    key: tuple[str, tuple[int, ...]]
    fqn: str
    text: str
    facts: str
    settings: str = ""


def tied_copy(
    name: str, ranks: Iterable[int], fqn: str, param: nn.Parameter, group: Mapping[str, object] | None = None
) -> TiedCopy:
    """Describe a copy.

    Args:
        name: of the weight, the same on all ``ranks``.
        ranks: global ranks that hold a copy.
        fqn: the parameter's name on this rank.
        param: tagged, unless it is frozen.
        group: the param group that it is stepped in; None if this rank steps nothing of it.
    """
    settings = {key: group[key] for key in _SETTINGS if group is not None and key in group}
    if not (param.requires_grad and is_tagged(param)):
        return TiedCopy((name, tuple(ranks)), fqn, "frozen", "frozen")
    spec, shard = param.block_spec, param.block_shard
    parts = ", ".join(
        dict.fromkeys(f"{part.role.value} ({part.update}, granularity {part.granularity})" for part in spec.parts)
    )
    facts = repr((spec.structure.stored_shape, spec.axis, spec.parts, None if shard is None else shard.chunks))
    shown = "".join(f", {key} {value}" for key, value in settings.items())
    return TiedCopy((name, tuple(ranks)), fqn, parts + shown, facts, shown)


def check_tied(copies: Sequence[TiedCopy]) -> None:
    """Collective over all ranks: the copies of a tied weight must be stepped alike.

    Args:
        copies: those of this rank.

    Raises:
        ValueError: on every rank, naming the weight and how each copy would be stepped.
    """
    found: dict[tuple[str, tuple[int, ...]], list[tuple[int, TiedCopy]]] = {}
    for rank, others in enumerate(gather(list(copies))):
        for copy in others:
            found.setdefault(copy.key, []).append((rank, copy))
    for (name, _), held in found.items():
        ways = {copy.facts for _, copy in held}
        if len(ways) > 1 or len({copy.settings for _, copy in held if copy.settings}) > 1:
            listed = "".join(f"\n  - rank {rank} steps {copy.fqn!r} as {copy.text}" for rank, copy in held)
            raise ValueError(
                f"the copies of the tied weight {name!r} on different pipeline stages would be stepped differently and "
                f"drift apart:{listed}\nGive all of them one role and one learning rate: a rule that matches every "
                f'name above ("rules": [{{"match": "...", "role": "embedding"}}]), and the same param group.'
            )


def rules_matched(names: Iterable[str], block_settings: BlockSettings) -> list[bool]:
    """Per rule of the settings, whether it matches one of the names."""
    known = list(names)
    return [any(rule.matches(name) for name in known) for rule in block_settings.rules]


def check_rules(matched: Sequence[bool], block_settings: BlockSettings, hint: str = "") -> None:
    """Collective over all ranks: every rule that is not optional must match a parameter of some stage.

    Args:
        matched: `rules_matched` of this rank's stage.
        block_settings: the same on every rank.
        hint: a sentence about how the host names parameters.

    Raises:
        ValueError: on every rank, naming the first rule that matches nothing anywhere.
    """
    for rule, found in zip(block_settings.rules, zip(*gather(list(matched)), strict=False), strict=False):
        if not rule.optional and not any(found):
            raise ValueError(
                f"rule {rule.match!r} matches no parameter of any pipeline stage. Correct its pattern. {hint}".strip()
            )
