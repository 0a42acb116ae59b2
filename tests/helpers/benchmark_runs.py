# SPDX-License-Identifier: Apache-2.0
"""Start a benchmark as a user does."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.helpers import ROOT

COMPILED = "DeepSpeedCPUAdam"  # by DeepSpeed, for minutes; the figures have it, the tests do without


def run_benchmark(module: str, *arguments: object, status: int = 0) -> str:
    """What ``python -m benchmarks.MODULE ARGUMENTS`` prints, from the repository's folder.

    Args:
        module: Below ``benchmarks``.
        arguments: Of the command line.
        status: That it must end with.
    """
    command = [sys.executable, "-m", f"benchmarks.{module}", *map(str, arguments)]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=800)
    assert done.returncode == status, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout
