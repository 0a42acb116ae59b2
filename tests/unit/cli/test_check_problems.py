# SPDX-License-Identifier: Apache-2.0
"""``ds-blockwise check`` and ``convert`` of checkpoints that are damaged or not sound: every problem, by name."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("deepspeed", reason="DeepSpeed's files need the extra 'deepspeed'")

from ds_blockwise.checkpoint.manifest import MANIFEST, files_in, sums_of, write_manifest
from ds_blockwise.cli.main import main
from tests.data.checkpoints.format_1 import write as old
from tests.helpers import ROOT

SOURCE = ROOT / "tests/data/checkpoints/format_1"
MODEL = "mp_rank_00_model_states.pt"
OPTIM = "zero_pp_rank_{}_mp_rank_00_optim_states.pt"


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[str], Path]:
    def copy(kind: str) -> Path:
        shutil.copytree(SOURCE / kind, tmp_path / kind)
        return tmp_path / kind / old.TAG

    return copy


def manifest_anew(folder: Path, **changes: Any) -> None:
    said = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    (folder / MANIFEST).unlink()
    keys = ("kind", "tag", "global_steps", "topology", "settings")
    files = {"files": sums_of(folder, files_in(folder))}
    write_manifest(folder, **{key: said[key] for key in keys}, **(files | changes))


def edit(path: Path, change: Callable[[Any], object]) -> None:
    loaded = torch.load(path, weights_only=False)
    change(loaded)
    torch.save(loaded, path)


def check(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    status = main(["check", str(folder), "--json"])
    captured = capsys.readouterr()
    return status, json.loads(captured.out)["problems"] if captured.out else [captured.err]


def state_of(file: Any) -> Any:
    return file["optimizer_state_dict"]["base_optimizer_state"]["state"][0]


def test_all_values_that_no_sound_run_has_are_named(folder, tmp_path, capsys) -> None:
    """NaN on one rank, a negative second moment on the other, both in one list; convert refuses."""
    path = folder("deepspeed")
    edit(path / OPTIM.format(0), lambda file: state_of(file)["exp_avg"][:2].fill_(float("nan")))
    manifest_anew(path)
    assert main(["convert", str(path), str(tmp_path / "output")]) == 2
    said = capsys.readouterr().err
    assert "holds NaN in 2 of" in said and "model.embed_tokens.weight" in said and OPTIM.format(0) in said
    assert "differ by" not in said and not (tmp_path / "output" / old.TAG).exists()
    edit(path / OPTIM.format(1), lambda file: state_of(file)["exp_avg_sq"][:1].fill_(-1.0))
    edit(
        path / OPTIM.format(1),
        lambda file: file["optimizer_state_dict"]["single_partition_of_fp32_groups"][0].data[3:4].fill_(float("inf")),
    )
    manifest_anew(path)
    status, problems = check(path, capsys)
    assert status == 1 and len(problems) == 3, problems
    first, second, third = sorted(problems)
    assert f"{OPTIM.format(0)}: exp_avg of 'model.embed_tokens.weight' holds NaN in 2 of" in first
    assert f"{OPTIM.format(1)}: exp_avg_sq of " in second and "holds values below zero in 1 of" in second
    assert f"{OPTIM.format(1)}: weights of " in third and "holds infinity in 1 of" in third


def test_values_are_looked_at_without_a_record_too(folder, capsys) -> None:
    """AdamW's checkpoint has no record; NaN is NaN."""
    path = folder("deepspeed")

    def foreign(file: Any) -> None:
        del file["optimizer_state_dict"]["base_optimizer_state"]["ds_blockwise"]
        state_of(file)["exp_avg_sq"][:3].fill_(-2.0)

    edit(path / OPTIM.format(0), foreign)
    manifest_anew(path)
    status, problems = check(path, capsys)
    assert status == 1 and len(problems) == 1
    assert "['exp_avg_sq'] holds values below zero in 3 of" in problems[0]


