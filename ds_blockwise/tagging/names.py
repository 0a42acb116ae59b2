# SPDX-License-Identifier: Apache-2.0
"""From a parameter's name to its role.

Decides what a weight does (query, FFN, norm, ...) from its fully qualified name, with the rules of `name_rules`. Knows
nothing of shapes, head counts or ranks.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from ds_blockwise.blocks.roles import QKVLayout, Role, Storage
from ds_blockwise.blocks.rule_needed import CHOOSE, ROLE_CHOICES, RuleNeeded
from ds_blockwise.tagging.name_rules import NAME_RULES, NameRule

_COMPILED = tuple((rule, re.compile(rf"(?:^|\.)(?:{rule.module})$"), re.compile(rule.leaf)) for rule in NAME_RULES)

_WRAPPER_PREFIX = re.compile(r"^(?:module\.)+")
# PEFT puts the wrapped linear, and the two factors beside it, one or two modules below the linear's own name
_ADAPTER = re.compile(r"\.(?:base_layer|original_module|modules_to_save\.[^.]+|(?P<factor>lora_[AB])\.[^.]+)$")
_BIAS = re.compile(r"bias\d*|.*_proj_bias|[qkv]_bias")
_PEFT_PREFIX = re.compile(r"^base_model\.model\.")


@dataclass(frozen=True, slots=True)
class NameMatch:
    """What a name or a module says about a parameter: one role, or several attention roles in a QKV layout.

    Attributes:
        role: the role of the whole parameter; None if it serves several.
        qkv_layout: the row layout of a parameter with several roles; None otherwise.
        is_bias: the parameter is the bias of a linear (biases of norms are not: they are norm vectors).
        dialect: the rule table or reader that matched, for error messages and reports.
        headless: the role usually has heads, but these rows belong to none (MLA's latent projections): one block per
            row.
        storage: how the matrix is stored; None if neither the name nor the module says.
    """

    role: Role | None
    qkv_layout: QKVLayout | None
    is_bias: bool
    dialect: str
    headless: bool = False
    storage: Storage | None = None


def canonical_fqn(name: str) -> str:
    """Return ``name`` without what wrappers add: leading ``module.`` and every ``_orig_mod.`` of torch.compile."""
    return _WRAPPER_PREFIX.sub("", name.replace("_orig_mod.", ""))


def adapted_path(path: str) -> str:
    """The path of the linear that a PEFT adapter wraps, from the path of the wrapped module or of a factor."""
    return _ADAPTER.sub("", path)


def is_low_rank_input(path: str) -> bool:
    """Whether a module path is that of LoRA's A, whose rows are the low rank and not the layer's outputs."""
    adapter = _ADAPTER.search(path)
    return adapter is not None and adapter["factor"] == "lora_A"


def match_name(fqn: str) -> NameMatch | None:
    """Read a parameter's role off its fully qualified name.

    Args:
        fqn: fully qualified name as ``named_parameters()`` gives it; prefixes and modules that wrappers (DDP,
            torch.compile, PEFT) insert are ignored.

    Returns:
        What the name says; None if no naming rule matches it.

    Raises:
        RuleNeeded: several naming rules match and disagree.
    """
    path, _, leaf = canonical_fqn(fqn).rpartition(".")
    module = adapted_path(_PEFT_PREFIX.sub("", path))
    found: dict[tuple[object, ...], NameRule] = {}
    for rule, pattern, leaves in _COMPILED:
        if leaves.fullmatch(leaf) and pattern.search(module):
            found.setdefault((rule.role, rule.qkv_layout, rule.headless, rule.storage), rule)
    if not found:
        return None
    rule = next(iter(found.values()))
    if len(found) > 1:
        readings = ", ".join(f"{meaning_of(r)} ({r.dialect})" for r in found.values())
        raise RuleNeeded(
            f"{{parameter}} matches naming rules that disagree: {readings}. Give its role.",
            canonical_fqn(fqn),
            None,
            {"role": CHOOSE},
            {"role": ROLE_CHOICES},
        )
    is_bias = rule.role is not Role.NORM and is_bias_name(leaf)
    return NameMatch(rule.role, rule.qkv_layout, is_bias, rule.dialect, rule.headless, rule.storage)


def meaning_of(read: NameMatch | NameRule) -> str:
    """The role, or the QKV layout of several, in a word for messages."""
    return read.role.value if read.role else f"qkv/{read.qkv_layout}"


def is_bias_name(leaf: str) -> bool:
    """Whether a parameter's own name is that of a linear's bias; experts have ``bias0`` or ``gate_up_proj_bias``."""
    return _BIAS.fullmatch(leaf) is not None


def merge_tied(fqns: Collection[str], roles: set[Role]) -> Role:
    """Role of one parameter that is registered under several names.

    An output layer that shares its weight with the embedding counts as an embedding: block type ``emb``.

    Raises:
        RuleNeeded: the names disagree in any other way.
    """
    if roles == {Role.EMBEDDING, Role.OUTPUT}:
        return Role.EMBEDDING
    if len(roles) == 1:
        return next(iter(roles))
    raise RuleNeeded(
        f"{{parameter}} has the names {sorted(fqns)}, and by these names several roles: "
        f"{', '.join(sorted(r.value for r in roles))}. Give its role.",
        min(fqns),
        None,
        {"role": CHOOSE},
        {"role": ROLE_CHOICES},
    )
