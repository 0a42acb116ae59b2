# SPDX-License-Identifier: Apache-2.0
"""``ds-blockwise check FILE.json``: a DeepSpeed JSON of a script, of HF Trainer or of a tool, without a run file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ds_blockwise.cli.main import main
from ds_blockwise.runs.reading.engine_file import check_engine_file
from tests.helpers import ROOT

Check = Callable[..., tuple[int, str]]

SOUND: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 4,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "BlockwiseAdamMini", "params": {"lr": 1e-3}},
}


@pytest.fixture
def check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Check:
    """Exit status and what is printed."""

    def run(content: object, *options: str) -> tuple[int, str]:
        file = tmp_path / "ds.json"
        file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        status = main(["check", str(file), *options])
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return run


def optimizer(**params: Any) -> dict[str, Any]:
    return SOUND | {"optimizer": {"type": "BlockwiseAdamMini", "params": params}}


def schedule(name: str = "BlockwiseCosineLR", **params: Any) -> dict[str, Any]:
    return SOUND | {"scheduler": {"type": name, "params": params}}


def test_a_sound_one_is_described(check: Check) -> None:
    status, text = check(SOUND)
    assert status == 0 and text.splitlines() == [
        "optimizer  BlockwiseAdamMini",
        "engine     ZeRO-2, bf16",
        "clipping   to a gradient norm of 1.0, DeepSpeed's default; set gradient_clipping in the JSON to change it",
        "no problems",
    ]


def test_what_hugging_face_fills_in_is_no_mistake(check: Check) -> None:
    status, text = check((ROOT / "configs/hf/finetune.json").read_text(encoding="utf-8"))
    assert status == 0, text
    (left,) = (line for line in text.splitlines() if line.startswith("filled in"))
    assert "optimizer.params.lr" in left and "scheduler.params.total_num_steps" in left and "bf16.enabled" in left
    status, text = check(optimizer(lr_multipliers="auto", backend="auto"))
    assert status == 0 and "filled in" not in text, text  # these two are values of ours


WRONG: dict[str, tuple[object, tuple[str, ...]]] = {
    "key of the optimizer": (optimizer(lr_multiplier="tuned"), ("unknown key 'lr_multiplier'", "'lr_multipliers'?")),
    "auto where nobody fills it in": (optimizer(momentum_dtype="auto"), ("momentum_dtype", "'auto'")),
    "auto of ours beside others": (
        optimizer(lr="auto", lr_multipliers="auto"),
        ("optimizer.params.lr_multipliers", 'write {"auto": {}}'),
    ),
    "name of the optimizer": (SOUND | {"optimizer": {"type": "BlockwiseMoun"}}, ("did you mean 'BlockwiseMuon'?",)),
    "key of DeepSpeed": (SOUND | {"gradient_cliping": 1.0}, ("did you mean 'gradient_clipping'?",)),
    "what a host does": (
        SOUND | {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}},
        ('Use "device": "cpu".',),
    ),
    "length of the run": (schedule(min_lr=1e-5), ("needs the number of updates", '"total_num_steps": 50000')),
    "key of the schedule": (schedule(total_num_steps=9, minlr=0.0), ("did you mean 'min_lr'?",)),
    "value of the schedule": (schedule(total_num_steps=9, min_lr=0.1), ("min_lr (0.1) is above the peak lr",)),
    "text": ("{", ("a readable JSON file",)),
    "list": ("[]", ("a JSON object",)),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_named(check: Check, what: str) -> None:
    content, words = WRONG[what]
    status, text = check(content)
    assert status == 1 and all(word in text for word in words), text
    assert "__init__" not in text


def test_everything_is_named_at_once(check: Check) -> None:
    status, text = check(
        SOUND | {"gradient_clipping": -1, "optimizer": {"type": "x"}, "zero_optimization": {"stage": 7}}
    )
    assert status == 1 and text.startswith(f"{text.split(':')[0]}: 3 problem(s)"), text


def test_a_multiplier_that_moves_may_have_a_schedule_of_the_script(check: Check) -> None:
    moving = optimizer(lr_multipliers={"norm": {"start": 1.0, "end": 0.25}})
    assert check(moving)[0] == 0
    status, text = check(moving | {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5}}})
    assert status == 1 and "optimizer.params" in text, text


def test_as_json(check: Check) -> None:
    status, text = check(SOUND, "--json")
    assert status == 0 and json.loads(text)["engine"]["optimizer"] == "BlockwiseAdamMini"
    status, text = check(SOUND | {"gradient_clipping": -1}, "--json")
    assert status == 1 and len(json.loads(text)["problems"]) == 1


@pytest.mark.parametrize("option", [("--set", "training.steps=3"), ("--deepspeed-config", "other.json")])
def test_options_of_a_run_file_are_refused(check: Check, option: tuple[str, str]) -> None:
    status, text = check(SOUND, *option)
    assert status == 2 and f"{option[0]} changes a run file" in text


@pytest.mark.parametrize("file", sorted((ROOT / "configs/deepspeed").glob("*.json")), ids=lambda file: file.stem)
def test_the_repositorys_lack_nothing_but_what_the_main_job_fills_in(file: Path) -> None:
    _, problems = check_engine_file(file)
    assert all("In the JSON of a run file leave it out" in line for line in problems.lines), problems.lines
