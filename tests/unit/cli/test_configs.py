# SPDX-License-Identifier: Apache-2.0
"""``ds-blockwise configs``: every shipped file is listed with a line, and a copy stands by itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from ds_blockwise.cli.main import main
from tests.helpers import ROOT

CONFIGS = ROOT / "configs"
SHIPPED = sorted(
    path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*") if path.suffix in (".yaml", ".json")
)


def test_every_file_is_listed_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line.startswith("  "))
    assert sorted(lines) == SHIPPED
    assert lines["model/llama_1100m.yaml"] == "LLaMA 1.1B"
    assert lines["recipe/c4.yaml"] == "C4 as in the paper: 30k steps of 512 sequences of 256 tokens, warm-up 1k"
    mini = lines["deepspeed/bf16_blockwise_adam_mini.json"]
    assert mini == "BlockwiseAdamMini, lr 0.0006, multipliers paper, bf16, ZeRO-1, BlockwiseCosineLR"
    assert lines["deepspeed/adamw_offload.json"] == "AdamW, lr 0.004, ZeRO-2, optimizer offload, BlockwiseCosineLR"


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("run/tiny.yaml", "run/tiny.yaml"),
        ("run/tiny", "run/tiny.yaml"),
        ("configs/run/tiny.yaml", "run/tiny.yaml"),
        ("c4", "recipe/c4.yaml"),
        ("finetune.json", "hf/finetune.json"),
    ],
)
def test_a_file_is_printed_as_it_is(name: str, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs", name]) == 0
    assert capsys.readouterr().out == (CONFIGS / file).read_text(encoding="utf-8")


def test_a_name_that_is_not_one_file_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs", "tiny"]) == 2
    assert "'tiny' there are several: model/tiny.yaml, run/tiny.yaml" in capsys.readouterr().err
    assert main(["configs", "run/tyny.yaml"]) == 2
    assert "there is none; did you mean 'run/tiny.yaml'?" in capsys.readouterr().err
    assert main(["configs", "--to", "somewhere"]) == 2
    assert "--to somewhere has no NAME" in capsys.readouterr().err


def test_a_copy_stands_by_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With bases of bases, and with model and JSON that only a base names."""
    pytest.importorskip("pydantic", reason="run files need the extra 'launch'")
    target = tmp_path / "a new" / "folder"
    for name in ("llama_2b/gqa_nodes_8", "llama_130m_c4"):
        assert main(["configs", f"run/{name}.yaml", "--to", str(target)]) == 0
        said = capsys.readouterr().out
        assert said.endswith(f"next: ds-blockwise check '{target}/run/{name}.yaml'\n")
        assert main(["check", f"{target}/run/{name}.yaml"]) == 0, capsys.readouterr()
        capsys.readouterr()
    copies = sorted(path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file())
    assert copies == sorted(
        [
            *("run/llama_2b/gqa_nodes_8.yaml", "run/llama_2b/nodes_8.yaml", "run/llama_2b/nodes_1.yaml"),
            *("run/llama_130m_c4.yaml", "recipe/c4.yaml", "recipe/openwebtext.yaml"),
            *("model/llama_2b.yaml", "model/llama_2b_gqa.yaml", "model/llama_130m.yaml"),
            *("deepspeed/bf16_blockwise_adam_mini.json", "deepspeed/bf16_blockwise_adam_mini_c4.json"),
        ]
    )
    assert all((target / name).read_bytes() == (CONFIGS / name).read_bytes() for name in copies)


def test_nothing_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "deepspeed").mkdir()
    own = tmp_path / "deepspeed" / "blockwise_muon.json"
    own.write_text("mine", encoding="utf-8")
    assert main(["configs", "blockwise_muon", "--to", str(tmp_path)]) == 2
    assert f"{tmp_path} holds deepspeed/blockwise_muon.json already, and nothing is replaced" in capsys.readouterr().err
    assert own.read_text(encoding="utf-8") == "mine"
