# SPDX-License-Identifier: Apache-2.0
"""Trainer and Accelerate with nothing but a JSON and the import; PEFT and torch.compile under DeepSpeed."""

from importlib.util import find_spec

import pytest

from tests.helpers.distributed import Outcome, passes
from tests.helpers.huggingface import cases
from tests.helpers.suites import Suite

_MISSING = [name for name in ("deepspeed", "transformers", "accelerate", "peft") if find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(_MISSING), reason="needs deepspeed, transformers, accelerate and peft")


SUITE = Suite(cases.run_case, {name: (2, name) for name in cases.CASES})
outcome = SUITE.outcome()


@SUITE.cases()
def test_hosts_that_drive_deepspeed(outcome: Outcome, name: str) -> None:
    """Each case says in `cases` what it would mean to fail."""
    passes(outcome, name)
