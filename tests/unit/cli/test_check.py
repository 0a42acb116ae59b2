# SPDX-License-Identifier: Apache-2.0
"""`ds-blockwise check` and `convert`: what they print, and what they refuse with which exit status."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ds_blockwise.cli.main import main
from tests.helpers.distributed import RankContext, run_cases
from tests.hosts.deepspeed.test_portable import FROZEN, Custom, qwen, saved, saved_by_adamw

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")

OPTIM = "zero_pp_rank_0_mp_rank_00_optim_states.pt"


def command(*arguments: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of ``ds-blockwise``."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([str(argument) for argument in arguments])
    return status, out.getvalue(), err.getvalue()


def save(context: RankContext, name: str, **options: Any) -> Path:
    """A checkpoints folder of a ZeRO-2 run on one rank."""
    return saved(context, name, build=partial(qwen, frozen=FROZEN), **{"stage": 2, **options})[0]


# -------------------------------------------------------------------------------------- cases


def check_says_what_is_inside(context: RankContext) -> None:
    """One has to know what a folder is before one can resume it."""
    folder = save(context, "inside", params={"lr_multipliers": {"emb": 7}, "checkpoint_format": "compact"})
    status, text, err = command("check", folder)
    assert status == 0, (text, err)
    for words in (
        f"{folder / 't'}: deepspeed checkpoint",
        "step         2",
        "optimizer    BlockwiseAdamMini",
        "dp 1, tp 1, pp 1, zero_stage 2",
        "emb 7",
        "checkpoint_format: compact",
        "no problem found",
    ):
        assert words in text, (words, text)
    status, text, _ = command("check", folder / "t", "--json")
    found = json.loads(text)
    assert status == 0 and not found["problems"] and not found["notes"]
    trained = sum(p.numel() for p in qwen(frozen=FROZEN).parameters() if p.requires_grad)
    assert (found["parameters"], found["elements"]) == (len(list(qwen().parameters())) - len(FROZEN), trained)
    assert found["bytes"]["weights"] == 4 * trained  # ZeRO pads the moments only
    assert found["bytes"]["exp_avg_sq_blocks"] < found["bytes"]["exp_avg"] / 2
    files = sum(path.stat().st_size for path in (folder / "t").rglob("*") if path.is_file())
    assert found["bytes"]["total"] == files == sum(v for k, v in found["bytes"].items() if k != "total")


def check_finds_damage(context: RankContext) -> None:
    """A file that changed on the disk must be named, with exit status 1, for scripts."""
    folder = save(context, "damage")
    path = folder / "t" / OPTIM
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 4
    for new, words in (
        (bytes(flipped), "contents have changed"),
        (content[:-100], "bytes instead of"),
        (None, "missing"),
    ):
        path.unlink()
        if new is not None:
            path.write_bytes(new)
        status, text, _ = command("check", folder)
        assert status == 1 and f"PROBLEM: {OPTIM}: " in text and words in text, text
        status, text, err = command("convert", folder, context.tmp_path / "never")
        assert status == 2 and OPTIM in err and words in err and not text, err
        assert not (context.tmp_path / "never").exists()
        path.touch()
    path.write_bytes(content)
    (folder / "later.partial").mkdir()
    status, text, _ = command("check", folder)
    assert status == 0 and "later.partial was left by a save that did not finish" in text, text


def check_without_a_manifest(context: RankContext) -> None:
    """Checkpoints of before, and other people's, have none: the sums inside the files must do."""
    folder = save(context, "bare")
    (folder / "t" / "ds_blockwise.json").unlink()
    status, text, _ = command("check", folder)
    assert status == 0 and "only the sums inside the files" in text and "BlockwiseAdamMini" in text, text
    path = folder / "t" / OPTIM
    path.write_bytes(path.read_bytes()[:-100])
    status, text, _ = command("check", folder)
    assert status == 1 and f"PROBLEM: {OPTIM}" in text, text


def check_of_another_optimizer(context: RankContext) -> None:
    """AdamW's checkpoints are none of ours, and still sound."""
    folder = saved_by_adamw(context, "adamw")
    status, text, _ = command("check", folder)
    assert status == 0 and "note: " in text and "its optimizer was another one" in text, text
    status, _, err = command("convert", folder, context.tmp_path / "never")
    assert status == 2 and "engine.load_checkpoint" in err and not (context.tmp_path / "never").exists(), err


