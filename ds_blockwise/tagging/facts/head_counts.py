# SPDX-License-Identifier: Apache-2.0
"""How many heads a weight has: from the user's rule, a host's reader, the attention module or its config."""

from __future__ import annotations

from ds_blockwise.blocks.roles import Role
from ds_blockwise.blocks.rule_needed import CHOOSE, RuleNeeded
from ds_blockwise.blocks.settings.rules import Rule
from ds_blockwise.blocks.structure import HeadGeometry
from ds_blockwise.tagging.module_facts import NUM_HEADS, generic_heads
from ds_blockwise.tagging.module_reader import READERS
from ds_blockwise.tagging.names import NameMatch
from ds_blockwise.tagging.owner_class import attention_of
from ds_blockwise.tagging.registered import RegisteredParameter


def own_heads(named: RegisteredParameter, match: NameMatch, rule: Rule | None) -> tuple[int | None, int | None, str]:
    """Heads, rows of a head and their source, for a weight of one role; no heads where it needs none.

    Raises:
        RuleNeeded: it has heads, and nothing says how many.
    """
    if match.role not in (Role.QUERY, Role.KEY, Role.VALUE) or match.is_bias or match.headless:
        return None, None, ""
    if rule is not None and rule.num_heads is not None:
        return rule.num_heads, None, f"rule {rule.match!r}"
    heads = find_heads(named)
    if heads is None:
        if match.role is Role.VALUE:
            return None, None, ""  # by default a block of values is a row, which needs no head count
        raise _no_heads(named, match)
    count = heads.num_heads if match.role is Role.QUERY else heads.num_kv_heads
    return count, heads.head_dim, heads.source


def fused_heads(named: RegisteredParameter, match: NameMatch, rule: Rule | None) -> HeadGeometry:
    """Heads of a weight that holds several attention roles.

    Raises:
        RuleNeeded: nothing says how many there are.
    """
    if rule is not None and rule.num_heads is not None:
        return HeadGeometry(rule.num_heads, rule.num_kv_heads or rule.num_heads, None, f"rule {rule.match!r}")
    # Megatron's modules count query groups, and count per tensor-parallel rank: only its reader can read them
    heads = _ask_readers(named) if match.dialect == "megatron" else find_heads(named)
    if heads is None:
        raise _no_heads(named, match)
    return heads


def _no_heads(named: RegisteredParameter, match: NameMatch) -> RuleNeeded:
    role = {"role": "qkv", "layout": match.qkv_layout} if match.role is None else {"role": match.role.value}
    kv_heads = {"num_kv_heads": CHOOSE} if match.role is None else {}
    return RuleNeeded(
        f"{{parameter}} has heads, but neither {type(attention_of(named.first)).__name__} nor its config says how many "
        f"(looked for {', '.join(NUM_HEADS)}). For a Megatron-core model import megatron_patch; otherwise give it.",
        named.fqn,
        named.shape,
        {**role, "num_heads": CHOOSE, **kv_heads},
    )


def find_heads(named: RegisteredParameter) -> HeadGeometry | None:
    """Heads as a host's reader, the attention module or its config says; None if none of them does."""
    attention = attention_of(named.first)
    if attention is None:
        return None
    return _ask_readers(named) or generic_heads(attention)


def _ask_readers(named: RegisteredParameter) -> HeadGeometry | None:
    attention = attention_of(named.first)
    if attention is None:
        return None
    return next((heads for reader in READERS if (heads := reader.heads(attention)) is not None), None)
