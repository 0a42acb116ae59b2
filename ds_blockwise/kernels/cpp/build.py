# SPDX-License-Identifier: Apache-2.0
"""Compile the C++ kernels once per machine type and load them; a wheel may bring them compiled (`prebuilt`).

Built by ``torch.utils.cpp_extension``: users of torch know its ninja, cache directory and environment variables, and
DeepSpeed's op builder is the same underneath but would make DeepSpeed a requirement. The sources need no torch header,
so a build takes seconds and the library fits every torch version.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import logging
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from ds_blockwise.kernels.cpp import prebuilt

logger = logging.getLogger(__name__)


class BuildError(RuntimeError):
    """The C++ kernels could not be compiled or loaded; the message says why and what to do."""


def missing_tool() -> str | None:
    """What is needed to build and cannot be found, in a sentence; None if nothing is."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler {compiler!r} (install g++ or clang, or set CXX)"
    if shutil.which("ninja") is None and importlib.util.find_spec("ninja") is None:
        return "ninja is not installed (pip install ninja)"
    return None


def _machine_flags() -> tuple[str, ...]:
    if platform.machine().lower() in ("x86_64", "amd64"):
        return ("-march=native", *prebuilt.X86_FLAGS)
    return ("-mcpu=native",)


def _cache_key() -> str:
    # what ``native`` means here: homes are shared by machines whose instructions differ
    features = sorted(prebuilt.cpu_features()) or platform.processor()
    facts = (prebuilt.digest_of_sources(), prebuilt.FLAGS, _machine_flags(), os.environ.get("CXX"), platform.machine())
    return hashlib.sha256(repr((facts, features)).encode()).hexdigest()[:16]


@contextlib.contextmanager
def _only_builder(folder: Path) -> Iterator[None]:
    """One process at a time; the lock dies with its holder, unlike torch's own, which a killed build leaves behind."""
    import fcntl

    with open(folder / "builder.lock", "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _ninja_on_path() -> Iterator[None]:
    """An environment's ninja is not on PATH when its Python is called by path."""
    old = os.environ.get("PATH", "")
    if shutil.which("ninja") is None:
        import ninja

        os.environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, old])
    try:
        yield
    finally:
        os.environ["PATH"] = old


def _compile(name: str, folder: Path) -> Path:
    """Build in a folder of its own, so that a library in its final place is always whole."""
    from torch.utils import cpp_extension

    folder.mkdir(exist_ok=True)
    (folder / "lock").unlink(missing_ok=True)
    cpp_extension.load(
        name=name,
        sources=[str(prebuilt.SOURCES / "kernels.cpp")],
        extra_cflags=[*prebuilt.FLAGS, *_machine_flags()],
        # PEFT's BOFT leaves CXX=gcc in the environment where it finds no CUDA, and gcc links no C++ library by itself
        extra_ldflags=["-fopenmp", *(["-lstdc++"] if sys.platform == "linux" else [])],
        build_directory=str(folder),
        is_python_module=False,
        with_cuda=False,
    )
    return folder / f"{name}.so"


def library_path() -> Path:
    """Where the compiled kernels of these sources, flags and CPU are, or will be."""
    from torch.utils import cpp_extension

    name = f"ds_blockwise_cpu_{_cache_key()}"
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    return Path(root) / name / f"{name}.so"


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled kernels: those of the wheel, or built at the first call on a machine.

    Raises:
        BuildError: no compiler, or it failed.
    """
    return _of_the_wheel() or _built()


def library_at_hand() -> ctypes.CDLL | None:
    """The compiled kernels if nothing is to be compiled for them: loaded before, or in the wheel."""
    return library() if library.cache_info().currsize else _of_the_wheel()


@functools.cache
def _of_the_wheel() -> ctypes.CDLL | None:
    path = prebuilt.found()
    if path is None:
        return None
    try:
        return prebuilt.load(path)
    except OSError as error:
        logger.warning("ds_blockwise: the CPU kernels of the wheel cannot be loaded, they are compiled here: %s", error)
        return None


def _built() -> ctypes.CDLL:
    built = library_path()
    folder = built.parent
    try:
        # Only asked to build what is missing: ninja compares command lines, so two environments that share a home
        # would build the same sources anew in turn, each waiting for the other.
        if not built.exists():
            missing = missing_tool()
            if missing is not None:
                raise BuildError(missing)
            folder.mkdir(parents=True, exist_ok=True)
            with _only_builder(folder), _ninja_on_path():
                if not built.exists():
                    logger.warning("ds_blockwise: compiling the CPU kernels into %s (once, less than a minute)", folder)
                    _compile(built.stem, folder / "build").replace(built)
        return ctypes.CDLL(str(built))
    except BuildError:
        raise
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        output = getattr(error, "output", None) or b""
        lines = [*str(error).splitlines(), *output.decode(errors="replace").splitlines()]
        said = [line for line in lines if "error" in line.lower()][1:3] or lines[-3:]
        raise BuildError(
            f"compiling {prebuilt.SOURCES / 'kernels.cpp'} in {folder} failed: {' | '.join(said)}"
        ) from error
