# SPDX-License-Identifier: Apache-2.0
"""Time and bandwidth: samples in turn, and probes that move a known number of bytes in the same rounds."""

from __future__ import annotations

import ctypes
import functools
import gc
import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from benchmarks.step.peers import ADAM_MINI, ADAMW, Contender, Missing
from benchmarks.step.shapes import Case

SAMPLE_S = 0.03  # a sample is as many steps as fill this time
MOST_STEPS = 500
# The idle threads of one OpenMP library spin for about a millisecond after its last loop, on cores that the next
# contender's library wants.
SETTLE_S = 0.003
COPY = "copy"
COMPILED, SWEEPS = "compiled", "sweeps"
PROBES = (COMPILED, SWEEPS)


@dataclass(frozen=True)
class Timing:
    """Samples of one contender or probe.

    Attributes:
        steps_per_sample: steps in one sample.
        seconds: of one step, one value per round.
    """

    steps_per_sample: int
    seconds: tuple[float, ...]

    def quantile(self, share: float) -> float:
        """Seconds below which a share of the samples lies (nearest sample)."""
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    @property
    def median(self) -> float:
        """Seconds of one step, the middle sample's."""
        return statistics.median(self.seconds)


def _adam_mini_traffic(grad: torch.Tensor, first: torch.Tensor, param: torch.Tensor) -> None:
    first.lerp_(grad, 0.1)
    param.add_(first, alpha=1e-9)


def _adamw_traffic(grad: torch.Tensor, first: torch.Tensor, param: torch.Tensor, second: torch.Tensor) -> None:
    first.lerp_(grad, 0.1)
    second.add_(first, alpha=1e-9)
    param.add_(second, alpha=1e-9)


@functools.cache
def _compiled(traffic: Callable[..., None]) -> Callable[..., None]:
    return torch.compile(traffic, dynamic=True)


class Probe:
    """Reads and writes buffers of the case's size as the optimizers do, with next to no arithmetic, and copies one.

    Compiled, all reads and writes of an element are in one loop, as in the best possible optimizer. As sweeps, every
    buffer is passed over by torch operations that do one read or two for each write, in the same total proportion:
    Adam-mini three to two (20 bytes a parameter), AdamW four to three (28). No buffer is read twice from memory.

    Args:
        case: gives the size, and the gradient to read.
        kind: one of `PROBES`.
    """

    def __init__(self, case: Case, kind: str) -> None:
        self._buffers = [torch.ones_like(case.param) for _ in range(3)]
        self._grad = case.grad
        self._kind = kind

    def adam_mini(self) -> None:
        """Move 20 bytes a parameter."""
        first, param, _ = self._buffers
        if self._kind == COMPILED:
            _compiled(_adam_mini_traffic)(self._grad, first, param)
        else:
            first.lerp_(self._grad, 0.1)
            param.mul_(1.0)

    def adamw(self) -> None:
        """Move 28 bytes a parameter."""
        first, param, second = self._buffers
        if self._kind == COMPILED:
            _compiled(_adamw_traffic)(self._grad, first, param, second)
        else:
            first.lerp_(self._grad, 0.1)
            param.mul_(1.0)
            second.mul_(1.0)

    def copy(self) -> None:
        """Move 8 bytes a parameter: one buffer into another."""
        self._buffers[0].copy_(self._grad)

    def runs(self) -> dict[str, Callable[[], None]]:
        """What to call, by the family whose traffic it imitates, and the copy."""
        return {ADAMW: self.adamw, ADAM_MINI: self.adam_mini, COPY: self.copy}


def measure(
    case: Case, contenders: list[Contender], rounds: int, probe: str
) -> tuple[dict[str, Timing], dict[str, Timing], list[Missing]]:
    """Time every contender and every probe in turn.

    Each round takes one sample of each; the order rotates and every other round is reversed, so that nobody always
    follows the same neighbour.

    Args:
        case: the memory that all of them step.
        contenders: who runs.
        rounds: samples of each.
        probe: one of `PROBES`.

    Returns:
        Timings by contender's name, timings by probe's name, and the contenders that cannot step this case.
    """
    _return_memory()
    check_memory(case, contenders)
    missing: list[Missing] = []
    runs: dict[str, Callable[[], object]] = {}
    for contender in contenders:
        try:
            runs[contender.name] = contender.build(case).step
            runs[contender.name]()
        except Exception as error:  # the reason goes into the table
            runs.pop(contender.name, None)
            missing.append(Missing(contender.name, str(error).splitlines()[0][:200]))
    probes = {f"probe {name}": run for name, run in Probe(case, probe).runs().items()}
    timings = take_turns({**runs, **probes}, rounds, case.param.device)
    return (
        {name: timings[name] for name in runs},
        {name.removeprefix("probe "): timings[name] for name in probes},
        missing,
    )


def take_turns(runs: Mapping[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, Timing]:
    """Timings by name of functions that run in turn: see `measure`.

    Args:
        runs: what to call, by name.
        rounds: samples of each.
        device: whose clock is read.
    """
    steps = {}
    for name, run in runs.items():
        run()
        steps[name] = max(1, min(MOST_STEPS, math.ceil(SAMPLE_S / _sample(run, 1, device))))
    names, samples = list(runs), {name: [] for name in runs}
    gc.collect()
    gc.disable()
    try:
        for index in range(rounds):
            at = index % len(names)
            order = names[at:] + names[:at]
            for name in order if index % 2 == 0 else reversed(order):
                time.sleep(SETTLE_S)
                if steps[name] > 1:
                    runs[name]()  # what fits the cache is timed in the cache, whoever came before
                samples[name].append(_sample(runs[name], steps[name], device) / steps[name])
    finally:
        gc.enable()
    return {name: Timing(steps[name], tuple(samples[name])) for name in names}


def _sample(run: Callable[[], object], steps: int, device: torch.device) -> float:
    """Seconds of some calls in a row; on a GPU by its own clock."""
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        begin.record()
        for _ in range(steps):
            run()
        end.record()
        torch.cuda.synchronize(device)
        return begin.elapsed_time(end) / 1e3
    start = time.perf_counter()
    for _ in range(steps):
        run()
    return time.perf_counter() - start


def _return_memory() -> None:
    """Give what the case before used back to the system: optimizers in reference cycles, glibc's freed pieces."""
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def check_memory(case: Case, contenders: list[Contender]) -> None:
    """Refuse a case that would not fit before the machine starts to swap or kills the process.

    Raises:
        ValueError: states of all contenders and their temporaries are larger than the memory that is free.
    """
    # three probe buffers, and what an optimizer of many small operations needs besides: three tensors
    need = case.numel * (12 + 12 + sum(contender.state_bytes for contender in contenders))
    free = free_bytes(case.param.device)
    if need > free:
        raise ValueError(
            f"{case.size} needs about {need / 1e9:.1f} GB for the states of {len(contenders)} contenders, "
            f"{free / 1e9:.1f} GB are free. Leave out this size, or some contenders by --without."
        )


def free_bytes(device: torch.device) -> int:
    """Memory that can still be allocated on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with open("/proc/meminfo", encoding="ascii") as file:
        fields = dict(line.split(":") for line in file)
    return int(fields["MemAvailable"].split()[0]) * 1024
