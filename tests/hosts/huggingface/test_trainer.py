# SPDX-License-Identifier: Apache-2.0
"""Trainer and Accelerate with nothing but a JSON and the import; PEFT and torch.compile under DeepSpeed."""

from importlib.util import find_spec

import pytest

from tests.helpers.distributed import Outcome, fleet_outcome, passes
from tests.helpers.huggingface import cases as hf_cases

_MISSING = [name for name in ("deepspeed", "transformers", "accelerate", "peft") if find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(_MISSING), reason="needs deepspeed, transformers, accelerate and peft")


@pytest.fixture(scope="module")
def outcome(request: pytest.FixtureRequest) -> Outcome:
    """Every case on two ranks of one spawn."""
    return fleet_outcome(request, hf_cases.run_case, {name: (2, name) for name in hf_cases.CASES})


@pytest.mark.parametrize("name", hf_cases.CASES)
def test_hosts_that_drive_deepspeed(outcome: Outcome, name: str) -> None:
    """Each case says in `hf_cases` what it would mean to fail."""
    passes(outcome, name)
