# SPDX-License-Identifier: Apache-2.0
"""``make test-deepspeed-versions``: every promised release of DeepSpeed, in a folder of its own, without operators.

Each has to give the oracle's values in every ZeRO stage on two ranks, to resume bit for bit, and to save and load our
checkpoints.
"""

from __future__ import annotations

import sys
import time

from tests.helpers.support_page import versions
from tests.helpers.versions.overlay import Package

DEEPSPEED = Package(
    "deepspeed", "DeepSpeed", build=("--no-build-isolation",), every_patch=True, variables={"DS_BUILD_OPS": "0"}
)
_FOLDER = "tests/hosts/deepspeed/"
TESTS = tuple(_FOLDER + name for name in ("test_parity.py", "test_resume.py", "test_checkpoint_guard.py"))
CHOSEN = "(test_zero_stages and grid and dp2) or test_resume_is_bitwise or round_trip"


def tested_with(version: str) -> str:
    """Run the tests, and put what came of them into docs/versions.csv.

    Raises:
        RuntimeError: one fails, or another release is found first.
    """
    DEEPSPEED.check_found_first(version, "deepspeed")
    begin = time.monotonic()
    passed = DEEPSPEED.passed_tests(version, TESTS, "-k", CHOSEN, "-n", "2", "--dist", "loadfile")
    versions.add_row(DEEPSPEED.title, version, passed, f'make test-deepspeed-versions ONLY="{version}"')
    return f"{passed} tests passed in {time.monotonic() - begin:.0f} s"


if __name__ == "__main__":
    sys.exit(DEEPSPEED.try_each(sys.argv[1:], tested_with))
