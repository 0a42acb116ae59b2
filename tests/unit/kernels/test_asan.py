# SPDX-License-Identifier: Apache-2.0
"""`make test-asan` itself: nothing else that runs often would notice that it no longer starts."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.spawns
def test_some_random_tables_and_a_look_under_the_sanitizer():
    """With a few seeds the command that `make test-asan` gives with all; it ends early if the sanitizer is missing."""
    # the run inside writes no page of the repository
    inherited = ("TRITON_INTERPRET", "WRITE_SUPPORT", "WRITE_RELIABILITY")
    environment = {name: value for name, value in os.environ.items() if name not in inherited}
    command = [
        sys.executable,
        "-m",
        "tests.helpers.asan",
        "tests/unit/kernels/test_cpp.py",
        "tests/unit/kernels/test_cpp_lion.py",
        "tests/unit/kernels/test_close_look.py",
        "-k",
        "tables and (17 or 44) or other_objects and compiled and sparse",
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0 and "7 passed" in done.stdout, done.stdout + done.stderr