def test_a_damaged_file_does_not_hide_another(folder, capsys) -> None:
    path = folder("portable")
    flipped = bytearray((path / "exp_avg-00001.safetensors").read_bytes())
    flipped[-1] ^= 0x7F
    (path / "exp_avg-00001.safetensors").write_bytes(flipped)
    (path / "training_state.pt").unlink()
    status, problems = check(path, capsys)
    assert status == 1
    assert any(p.startswith("exp_avg-00001.safetensors: its contents have changed") for p in problems), problems
    assert any("training_state.pt: missing" in p for p in problems), problems


def no_files(path: Path) -> None:
    manifest_anew(path, files={})


def no_moment(path: Path) -> None:
    index = json.loads((path / "portable.json").read_text(encoding="utf-8"))
    del index["tensors"]["exp_avg_sq"]["lm_head.weight"]
    del index["tensors"]["exp_avg"]["model.norm.weight"]
    (path / "portable.json").write_text(json.dumps(index), encoding="utf-8")
    manifest_anew(path)


def bad_record(path: Path) -> None:
    edit(path / OPTIM.format(1), lambda file: _record(file)["tensors"][0]["placements"][0].update(numel="many"))
    manifest_anew(path)


def later_record(path: Path) -> None:
    edit(path / OPTIM.format(0), lambda file: _record(file).update(format=2))
    manifest_anew(path)


def _record(file: Any) -> Any:
    return file["optimizer_state_dict"]["base_optimizer_state"]["ds_blockwise"]


def many_ranks(path: Path) -> None:
    edit(path / MODEL, lambda file: file.update(dp_world_size=10**7))
    manifest_anew(path)


def manifest_cut(path: Path) -> None:
    (path / MANIFEST).write_bytes((path / MANIFEST).read_bytes()[:-40])


def file_added(path: Path) -> None:
    shutil.copy(path / MODEL, path / "mp_rank_01_model_states.pt")


def endless(path: Path) -> None:
    (path / MODEL).unlink()
    (path / MODEL).symlink_to("/dev/zero")


def outside(path: Path) -> None:
    copy = path.parent / "elsewhere.pt"
    (path / MODEL).rename(copy)
    (path / MODEL).symlink_to(copy)


PROBLEMS: dict[str, tuple[str, Callable[[Path], None], list[str]]] = {
    "a manifest without files": ("deepspeed", no_files, ["lists no file with tensors"]),
    "an index without moments": (
        "portable",
        no_moment,
        ["exp_avg of 'model.norm.weight' are missing", "exp_avg_sq of 'lm_head.weight' are missing"],
    ),
    "a record that cannot be read": ("deepspeed", bad_record, [OPTIM.format(1), "numel must be an integer", "'many'"]),
    "a record of a later format": ("deepspeed", later_record, [OPTIM.format(0), "written in format 2"]),
    "ten million ranks": ("deepspeed", many_ranks, ["1 x 10000000 ranks"]),
    "a damaged manifest": ("deepspeed", manifest_cut, [MANIFEST, "cannot be read"]),
    "a file that was added": ("deepspeed", file_added, ["mp_rank_01_model_states.pt: not listed"]),
    "a device": ("deepspeed", endless, [MODEL, "a link out of the checkpoint"]),
    "a link outwards": ("deepspeed", outside, [MODEL, "a link out of the checkpoint", "put a copy"]),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_check_finds(folder, capsys, name: str) -> None:
    """Each was `no problem found` with status 0, a traceback, or a wait without end."""
    kind, spoil, words = PROBLEMS[name]
    path = folder(kind)
    spoil(path)
    status, problems = check(path, capsys)
    assert status == 1
    assert all(word in "\n".join(problems) for word in words), problems


def test_latest_that_is_a_pipe(folder, capsys) -> None:
    path = folder("deepspeed").parent
    (path / "latest").unlink()
    os.mkfifo(path / "latest")
    assert main(["check", str(path)]) == 2
    assert "latest names no checkpoint: it is not a regular file" in capsys.readouterr().err
