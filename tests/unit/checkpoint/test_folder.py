# SPDX-License-Identifier: Apache-2.0
"""Checkpoints as files: which one is found, what is noticed about a damaged one, what a killed save leaves."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
import torch

from ds_blockwise.atomic_files import sha256_of
from ds_blockwise.checkpoint import folder as files
from ds_blockwise.checkpoint.manifest import (
    MANIFEST,
    CheckpointError,
    files_in,
    listed_files,
    read_manifest,
    sums_of,
    verify,
    write_manifest,
)

TOPOLOGY = {"world_size": 2, "dp": 2}


def save(folder: Path, tag: str, steps: int, *, latest: bool = True, publish: bool = True) -> Path:
    partial = files.start_partial(folder, tag)
    (partial / "deep").mkdir()
    torch.save({"weight": torch.arange(100.0) + steps}, partial / "mp_rank_00_model_states.pt")
    (partial / "deep" / "note.txt").write_text(f"step {steps}", encoding="utf-8")
    sums = sums_of(partial, files_in(partial))
    write_manifest(partial, kind="deepspeed", tag=tag, global_steps=steps, topology=TOPOLOGY, settings=None, files=sums)
    if not publish:
        return partial
    final = files.publish(partial)
    if latest:
        files.write_latest(folder, tag)
    return final


def foreign(folder: Path, tag: str, age: int) -> Path:
    """As DeepSpeed alone leaves it."""
    path = folder / tag
    path.mkdir(parents=True)
    torch.save({"weight": torch.randn(3000)}, path / "mp_rank_00_model_states.pt")
    torch.save({"state": torch.randn(500)}, path / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    for file in path.iterdir():
        os.utime(file, (1e9 - age, 1e9 - age))
    return path


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
    assert listed_files(final) == ["mp_rank_00_model_states.pt", "deep/note.txt"]  # the largest first
    assert verify(final) == []
    assert (tmp_path / "latest").read_text(encoding="utf-8") == "step_2"
    assert {p.name for p in tmp_path.iterdir()} == {"step_2", "latest"}


def test_every_kind_of_damage_is_named(tmp_path: Path) -> None:
    """A load that noticed nothing would train on from other weights."""
    final = save(tmp_path, "step_2", 2)
    weights, note = final / "mp_rank_00_model_states.pt", final / "deep" / "note.txt"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    (problem,) = verify(final)
    assert problem.startswith("mp_rank_00_model_states.pt: ")
    assert f"{len(whole) - 1} bytes instead of {len(whole)}" in problem
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    weights.write_bytes(flipped)
    (problem,) = verify(final)
    assert "contents have changed" in problem
    assert verify(final, contents=False) == []
    assert verify(final, ["deep/note.txt"]) == []
    note.unlink()
    assert verify(final, ["deep/note.txt"]) == ["deep/note.txt: missing"]
    assert len(verify(final)) == 2


@pytest.mark.parametrize("damage", ["cut", "bit", "format", "list"])
def test_a_damaged_manifest_is_an_error_of_its_own(tmp_path: Path, damage: str) -> None:
    final = save(tmp_path, "step_2", 2)
    path = final / MANIFEST
    text = path.read_text(encoding="utf-8")
    changed = {
        "cut": text[: len(text) // 2],
        "bit": text.replace('"world_size": 2', '"world_size": 3'),
        "format": text.replace('"format": 1', '"format": 9'),
        "list": "[]",
    }[damage]
    assert changed != text
    path.write_text(changed, encoding="utf-8")
    expected = "reads format 1" if damage == "format" else "Restore the file from a copy"
    for use in (read_manifest, verify, files.open_checkpoint):
        with pytest.raises(CheckpointError, match=expected) as caught:
            use(final)
        assert str(path) in str(caught.value)
    with pytest.raises(CheckpointError, match=expected):
        files.resolve_tag(tmp_path)  # latest names it: loading another one instead would be silent


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
    with pytest.raises(CheckpointError, match=r"names 'step_1', which is not there.*Unfinished: step_1\.partial"):
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
    """DeepSpeed's own: torch's zip files carry sums, and the file times tell their order."""
    foreign(tmp_path, "global_step9", age=1)
    old = foreign(tmp_path, "global_step10", age=2)
    newest = files.newest_complete(tmp_path)
    assert newest is not None
    assert (newest.tag, newest.kind, newest.global_steps) == ("global_step9", "deepspeed", None)
    save(tmp_path, "ours", 1, latest=False)
    newest = files.newest_complete(tmp_path)
    assert newest is not None
    assert newest.tag == "ours"
    path = old / "mp_rank_00_model_states.pt"
    whole = path.read_bytes()
    assert verify(old) == []
    for content, expected in ((whole[: len(whole) // 2], "cut off"), (b"", "empty")):
        path.write_bytes(content)
        (problem,) = verify(old)
        assert problem == f"mp_rank_00_model_states.pt: {expected}"
    (tmp_path / "no_model_states").mkdir()
    assert files._complete(tmp_path / "no_model_states") is None


def test_a_flipped_bit_in_a_file_without_manifest_is_noticed_or_harmless(tmp_path: Path) -> None:
    """Zip sums cover the tensors; what they leave out must not change them, whatever the bit does to the header."""
    path = foreign(tmp_path, "global_step1", age=0) / "mp_rank_00_model_states.pt"
    whole = path.read_bytes()
    weight = torch.load(path, weights_only=True)["weight"]
    generator = random.Random(3)
    noticed = 0
    for _ in range(300):
        flipped = bytearray(whole)
        flipped[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        path.write_bytes(flipped)
        if verify(path.parent, [path.name]):
            noticed += 1
            continue
        try:
            assert torch.equal(torch.load(path, weights_only=True)["weight"], weight)
        except RuntimeError:
            pass  # torch refuses it: an error, not another weight
    assert noticed > 200


def test_writing_leaves_nothing_half_done_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, "step_1", 1)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_latest(tmp_path, "step_2")
    assert (tmp_path / "latest").read_text(encoding="utf-8") == "step_1"
    assert {p.name for p in tmp_path.iterdir()} == {"step_1", "latest"}


def test_the_manifest_is_plain_json(tmp_path: Path) -> None:
    final = save(tmp_path, "step_2", 2)
    manifest = json.loads((final / MANIFEST).read_text(encoding="utf-8"))
    assert manifest["files"]["deep/note.txt"] == {
        "bytes": len("step 2"),
        "sha256": sha256_of(final / "deep" / "note.txt"),
    }
