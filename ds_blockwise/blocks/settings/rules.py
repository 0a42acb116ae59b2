# SPDX-License-Identifier: Apache-2.0
"""One rule of the user: what parameters it matches by name, and what it sets for them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ds_blockwise.blocks.roles import NORM_PLACES, QKV_LAYOUTS, STORAGES, NormPlace, QKVLayout, Role, Storage
from ds_blockwise.blocks.settings.defaults import GRANULARITIES, NOT_ORTHOGONALIZED, ORTHOGONALIZE, Granularity
from ds_blockwise.blocks.settings.update_settings import Betas, LRMultiplier, as_betas, as_lr_multiplier
from ds_blockwise.values import as_count, as_mapping, as_multiplier, check_keys, if_given, suggest, unknown

ROLE_NAMES = tuple(role.value for role in Role)
_RULE_KEYS = (
    "match",
    "role",
    "layout",
    "num_heads",
    "num_kv_heads",
    "storage",
    "lr_multiplier",
    "weight_decay_multiplier",
    "betas",
    "granularity",
    "orthogonalize",
    "width",
)
_OPTIONAL = "optional"


def as_granularity(name: str, value: object) -> Granularity:
    """``value`` if it is a size of blocks.

    Raises:
        ValueError: it is none.
    """
    if value not in GRANULARITIES:
        raise ValueError(f"{name} must be one of {', '.join(GRANULARITIES)}, got {value!r}")
    return value


def as_orthogonalize(name: str, value: object) -> str:
    """``value`` if it is what Muon can take for one matrix, or that nothing is orthogonalised.

    Raises:
        ValueError: it is neither.
    """
    allowed = (*ORTHOGONALIZE, NOT_ORTHOGONALIZED)
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}{suggest(value, allowed)}")
    return value


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule of the user.

    Attributes:
        match: regular expression, searched anywhere in a parameter's name. The other attributes say what the rule sets
            for the parameters that it matches; None leaves it as it is.
        role: role of the whole parameter.
        qkv_layout: QKV layout of a fused weight; ``role`` is None then.
        num_heads: query heads, or the heads of the one role.
        num_kv_heads: key and value heads of a fused weight.
        lr_multiplier: factor on the learning rate; ``{"start": 1.0, "end": 0.25}`` moves it over the schedule's decay.
        weight_decay_multiplier: factor on the weight decay.
        betas: decay rates of the two moments; null for the param group's.
        granularity: size of a block.
        storage: how the matrix is stored.
        orthogonalize: what `BlockwiseMuon` takes for one matrix, or ``none``; the other optimizers do not read it.
        width: of the residual stream that the matrix reads or writes, for ``transfer``.
        norm_place: where the norm stands, if the rule's role is ``norm_in``, ``norm_out`` or ``norm_qk``; its
            ``role`` is ``norm`` then.
        optional: the rule may match nothing, because engines of several models share the settings.
    """

    match: str
    role: Role | None = None
    qkv_layout: QKVLayout | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    lr_multiplier: LRMultiplier | None = None
    weight_decay_multiplier: float | None = None
    betas: Betas | None = None
    granularity: Granularity | None = None
    storage: Storage | None = None
    orthogonalize: str | None = None
    width: int | None = None
    norm_place: NormPlace | None = None
    optional: bool = False

    def matches(self, fqn: str) -> bool:
        """True if the rule's regular expression is found anywhere in ``fqn``."""
        return re.search(self.match, fqn) is not None


def parse_rule(index: int, value: object) -> Rule:
    """Check one raw rule (a JSON's dict) and freeze it.

    Args:
        index: its place in the list, for messages.
        value: the rule.

    Raises:
        ValueError: an unknown key or role, a value outside its range, a bad regular expression, or nothing is set.
        TypeError: a value of the wrong type.
    """
    name = f"rules[{index}]"
    raw = as_mapping(name, value)
    check_keys(name, raw, (*_RULE_KEYS, _OPTIONAL))
    match = raw.get("match")
    if not isinstance(match, str) or not match:
        raise ValueError(f'{name} needs "match": a regular expression on parameter names, got {match!r}')
    try:
        re.compile(match)
    except re.error as error:
        raise ValueError(f"{name}: {match!r} is not a regular expression: {error}") from error
    role, layout = raw.get("role"), raw.get("layout")
    if role == "qkv":
        if layout not in QKV_LAYOUTS:
            raise ValueError(f'{name}: role "qkv" needs "layout": one of {", ".join(QKV_LAYOUTS)}, got {layout!r}')
        role = None
    else:
        if layout is not None:
            raise ValueError(f'{name}: "layout" goes with "role": "qkv" only, got role {role!r}')
        if role is not None and role not in (*ROLE_NAMES, *NORM_PLACES):
            raise ValueError(f"{name}: {unknown('role', role, (*ROLE_NAMES, *NORM_PLACES, 'qkv'))}")
    place = next((known for known in NORM_PLACES if role == known), None)
    storage = raw.get("storage")
    if storage is not None and storage not in STORAGES:
        raise ValueError(f"{name}.storage must be one of {', '.join(STORAGES)}, got {storage!r}")
    optional = raw.get(_OPTIONAL, False)
    if not isinstance(optional, bool):
        raise TypeError(f"{name}.optional must be true or false, got {optional!r}")
    rule = Rule(
        match=match,
        role=None if role is None else Role.NORM if place else Role(role),
        qkv_layout=layout,
        num_heads=if_given(as_count, f"{name}.num_heads", raw.get("num_heads")),
        num_kv_heads=if_given(as_count, f"{name}.num_kv_heads", raw.get("num_kv_heads")),
        lr_multiplier=if_given(as_lr_multiplier, f"{name}.lr_multiplier", raw.get("lr_multiplier")),
        weight_decay_multiplier=if_given(
            as_multiplier, f"{name}.weight_decay_multiplier", raw.get("weight_decay_multiplier")
        ),
        betas=if_given(as_betas, f"{name}.betas", raw.get("betas")),
        granularity=if_given(as_granularity, f"{name}.granularity", raw.get("granularity")),
        storage=storage,
        orthogonalize=if_given(as_orthogonalize, f"{name}.orthogonalize", raw.get("orthogonalize")),
        width=if_given(as_count, f"{name}.width", raw.get("width")),
        norm_place=place,
        optional=optional,
    )
    if rule == Rule(match, optional=optional):
        raise ValueError(f"{name} ({match!r}) sets nothing. Give at least one of {', '.join(_RULE_KEYS[1:])}")
    return rule
