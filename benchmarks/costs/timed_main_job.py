# SPDX-License-Identifier: Apache-2.0
"""The main job with a clock; `end_to_end.py` starts it through the DeepSpeed launcher, in the place of the script.

Runs `launch/pretrain_llama.py` unchanged but for two things: times and peak memory go to a file per rank, and the final
checkpoint is not written (it is no part of a training step, and its memory would be the peak).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import pretrain_llama
from job.trainer import Trainer


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes; see `forget_peak`."""
    with open("/proc/self/status", encoding="ascii") as file:
        fields = dict(line.split(":", 1) for line in file)
    return int(fields["VmHWM"].split()[0]) * 1024


def forget_peak() -> None:
    """Start a new peak from what is resident now (Linux, see proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


class TimedTrainer(Trainer):
    """Notes how long each step and the optimizer within it take, and the peak of memory.

    Attributes:
        folder: where the file of this rank is written.
        dropped: first steps that do not count: memory is allocated and caches fill.
    """

    folder: Path
    dropped: int

    def __init__(self, engine: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(engine, *args, **kwargs)
        self._steps: list[float] = []
        self._optimizer: list[float] = []
        self._start_peak = 0
        optimizer = engine.basic_optimizer
        original = optimizer.step

        def timed(*step_args: Any, **step_kwargs: Any) -> Any:
            start = time.perf_counter()
            result = original(*step_args, **step_kwargs)
            if self._optimizer:  # none while the engine tries it out
                self._optimizer[-1] += time.perf_counter() - start
            return result

        optimizer.step = timed

    def _one_step(self) -> None:
        if len(self._steps) == self.dropped:
            self._start_peak = peak_memory()
            forget_peak()
        self._optimizer.append(0.0)
        start = time.perf_counter()
        super()._one_step()
        self._steps.append(time.perf_counter() - start)

    def save(self) -> None:
        """Write the notes; a run of this job ends with its only save."""
        in_steps = peak_memory()
        notes = {
            "step_seconds": self._steps[self.dropped :],
            "optimizer_seconds": self._optimizer[self.dropped :],
            "peak_bytes": max(self._start_peak, in_steps),
            "peak_in_steps_bytes": in_steps,
        }
        path = self.folder / f"rank{self._processes.rank}.json"
        path.write_text(json.dumps(notes), encoding="utf-8")


def main() -> None:
    """Take the two options of this file and leave the others to the main job."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--notes", type=Path, required=True, help="folder of the times, one file per rank")
    parser.add_argument("--drop", type=int, required=True, help="first steps that do not count")
    options, arguments = parser.parse_known_args()
    TimedTrainer.folder, TimedTrainer.dropped = options.notes, options.drop
    pretrain_llama.Trainer = TimedTrainer
    pretrain_llama.main(arguments)


if __name__ == "__main__":
    main()
