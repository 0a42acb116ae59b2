# SPDX-License-Identifier: Apache-2.0
"""CONTRIBUTING.md: the files that it names exist, and a gradient goes the way that it describes."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ds_blockwise import BlockwiseAdamMini
from ds_blockwise.blocks.roles import Role
from ds_blockwise.blocks.segment_table import Placement
from ds_blockwise.kernels.cpp.backend import CppKernels
from ds_blockwise.parallel.reduce import ReductionGroups
from tests.helpers import ROOT
from tests.helpers.kernel_cases import spec

TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
MOST_FILES = 5


def test_every_path_exists() -> None:
    paths = set(re.findall(r"`((?:\w[\w.]*/)+[\w.]*|[\w.]+\.(?:py|md|toml|txt))`", TEXT))
    assert len(paths) > 25
    for path in paths - {"hosts/deepspeed/"}:
        assert (ROOT / path).exists(), path


def test_every_target_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"make ([\w-]+)", TEXT):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_rooms_are_in_the_order_of_the_linter() -> None:
    layers = re.search(
        r'containers = \["ds_blockwise"\].*?layers = \[(.*?)\]', (ROOT / "pyproject.toml").read_text(), re.S
    )
    assert layers is not None
    ruled = [line.split(" | ") for line in re.findall(r'"(.+?)"', layers[1])]
    table = [re.findall(r"`ds_blockwise/(\w+)", row.split("|")[1]) for row in re.findall(r"^\| `ds_b.*$", TEXT, re.M)]
    assert table == ruled[::-1]


def test_a_gradient_goes_the_way_that_is_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Watched on a split block: which of our files lie between `step` and the kernels, and the network."""
    crossed: dict[str, list[str]] = {}

    def watched(owner: Any, name: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def watching(*args: Any, **keywords: Any) -> Any:
            files = [Path(frame.filename) for frame in traceback.extract_stack()]
            ours = [file.relative_to(ROOT).as_posix() for file in files if file.is_relative_to(ROOT / "ds_blockwise")]
            crossed[name] = list(dict.fromkeys(ours))
            return original(*args, **keywords)

        monkeypatch.setattr(owner, name, watching)

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        tensor = torch.zeros(235)
        optimizer = BlockwiseAdamMini([tensor], lr=1e-3, backend="cpp")
        placement = Placement(spec((6, 50), Role.FFN), None, 0, 25, 235, (25, 260))
        optimizer.bind(tensor, [placement], ReductionGroups(dp_group=dist.group.WORLD))
        tensor.grad = torch.ones(235)
        watched(dist, "all_reduce")
        for name in ("_step", "_sum_split"):
            watched(next(b.kernels for b in optimizer.bindings()), name)
        assert isinstance(next(b.kernels for b in optimizer.bindings()), CppKernels)
        optimizer.step()
    finally:
        dist.destroy_process_group()
    assert set(crossed) == {"all_reduce", "_step", "_sum_split"}
    files = {file for way in crossed.values() for file in way}
    assert len(files) <= MOST_FILES
    walk = TEXT.partition("## One gradient")[2].partition("\n## ")[0]
    described = re.findall(r"`(ds_blockwise/[\w/]+\.py)`", walk)
    assert files == set(described) - {"ds_blockwise/kernels/update.py"}  # that one is the definition, to read
    assert [file for file in described if file in files] == list(dict.fromkeys(described))[: len(files)]
