# SPDX-License-Identifier: Apache-2.0
"""The main job's folder without a job: what a path names, and a folder in which another job writes."""

from __future__ import annotations

import fcntl
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("deepspeed", reason="the main job needs the extra 'deepspeed'")
pytest.importorskip("megatron.core", reason="the main job needs the extra 'megatron'")

from ds_blockwise.checkpoint.folder_rules import lock
from ds_blockwise.checkpoint.folder_rules.lock import LOCK, FolderInUseError
from job import run_folder
from job.run_folder import folder_and_tag
from tests.helpers.checkpoint_folders import save


def test_a_path_to_one_checkpoint_may_be_written_in_any_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last part of a path is not always the name of a folder."""
    final = save(tmp_path, "step_1", 1)
    monkeypatch.chdir(final)
    for path in (final, final / "deep" / "..", Path(".")):
        assert folder_and_tag(path) == (tmp_path, "step_1"), path
    assert folder_and_tag(Path("..")) == (Path(".."), None)


@pytest.mark.parametrize("resumes", [True, False])
def test_a_second_job_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resumes: bool) -> None:
    """With --overwrite it deleted the checkpoints of a job that still ran."""
    monkeypatch.setattr(lock, "PATIENCE_S", 0.0)
    folder = tmp_path / "checkpoints"
    found = save(folder, "step_1", 1)
    started = save(folder, "step_2", 2, publish=False)
    run: Any = SimpleNamespace(output=tmp_path, training=SimpleNamespace(steps=5))
    from ds_blockwise.checkpoint.folder import open_checkpoint

    checkpoint = open_checkpoint(found) if resumes else None
    with (folder / LOCK).open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(FolderInUseError, match="is in use"):
            run_folder._prepare(run, {}, checkpoint)
        assert sorted(tmp_path.rglob("*")) == before
    try:
        run_folder._prepare(run, {}, checkpoint)
        assert not started.exists()
        assert found.exists() == resumes
        assert (folder / "latest").exists() == resumes
    finally:
        lock.let_go(folder)
