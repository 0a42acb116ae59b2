# SPDX-License-Identifier: Apache-2.0
"""The registry holds every optimizer and schedule, and nobody else lists them."""

from __future__ import annotations

import re

import pytest
import torch

import ds_blockwise
from ds_blockwise.optimizers.base import BlockwiseOptimizer
from ds_blockwise.optimizers.registry import OPTIMIZERS, SCHEDULES
from ds_blockwise.optimizers.schedules.schedule import BlockwiseLR
from tests.helpers import ROOT
from tests.helpers.optimizers import SHORT_NAMES

# two names of optimizers next to each other in a tuple, list, set, dict or choice of types
ENUMERATION = re.compile(r"""["']?Blockwise\w+["']?(?::\s*\w+)?,\s*["']?Blockwise(?:Adam|Muon|Lion)\w*["']?""")
EXPORTS = {"ds_blockwise/__init__.py", "ds_blockwise/optimizers/registry.py"}


def subclasses(cls: type) -> set[type]:
    found = set(cls.__subclasses__())
    return found.union(*(subclasses(sub) for sub in found))


def ours(cls: type) -> set[type]:
    public = (sub for sub in subclasses(cls) if not sub.__name__.startswith("_"))
    return {sub for sub in public if sub.__module__.startswith("ds_blockwise.")}


def test_every_optimizer_and_schedule_is_registered_under_its_json_name() -> None:
    assert set(OPTIMIZERS.values()) == ours(BlockwiseOptimizer)
    assert set(SCHEDULES.values()) == {BlockwiseLR, *ours(BlockwiseLR)}
    assert list(OPTIMIZERS) == ["BlockwiseAdamW", "BlockwiseAdamMini"]
    assert list(SCHEDULES) == ["BlockwiseLR", "BlockwiseCosineLR", "BlockwiseWSDLR", "BlockwiseLinearLR"]


def test_what_is_registered_is_public() -> None:
    registered = OPTIMIZERS | SCHEDULES
    assert registered == {name: getattr(ds_blockwise, name) for name in registered}
    assert set(registered) <= set(ds_blockwise.__all__)
    assert {name for name in ds_blockwise.__all__ if re.match("Blockwise", name)} == set(registered)


def test_tests_name_every_optimizer() -> None:
    assert list(SHORT_NAMES) == list(OPTIMIZERS)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_takes_the_settings_that_all_share(name: str) -> None:
    optimizer = OPTIMIZERS[name]([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    assert type(optimizer).__name__ == name and isinstance(optimizer, torch.optim.Optimizer)


def test_nobody_else_lists_the_optimizers() -> None:
    """A list that is forgotten when an optimizer is added leaves it out in silence."""
    found = []
    for folder in ("ds_blockwise", "launch", "benchmarks", "megatron_patch"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            code = re.sub(r'""".*?"""', "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
            code = re.sub(r"^from .*$|^import .*$", "", code, flags=re.MULTILINE)
            if name not in EXPORTS:
                found += [f"{name}: {match[0]}" for match in ENUMERATION.finditer(code)]
    assert not found, "\n".join(["ask ds_blockwise.optimizers.registry instead:", *found])


def test_a_list_of_optimizers_would_be_seen() -> None:
    for line in (
        'OURS = ("BlockwiseAdamW", "BlockwiseAdamMini")',
        "for cls in (BlockwiseAdamMini, BlockwiseAdamW):",
        '{"BlockwiseAdamW": BlockwiseAdamW, "BlockwiseAdamMini": 1}',
        'MINI, OURS = "BlockwiseAdamMini", "BlockwiseMuon"',
    ):
        assert ENUMERATION.search(line), line
    assert not ENUMERATION.search('("BlockwiseAdamW", "ZeRO-2")')
