# SPDX-License-Identifier: Apache-2.0
"""From a parameter's name to its role.

Decides what a weight does (query, FFN, norm, ...) from its fully qualified name, with the rules of `name_rules`. Knows
nothing of shapes, head counts or ranks.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from ds_blockwise.blocks.roles import LAYOUT_CHOICES, NormPlace, QKVLayout, Role, Storage
from ds_blockwise.blocks.rule_needed import CHOOSE, ROLE_CHOICES, RuleNeeded
from ds_blockwise.tagging.name_rules import NAME_RULES, NameRule

_COMPILED = tuple((rule, re.compile(rf"(?:^|\.)(?:{rule.module})$"), re.compile(rule.leaf)) for rule in NAME_RULES)

_WRAPPER_PREFIX = re.compile(r"^(?:module\.)+")
# PEFT puts what it wraps, and what it adds, one or two modules below the wrapped module's own name, and may do so twice
_WRAPPED = r"\.(?:base_layer|original_module|modules_to_save\.[^.]+|token_adapter)"
_INSIDE = re.compile(rf"{_WRAPPED}(?=\.|$)")
# Rows of a factor are the outputs of the adapted linear, tokens of the adapted table, or neither (``low_rank``); tokens
# may be columns. A factor of LoRA is a module for each adapter, those of others parameters of the adapter's name
_FACTOR = (
    r"\.(?P<factor>(?P<low_rank>lora_A|hada_w[12]_b|lokr_w[12](?:_[ab])?|lora_embedding_B)|(?P<columns>lora_embedding_A)"
    r"|lora_B|hada_w[12]_a|trainable_tokens_delta)(?P<module>\.[^.]+)?"
)
_ADAPTER = re.compile(rf"(?:{_WRAPPED})*(?:{_FACTOR})?$")
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
        norm_place: where a norm stands; None if the module does not say.
    """

    role: Role | None
    qkv_layout: QKVLayout | None
    is_bias: bool
    dialect: str
    headless: bool = False
    storage: Storage | None = None
    norm_place: NormPlace | None = None


def canonical_fqn(name: str) -> str:
    """Return ``name`` without what wrappers add: leading ``module.`` and every ``_orig_mod.`` of torch.compile."""
    return _WRAPPER_PREFIX.sub("", name.replace("_orig_mod.", ""))


def adapted_path(path: str) -> str:
    """The path of the module that a PEFT adapter wraps, from the path of the wrapped module or of a factor."""
    return _adapter(path)[0]


def is_low_rank_input(path: str) -> bool:
    """Whether a module path is that of a factor, such as LoRA's A, whose rows are not the layer's outputs."""
    return _adapter(path)[1]["low_rank"] is not None


def is_factor(fqn: str) -> bool:
    """Whether a parameter is a factor of a low-rank adapter, by its name."""
    path = _PEFT_PREFIX.sub("", canonical_fqn(fqn).rpartition(".")[0])
    return _adapter(path)[1]["factor"] is not None


def _adapter(path: str) -> tuple[str, re.Match[str]]:
    found = _ADAPTER.search(path)
    assert found is not None  # it matches the empty end
    return path[: found.start()], found


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
    module, adapter = _adapter(_PEFT_PREFIX.sub("", path))
    module = _INSIDE.sub("", module)
    if adapter["factor"] and not adapter["module"]:
        leaf = "weight"  # the parameter has the adapter's name
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
    storage = "in_out" if adapter["columns"] else rule.storage
    return NameMatch(rule.role, rule.qkv_layout, is_bias, rule.dialect, rule.headless, storage)


def meaning_of(read: NameMatch | NameRule) -> str:
    """The role, or the QKV layout of several, in a word for messages."""
    if read.role is not None:
        return read.role.value
    return "qkv" if read.qkv_layout in LAYOUT_CHOICES else f"qkv/{read.qkv_layout}"


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
