# SPDX-License-Identifier: Apache-2.0
"""Start a benchmark as a user does, or answer its trials from a formula."""

from __future__ import annotations

import math
import os
import subprocess
import sys

from benchmarks.provenance import PROVENANCE
from tests.helpers import ROOT

COMPILED = "DeepSpeedCPUAdam"  # by DeepSpeed, for minutes; the figures have it, the tests do without
ALL_COMPILED = [COMPILED, "DeepSpeedCPULion"]


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


class FakeTrials:
    """Answers trials from a formula instead of training them."""

    def __init__(self, loss_of):
        self.results = {}
        self.titles = []
        self.compared = False
        self._loss_of = loss_of

    def find(self, trials):
        return [trial for trial in trials if trial not in self.results]

    def train(self, trials, title):
        self.titles.append(title)
        for trial in trials:
            loss = self._loss_of(trial)
            self.results[trial] = {
                "diverged": None if math.isfinite(loss) else "inf",
                "final_validation_loss": loss if math.isfinite(loss) else None,
                "optimizer_state_bytes_per_parameter": 8.0,
                "cpu_seconds": 0.5 * trial.steps,
                "parameters": 1000,
                "tokens": 10 * trial.steps,
                "curve": [(0, 7.0), (trial.steps // 2, 5.0), (trial.steps, loss)],
                "fingerprint": trial.name,
                "provenance": dict.fromkeys(PROVENANCE, "x"),
            }
