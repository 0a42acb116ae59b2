# SPDX-License-Identifier: Apache-2.0
"""A small project (run file, model, JSON, text) for the tests of `launch/`."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
# The scripts of launch/ import their neighbours by bare name, as the launcher starts them.
sys.path.insert(0, str(LAUNCH))

import token_files  # noqa: E402
from batches import Batches, check_data  # noqa: E402
from engine_config import compose  # noqa: E402
from run_config import DataConfig, RunConfig, check_run, load_run  # noqa: E402

__all__ = [
    "LAUNCH",
    "MODEL",
    "ROOT",
    "Batches",
    "DataConfig",
    "RunConfig",
    "check_data",
    "check_run",
    "compose",
    "load",
    "load_run",
    "make_project",
    "token_files",
]

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
