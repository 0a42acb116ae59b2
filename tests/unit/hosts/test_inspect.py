# SPDX-License-Identifier: Apache-2.0
"""Which folder is taken for which checkpoint, and what of it can be described without DeepSpeed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from ds_blockwise.hosts.deepspeed.checkpoint.inspect import convert_checkpoint, describe_checkpoint
from tests.helpers import ROOT

PORTABLE = ROOT / "tests/data/checkpoints/format_1/portable"


def test_a_portable_checkpoint_is_described_to_the_last_byte() -> None:
    """What ``check --json`` prints: scripts rely on its keys."""
    found = describe_checkpoint(PORTABLE)
    tag_folder = PORTABLE / "step_3"
    assert list(found) == (
        "checkpoint kind global_steps optimizer topology settings parameters elements bytes notes problems".split()
    )
    assert (found["checkpoint"], found["kind"], found["global_steps"]) == (str(tag_folder), "portable", 3)
    index = json.loads((tag_folder / "portable.json").read_text(encoding="utf-8"))
    assert (found["settings"], found["topology"]) == (index["record"]["settings"], index["origin"]["topology"])
    total = sum(path.stat().st_size for path in tag_folder.iterdir())
    assert found["bytes"]["total"] == total == sum(n for kind, n in found["bytes"].items() if kind != "total")
    assert found["bytes"]["weights"] == 632 * 4
    assert json.loads(json.dumps(found)) == found


def test_damage_of_a_portable_checkpoint_is_a_problem_not_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "step_3"
    shutil.copytree(PORTABLE / "step_3", folder)
    (folder / "weights-00001.safetensors").unlink()
    found = describe_checkpoint(folder)
    assert found["problems"] == ["weights-00001.safetensors: missing"]
    assert found["parameters"] == 12  # portable.json is whole
    with pytest.raises(ValueError, match="is portable already"):
        convert_checkpoint(folder, tmp_path / "output")


def test_the_samples_of_a_run_with_sequence_parallelism_are_kept(tmp_path: Path) -> None:
    """DeepSpeed divides the batch by that size, and writes a whole float."""
    source = tmp_path / "source"
    shutil.copytree(ROOT / "tests/data/checkpoints/format_1/deepspeed", source)
    (model_file,) = source.glob("step_3/*model_states.pt")
    written = torch.load(model_file, weights_only=False)
    torch.save(written | {"global_samples": 6.0}, model_file)
    for manifest in source.glob("step_3/ds_blockwise*.json"):
        manifest.unlink()  # its sums are those of the other samples
    folder, _ = convert_checkpoint(source, tmp_path / "output")
    counters = torch.load(folder / "training_state.pt")["counters"]
    assert (counters["global_samples"], type(counters["global_samples"])) == (6, int)


def test_a_universal_checkpoint_must_have_all_files_of_a_parameter(tmp_path: Path) -> None:
    """A frozen parameter has no moments; one with a single moment has lost the other."""
    zero = tmp_path / "u" / "zero"
    for name, files in {"a": ("fp32", "exp_avg", "exp_avg_sq"), "b": ("fp32",), "c": ("fp32", "exp_avg")}.items():
        (zero / name).mkdir(parents=True)
        for file in files:
            torch.save(torch.zeros(3), zero / name / f"{file}.pt")
    (tmp_path / "latest_universal").write_text("u", encoding="utf-8")
    found = describe_checkpoint(tmp_path)
    assert (found["kind"], found["parameters"]) == ("universal", 3)
    assert found["problems"] == ["zero/c/exp_avg_sq.pt: missing"]
    with pytest.raises(ValueError, match="Convert the checkpoint that it was made from"):
        convert_checkpoint(tmp_path, tmp_path / "output")


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a folder"):
        describe_checkpoint(tmp_path / "absent")
    with pytest.raises(ValueError, match="there is no checkpoint in"):
        describe_checkpoint(tmp_path)
