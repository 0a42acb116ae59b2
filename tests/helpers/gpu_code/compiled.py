# SPDX-License-Identifier: Apache-2.0
"""Compile the launches of a step for a GPU that is not there, and read what the code needs.

Launches go through Triton's own way from a call to code (`JITFunction.warmup`), with a driver that only names its chip.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from ds_blockwise.kernels.base import Item, Kernels
from ds_blockwise.kernels.triton import backend

REGISTERS, THREADS, CTAS = 65536, 2048, 32  # of a multiprocessor, sm_80 and sm_90 alike
SHARED = {80: 164 * 1024, 90: 228 * 1024}
SHARED_RESERVED = 1024  # a program


@dataclass(frozen=True)
class Code:
    """One launch.

    Attributes:
        kernel: its name.
        meta: what it was compiled for.
        programs: how many run.
        registers: of a thread.
        spilled: bytes of a thread in local memory.
        residents: programs that a multiprocessor holds at a time.
        loads: instructions that load tensors from global memory, by the bytes of a thread.
        stores: those that store.
        bf16: whether the hardware rounds to bf16.
        fused: whether multiplications and additions were contracted.
        triton: the version that compiled it.
    """

    kernel: str
    meta: dict[str, object] = field(hash=False)
    programs: int
    registers: int
    spilled: int
    residents: int
    loads: dict[int, int]
    stores: dict[int, int]
    bf16: bool
    fused: bool
    triton: str = triton.__version__


class _Chip:
    """A driver of a chip of this compute capability, as far as compiling asks."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


def step_of(items: Sequence[Item]) -> Callable[[Kernels], None]:
    """The step of these tensors by given kernels."""

    def work(kernels: Kernels) -> None:
        kernels.sum_split_blocks([item for item in items if item.table.has_split_blocks])
        (kernels.step_ if "exp_avg_sq" in items[0].state else kernels.step_by_sign_)(items)

    return work


def codes(work: Callable[[Kernels], None], capability: int) -> list[Code]:
    """The launches of what is done with the kernels."""
    found: list[Code] = []

    def compile_only(kernel, programs, *args, **meta):
        if programs:
            compiled = kernel.warmup(*args, grid=(programs,), **meta)
            found.append(_code(kernel.fn.__name__, programs, meta, compiled, capability))

    driver.set_active(_Chip(capability))
    with patch.object(backend, "_run", compile_only):
        work(backend.TritonKernels())
    return found


def _code(name: str, programs: int, meta: dict[str, object], compiled: object, capability: int) -> Code:
    registers, spilled = _usage(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    threads = 32 * compiled.metadata.num_warps
    per_warp = -(-registers * 32 // 256) * 256
    residents = min(
        REGISTERS // (per_warp * compiled.metadata.num_warps),
        THREADS // threads,
        CTAS,
        SHARED[capability] // (compiled.metadata.shared + SHARED_RESERVED),
    )
    return Code(
        kernel=name,
        meta=meta,
        programs=programs,
        registers=registers,
        spilled=spilled,
        residents=residents,
        loads=_widths(ptx, "ld"),
        stores=_widths(ptx, "st"),
        bf16="cvt.rn.bf16" in ptx,
        fused=compiled.metadata.enable_fp_fusion,
    )


@functools.cache
def _usage(cubin: bytes) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.check_output([str(tool), "--dump-resource-usage", file.name], text=True)
    usage = text.split("Function")[-1]
    (registers,) = re.findall(r"REG:(\d+)", usage)
    return int(registers), sum(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))


def _widths(ptx: str, operation: str) -> dict[int, int]:
    """Instructions on global memory by the bytes of a thread; 64-bit scalars are of tables and left out."""
    found = re.findall(rf"\b{operation}\.global\S*?(?:\.v(\d))?\.b(\d+)\b", ptx)
    return dict(Counter(int(count or 1) * int(bits) // 8 for count, bits in found if count or bits != "64"))
