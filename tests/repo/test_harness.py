# SPDX-License-Identifier: Apache-2.0
"""The harness of the multi-process tests: it must fail loudly, name the rank, and never hang."""

from __future__ import annotations

import os
import time

import pytest
import torch

from tests.helpers import distributed
from tests.helpers.distributed import DistributedError, RankContext, run_cases, run_distributed


def _sum_of_ranks(context: RankContext, start: int) -> float:
    value = torch.tensor(float(start + context.rank))
    torch.distributed.all_reduce(value)
    return value.item() + context.rank


def _misbehave(context: RankContext, what: str) -> None:
    if context.rank == 1:
        if what == "raise":
            raise RuntimeError("the reason")
        if what == "die":
            os._exit(3)
        if what == "sleep":
            time.sleep(600)
    context.barrier()


def test_values_come_home_in_rank_order() -> None:
    """Results of ranks would be mixed up, and a comparison made with the wrong one."""
    assert run_distributed(_sum_of_ranks, 2, 10) == [21.0, 22.0]


def test_other_cases_go_on_after_a_rank_left_its_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """One failing rank would hang the run in a collective, or hide the cases that follow."""
    monkeypatch.setattr(distributed, "GRACE_S", 2.0)
    names = ("fine", "raise", "sleep", "die", "last")
    results = run_cases(_misbehave, 2, {name: name for name in names}, case_timeout=6.0)
    assert results["fine"] is None
    assert results["last"] is None
    raised, slept, died = results["raise"], results["sleep"], results["die"]
    assert raised is not None
    assert "rank 1 of 2" in raised
    assert "RuntimeError: the reason" in raised
    assert "barrier" in raised, "the stack of the rank that waits for it is missing"
    assert slept is not None
    assert "still running after 6 s" in slept
    assert "_misbehave" in slept, "the stack of the rank that is stuck is missing"
    assert died is not None
    assert "process died, exit code 3" in died


def test_a_failed_rank_raises_in_the_parent() -> None:
    """A test would pass although a rank failed."""
    with pytest.raises(DistributedError, match=r"(?s)rank 0 of 1.*the reason"):
        run_distributed(_fail, 1)


def _fail(context: RankContext) -> None:
    raise ValueError("the reason")
