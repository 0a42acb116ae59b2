# SPDX-License-Identifier: Apache-2.0
"""A table of cases for several ranks, each a test of its own, many of them on the same processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest

from tests.helpers.distributed import Outcome, fleet_outcome


class Suite:
    """What the test files on real engines share.

    A file says ``SUITE = Suite(run_case, CASES)`` and ``outcome = SUITE.outcome()``; its tests are decorated with
    ``@SUITE.cases("kind", ...)``, take ``outcome`` and ``name``, and say ``passes(outcome, name)``.

    Args:
        run: entry of every rank, a function of a module: ``run(context, case)``.
        cases: name, which begins with its kind -> (number of ranks, case).
        per_spawn: cases on the same processes.
        slow: which names are left to ``make test-slow``.
    """

    def __init__(
        self,
        run: Callable[..., Any],
        cases: Mapping[str, tuple[int, Any]],
        *,
        per_spawn: int = 40,
        slow: Callable[[str], bool] = lambda name: False,
    ) -> None:
        self._run, self._cases, self._per_spawn, self._slow = run, cases, per_spawn, slow

    def cases(self, *kinds: str) -> pytest.MarkDecorator:
        """A test for each case whose name begins with one of the kinds; for each case if there is none."""
        chosen = [name for name in self._cases if name.startswith(kinds or ("",))]
        assert chosen, f"no case of {kinds}"
        return self.tests(chosen)

    def tests(self, chosen: Iterable[str]) -> pytest.MarkDecorator:
        """A test for each of these cases."""
        marked = [pytest.param(name, marks=pytest.mark.slow if self._slow(name) else ()) for name in chosen]
        return pytest.mark.parametrize("name", marked)

    def outcome(self) -> Any:
        """The fixture: failure text of a case by name, or None."""

        @pytest.fixture(scope="module")
        def outcome(request: pytest.FixtureRequest) -> Outcome:
            return fleet_outcome(request, self._run, self._cases, self._per_spawn)

        return outcome


def notices_a_wrong_multiplier(outcome: Outcome, name: str) -> None:
    """For a case whose oracle has a wrong multiplier: the comparison must have failed, and for that reason."""
    failure = outcome(name)
    assert failure is not None, f"{name}: a wrong multiplier went unnoticed"
    assert "parameters off by more than" in failure, failure
