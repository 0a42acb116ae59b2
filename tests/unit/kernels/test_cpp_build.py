# SPDX-License-Identifier: Apache-2.0
"""Compiling the C++ kernels: what users meet on machines that are not like ours."""

import shutil
import stat
from pathlib import Path

import ds_blockwise
from ds_blockwise.kernels.cpp.build import _cache_key, library, library_path
from tests.helpers.kernel_user import as_user


def test_a_compiler_that_fails_is_reported_with_its_own_words(tmp_path):
    """An old or broken compiler is as common as none."""
    broken = tmp_path / "broken-c++"
    broken.write_text("#!/bin/sh\necho 'fatal error: this compiler is too old' >&2\nexit 1\n")
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    done = as_user(tmp_path / "cache", "auto", CXX=str(broken))
    assert done.returncode == 0, done.stderr
    assert "stepped by reference" in done.stdout
    assert "this compiler is too old" in done.stderr
    assert "this compiler is too old" in as_user(tmp_path / "cache", "cpp", CXX=str(broken)).stderr


def test_a_killed_build_does_not_hang_the_next_start(tmp_path, monkeypatch):
    """torch's own lock file stays behind when a job is killed, and every later start waits for it for ever.

    The compiler is the one that PEFT's BOFT leaves in the environment.
    """
    monkeypatch.setenv("CXX", "gcc")
    folder = tmp_path / f"ds_blockwise_cpu_{_cache_key()}" / "build"
    folder.mkdir(parents=True)
    (folder / "lock").touch()
    done = as_user(tmp_path, "cpp")
    assert "stepped by cpp" in done.stdout, done.stderr
    assert done.stderr.count("compiling the CPU kernels") == 1


def test_another_environment_uses_what_is_built(tmp_path):
    """Two environments in one home would build the same sources in turn, at each start, waiting for each other."""

    library()
    built = library_path()
    cache = tmp_path / "cache"
    (cache / built.parent.name).mkdir(parents=True)
    copy = shutil.copy(built, cache / built.parent.name / built.name)
    before = copy.stat()
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(Path(ds_blockwise.__file__).parent, elsewhere / "ds_blockwise")
    bare = f"{elsewhere / 'nothing'}"  # no compiler and no ninja there
    done = as_user(cache, "cpp", cwd=elsewhere, PATH=bare)
    assert f"stepped by cpp of {elsewhere}" in done.stdout, done.stderr
    assert "compiling" not in done.stderr
    assert copy.stat().st_mtime_ns == before.st_mtime_ns
