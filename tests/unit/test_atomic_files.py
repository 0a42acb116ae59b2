# SPDX-License-Identifier: Apache-2.0
"""Files are written whole or not at all."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import torch

from ds_blockwise import atomic_files
from ds_blockwise.atomic_files import SUMS, SummedFile, replace_file, replace_text, sha256_of, sum_of


def test_the_digest_is_that_of_the_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the file is read in several chunks."""
    monkeypatch.setattr(atomic_files, "_CHUNK", 7)
    content = os.urandom(40)
    (tmp_path / "a").write_bytes(content)
    assert sha256_of(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_a_name_is_given_after_the_bytes_are_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """File, then name, then the folder's list of names."""
    partial, final = tmp_path / "a.partial", tmp_path / "a"
    partial.write_text("new", encoding="utf-8")
    final.write_text("old", encoding="utf-8")
    seen: list[tuple[str, str]] = []
    monkeypatch.setattr(atomic_files, "sync", lambda path: seen.append((path.name, final.read_text(encoding="utf-8"))))
    replace_file(partial, final)
    assert seen == [("a.partial", "old"), (tmp_path.name, "new")]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_full_disk_leaves_the_old_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no file beside it."""
    path = tmp_path / "latest"
    replace_text(path, "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        replace_text(path, "new")
    assert path.read_text(encoding="utf-8") == "old"
    assert [found.name for found in tmp_path.iterdir()] == ["latest"]


def test_the_digest_is_sha_256(tmp_path: Path) -> None:
    """The published digests of "abc" and of nothing (FIPS 180-2, appendix B), also over several reads."""
    file = tmp_path / "file"
    file.write_bytes(b"abc")
    assert sha256_of(file) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    file.write_bytes(b"")
    assert sha256_of(file) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    file.write_bytes(b"a" * 1_000_000)
    assert sha256_of(file) == "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"


def test_text_is_replaced(tmp_path: Path) -> None:
    file = tmp_path / "latest"
    replace_text(file, "step_1")
    replace_text(file, "step_2 ü")
    assert file.read_text(encoding="utf-8") == "step_2 ü"
    assert list(tmp_path.iterdir()) == [file]


def test_the_faster_sum_is_xxh3(tmp_path: Path) -> None:
    """The digests of nothing and of "abc" that its authors' program prints; one bit is another sum."""
    file = tmp_path / "file"
    file.write_bytes(b"")
    assert sum_of(file) == "xxh3_128:99aa06d3014798d86001c324468d497f"
    file.write_bytes(b"abc")
    assert sum_of(file) == "xxh3_128:06b05ab6733a618578af5f94892f3950"
    file.write_bytes(b"abb")
    assert sum_of(file) != "xxh3_128:06b05ab6733a618578af5f94892f3950"


@pytest.mark.parametrize("name", SUMS)
def test_a_file_is_summed_while_torch_writes_it(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small pieces and large ones, in the order of the file."""
    monkeypatch.setattr(atomic_files, "SUM", name)
    path = tmp_path / "state.pt"
    tensors = {"large": torch.arange(1 << 20), "small": [torch.tensor(i) for i in range(50)], "none": torch.zeros(0)}
    file = SummedFile(path)
    torch.save(tensors, file)
    assert file.close() == sum_of(path, name) and file.size == path.stat().st_size
    assert torch.equal(torch.load(path)["large"], tensors["large"])


def test_a_full_disk_is_said_when_the_file_is_closed() -> None:
    """torch's writer ends the process if what it writes into raises while it is put away."""
    file = SummedFile("/dev/full")
    torch.save({"large": torch.zeros(1 << 20)}, file)
    with pytest.raises(OSError, match="No space left"):
        file.close()


def test_much_is_on_its_way_to_the_disk_before_the_file_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what the disk says there is not lost: the kernel tells each failure once."""
    monkeypatch.setattr(atomic_files, "_FLUSHED_AT_ONCE", 100)
    sizes: list[int] = []
    path = tmp_path / "file"
    monkeypatch.setattr(os, "fdatasync", lambda descriptor: sizes.append(os.fstat(descriptor).st_size))
    file = SummedFile(path)
    for _ in range(5):
        file.write(bytes(60))
    assert file.close() == sum_of(path) and sizes and sizes[0] >= 120

    def broken(_: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", broken)
    file = SummedFile(path)
    file.write(bytes(200))
    with pytest.raises(OSError, match="Input/output error"):
        file.close()


def test_an_error_of_the_writer_is_not_replaced(tmp_path: Path) -> None:
    """By one of closing the file."""
    file = SummedFile("/dev/full")
    file.write(b"held back")
    file.abandon()
    with pytest.raises(FileNotFoundError):
        SummedFile(tmp_path / "nowhere" / "file")