def check_of_a_universal_checkpoint(context: RankContext) -> None:
    """DeepSpeed's converter writes a folder per parameter; one that lacks a file must not pass."""
    from deepspeed.checkpoint import ds_to_universal

    folder = save(context, "source")
    universal = context.tmp_path / "universal"
    workers = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    folders = {"input_folder": str(folder / "t"), "output_folder": str(universal / "u")}
    ds_to_universal.main(SimpleNamespace(**folders, **workers, inject_missing_state=False))
    (universal / "latest_universal").write_text("u")
    status, text, _ = command("check", universal)
    assert status == 0 and "u: universal checkpoint" in text and "exp_avg_sq: " in text, text
    (universal / "u" / "zero" / "lm_head.weight" / "exp_avg.pt").unlink()
    status, text, _ = command("check", universal / "u")
    assert status == 1 and "zero/lm_head.weight/exp_avg.pt: missing" in text, text
    status, _, err = command("convert", universal, context.tmp_path / "never")
    assert status == 2 and "Convert the checkpoint that it was made from" in err, err


def convert_and_check(context: RankContext) -> None:
    """The way that the documentation describes."""
    folder = save(context, "from")
    output = context.tmp_path / "to"
    status, text, err = command("convert", folder, output)
    assert status == 0 and f"wrote {output / 't'}" in text and f"engine.load_checkpoint({str(output)!r})" in text, err
    status, text, _ = command("check", output)
    assert status == 0 and "portable checkpoint" in text and "frozen: " in text and "buffers: " in text, text
    status, _, err = command("convert", output, context.tmp_path / "again")
    assert status == 2 and "is portable already" in err, err
    status, _, err = command("convert", folder, output, "--tag", "t")
    assert status == 2 and "exists already" in err, err
    weights = output / "t" / "weights-00001.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    status, text, _ = command("check", output)
    assert status == 1 and "PROBLEM: weights-00001.safetensors" in text, text


def wrong_arguments(context: RankContext) -> None:
    """A user's mistake is one line and exit status 2."""
    folder = save(context, "right")
    empty = context.tmp_path / "empty"
    empty.mkdir()
    for arguments, words in (
        (["check", context.tmp_path / "absent"], "is not a folder"),
        (["check", empty], "there is no checkpoint in"),
        (["check", folder, "--tag", "u"], "there is no checkpoint 'u' in"),
        (["convert", empty, folder], "there is no checkpoint in"),
    ):
        status, text, err = command(*arguments)
        assert status == 2 and not text and words in err and "Traceback" not in err, (arguments, err)
        assert len(err.splitlines()) == 1, err


def objects_in_files(context: RankContext) -> None:
    """Looking at a file must not run what somebody put into it."""
    folder = save(context, "objects", client_state={"object": Custom()})
    status, text, _ = command("check", folder)
    assert status == 1 and "Custom" in text and "add --trust" in text, text
    status, text, _ = command("check", folder, "--trust")
    assert status == 0 and "'object' is left out" in text, text


def stdout_is_json_alone(context: RankContext) -> None:
    """DeepSpeed prints while it is imported, which would spoil the output for scripts."""
    folder = save(context, "stdout")
    code = "from ds_blockwise.cli.main import main; raise SystemExit(main())"
    command = [sys.executable, "-c", code, "check", str(folder), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["optimizer"] == "BlockwiseAdamMini"


CASES: dict[str, Callable[[RankContext], None]] = {
    case.__name__: case
    for case in (
        check_says_what_is_inside,
        check_finds_damage,
        check_without_a_manifest,
        check_of_another_optimizer,
        check_of_a_universal_checkpoint,
        convert_and_check,
        wrong_arguments,
        objects_in_files,
        stdout_is_json_alone,
    )
}


def run_case(context: RankContext, name: str) -> None:
    CASES[name](context)
    shutil.rmtree(context.tmp_path / "never", ignore_errors=True)


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> dict[str, str | None]:
    chosen = [i.callspec.params["name"] for i in request.session.items if i.path == request.path]
    return run_cases(run_case, 1, {name: name for name in chosen})


@pytest.mark.parametrize("name", CASES)
def test_commands(outcomes: dict[str, str | None], name: str) -> None:
    """See the case's own docstring."""
    if outcomes[name] is not None:
        pytest.fail(f"{name}\n{outcomes[name]}", pytrace=False)
