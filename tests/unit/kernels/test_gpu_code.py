# SPDX-License-Identifier: Apache-2.0
"""What a GPU would run for real models, compiled without one: no spills, wide accesses, several programs at a time."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from tests.helpers import ROOT
from tests.helpers.gpu_code.mixes import MIXES

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton's wheel holds the GPU assembler on Linux only")
CAPABILITIES = (80, 90)


@pytest.fixture(scope="module")
def launches():
    """Every launch of every mix, from a process without the interpreter in which contraction is off by default."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "0"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *(path for path in sys.path if path)])
    command = [sys.executable, "-m", "tests.helpers.gpu_code", *map(str, CAPABILITIES)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {(one["mix"], one["capability"]) for one in found} == {(name, c) for name in MIXES for c in CAPABILITIES}
    return found


def test_nothing_is_spilled(launches):
    """A spilled register is read from memory for each element."""
    assert not [one for one in launches if one["spilled"]]


def test_contraction_does_not_depend_on_a_default(launches):
    """Triton 3.10 turns it off by default, and weights would change with the version."""
    assert all(one["fused"] for one in launches)


def test_bf16_is_rounded_by_the_hardware(launches):
    updates = [one for one in launches if one["kernel"] == "update_kernel" and one["capability"] == 90]
    assert {one["mix"] for one in updates if one["bf16"]} == {name for name in MIXES if "bf16" in name}
