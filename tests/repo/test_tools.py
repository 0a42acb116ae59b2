# SPDX-License-Identifier: Apache-2.0
"""The pages of `docs/tools` and the table of what was run; `make test-tools` follows the pages."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import ROOT
from tests.helpers.models import small_weight
from tests.helpers.oracle import Hyper, Oracle
from tests.helpers.support_page import versions
from tests.helpers.support_page.tools import read_rows, section
from tests.helpers.tables.oracle_names import hf_llama_classes
from tests.helpers.tools.material import SIZES
from tests.helpers.tools.run import TOOLS, check_records, files_and_commands, in_one_line

PAGES = {path.name: path for path in (ROOT / "docs/tools").glob("*.md")}
WIDTHS = {"q": 24, "k": 12, "v": 12, "o": 24}


def test_every_page_is_run() -> None:
    assert {tool.page for tool in TOOLS.values()} == set(PAGES)
    for name, page in PAGES.items():
        files, commands = files_and_commands(page)
        assert commands, name
        for file, text in files.items():
            if file.endswith(".py"):
                ast.parse(text)
            elif file.endswith(".json"):
                json.loads(text)


def test_the_table_is_of_the_pages_as_they_are() -> None:
    """A command or a version that was changed since has to be run again."""
    rows = {row["tool"]: row for row in read_rows()}
    assert set(rows) == set(TOOLS)
    for name, row in rows.items():
        tool = TOOLS[name]
        _, commands = files_and_commands(ROOT / "docs/tools" / tool.page)
        assert row["command"] == in_one_line(commands)
        assert any(word == f"{tool.package}=={row['version']}" for words in tool.install for word in words), row
        assert row["result"] == f"{tool.updates} updates on 2 ranks equal the oracle's (1e-4)"
    assert "\n".join(section(read_rows())) in (ROOT / "docs/support.md").read_text(encoding="utf-8")


def test_releases_of_hosts_are_those_that_were_run() -> None:
    """A row that nobody ran, or a run that nobody sees."""
    page = (ROOT / "docs/support.md").read_text(encoding="utf-8")
    assert versions.read_rows() and "\n".join(versions.section(versions.read_rows())) in page


def llama_shapes() -> dict[str, tuple[int, ...]]:
    """The shapes of the tiny LLaMA's parameters."""
    hidden, ffn, vocab = SIZES["hidden"], SIZES["ffn"], SIZES["vocab"]
    shapes: dict[str, tuple[int, ...]] = {}
    for name in hf_llama_classes(**SIZES):
        part = name.split(".")[-2]
        rows = {"gate_proj": ffn, "up_proj": ffn, "down_proj": hidden, "embed_tokens": vocab, "lm_head": vocab}
        if part.endswith("norm"):
            shapes[name] = (hidden,)
        elif part in rows:
            shapes[name] = (rows[part], ffn if part == "down_proj" else hidden)
        else:
            shapes[name] = (WIDTHS[part[0]], WIDTHS["q"] if part == "o_proj" else hidden)
    return shapes


def write_records(folder: Path, change: str = "") -> None:
    """What three right updates of one engine leave behind, or one of them with an element that is 1% off."""
    engine: dict[str, Any] = {"optimizer": "BlockwiseAdamMini", "module": "LlamaForCausalLM", "world_size": 2}
    torch.save({**engine, "zero_stage": 2, "clipping": 0.5}, folder / "engine_0.pt")
    weights = {name: small_weight(name, shape) for name, shape in llama_shapes().items()}
    hyper = Hyper(1e-3, (0.9, 0.95), 1e-8, 0.1)
    oracle = Oracle(weights, hf_llama_classes(**SIZES), True, hyper, arithmetic=torch.float32)
    for index in range(3):
        before = oracle.weights()
        gradients = {name: small_weight(f"{name} {index}", weight.shape).double() for name, weight in weights.items()}
        norm = sum(float(gradient.square().sum()) for gradient in gradients.values()) ** 0.5
        factor = min(1.0, 0.5 / norm)
        oracle.step({name: gradient * factor for name, gradient in gradients.items()})
        after = oracle.weights()
        if index == 1 and change:
            after[change].view(-1)[3] += 0.01 * (after[change] - before[change]).view(-1)[3]
        found = {"before": before, "after": after, "gradients": gradients, "lr": 1e-3, "betas": (0.9, 0.95)}
        torch.save({**found, "eps": 1e-8, "weight_decay": [0.1]}, folder / f"engine_0_update_{index}.pt")
        oracle.set_weights(after)


def test_right_updates_pass_and_a_wrong_one_does_not(tmp_path: Path) -> None:
    """Else a tool that trains with something else would stand in the table."""
    tool = TOOLS["llama-factory"]
    write_records(tmp_path)
    assert check_records(tmp_path, tool) == ("LlamaForCausalLM: BlockwiseAdamMini, ZeRO-2",)
    wrong = "model.layers.1.mlp.up_proj.weight"
    write_records(tmp_path, wrong)
    with pytest.raises(AssertionError, match=rf"update 1: 1 of 21 parameters off by more than 0\.0001\s+{wrong}"):
        check_records(tmp_path, tool)
    write_records(tmp_path)
    torch.save({**torch.load(tmp_path / "engine_0.pt"), "optimizer": "AdamW"}, tmp_path / "engine_0.pt")
    with pytest.raises(AssertionError, match="AdamW"):
        check_records(tmp_path, tool)
