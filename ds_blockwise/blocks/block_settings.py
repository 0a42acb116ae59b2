# SPDX-License-Identifier: Apache-2.0
"""The user's settings of blocks: multipliers, granularity and rules, checked once and then immutable.

Defaults: the ratios of arXiv 2502.19002 (Emb 10, QK 8, FFN 6, VO 4, Norm 1) in the unit of AdamW's rate, partition of
Adam-mini (arXiv 2406.16793, algorithm 2): a block is a head of Q and K, a row of any other weight. Norms depart from
it: their blocks are single elements, not the whole vector, which costs almost no memory (docs/evidence.md: its gain).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

from ds_blockwise.blocks.auto_settings import AUTO, AutoMultipliers, parse_auto
from ds_blockwise.blocks.defaults import (
    DEFAULT_GRANULARITY,
    DEFAULT_PRESET,
    GRANULARITIES,
    HEAD_ROLES,
    LR_PRESETS,
    PUBLISHED,
    PUBLISHED_GRANULARITY,
    Granularity,
)
from ds_blockwise.blocks.roles import BLOCK_TYPE_OF, BLOCK_TYPES, QKV_LAYOUTS, STORAGES, QKVLayout, Role, Storage
from ds_blockwise.blocks.rule_needed import RuleNeeded
from ds_blockwise.blocks.transfer import Transfer, parse_transfer
from ds_blockwise.values import as_count, as_mapping, as_multiplier, check_keys, if_given, suggest, unknown

_Setting = TypeVar("_Setting")
_ROLE_NAMES = tuple(role.value for role in Role)
_SETTING_KEYS = tuple(dict.fromkeys((*BLOCK_TYPES, *_ROLE_NAMES)))
_RULE_KEYS = (
    "match",
    "role",
    "layout",
    "num_heads",
    "num_kv_heads",
    "storage",
    "lr_multiplier",
    "weight_decay_multiplier",
    "granularity",
    "width",
)
_OPTIONAL = "optional"
PRESET = "preset"


def _checked(name: str, value: object, *extra: str) -> Mapping[str, object]:
    raw = as_mapping(name, value)
    check_keys(name, raw, (*_SETTING_KEYS, *extra))
    return raw


def _granularity(name: str, value: object) -> Granularity:
    if value not in GRANULARITIES:
        raise ValueError(f"{name} must be one of {', '.join(GRANULARITIES)}, got {value!r}")
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
        lr_multiplier: factor on the learning rate.
        weight_decay_multiplier: factor on the weight decay.
        granularity: size of a block.
        storage: how the matrix is stored.
        width: of the residual stream that the matrix reads or writes, for ``transfer``.
        optional: the rule may match nothing, because engines of several models share the settings.
    """

    match: str
    role: Role | None = None
    qkv_layout: QKVLayout | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    lr_multiplier: float | None = None
    weight_decay_multiplier: float | None = None
    granularity: Granularity | None = None
    storage: Storage | None = None
    width: int | None = None
    optional: bool = False

    def matches(self, fqn: str) -> bool:
        """True if the rule's regular expression is found anywhere in ``fqn``."""
        return re.search(self.match, fqn) is not None


def _parse_rule(index: int, value: object) -> Rule:
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
        if role is not None and role not in _ROLE_NAMES:
            raise ValueError(f"{name}: {unknown('role', role, (*_ROLE_NAMES, 'qkv'))}")
    storage = raw.get("storage")
    if storage is not None and storage not in STORAGES:
        raise ValueError(f"{name}.storage must be one of {', '.join(STORAGES)}, got {storage!r}")
    optional = raw.get(_OPTIONAL, False)
    if not isinstance(optional, bool):
        raise TypeError(f"{name}.optional must be true or false, got {optional!r}")
    rule = Rule(
        match=match,
        role=None if role is None else Role(role),
        qkv_layout=layout,
        num_heads=if_given(as_count, f"{name}.num_heads", raw.get("num_heads")),
        num_kv_heads=if_given(as_count, f"{name}.num_kv_heads", raw.get("num_kv_heads")),
        lr_multiplier=if_given(as_multiplier, f"{name}.lr_multiplier", raw.get("lr_multiplier")),
        weight_decay_multiplier=if_given(
            as_multiplier, f"{name}.weight_decay_multiplier", raw.get("weight_decay_multiplier")
        ),
        granularity=if_given(_granularity, f"{name}.granularity", raw.get("granularity")),
        storage=storage,
        width=if_given(as_count, f"{name}.width", raw.get("width")),
        optional=optional,
    )
    if rule == Rule(match, optional=optional):
        raise ValueError(f"{name} ({match!r}) sets nothing. Give at least one of {', '.join(_RULE_KEYS[1:])}")
    return rule


