# SPDX-License-Identifier: Apache-2.0
"""How the tables of cases in this folder are run: each file has ``CASES`` and ``run_case``, the entry of every rank."""

from __future__ import annotations

import pytest

from tests.helpers.distributed import Outcome, fleet_outcome


@pytest.fixture(scope="module")
def outcome(request: pytest.FixtureRequest) -> Outcome:
    """What went wrong in a case of the file's ``CASES``, by name; None if nothing did. See `fleet_outcome`."""
    file = request.module
    return fleet_outcome(request, file.run_case, file.CASES, per_spawn=getattr(file, "PER_SPAWN", 20))
