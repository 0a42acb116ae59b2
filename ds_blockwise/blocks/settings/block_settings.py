# SPDX-License-Identifier: Apache-2.0
"""The user's settings of blocks: multipliers, granularity and rules, checked once and then immutable.

Defaults: the ratios of arXiv 2502.19002 (Emb 10, QK 8, FFN 6, VO 4, Norm 1) in the unit of AdamW's rate, partition of
Adam-mini (arXiv 2406.16793, algorithm 2): a block is a head of Q and K, a row of any other weight. Norms depart from
it: their blocks are single elements, not the whole vector, which costs almost no memory (docs/evidence.md: its gain).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

from ds_blockwise.blocks.roles import (
    BLOCK_TYPE_OF,
    BLOCK_TYPES,
    NORM_PLACES,
    BlockType,
    NormPlace,
    Role,
)
from ds_blockwise.blocks.rule_needed import CHOOSE, NORM_CHOICES, RuleNeeded
from ds_blockwise.blocks.settings.auto_settings import AUTO, AutoMultipliers, parse_auto
from ds_blockwise.blocks.settings.defaults import (
    DEFAULT_GRANULARITY,
    DEFAULT_ORTHOGONALIZE,
    DEFAULT_PRESET,
    GRANULARITIES,
    HEAD_ROLES,
    LR_PRESETS,
    NOT_ORTHOGONALIZED,
    ORTHOGONALIZE,
    PUBLISHED,
    PUBLISHED_GRANULARITY,
    Granularity,
    Orthogonalize,
)
from ds_blockwise.blocks.settings.rules import ROLE_NAMES, Rule, as_granularity, as_orthogonalize, parse_rule
from ds_blockwise.blocks.settings.transfer import Transfer, parse_transfer
from ds_blockwise.blocks.settings.update_settings import (
    Betas,
    LRMultiplier,
    MovingMultiplier,
    UpdateSettings,
    as_betas,
    as_lr_multiplier,
)
from ds_blockwise.values import as_mapping, as_multiplier, check_keys, suggest

_Setting = TypeVar("_Setting")
_Default = TypeVar("_Default")
_SETTING_KEYS = tuple(dict.fromkeys((*BLOCK_TYPES, *ROLE_NAMES, *NORM_PLACES)))
PRESET = "preset"


def _checked(name: str, value: object, *extra: str) -> Mapping[str, object]:
    raw = as_mapping(name, value)
    check_keys(name, raw, (*_SETTING_KEYS, *extra))
    return raw


def _parse_multipliers(name: str, value: object) -> dict[str, float]:
    return {k: as_multiplier(f"{name}[{k!r}]", v) for k, v in _checked(name, value).items()}


def _parse_lr_multipliers(value: object) -> dict[str, LRMultiplier]:
    return {k: as_lr_multiplier(f"lr_multipliers[{k!r}]", v) for k, v in _checked("lr_multipliers", value).items()}


def _parse_betas(value: object) -> dict[str, Betas]:
    return {k: as_betas(f"betas_by_type[{k!r}]", v) for k, v in _checked("betas_by_type", value).items()}


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
    return {k: as_granularity(f"granularity[{k!r}]", v) for k, v in _checked("granularity", value, "bias").items()}


@dataclass(frozen=True, slots=True)
class Resolved:
    """The settings of one role in one parameter."""

    update: UpdateSettings
    granularity: Granularity
    orthogonalize: Orthogonalize | None = None
    by_rule: bool = False  # a rule asked for that


@dataclass(frozen=True, slots=True)
class BlockSettings:
    """The user's settings: they give each role its multipliers and block size. Equal if they set the same.

    Attributes:
        preset: key of `LR_PRESETS`: the multipliers of what ``lr_multipliers`` does not name, and the unit of ``lr``.
        lr_multipliers: factors on the learning rate by block type or role, some of them moving over the run; a role
            wins over its block type.
        weight_decay_multipliers: factors on the weight decay, by the same keys.
        granularity: block sizes, by the same keys or ``bias``.
        rules: rules for single parameters; they win over the maps.
        auto: how multipliers are measured; None if they are fixed.
        orthogonalize: what is one matrix, by the same keys; None where nothing is orthogonalised (all but Muon).
        transfer: how learning rates follow the model's width; None if they do not.
        betas_by_type: decay rates of the moments, by the keys of the multipliers.
    """

    lr_multipliers: dict[str, LRMultiplier] = field(default_factory=dict)
    weight_decay_multipliers: dict[str, float] = field(default_factory=dict)
    granularity: dict[str, Granularity] = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()
    auto: AutoMultipliers | None = None
    transfer: Transfer | None = None
    preset: str = DEFAULT_PRESET
    betas_by_type: dict[str, Betas] = field(default_factory=dict)
    orthogonalize: dict[str, str] | None = None

    @classmethod
    def parse(
        cls,
        lr_multipliers: object = None,
        weight_decay_multipliers: object = None,
        granularity: object = None,
        rules: object = None,
        transfer: object = None,
        betas_by_type: object = None,
        *,
        orthogonalize: object = None,
    ) -> BlockSettings:
        """Check raw settings (a JSON's dicts and lists) and freeze them; None means the defaults.

        ``lr_multipliers`` may be a preset's name or have a key ``"preset"``: see `LR_PRESETS`. It may be ``"auto"`` or
        have a key ``"auto"``: see `AutoMultipliers`. ``granularity`` may be ``"published"``: `PUBLISHED_GRANULARITY`.
        Without ``orthogonalize`` nothing is orthogonalised; ``{}`` means its defaults.

        Raises:
            ValueError: unknown key or role, a value outside its range, a bad regular expression.
            TypeError: a value of the wrong type.
        """
        preset, lr_multipliers = _parse_preset(lr_multipliers)
        auto, lr_multipliers = parse_auto(lr_multipliers, preset)
        of_lr = _parse_lr_multipliers(lr_multipliers)
        of_weight_decay = _parse_multipliers("weight_decay_multipliers", weight_decay_multipliers)
        sizes = _parse_granularity(granularity)
        if rules is None:
            rules = ()
        if isinstance(rules, (str, Mapping)) or not isinstance(rules, Iterable):
            raise TypeError(f'rules must be a list of {{"match": ..., ...}}, got {rules!r}')
        parsed = tuple(parse_rule(index, rule) for index, rule in enumerate(rules))
        width_rule = parse_transfer(transfer)
        if auto is not None and width_rule is not None:
            raise ValueError(
                'lr_multipliers is "auto", which measures multipliers at this model\'s width, and transfer moves those '
                "of another width here. Remove one of the two."
            )
        betas = _parse_betas(betas_by_type)
        found = cls(of_lr, of_weight_decay, sizes, parsed, auto, width_rule, preset, betas)
        return found if orthogonalize is None else found.with_orthogonalize(orthogonalize)

    @property
    def is_default(self) -> bool:
        """True if the user set nothing."""
        return self == BlockSettings()

    @property
    def names_norm_places(self) -> bool:
        """Whether a setting is for norms in one place only, so that the place of every norm has to be known."""
        maps = (self.lr_multipliers, self.weight_decay_multipliers, self.granularity, self.betas_by_type)
        return any(place in given for given in maps for place in NORM_PLACES)

    @property
    def moves(self) -> bool:
        """Whether a multiplier changes over the run."""
        given = (*self.lr_multipliers.values(), *(rule.lr_multiplier for rule in self.rules))
        return any(isinstance(multiplier, MovingMultiplier) for multiplier in given)

    @property
    def norm_multiplier(self) -> float:
        """The multiplier of a norm under the preset: what 1 of the paper's ratios is in its unit."""
        return LR_PRESETS[self.preset]["norm"]

    def lr_multiplier_of(self, block_type: BlockType) -> LRMultiplier:
        """The multiplier of a block type where no role and no rule has another; of a measured one the preset's."""
        return self.lr_multipliers.get(block_type, LR_PRESETS[self.preset][block_type])

    def with_lr_multipliers(self, multipliers: Mapping[str, object]) -> BlockSettings:
        """These settings with some multipliers replaced; rules keep theirs.

        Raises:
            ValueError, TypeError: an unknown key, a value outside its range.
        """
        checked = _parse_multipliers("lr_multipliers", multipliers)
        return replace(self, lr_multipliers={**self.lr_multipliers, **checked})

    def with_orthogonalize(self, value: object) -> BlockSettings:
        """These settings with the setting ``orthogonalize`` as the user wrote it; None: the defaults.

        Raises:
            ValueError: an unknown key or value; ``head`` for a role that has no heads.
            TypeError: it is no mapping.
        """
        checked = {}
        for key, how in _checked("orthogonalize", value).items():
            name = f"orthogonalize[{key!r}]"
            checked[key] = as_orthogonalize(name, how)
            with_heads = {*(role.value for role in HEAD_ROLES), *(BLOCK_TYPE_OF[role] for role in HEAD_ROLES)}
            if how == "head" and key not in with_heads:
                raise ValueError(f'{name}: "head" is for query, key and value weights. Use "role", "matrix" or "none"')
        return replace(self, orthogonalize=checked)

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

    def resolve(
        self,
        fqn: str,
        role: Role,
        is_bias: bool,
        other_names: tuple[str, ...] = (),
        norm_place: NormPlace | None = None,
    ) -> Resolved:
        """Settings of ``role`` in parameter ``fqn``: user rule, then role key, then block-type key, then default.

        Args:
            fqn: the parameter's name.
            role: the role.
            is_bias: bias of a linear.
            other_names: further names of the parameter, which rules may match as well.
            norm_place: where a norm stands; its key wins over the role's.

        Raises:
            RuleNeeded: several rules match the parameter, the granularity is not allowed for the role, or a setting is
                for norms in one place and nothing tells where this one stands.
        """
        rule = self.rule_for(fqn, *other_names) or Rule(match="")
        if role is Role.NORM and norm_place is None and rule.role is None and self.names_norm_places:
            raise RuleNeeded(
                "a setting is for norms in one place, and the modules around {parameter} do not tell where it stands. "
                "Say it.",
                fqn,
                None,
                {"role": CHOOSE},
                {"role": NORM_CHOICES},
            )
        block_type = BLOCK_TYPE_OF[role]

        def pick(own: _Setting | None, chosen: Mapping[str, _Setting], default: _Default) -> _Setting | _Default:
            if own is not None:
                return own
            keys = (role.value if norm_place is None else norm_place, role.value, block_type)
            return next((chosen[key] for key in keys if key in chosen), default)

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
        how, by_rule = None, False
        if self.orthogonalize is not None and not is_bias:
            how = pick(rule.orthogonalize, self.orthogonalize, DEFAULT_ORTHOGONALIZE.get(role, NOT_ORTHOGONALIZED))
            by_rule = rule.orthogonalize is not None
        measured = self.auto is not None and block_type != "other"
        unset = 1.0 if measured else LR_PRESETS[self.preset][block_type]  # 1 until something is measured
        update = UpdateSettings.of(
            pick(rule.lr_multiplier, self.lr_multipliers, unset),
            pick(rule.weight_decay_multiplier, self.weight_decay_multipliers, 1.0),
            pick(rule.betas, self.betas_by_type, None),
        )
        orthogonalize = next((each for each in ORTHOGONALIZE if each == how), None)
        return Resolved(update, granularity, orthogonalize, by_rule)
