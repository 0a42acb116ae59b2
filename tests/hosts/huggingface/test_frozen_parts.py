# SPDX-License-Identifier: Apache-2.0
"""DoRA, and a LLaVA with its tower frozen, under ZeRO-2 and ZeRO-3."""

from importlib.util import find_spec

import pytest

from tests.helpers.distributed import Outcome, passes
from tests.helpers.huggingface import finetuned
from tests.helpers.suites import Suite

_MISSING = [name for name in ("deepspeed", "transformers", "peft") if find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(_MISSING), reason="needs deepspeed, transformers and peft")


SUITE = Suite(finetuned.run_case, {name: (2, name) for name in finetuned.CASES})
outcome = SUITE.outcome()


@SUITE.cases()
def test_what_is_trained_steps_like_whole_tensors(outcome: Outcome, name: str) -> None:
    """Adapters and towers bring parameters of new kinds and shapes, and most of the model has no gradient."""
    passes(outcome, name)
