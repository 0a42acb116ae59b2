# SPDX-License-Identifier: Apache-2.0
"""``make test-megatron-new``: the tests of Megatron-core's layers and optimizers under the later supported releases.

From 0.17 on pip offers Megatron-core to Python 3.12 and later only. Its code runs on 3.11 all the same, so the release
goes into a folder of its own, before that of the pinned one, which `make test` takes.
"""

from __future__ import annotations

import importlib.metadata
import sys
import time

from tests.helpers.support_page import versions
from tests.helpers.versions.overlay import Package

MEGATRON = Package("megatron-core", "Megatron-core", options=("--ignore-requires-python",))
TESTS = ("tests/hosts/megatron", "tests/hosts/deepspeed/test_tensor_parallel.py")


def tested_with(version: str) -> str:
    """Run the tests and say what came of them.

    Raises:
        RuntimeError: one fails, or another release is found first.
    """
    MEGATRON.check_found_first(version, "megatron.core")
    begin = time.monotonic()
    passed = MEGATRON.passed_tests(version, TESTS, "-n", "2", "--dist", "loadfile")
    versions.add_row(MEGATRON.title, version, passed, f'make test-megatron-new ONLY="{version}"')
    return f"{passed} tests passed in {time.monotonic() - begin:.0f} s"


def main() -> int:
    """See `Package.try_each`; without arguments, the releases after the pinned one."""
    pinned = importlib.metadata.version(MEGATRON.name)
    later = [version for version in MEGATRON.offered() if version.split(".")[:2] != pinned.split(".")[:2]]
    return MEGATRON.try_each(sys.argv[1:] or later, tested_with)


if __name__ == "__main__":
    sys.exit(main())
