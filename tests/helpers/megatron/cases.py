# SPDX-License-Identifier: Apache-2.0
"""What the tables of cases in ``tests/hosts/megatron`` have in common."""

from __future__ import annotations

from collections.abc import Iterable

from tests.helpers.distributed import Outcome


def of_kinds(cases: Iterable[str], *kinds: str) -> list[str]:
    """Names of the cases of some kinds; a name begins with its kind."""
    return [name for name in cases if name.startswith(kinds)]


def is_noticed(outcome: Outcome, name: str) -> None:
    """Fail unless a case, whose oracle has a wrong multiplier, failed in the comparison of weights."""
    failure = outcome(name)
    assert failure is not None, f"{name}: a wrong multiplier went unnoticed"
    assert "parameters off by more than" in failure, failure
