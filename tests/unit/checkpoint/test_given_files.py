# SPDX-License-Identifier: Apache-2.0
"""What is read of files that anybody may have written: where they may lie, what they may hold, of which types."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

import pytest
import torch

from ds_blockwise.checkpoint.given_files import load_torch_file, read_json, why_not_inside
from ds_blockwise.checkpoint.state_dicts import bad_values
from ds_blockwise.checkpoint.typed_data import typed


class Inner(TypedDict):
    numel: int
    rate: float


class Outer(TypedDict):
    name: str
    parts: list[Inner]
    by_name: dict[str, int | str]
    maybe: Inner | None


def outer(**changes: Any) -> dict[str, Any]:
    whole = {"name": "x", "parts": [{"numel": 3, "rate": 0.5}], "by_name": {"a": 1, "b": "c"}, "maybe": None}
    return whole | changes


WRONG: dict[str, tuple[object, str]] = {
    "no mapping": ([], "it must be a mapping, got a list"),
    "a missing key": ({"name": "x", "parts": [], "by_name": {}}, "it lacks maybe"),
    "a bool for a number": (outer(parts=[{"numel": True, "rate": 1}]), r"it\.parts\[0\]\.numel must be an integer"),
    "a negative number": (outer(parts=[{"numel": -1, "rate": 1}]), "an integer of 0 or more, got -1"),
    "a number too large": (outer(parts=[{"numel": 10**5000, "rate": 1}]), "got an integer that large"),
    "NaN": (outer(parts=[{"numel": 1, "rate": float("nan")}]), r"rate must be a finite number, got nan"),
    "none of a union": (outer(by_name={"a": 0.5}), r"it\.by_name\['a'\] must be an integer of 0 or more or a string"),
    "a key that is none": (outer(by_name={3: 1}), "a key of it.by_name must be a string, got 3"),
    "inside a union": (outer(maybe={"numel": 1, "rate": "fast"}), r"it\.maybe\.rate must be a finite number"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_data_is_named_by_its_place(name: str) -> None:
    value, words = WRONG[name]
    with pytest.raises(ValueError, match=words):
        typed(value, Outer, "it")


def test_right_data_is_given_back_and_unknown_keys_are_left() -> None:
    value = outer(more=object(), maybe={"numel": 2, "rate": 1})
    assert typed(value, Outer, "it") is value


@pytest.mark.parametrize(
    "tensor",
    [
        torch.empty(3, device="meta"),
        torch.zeros(1).expand(10**12),
        torch.sparse_coo_tensor(size=(3,)),
        "not a tensor",
    ],
    ids=["meta", "expanded", "sparse", "string"],
)
def test_only_plain_tensors_are_taken(tensor: object) -> None:
    assert typed(torch.zeros(2, 3).t(), torch.Tensor, "weights").shape == (3, 2)
    with pytest.raises(ValueError, match="weights must be a plain tensor, got "):
        typed(tensor, torch.Tensor, "weights")


def test_names_that_lead_out_of_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "t"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "file").write_text("", encoding="utf-8")
    (tmp_path / "secret").write_text("", encoding="utf-8")
    (folder / "out").symlink_to(tmp_path / "secret")
    (folder / "in").symlink_to(folder / "deep" / "file")
    (folder / "loop").symlink_to(folder / "loop")
    for name in ("deep/file", "in", "absent"):
        assert why_not_inside(folder, name) is None, name
    for name in ("../secret", "/etc/passwd", "deep/../../secret", "out", "", "a\0b", "a\\b", 3, None):
        assert why_not_inside(folder, name) is not None, name


UNREADABLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a pipe": (os.mkfifo, "a pipe, not a file"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "a device, not a file"),
    "a folder": (lambda path: path.mkdir(), "a folder, not a file"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_only_regular_files_are_loaded(tmp_path: Path, name: str) -> None:
    """A pipe and a device were read without end."""
    make, words = UNREADABLE[name]
    make(tmp_path / "file")
    with pytest.raises(ValueError, match=words):
        load_torch_file(tmp_path / "file")
    with pytest.raises(OSError):
        read_json(tmp_path / "file")


def test_json_that_is_nested_too_deeply(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(ValueError, match="nested too deeply"):
        read_json(tmp_path / "file")


class Runs:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_does_not_run(tmp_path: Path, zipped: bool) -> None:
    """In torch's zip files and in its older format."""
    path, marker = tmp_path / "file.pt", tmp_path / "ran"
    torch.save({"weight": torch.ones(3), "extra": [Runs(marker)]}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"objects \(posix\.mkdir\).*can run code. If .* wrote it, say please\."):
        load_torch_file(path, how_to_trust="say please")
    assert not marker.exists()
    load_torch_file(path, trust=True)
    assert marker.exists()


def test_bad_values() -> None:
    nan, inf = float("nan"), float("inf")
    assert bad_values("weights", torch.tensor([1.0, -2.0])) is None
    assert bad_values("exp_avg", torch.tensor([1.0, nan, inf])) == "holds NaN in 1 and infinity in 1 of 3 elements"
    assert bad_values("exp_avg_sq", torch.tensor([0.0, -1e-30])) == "holds values below zero in 1 of 2 elements"
    assert bad_values("buffers", torch.tensor([-inf])) is None
    assert bad_values("buffers", torch.tensor([1, 2])) is None
    assert bad_values("weights", torch.tensor([nan]).to(torch.float8_e4m3fn)) == "holds NaN in 1 of 1 elements"
