# SPDX-License-Identifier: Apache-2.0
"""Run tests with the C++ kernels under AddressSanitizer: ``python -m tests.helpers.asan TESTS``.

The library is compiled anew with the sanitizer, which must be loaded before anything else; so this module starts itself
a second time with it preloaded. Any access outside a tensor ends the process with the sanitizer's report.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from ds_blockwise.kernels.cpp import backend, build, look, prebuilt

_LIBRARY = "DS_BLOCKWISE_ASAN_LIBRARY"


def _compile(folder: Path) -> Path:
    target = folder / "kernels_asan.so"
    flags = ("-O0", "-g", "-fopenmp", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fPIC", "-std=c++17")
    compiler = os.environ.get("CXX", "g++")
    command = [compiler, "-shared", *flags, str(prebuilt.SOURCES / "kernels.cpp"), "-o", str(target)]
    subprocess.run(command, check=True)
    return target


def _preloaded() -> str:
    """The sanitizer; and the C++ library, or the sanitizer cannot see exceptions thrown by torch."""
    compiler = os.environ.get("CXX", "g++")

    def path_of(name: str) -> str:
        command = [compiler, f"-print-file-name={name}"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    return f"{path_of('libasan.so')} {path_of('libstdc++.so.6')}"


def main(arguments: list[str]) -> int:
    """Run pytest with ``arguments``; returns its exit code."""
    library = os.environ.get(_LIBRARY)
    if library is None:
        with tempfile.TemporaryDirectory() as folder:
            environment = {
                **os.environ,
                _LIBRARY: str(_compile(Path(folder))),
                "LD_PRELOAD": _preloaded(),
                # Python keeps memory until it ends; torch's threads have no frames that the sanitizer knows
                "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1:detect_stack_use_after_return=0",
                "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
            }
            command = [sys.executable, "-m", "tests.helpers.asan", *arguments]
            return subprocess.run(command, env=environment, check=False).returncode
    if not hasattr(ctypes.CDLL(None), "__asan_init"):
        raise SystemExit("AddressSanitizer is not loaded: without it these tests find nothing")
    loaded = ctypes.CDLL(library)
    backend.library = build.library = look.library_at_hand = lambda: loaded
    return int(pytest.main(["-q", "-p", "no:cacheprovider", *arguments]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
