# SPDX-License-Identifier: Apache-2.0
"""A run file with its model file and DeepSpeed JSON, without a mistake, and how to put one in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

MISSING = object()


def project(folder: Path, run: dict[str, Any], model: dict[str, Any], engine: dict[str, Any]) -> Path:
    """A run file with its model file and JSON."""
    (folder / "model.yaml").write_text(yaml.safe_dump(model), encoding="utf-8")
    (folder / "ds.json").write_text(json.dumps(engine), encoding="utf-8")
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run), encoding="utf-8")
    return path


def sound() -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Run, model and JSON without a mistake: 2 nodes of 4, tensor parallelism 2."""
    run = {
        "name": "r",
        "model": "model.yaml",
        "deepspeed": "ds.json",
        "output": "runs/r",
        "data": {"directory": "data/r"},
        "parallel": {"tensor": 2},
        "cluster": {"nodes": 2, "gpus_per_node": 4},
        "training": {
            "steps": 100,
            "warmup_steps": 10,
            "global_batch_size": 32,
            "micro_batch_size": 4,
            "validation_sequences": 8,
            "validation_interval": 50,
        },
    }
    model = {
        "num_layers": 2,
        "hidden_size": 64,
        "ffn_hidden_size": 128,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "vocab_size": 256,
        "sequence_length": 32,
    }
    engine = {
        "bf16": {"enabled": True},
        "optimizer": {"type": "BlockwiseAdamMini", "params": {"lr": 1e-3}},
        "scheduler": {"type": "BlockwiseCosineLR", "params": {"min_lr": 1e-4}},
        "zero_optimization": {"stage": 1},
    }
    return run, model, engine


def put(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        values = values[parent]
    if value is MISSING:
        del values[last]
    else:
        values[last] = value