def _parse_multipliers(name: str, value: object) -> dict[str, float]:
    return {k: as_multiplier(f"{name}[{k!r}]", v) for k, v in _checked(name, value).items()}


def _parse_preset(value: object) -> tuple[str, object]:
    """The preset that ``lr_multipliers`` names, and the rest of the setting: numbers that win over the preset's."""
    names = (*LR_PRESETS, AUTO)
    if isinstance(value, str) and value != AUTO:
        value = {PRESET: value}
    if not isinstance(value, Mapping) or PRESET not in value:
        return DEFAULT_PRESET, value
    rest = {key: multiplier for key, multiplier in value.items() if key != PRESET}
    name = value[PRESET]
    if name == AUTO:
        raise ValueError('lr_multipliers["preset"] is "auto". Write {"auto": {}, ...} to measure multipliers')
    if not isinstance(name, str) or name not in LR_PRESETS:
        raise ValueError(
            f"lr_multipliers must be a mapping from block types or roles to numbers, or a preset, got {name!r}"
            f"{suggest(name, names)}. Presets: {', '.join(names)}"
        )
    return name, rest


def _parse_granularity(value: object) -> dict[str, Granularity]:
    if isinstance(value, str):
        if value != PUBLISHED:
            raise ValueError(
                f"granularity must be a mapping from block types or roles to {', '.join(GRANULARITIES)}, or "
                f'"{PUBLISHED}" (the partition of the Adam-mini paper), got {value!r}{suggest(value, [PUBLISHED])}'
            )
        return {role.value: cut for role, cut in PUBLISHED_GRANULARITY.items() if cut != DEFAULT_GRANULARITY[role]}
    return {k: _granularity(f"granularity[{k!r}]", v) for k, v in _checked("granularity", value, "bias").items()}


@dataclass(frozen=True, slots=True)
class Resolved:
    """The settings of one role in one parameter."""

    lr_multiplier: float
    weight_decay_multiplier: float
    granularity: Granularity


