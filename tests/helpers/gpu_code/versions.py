# SPDX-License-Identifier: Apache-2.0
"""``make test-triton-versions``: every kernel of every mix, compiled by each Triton from the oldest promised one on.

A wheel is installed into a folder of its own, beside torch and without it; no GPU is needed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time

from tests.helpers import ROOT
from tests.helpers.versions.overlay import Package

TRITON = Package("triton", "Triton", build=("--only-binary", ":all:"))
CAPABILITIES = ("80", "90")
# bytes a thread: assemblers differ (3.7.1: 40 for sm_80); the pinned one may spill nothing (`make test`)
MOST_SPILLED = 48


def compiled_by(version: str) -> str:
    """Compile everything anew and say what came of it.

    Raises:
        RuntimeError: a kernel does not compile, or its code spills more than `MOST_SPILLED`.
    """
    environment = {name: value for name, value in TRITON.before(version).items() if name != "TRITON_INTERPRET"}
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, "-m", "tests.helpers.gpu_code", *CAPABILITIES],
            env={**environment, "TRITON_CACHE_DIR": cache},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    launches = [json.loads(line) for line in done.stdout.splitlines()]
    most = max(launches, key=lambda launch: launch["spilled"])
    if most["spilled"] > MOST_SPILLED:
        raise RuntimeError(f"registers are spilled: {most}")
    if any(launch["triton"] != version for launch in launches):
        raise RuntimeError(f"Triton {launches[0]['triton']} was found before {version}")
    by_kernel: dict[str, list[int]] = {}
    for launch in launches:
        by_kernel.setdefault(launch["kernel"], []).append(launch["registers"])
    registers = ", ".join(f"{name} {min(found)} to {max(found)}" for name, found in by_kernel.items())
    cost = f"{len(launches)} launches in {time.monotonic() - begin:.0f} s"
    return f"{cost}; registers: {registers}; at most {most['spilled']} bytes spilled"


if __name__ == "__main__":
    sys.exit(TRITON.try_each(sys.argv[1:], compiled_by))
