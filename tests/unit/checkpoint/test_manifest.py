# SPDX-License-Identifier: Apache-2.0
"""The manifest: what it lists, and which damage of which file it shows."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import pytest
import torch

from ds_blockwise import atomic_files
from ds_blockwise.atomic_files import sum_of
from ds_blockwise.checkpoint import manifest
from ds_blockwise.checkpoint.manifest import (
    MANIFEST,
    CheckpointError,
    FileFacts,
    listed_files,
    read_manifest,
    sums_of,
    verify,
)
from tests.helpers.checkpoint_folders import foreign, save


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
        "format": text.replace('"format": 2', '"format": 9'),
        "list": "[]",
    }[damage]
    assert changed != text
    path.write_text(changed, encoding="utf-8")
    expected = "reads formats 1 and 2" if damage == "format" else "Restore the file from a copy"
    for use in (read_manifest, verify, listed_files):
        with pytest.raises(CheckpointError, match=expected) as caught:
            use(final)
        assert str(path) in str(caught.value)


def test_files_without_a_manifest_are_checked_by_the_sums_inside_them(tmp_path: Path) -> None:
    old = foreign(tmp_path, "global_step10", age=2)
    path = old / "mp_rank_00_model_states.pt"
    whole = path.read_bytes()
    assert verify(old) == []
    for content, expected in ((whole[: len(whole) // 2], "cut off"), (b"", "empty")):
        path.write_bytes(content)
        (problem,) = verify(old)
        assert problem == f"mp_rank_00_model_states.pt: {expected}"


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


def test_the_manifest_is_plain_json(tmp_path: Path) -> None:
    final = save(tmp_path, "step_2", 2)
    assert listed_files(final) == ["mp_rank_00_model_states.pt", "deep/note.txt"]  # the largest first
    manifest = json.loads((final / MANIFEST).read_text(encoding="utf-8"))
    assert manifest["files"]["deep/note.txt"] == {
        "bytes": len("step 2"),
        "sum": sum_of(final / "deep" / "note.txt"),
    }


def test_a_manifest_of_the_first_format_is_read(tmp_path: Path) -> None:
    """It has SHA-256 under a key of that name."""
    final = save(tmp_path, "step_2", 2)
    said = json.loads((final / MANIFEST).read_text(encoding="utf-8"))
    said["format"] = 1
    said["files"] = {
        name: {"bytes": facts["bytes"], "sha256": hashlib.sha256((final / name).read_bytes()).hexdigest()}
        for name, facts in said["files"].items()
    }
    del said["manifest_sha256"]
    said["manifest_sha256"] = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
    (final / MANIFEST).write_text(json.dumps(said), encoding="utf-8")
    assert verify(final) == []
    found = read_manifest(final)
    assert found is not None and all(facts["sum"].startswith("sha256:") for facts in found["files"].values())
    (final / "deep" / "note.txt").write_text("step 3", encoding="utf-8")
    assert [line.partition(" (")[0] for line in verify(final)] == ["deep/note.txt: its contents have changed"]


def test_a_sum_of_a_kind_that_is_not_here_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without xxhash says so; names and sizes can be compared."""
    final = save(tmp_path, "step_2", 2)
    monkeypatch.delitem(atomic_files.SUMS, "xxh3_128")
    monkeypatch.setattr(atomic_files, "SUM", "sha256")
    problems = verify(final)
    assert len(problems) == 2 and all("pip install xxhash" in line and '"verify": "size"' in line for line in problems)
    assert verify(final, contents=False) == []
    assert verify(save(tmp_path, "step_3", 3)) == []  # summed by SHA-256


def test_a_file_that_was_summed_while_it_was_written_is_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But its size is looked at: a file that lost its end must not be listed with the sum of the whole."""
    (tmp_path / "a.pt").write_bytes(b"abc")
    known: FileFacts = {"bytes": 3, "sum": "known"}
    monkeypatch.setattr(manifest, "sum_of", lambda path: f"read:{path.name}")
    (tmp_path / "b.pt").write_bytes(b"d")
    assert sums_of(tmp_path, ["a.pt", "b.pt"], {"a.pt": known}) == {
        "a.pt": known,
        "b.pt": {"bytes": 1, "sum": "read:b.pt"},
    }
    (tmp_path / "a.pt").write_bytes(b"ab")
    with pytest.raises(OSError, match="has 2 bytes, 3 were written"):
        sums_of(tmp_path, ["a.pt"], {"a.pt": known})
