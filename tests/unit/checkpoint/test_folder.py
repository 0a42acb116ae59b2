# SPDX-License-Identifier: Apache-2.0
"""Checkpoints as folders: which one is found, and what a killed save leaves."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ds_blockwise.checkpoint import folder as files
from ds_blockwise.checkpoint.manifest import MANIFEST, CheckpointError, verify
from tests.helpers.checkpoint_folders import TOPOLOGY, foreign, save


def test_a_saved_checkpoint_is_found_and_whole(tmp_path: Path) -> None:
    final = save(tmp_path, "step_2", 2)
    found = files.resolve_tag(tmp_path)
    assert found is not None
    assert (found.folder, found.tag, found.kind, found.global_steps, found.notes) == (
        final,
        "step_2",
        "deepspeed",
        2,
        (),
    )
    assert found.manifest is not None
    assert found.manifest["topology"] == TOPOLOGY
    assert sorted(found.manifest["files"]) == ["deep/note.txt", "mp_rank_00_model_states.pt"]
    assert verify(final) == []
    assert (tmp_path / "latest").read_text(encoding="utf-8") == "step_2"
    assert {p.name for p in tmp_path.iterdir()} == {"step_2", "latest"}


def test_a_damaged_manifest_is_not_passed_over(tmp_path: Path) -> None:
    """``latest`` names that checkpoint: to load another one instead would go unnoticed."""
    save(tmp_path, "step_1", 1)
    final = save(tmp_path, "step_2", 2)
    (final / MANIFEST).write_text("[]", encoding="utf-8")
    with pytest.raises(CheckpointError, match="Restore the file from a copy"):
        files.open_checkpoint(final)
    with pytest.raises(CheckpointError, match="Restore the file from a copy"):
        files.resolve_tag(tmp_path)
    newest = files.newest_complete(tmp_path)
    assert newest is not None
    assert newest.tag == "step_1"


def test_latest_that_names_nothing_falls_back_to_the_newest_complete_one(tmp_path: Path) -> None:
    save(tmp_path, "step_9", 9)
    final = save(tmp_path, "step_10", 10)
    save(tmp_path, "step_11", 11, publish=False)
    for said in (None, "", "step_11"):
        (tmp_path / "latest").unlink(missing_ok=True)
        if said is not None:
            files.write_latest(tmp_path, said)
        found = files.resolve_tag(tmp_path)
        assert found is not None
        assert found.folder == final, said
        (note,) = found.notes
        assert str(tmp_path / "latest") in note
        assert "step_10" in note
    (final / "mp_rank_00_model_states.pt").unlink()  # no longer complete
    newest = files.newest_complete(tmp_path)
    assert newest is not None
    assert newest.tag == "step_9"


def test_latest_may_name_an_older_checkpoint(tmp_path: Path) -> None:
    """The user's choice, or a save with save_latest=False: not ours to correct."""
    save(tmp_path, "step_9", 9)
    save(tmp_path, "step_10", 10, latest=False)
    found = files.resolve_tag(tmp_path)
    assert found is not None
    assert (found.tag, found.notes) == ("step_9", ())


def test_nothing_to_load(tmp_path: Path) -> None:
    assert files.resolve_tag(tmp_path) is None
    assert files.resolve_tag(tmp_path / "absent") is None
    save(tmp_path, "step_1", 1, publish=False)
    assert files.resolve_tag(tmp_path) is None
    with pytest.raises(CheckpointError, match=r"no checkpoint 'step_1' in .*Complete checkpoints there: none"):
        files.resolve_tag(tmp_path, "step_1")
    files.write_latest(tmp_path, "step_1")
    with pytest.raises(CheckpointError, match=r"names 'step_1', which is not there.*Unfinished: step_1\..+\.partial"):
        files.resolve_tag(tmp_path)
    save(tmp_path, "step_2", 2, latest=False)
    with pytest.raises(CheckpointError, match="Complete checkpoints there: step_2"):
        files.resolve_tag(tmp_path, "step_7")


def test_replacing_a_tag_can_be_stopped_between_its_two_renames(tmp_path: Path) -> None:
    """The moment in which the only copy has neither its own name nor a successor."""
    final = save(tmp_path, "best", 1)
    partial = save(tmp_path, "best", 2, publish=False)
    final.rename(tmp_path / "best.replaced")
    for tag in (None, "best"):
        found = files.resolve_tag(tmp_path, tag)
        assert found is not None
        assert (found.tag, found.global_steps) == ("best.replaced", 1)
        assert "a save was stopped while it replaced" in found.notes[0]
    notes = files.remove_unfinished(tmp_path)
    assert len(notes) == 2
    assert "put back" in notes[0]
    assert f"{partial} was removed" in notes[1]
    found = files.resolve_tag(tmp_path)
    assert found is not None
    assert (found.tag, found.global_steps, found.notes) == ("best", 1, ())
    assert files.remove_unfinished(tmp_path) == []


def test_a_tag_saved_again_replaces_the_old_one(tmp_path: Path) -> None:
    save(tmp_path, "best", 1)
    final = save(tmp_path, "best", 2)
    assert files.open_checkpoint(final).global_steps == 2
    assert verify(final) == []
    (tmp_path / "best.replaced").mkdir()  # killed before it was deleted
    assert [p.name for p in files.partial_folders(tmp_path)] == ["best.replaced"]
    save(tmp_path, "best", 3)
    assert {p.name for p in tmp_path.iterdir()} == {"best", "latest"}


def test_starting_again_keeps_the_only_copy(tmp_path: Path) -> None:
    """A second save of the tag after the first was killed between its renames."""
    save(tmp_path, "best", 1).rename(tmp_path / "best.replaced")
    files.start_partial(tmp_path, "best")
    found = files.resolve_tag(tmp_path)
    assert found is not None
    assert (found.tag, found.global_steps) == ("best", 1)


def test_checkpoints_without_a_manifest(tmp_path: Path) -> None:
    """DeepSpeed's own: the file times tell their order."""
    foreign(tmp_path, "global_step9", age=1)
    foreign(tmp_path, "global_step10", age=2)
    newest = files.newest_complete(tmp_path)
    assert newest is not None
    assert (newest.tag, newest.kind, newest.global_steps) == ("global_step9", "deepspeed", None)
    save(tmp_path, "ours", 1, latest=False)
    newest = files.newest_complete(tmp_path)
    assert newest is not None
    assert newest.tag == "ours"
    (tmp_path / "other" / "no_model_states").mkdir(parents=True)
    assert files.newest_complete(tmp_path / "other") is None


def test_writing_leaves_nothing_half_done_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, "step_1", 1)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_latest(tmp_path, "step_2")
    assert (tmp_path / "latest").read_text(encoding="utf-8") == "step_1"
    assert {p.name for p in tmp_path.iterdir()} == {"step_1", "latest"}