@dataclass(frozen=True, slots=True)
class BlockSettings:
    """The user's settings: they give each role its multipliers and block size. Equal if they set the same.

    Attributes:
        preset: key of `LR_PRESETS`: the multipliers of what ``lr_multipliers`` does not name, and the unit of ``lr``.
        lr_multipliers: factors on the learning rate by block type or role; a role wins over its block type.
        weight_decay_multipliers: factors on the weight decay, by the same keys.
        granularity: block sizes, by the same keys or ``bias``.
        rules: rules for single parameters; they win over the three maps.
        auto: how multipliers are measured; None if they are fixed.
        transfer: how learning rates follow the model's width; None if they do not.
    """

    lr_multipliers: dict[str, float] = field(default_factory=dict)
    weight_decay_multipliers: dict[str, float] = field(default_factory=dict)
    granularity: dict[str, Granularity] = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()
    auto: AutoMultipliers | None = None
    transfer: Transfer | None = None
    preset: str = DEFAULT_PRESET

    @classmethod
    def parse(
        cls,
        lr_multipliers: object = None,
        weight_decay_multipliers: object = None,
        granularity: object = None,
        rules: object = None,
        transfer: object = None,
    ) -> BlockSettings:
        """Check raw settings (a JSON's dicts and lists) and freeze them; None means the defaults.

        ``lr_multipliers`` may be a preset's name or have a key ``"preset"``: see `LR_PRESETS`. It may be ``"auto"`` or
        have a key ``"auto"``: see `AutoMultipliers`. ``granularity`` may be ``"published"``: `PUBLISHED_GRANULARITY`.

        Raises:
            ValueError: unknown key or role, a value outside its range, a bad regular expression.
            TypeError: a value of the wrong type.
        """
        preset, lr_multipliers = _parse_preset(lr_multipliers)
        auto, lr_multipliers = parse_auto(lr_multipliers, preset)
        of_lr = _parse_multipliers("lr_multipliers", lr_multipliers)
        of_weight_decay = _parse_multipliers("weight_decay_multipliers", weight_decay_multipliers)
        sizes = _parse_granularity(granularity)
        if rules is None:
            rules = ()
        if isinstance(rules, (str, Mapping)) or not isinstance(rules, Iterable):
            raise TypeError(f'rules must be a list of {{"match": ..., ...}}, got {rules!r}')
        parsed = tuple(_parse_rule(index, rule) for index, rule in enumerate(rules))
        width_rule = parse_transfer(transfer)
        if auto is not None and width_rule is not None:
            raise ValueError(
                'lr_multipliers is "auto", which measures multipliers at this model\'s width, and transfer moves those '
                "of another width here. Remove one of the two."
            )
        return cls(of_lr, of_weight_decay, sizes, parsed, auto, width_rule, preset)

    @property
    def is_default(self) -> bool:
        """True if the user set nothing."""
        return self == BlockSettings()

    @property
    def norm_multiplier(self) -> float:
        """The multiplier of a norm under the preset: what 1 of the paper's ratios is in its unit."""
        return LR_PRESETS[self.preset]["norm"]

    def with_lr_multipliers(self, multipliers: Mapping[str, object]) -> BlockSettings:
        """These settings with some multipliers replaced; rules keep theirs.

        Raises:
            ValueError, TypeError: an unknown key, a value outside its range.
        """
        checked = _parse_multipliers("lr_multipliers", multipliers)
        return replace(self, lr_multipliers={**self.lr_multipliers, **checked})

    def is_measured(self, role: Role, *names: str) -> bool:
        """Whether the multiplier of a role is measured: ``"auto"`` is set, and no key and no rule fixes it.

        Args:
            role: the role.
            names: of the parameter, all of them.
        """
        if self.auto is None or BLOCK_TYPE_OF[role] == "other":
            return False
        rule = self.rule_for(*names)
        pinned = role.value in self.lr_multipliers or BLOCK_TYPE_OF[role] in self.lr_multipliers
        return not pinned and (rule is None or rule.lr_multiplier is None)

    def rule_for(self, *names: str) -> Rule | None:
        """The user's rule for a parameter; None if no rule matches any of its names.

        Args:
            names: all names of the parameter; a tied weight has several.

        Raises:
            RuleNeeded: several rules match it, by one name or by different ones.
        """
        found = [rule for rule in self.rules if any(rule.matches(name) for name in names)]
        if len(found) > 1:
            patterns = " and ".join(repr(rule.match) for rule in found)
            also = "" if len(names) == 1 else f" (one weight, also called {', '.join(map(repr, names[1:]))})"
            raise RuleNeeded(
                f'{{parameter}}{also} is matched by {len(found)} rules: {patterns}. Change their "match" so that only '
                f"one rule matches it.",
                names[0],
            )
        return found[0] if found else None

    def unmatched_rules(self, names: Iterable[str]) -> list[Rule]:
        """The rules that match none of a model's names, although they are not optional."""
        known = list(names)
        return [rule for rule in self.rules if not rule.optional and not any(map(rule.matches, known))]

    def resolve(self, fqn: str, role: Role, is_bias: bool, other_names: tuple[str, ...] = ()) -> Resolved:
        """Settings of ``role`` in parameter ``fqn``: user rule, then role key, then block-type key, then default.

        Args:
            fqn: the parameter's name.
            role: the role.
            is_bias: bias of a linear.
            other_names: further names of the parameter, which rules may match as well.

        Raises:
            RuleNeeded: several rules match the parameter, or the granularity is not allowed for the role.
        """
        rule = self.rule_for(fqn, *other_names) or Rule(match="")
        block_type = BLOCK_TYPE_OF[role]

        def pick(own: _Setting | None, chosen: Mapping[str, _Setting], default: _Setting) -> _Setting:
            if own is not None:
                return own
            return chosen.get(role.value, chosen.get(block_type, default))

        if is_bias:
            granularity = rule.granularity or self.granularity.get("bias", "element")
        else:
            granularity = pick(rule.granularity, self.granularity, DEFAULT_GRANULARITY[role])
        if granularity == "head" and (role not in HEAD_ROLES or is_bias):
            what = "a bias" if is_bias else f"role {role.value!r}"
            raise RuleNeeded(
                f'{{parameter}}: granularity "head" is for query, key and value weights, not for {what}. '
                f'Use "row", "tensor" or "element".',
                fqn,
            )
        measured = self.auto is not None and block_type != "other"
        unset = 1.0 if measured else LR_PRESETS[self.preset][block_type]  # 1 until something is measured
        return Resolved(
            lr_multiplier=pick(rule.lr_multiplier, self.lr_multipliers, unset),
            weight_decay_multiplier=pick(rule.weight_decay_multiplier, self.weight_decay_multipliers, 1.0),
            granularity=granularity,
        )
