# SPDX-License-Identifier: Apache-2.0
"""The rule for tags: what is refused, in which words, and that every way to name a checkpoint asks it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from ds_blockwise.checkpoint import folder as files
from ds_blockwise.checkpoint.folder_rules.tags import MAX_BYTES, agreed_tag, checked_tag
from ds_blockwise.checkpoint.manifest import CheckpointError
from ds_blockwise.hosts.deepspeed.checkpoint import inspect
from tests.helpers.checkpoint_folders import save

REFUSED = {
    "": "empty",
    "epoch/3": "'epoch_3'",
    "../x": "'x'",
    "/tmp/x": "'tmp_x'",
    "a\\b": "'a_b'",
    "run[1]": "'run_1'",  # DeepSpeed would look for it with glob, and find "run1"
    "*": "'step_100'",
    ".": "dot",
    "..": "dot",
    ".hidden": "dot",
    "a\nb": "printed",
    "a\0b": "printed",
    "a\ud800": "printed",
    " a": "blank",
    "a ": "blank",
    "latest": "beside the checkpoints",
    "LATEST": "beside the checkpoints",
    "latest_universal": "beside the checkpoints",
    "zero_to_fp32.py": "beside the checkpoints",
    "x.partial": "interrupted save",
    "x.Replaced": "interrupted save",
    "x" * (MAX_BYTES + 1): "191 bytes",
    "é" * 100: "200 bytes",
}


@pytest.mark.parametrize("tag", REFUSED)
def test_what_is_no_name_of_one_folder_is_refused(tag: str) -> None:
    with pytest.raises(ValueError, match="A tag is the name of one folder") as caught:
        checked_tag(tag)
    assert REFUSED[tag] in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("tag", "text"),
    [
        ("global_step10", "global_step10"),  # DeepSpeed, HF Trainer, Megatron-DeepSpeed
        ("pytorch_model", "pytorch_model"),  # Accelerate
        ("step_0000005", "step_0000005"),  # the main job
        ("epoch=3 loss=0.5, best", "epoch=3 loss=0.5, best"),
        ("vor-über", "vor-über"),
        ("x.partial.1", "x.partial.1"),
        ("-1", "-1"),
        (7, "7"),
        (Path("best"), "best"),
        ("x" * MAX_BYTES, "x" * MAX_BYTES),
    ],
)
def test_names_that_hosts_use_stay(tag: object, text: str) -> None:
    assert checked_tag(tag) == agreed_tag(tag) == text
    assert agreed_tag(None) is None


@pytest.mark.parametrize("tag", [True, 1.5, b"x", ["x"], object()])
def test_what_is_no_text_is_refused(tag: Any) -> None:
    with pytest.raises(TypeError, match="must be a string or an integer, got"):
        checked_tag(tag)


def test_a_number_that_python_does_not_write_out() -> None:
    with pytest.raises(ValueError, match="more than 190 digits"):
        checked_tag(10**5000)


def test_what_this_machine_cannot_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under LC_ALL=C without Python's UTF-8 mode."""
    monkeypatch.setattr(os, "fsencode", lambda text: text.encode("ascii"))
    with pytest.raises(ValueError, match="this machine cannot write 'ü' in a file's name"):
        checked_tag("über")


def test_the_same_rule_where_a_checkpoint_is_looked_for(tmp_path: Path) -> None:
    """Beside the folder lies a whole checkpoint, which a tag out of the folder must not reach."""
    save(tmp_path / "others", "x", 1)
    folder = tmp_path / "mine"
    save(folder, "step_1", 1)
    for tag in ("../others/x", str(tmp_path / "others" / "x"), "../mine/step_1", "step_1/"):
        with pytest.raises(ValueError, match="cannot name a checkpoint"):
            files.resolve_tag(folder, tag)
        files.write_latest(folder, tag)
        with pytest.raises(CheckpointError, match=r"latest names no checkpoint: .*Write the tag to load into it\."):
            files.resolve_tag(folder)


def test_a_checkpoint_named_by_a_dot_keeps_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``ds-blockwise convert . OUTPUT`` in a tag folder."""
    final = save(tmp_path, "step_1", 1)
    (final / "below").mkdir()
    monkeypatch.chdir(final / "below")
    assert inspect._found(Path(".."), None).folder == final
    monkeypatch.chdir(final)
    assert inspect._found(Path("."), None).tag == "step_1"


def test_latest_that_is_no_small_file(tmp_path: Path) -> None:
    """A pipe would be waited for, and a file without end read without end."""
    save(tmp_path, "step_1", 1)
    latest = tmp_path / "latest"
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: path.write_bytes(b"x" * 5000)):
        latest.unlink()
        make(latest)
        with pytest.raises(CheckpointError, match=r"latest names no checkpoint: it (is not a regular|has more)"):
            files.resolve_tag(tmp_path)
