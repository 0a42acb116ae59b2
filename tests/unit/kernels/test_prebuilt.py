# SPDX-License-Identifier: Apache-2.0
"""A wheel with compiled CPU kernels: no compiler is needed, and no bit differs from what is compiled on the machine."""

from __future__ import annotations

import itertools
import os
import platform
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from ds_blockwise.kernels.cpp import backend, prebuilt
from ds_blockwise.kernels.cpp.backend import CppKernels
from tests.helpers.kernel_cases import CASES, clone, item_of, step
from tests.helpers.kernel_user import as_user
from tests.helpers.newcomer import build_wheel

_MOMENTS = ("exp_avg", "exp_avg_sq")
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="compiled wheels are for Linux on x86-64"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder into which the wheel was unpacked."""
    given = os.environ.get("DS_BLOCKWISE_WHEEL")  # `make wheel` tests what it has built
    wheel = Path(given) if given else build_wheel(tmp_path_factory.mktemp("wheel"), compiled=True)
    # any Python and any torch, one platform
    assert wheel.name.split("-")[2:4] == ["py3", "none"] and "x86_64" in wheel.name
    target = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(target)
    return target


@pytest.fixture(scope="module")
def libraries(site: Path) -> dict[str, Path]:
    folder = site / "ds_blockwise/kernels/cpp/prebuilt"
    found = {path.name.rpartition("-")[0]: path for path in folder.iterdir()}
    assert found.keys() == prebuilt.LEVELS.keys() and len(list(folder.iterdir())) == len(found)
    return found


def test_no_compiler_is_needed(site: Path, tmp_path: Path) -> None:
    """A slim image has none, and twenty seconds at the first step of every new machine are twenty seconds."""
    done = as_user(tmp_path, "cpp", cwd=site, PATH=str(tmp_path), PYTHONPATH=str(site))
    assert f"stepped by cpp of {site}" in done.stdout, done.stderr
    assert "compiling" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_one_pool_of_threads_serves_torch_and_us(site: Path) -> None:
    """Two OpenMP runtimes in a process wait for work with busy threads of their own."""
    code = (
        "import torch; from ds_blockwise.kernels.cpp.backend import CppKernels; CppKernels();"
        "print(*{line.split()[-1] for line in open('/proc/self/maps') if 'omp' in line.split()[-1]}, sep='\\n')"
    )
    environment = os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=site, capture_output=True, text=True, check=True
    )
    assert len(done.stdout.split()) == 1, done.stdout


def test_every_level_gives_the_bits_of_the_machines_own(
    libraries: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cluster of two kinds of processors would train two models, and a resume would depend on the wheel."""
    own = CppKernels()
    tried = 0
    for level, needed in prebuilt.LEVELS.items():
        if not needed <= prebuilt.cpu_features():
            continue
        library = prebuilt.load(libraries[level])
        monkeypatch.setattr(backend, "library", lambda library=library: library)
        theirs = CppKernels()
        for (name, cases), lion in itertools.product(CASES.items(), (False, True)):
            pairs = [item_of(case, 7 * i, False) for i, case in enumerate(cases())]
            peers = [others for _, others in pairs]
            stepped = []
            for kernels in (own, theirs):
                items = [clone(item, kernels) for item, _ in pairs]
                for _ in range(2):
                    if lion:
                        kernels.step_by_sign_(items)
                    else:
                        step(kernels, items, peers)
                stepped.append(items)
            for a, b in zip(*stepped, strict=True):
                for got, want in ((a.param, b.param), *((a.state[key], b.state[key]) for key in _MOMENTS)):
                    bits = [t.reshape(-1).view(torch.uint8) for t in (got, want)]
                    assert torch.equal(*bits), (level, name)
        tried += 1
    assert tried, "this machine has no level of the wheel"


def test_the_best_level_that_the_machine_has(
    libraries: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wrong one ends in an illegal instruction; a machine that is older than all of them compiles."""
    monkeypatch.setattr(prebuilt, "FOLDER", libraries["x86-64-v3"].parent)
    for features, level in ((prebuilt.LEVELS["x86-64-v4"], "x86-64-v4"), (prebuilt.LEVELS["x86-64-v3"], "x86-64-v3")):
        monkeypatch.setattr(prebuilt, "cpu_features", lambda features=features: features | {"sse2"})
        assert prebuilt.found() == libraries[level]
        monkeypatch.setattr(prebuilt, "cpu_features", lambda features=features: features - {"avx2"})
        assert prebuilt.found() is None
    # a checkout whose sources were edited since does not load the libraries of others
    monkeypatch.setattr(prebuilt, "cpu_features", lambda: prebuilt.LEVELS["x86-64-v4"])
    for path in prebuilt.SOURCES.glob("*.[ch]*"):
        (tmp_path / path.name).write_text(path.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    monkeypatch.setattr(prebuilt, "SOURCES", tmp_path)
    assert prebuilt.found() is None


def test_a_library_that_cannot_be_loaded_is_said_and_compiled(site: Path, tmp_path: Path) -> None:
    """A file that a copy has cut short must not end the run, nor pass unsaid."""
    folder = site / "ds_blockwise/kernels/cpp/prebuilt"
    whole = {path: path.read_bytes() for path in folder.iterdir()}
    try:
        for path in whole:
            path.write_bytes(b"\x7fELF")
        done = as_user(tmp_path, "auto", cwd=site, PYTHONPATH=str(site), PATH=str(tmp_path))
    finally:
        for path, content in whole.items():
            path.write_bytes(content)
    assert "the CPU kernels of the wheel cannot be loaded, they are compiled here" in done.stderr
    assert "stepped by reference" in done.stdout and "there is no C++ compiler" in done.stderr
