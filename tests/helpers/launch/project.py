# SPDX-License-Identifier: Apache-2.0
"""A small project (run file, model, JSON, text) for the tests of `launch/`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from data import token_files
from ds_blockwise.runs.engine_json import compose
from ds_blockwise.runs.run_file import RunConfig, check_run, load_run
from tests.helpers import ROOT

LAUNCH = ROOT / "launch"
MODEL = """\
num_layers: 2
hidden_size: 48
ffn_hidden_size: 80
num_heads: 4
num_kv_heads: 2
head_dim: 12
vocab_size: 320
sequence_length: 32
"""
RUN = """\
name: small
model: model.yaml
deepspeed: mini.json
output: {output}
data:
  directory: {data}
  source: [{texts}]
  validation_fraction: 0.2
training:
  steps: 6
  warmup_steps: 2
  global_batch_size: 8
  micro_batch_size: 2
  validation_sequences: 7
  validation_interval: 4
  log_interval: 4
  seed: 5
"""


def _write_texts(folder: Path) -> None:
    """Text files of one language and a JSONL file with the key `text`."""
    folder.mkdir()
    for number in range(12):
        lines = [f"{number} plus {n} makes {number + n}, said the {'dog' if n % 3 else 'cat'}." for n in range(60)]
        (folder / f"{number:02d}.txt").write_text("\n".join(lines), encoding="utf-8")
    entries = [{"text": f"entry {n} follows entry {n - 1}. " * 20, "id": n} for n in range(12)]
    (folder / "more.jsonl").write_text("\n".join(map(json.dumps, entries)), encoding="utf-8")


def make_project(folder: Path) -> Path:
    _write_texts(folder / "texts")
    (folder / "model.yaml").write_text(MODEL, encoding="utf-8")
    shutil.copy(ROOT / "configs" / "deepspeed" / "blockwise_adam_mini.json", folder / "mini.json")
    text = RUN.format(output=folder / "runs", data=folder / "data", texts=folder / "texts")
    (folder / "run.yaml").write_text(text, encoding="utf-8")
    return folder


def load(project: Path, *overrides: str) -> tuple[RunConfig | None, str]:
    """The run and all of its problems for two processes, as one text."""
    run, problems = load_run(project / "run.yaml", overrides=overrides)
    if run is not None:
        check_run(run, 2, problems)
        compose(run, problems)
    return run, "\n".join(problems.lines)


def prepare_project(folder: Path) -> Path:
    """A project whose data is ready."""
    project = make_project(folder)
    run, problems = load(project)
    assert run is not None, problems
    token_files.prepare(run.data, run.shape.vocab_size, run.file)
    return project


def write_json(
    project: Path, name: str, optimizer: str = "BlockwiseAdamMini", dtype: str = "fp32", stage: int = 2, **params: Any
) -> Path:
    """A DeepSpeed JSON like the shipped one, with another optimizer, precision or stage.

    ``offload=True`` among the params moves the optimizer to the CPU, ``clipped=False`` leaves the gradients as they
    are; the others are the optimizer's.
    """
    config = json.loads((project / "mini.json").read_text(encoding="utf-8"))
    config["optimizer"]["type"] = optimizer
    config["zero_optimization"] = {"stage": stage}
    if params.pop("offload", False):
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    if not params.pop("clipped", True):
        config["gradient_clipping"] = 0.0
    config["optimizer"]["params"] |= params
    if dtype == "bf16":
        config["bf16"] = {"enabled": True}
    del config["tensorboard"]
    path = project / f"{name}.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


def assert_same_checkpoint(one: Path, two: Path) -> None:
    """Two tag folders hold the same weights, optimizer state, schedule and curves, bit for bit."""
    names = sorted(p.name for p in one.glob("*.pt"))
    assert names == sorted(p.name for p in two.glob("*.pt"))
    assert names
    for name in names:
        first, second = (torch.load(folder / name, weights_only=False) for folder in (one, two))
        for state in (first, second):
            for clock in ("train_seconds", "wall_seconds"):
                state.get("progress", {}).pop(clock, None)
            state.pop("ds_config", None)  # names the output folder
        _assert_same(first, second, name)


def _assert_same(one: Any, two: Any, where: str) -> None:
    assert type(one) is type(two), where
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, two), where
    elif isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for key in one:
            _assert_same(one[key], two[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(two), where
        for index, (first, second) in enumerate(zip(one, two, strict=True)):
            _assert_same(first, second, f"{where}[{index}]")
    elif isinstance(one, int | float | str | None):
        assert one == two, where
