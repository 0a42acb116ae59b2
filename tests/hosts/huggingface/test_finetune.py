# SPDX-License-Identifier: Apache-2.0
"""The fine-tuning example: a model from a shape, tuned whole and with adapters, resumed bit for bit."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.distributed import RankContext, run_distributed
from tests.helpers.launch.project import ROOT, prepare_project

_MISSING = [name for name in ("deepspeed", "transformers", "accelerate", "peft") if find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(_MISSING), reason="needs deepspeed, transformers, accelerate and peft")

STEPS, SAVED = 8, 4


def tune(context: RankContext, project: Path) -> None:
    """On every rank: pre-train on one text, tune on another, lose the second half, resume; then tune adapters."""
    from accelerate.state import AcceleratorState

    import finetune_hf
    from tests.helpers.deepspeed.engines import forget_groups, prepare_deepspeed

    prepare_deepspeed()

    def run(output: str, *arguments: str) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        common: dict[str, Any] = {
            "output_dir": project / output,
            "deepspeed": ROOT / "configs" / "hf" / "finetune.json",
            "learning_rate": 1e-3,
            "max_steps": STEPS,
            "save_steps": SAVED,
            "per_device_train_batch_size": 2,
            "sequence_length": 32,
            "logging_steps": 2,
        }
        finetune_hf.main([*(f"--{key}={value}" for key, value in common.items()), *arguments])
        forget_groups()

    texts, more = str(project / "texts" / "*.txt"), str(project / "texts" / "more.jsonl")
    tokenizer = str(project / "data" / "tokenizer.json")
    run("base", "--model", str(project / "model.yaml"), "--tokenizer", tokenizer, "--source", texts)
    from_base = ("--model", str(project / "base"), "--source", more)
    run("whole", *from_base)
    if context.rank == 0:
        shutil.copytree(project / "whole" / f"checkpoint-{SAVED}", project / "again" / f"checkpoint-{SAVED}")
    context.barrier()
    run("again", *from_base, "--resume_from_checkpoint", "true")
    run("adapters", *from_base, "--lora_rank", "2")


def test_tuning_resumes_bitwise_and_learns(tmp_path: Path) -> None:
    """Its summary says what was trained and by how much the loss fell; a resumed run ends with the same bits."""
    from safetensors.torch import load_file

    project = prepare_project(tmp_path)
    run_distributed(tune, 2, project, timeout=240.0)
    summaries = {
        name: json.loads((project / name / "summary.json").read_text(encoding="utf-8"))
        for name in ("base", "whole", "again", "adapters")
    }
    for name, summary in summaries.items():
        assert summary["optimizer"] == "BlockwiseAdamMini"
        assert summary["steps"] == STEPS
        assert (project / name / "loss.png").stat().st_size > 0
        assert summary["loss_after"] < summary["loss_before"], name
    assert summaries["whole"]["trained_parameters"] == summaries["whole"]["parameters"]
    assert summaries["adapters"]["trained_parameters"] < summaries["whole"]["parameters"] / 4
    assert summaries["again"]["loss_after"] == summaries["whole"]["loss_after"]
    whole, again = (load_file(project / name / "model.safetensors") for name in ("whole", "again"))
    assert {name: torch.equal(again[name], weight) for name, weight in whole.items()} == dict.fromkeys(whole, True)


def test_wrong_options_are_named(tmp_path: Path) -> None:
    """Every mistake at once, before a model is built."""
    import finetune_hf

    arguments = ["--model", str(tmp_path), "--source", str(tmp_path / "*.txt"), "--output_dir", str(tmp_path / "o")]
    with pytest.raises(ValueError, match=r"(?s)--model.*config\.json.*--tokenizer") as caught:
        options, _ = finetune_hf.parse(arguments)
        finetune_hf.inputs_of(options)
    assert str(tmp_path / "*.txt") in str(caught.value)
    numbers = ("--sequence_length", "0", "--validation_fraction", "nan", "--lora_rank", "-1")
    with pytest.raises(ValueError, match=r"(?s)--sequence_length = 0.*--lora_rank = -1.*--validation_fraction = nan"):
        options, _ = finetune_hf.parse([*arguments, *numbers])
        finetune_hf.inputs_of(options)


def test_the_json_is_checked_before_anything_reads_it(tmp_path: Path) -> None:
    """HF fills in "auto"; what is misspelt or of the wrong kind would come to light in the middle of a training."""
    import finetune_hf

    finetune_hf.check_engine_file(["--deepspeed", str(ROOT / "configs/hf/finetune.json"), "--model", "x"])
    path = tmp_path / "engine.json"
    path.write_text(
        '{"optimizer": {"type": "BlockwiseAdamMinni"}, "bf16": {"enaled": "auto"}, "gradient_cliping": 1, "fp16": 1}'
    )
    with pytest.raises(ValueError, match="4 problems") as caught:
        finetune_hf.check_engine_file([f"--deepspeed={path}"])
    assert all(word in str(caught.value) for word in ("BlockwiseAdamMini'", "'enabled'", "'gradient_clipping'", "fp16"))
