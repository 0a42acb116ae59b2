# SPDX-License-Identifier: Apache-2.0
"""The error for a parameter whose rule is missing or wrong, as data: what is wrong, and the rule to write.

A problem is the same in every layer of a model, and a rule is written into a JSON, a Python call or an argument: so
`tagging.rule_hints` joins the errors of a model and writes their rules for the place.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from ds_blockwise.blocks.roles import NORM_PLACE_MEANING, ROLE_MEANING, Role

CHOOSE = "?"
"""Stands in a proposed rule for what the user has to choose. No setting allows it, so that a rule which is pasted
without a choice is refused."""

ROLE_CHOICES: dict[str, str] = {
    **{role.value: ROLE_MEANING[role] for role in Role},
    "qkv": 'rows of several of these in one weight; give "layout", "num_heads" and "num_kv_heads" beside it',
}
"""The roles that a rule may give, with one line on each."""
NORM_CHOICES: dict[str, str] = {**NORM_PLACE_MEANING, Role.NORM.value: "a norm that the settings of no place are for"}
"""What a rule may say of a norm whose place has to be known, likewise."""


def exact_pattern(fqn: str) -> str:
    """A regular expression for the parameter ``fqn`` and no other."""
    return f"^{re.escape(fqn)}$"


class RuleNeeded(ValueError):
    """A parameter whose role or heads are not known, or are known to be wrong.

    Attributes:
        problem: what is wrong, with ``{parameter}`` where the parameter is named.
        fqn: the parameter's name.
        shape: its shape; None where only the name is known.
        rule: the rule to write, without ``match``; `CHOOSE` stands for what the user has to choose. Empty: no rule
            helps alone.
        choices: for a key of ``rule``, what may be chosen, with one line on each.
    """

    def __init__(
        self,
        problem: str,
        fqn: str,
        shape: tuple[int, ...] | None = None,
        rule: Mapping[str, object] | None = None,
        choices: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        rule, choices = dict(rule or {}), choices or {}
        super().__init__(problem, fqn, shape, rule, choices)
        self.problem, self.fqn, self.shape, self.rule, self.choices = problem, fqn, shape, rule, choices

    def says(self, more: str = "") -> str:
        """What is wrong, with the parameter's name and shape, and ``more`` behind them."""
        shape = "" if self.shape is None else f" of shape {self.shape}"
        return self.problem.replace("{parameter}", f"parameter {self.fqn!r}{shape}{more}")

    def __str__(self) -> str:
        if not self.rule:
            return self.says()
        rule = json.dumps({"match": exact_pattern(self.fqn), **self.rule})
        allowed = "".join(f' ("{key}": {", ".join(options)})' for key, options in self.choices.items())
        return f'{self.says()} The rule: "rules": [{rule}]{allowed}'
