# SPDX-License-Identifier: Apache-2.0
"""Kernels that come compiled in a wheel, one library for each level of x86-64, so that no compiler is needed.

``setup.py`` runs this file by its path, where torch may be missing: it imports the standard library only.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import subprocess
from pathlib import Path

SOURCES = Path(__file__).parent
FOLDER = SOURCES / "prebuilt"
FLAGS = ("-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
# compilers prefer half-width vectors on AVX-512 machines; whole ones were measured 5% faster here
X86_FLAGS = ("-mprefer-vector-width=512",)
_V3 = frozenset({"abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "xsave"})
# the best first; names of Linux in /proc/cpuinfo, levels of the System V psABI, which compilers know by these names
LEVELS: dict[str, frozenset[str]] = {
    "x86-64-v4": _V3 | {"avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl"},
    "x86-64-v3": _V3,
}


def digest_of_sources() -> str:
    """Of the C++ sources: a library of others is not loaded."""
    digest = hashlib.sha256()
    for path in sorted(p for p in SOURCES.iterdir() if p.suffix in (".cpp", ".h")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def compile_all(folder: Path) -> None:
    """Compile one library for each level.

    OpenMP's symbols stay open: the library takes those of the OpenMP that torch has loaded, so one pool of threads
    serves both.

    Args:
        folder: For the libraries.

    Raises:
        subprocess.CalledProcessError: The compiler failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    compiler = os.environ.get("CXX", "c++")
    for level in LEVELS:
        # compiling needs -fopenmp, linking with it would bind the library to one OpenMP
        compiled = folder / f"{level}.o"
        flags = (*FLAGS, *X86_FLAGS, f"-march={level}", "-std=c++17", "-fPIC")
        subprocess.run([compiler, *flags, "-c", str(SOURCES / "kernels.cpp"), "-o", str(compiled)], check=True)
        subprocess.run([compiler, "-shared", "-s", str(compiled), "-o", str(_path(folder, level))], check=True)
        compiled.unlink()


def found() -> Path | None:
    """The library of the best level that this machine has; None if the package came without."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return None
    features = cpu_features()
    for level, needed in LEVELS.items():
        path = _path(FOLDER, level)
        if needed <= features and path.exists():
            return path
    return None


def load(path: Path) -> ctypes.CDLL:
    """Load a library of `compile_all` into this process, where torch has been imported.

    Raises:
        OSError: No OpenMP is loaded, or it lacks a symbol.
    """
    openmp = _loaded_openmp()
    if openmp is not None:
        ctypes.CDLL(openmp, ctypes.RTLD_GLOBAL)  # again, so that its symbols are seen
    return ctypes.CDLL(str(path), os.RTLD_NOW)


def cpu_features() -> frozenset[str]:
    """This machine's instructions, in Linux's names; empty where they cannot be read."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    line = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return frozenset(line.partition(":")[2].split())


def _path(folder: Path, level: str) -> Path:
    return folder / f"{level}-{digest_of_sources()}.so"


def _loaded_openmp() -> str | None:
    """The OpenMP runtime that is in this process, GNU's or the compatible one of Intel and LLVM."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    files = (line.split(maxsplit=5)[5] for line in lines if len(line.split(maxsplit=5)) == 6)
    names = ("libgomp", "libiomp5", "libomp")
    return next((file for file in files if os.path.basename(file).startswith(names)), None)
