# SPDX-License-Identifier: Apache-2.0
"""Checkpoints as folders: which one is found, and what a killed save leaves."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from ds_blockwise.atomic_files import this_host
from ds_blockwise.checkpoint import folder as files
from ds_blockwise.checkpoint import manifest
from ds_blockwise.checkpoint.folder_rules.lock import holding
from ds_blockwise.checkpoint.manifest import MANIFEST, CheckpointError, ReplacedError, verify
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


def test_a_whole_checkpoint_whose_tag_was_allowed_once_is_not_removed(tmp_path: Path) -> None:
    """Earlier versions saved under tags with the suffixes of unfinished ones, and deleted what they had saved."""
    for tag in ("x.partial", "step_1.replaced"):
        save(tmp_path, tag, 1)
    save(tmp_path, "step_1", 1)
    assert files.partial_folders(tmp_path) == []
    assert files.remove_unfinished(tmp_path) == []
    with pytest.raises(CheckpointError, match=r"no checkpoint 'y'.*step_1, step_1\.replaced, x\.partial"):
        files.resolve_tag(tmp_path, "y")


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


def test_what_is_no_checkpoint_is_not_replaced(tmp_path: Path) -> None:
    """A tag may be the name of something of the user's: to save there deleted it."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "corpus.bin").write_text("precious", encoding="utf-8")
    (tmp_path / "notes").write_text("precious", encoding="utf-8")
    for tag in ("data", "notes"):
        with pytest.raises(ValueError, match="it would be replaced"):
            files.start_partial(tmp_path, tag)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "notes"]
    (tmp_path / "empty").mkdir()
    assert verify(save(tmp_path, "empty", 1)) == []
    foreign(tmp_path, "global_step1", age=1)
    assert verify(save(tmp_path, "global_step1", 1)) == []


def test_a_tag_that_is_a_link_is_replaced_and_its_target_stays(tmp_path: Path) -> None:
    target = save(tmp_path, "step_1", 1)
    (tmp_path / "best").symlink_to("step_1")
    final = save(tmp_path, "best", 2)
    assert not final.is_symlink()
    assert files.open_checkpoint(final).global_steps == 2
    assert files.open_checkpoint(target).global_steps == 1
    assert {p.name for p in tmp_path.iterdir()} == {"step_1", "best", "latest"}


def test_an_older_version_that_cannot_be_deleted_does_not_fail_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A reader on NFS has its files open."""
    save(tmp_path, "best", 1)

    def busy(path: Path) -> None:
        raise OSError(16, "Device or resource busy", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "rmtree", busy)
        final = save(tmp_path, "best", 2)
    assert files.open_checkpoint(final).global_steps == 2
    assert "which was replaced, could not be deleted" in caplog.text
    (left,) = files.partial_folders(tmp_path)
    save(tmp_path, "best", 3)
    assert not left.exists()


def test_what_another_process_may_be_writing_is_left_alone(tmp_path: Path) -> None:
    """Without the folder's lock; with it nobody else writes there."""
    mark = f"{this_host()}-{os.getppid()}-0123abcd"
    alive, elsewhere = (tmp_path / f"best.{m}.partial" for m in (mark, "elsewhere-1-0123abcd"))
    dead = tmp_path / f"best.{this_host()}-4194999-0123abcd.partial"  # above the largest process id of Linux
    for path in (alive, elsewhere, dead):
        path.mkdir()
    save(tmp_path, "best", 1)
    assert {p for p in files.partial_folders(tmp_path)} == {alive, elsewhere}
    assert all("may be writing it" in note for note in files.remove_unfinished(tmp_path))
    (tmp_path / f"latest.{mark}.partial").write_text("best", encoding="utf-8")
    with holding(tmp_path):
        assert len(files.remove_unfinished(tmp_path)) == 3
    assert {p.name for p in tmp_path.iterdir()} == {"best", "latest"}


@pytest.mark.parametrize("when", ["manifest", "files"])
def test_a_checkpoint_that_is_replaced_while_it_is_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Neither damaged nor sound, but of two versions; read again, it is sound."""
    final = save(tmp_path, "best", 1)
    found = files.open_checkpoint(final)
    reads = {"manifest": (manifest, "read_manifest"), "files": (manifest, "sum_of")}[when]
    original = getattr(*reads)
    calls: list[Path] = []

    def read(path: Path, *name: str) -> object:
        calls.append(path)
        if len(calls) == 1:
            save(tmp_path, "best", 2)
        return original(path, *name)

    monkeypatch.setattr(*reads, read)
    with pytest.raises(ReplacedError, match="is being replaced or removed by a job that saves there"):
        verify(final, version=found.version)
    assert manifest.once_more(lambda: verify(final)) == []


def test_a_checkpoint_that_is_removed_while_it_is_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final = save(tmp_path, "best", 1)

    def read(path: Path, name: str) -> str:
        files.remove_checkpoint(final)
        raise FileNotFoundError(path)

    monkeypatch.setattr(manifest, "sum_of", read)
    with pytest.raises(ReplacedError):
        verify(final)


def test_an_older_version_is_gone_for_readers_before_its_files_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that began in it finds it replaced, not damaged, whichever file is deleted first."""
    save(tmp_path, "best", 1)
    rmtree, seen = shutil.rmtree, []

    def delete(path: Path) -> None:
        seen.append(path.suffix)
        rmtree(path)

    monkeypatch.setattr(files.shutil, "rmtree", delete)
    save(tmp_path, "best", 2)
    assert seen == [".partial"]  # what readers pass over
    assert {p.name for p in tmp_path.iterdir()} == {"best", "latest"}
