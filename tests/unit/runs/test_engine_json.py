# SPDX-License-Identifier: Apache-2.0
"""What `deepspeed.initialize` gets is composed of the JSON and the run file, each number from one place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ds_blockwise.runs.engine_json import compose, optimizer_type, parameter_dtype, zero_stage
from ds_blockwise.runs.run_file import check_run, load_run
from tests.helpers import ROOT
from tests.helpers.run_files import project, put, sound

JSONS = sorted((ROOT / "configs" / "deepspeed").glob("*.json"))


@pytest.mark.parametrize("path", JSONS, ids=lambda path: path.stem)
def test_shipped_configuration_is_composed_from_one_place_each(path: Path) -> None:
    run, problems = load_run(ROOT / "configs" / "run" / "tiny.yaml", deepspeed_file=path)
    assert run is not None
    check_run(run, 2, problems)
    config = compose(run, problems)
    assert problems.lines == []
    assert config["train_batch_size"] == run.training.global_batch_size
    assert config["train_micro_batch_size_per_gpu"] == run.training.micro_batch_size
    params = config["scheduler"]["params"]
    assert params["total_num_steps"] == run.training.steps
    assert params["warmup_num_steps"] == run.training.warmup_steps
    assert run.output.name == path.stem
    assert config["tensorboard"]["output_path"] == str(run.output)
    assert run.wants_metrics_csv
    assert "csv_monitor" not in config  # it would write a file for each metric
    assert run.deepspeed == json.loads(path.read_text(encoding="utf-8"))  # compose made a copy


@pytest.mark.parametrize("key", ["zero_force_ds_cpu_optimizer", "disable_allgather", "dataloader_drop_last"])
def test_a_key_of_deepspeed_is_no_misspelling(key: str, tmp_path: Path) -> None:
    """What DeepSpeed reads is known, whether we use it or not."""
    parts = sound()
    put(parts[2], key, True)
    run, problems = load_run(project(tmp_path, *parts))
    assert run is not None
    assert compose(run, problems)[key] is True
    assert problems.lines == []


def test_facts_of_a_configuration() -> None:
    config = {"optimizer": {"type": "AdamW"}, "bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}
    assert (optimizer_type(config), parameter_dtype(config), zero_stage(config)) == ("AdamW", torch.bfloat16, 2)
    assert (parameter_dtype({"fp16": {"enabled": False}}), zero_stage({})) == (torch.float32, 0)
