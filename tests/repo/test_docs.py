# SPDX-License-Identifier: Apache-2.0
"""The pages cannot drift: links and paths lead somewhere, and docs/settings.md shows every setting with its default."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from ds_blockwise.blocks.roles import BLOCK_TYPE_OF, Role
from ds_blockwise.blocks.settings.defaults import DEFAULT_PRESET, LR_PRESETS, UNITS
from ds_blockwise.optimizers.registry import OPTIMIZERS
from ds_blockwise.optimizers.settings import OPTIMIZER_KEYS
from tests.helpers import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SETTINGS = (ROOT / "docs/settings.md").read_text(encoding="utf-8")
FOLDERS = "ds_blockwise|megatron_patch|launch|configs|tests|docs|benchmarks"


def test_the_citation_is_of_this_version_and_of_the_papers() -> None:
    """Each paper that the README asks to cite, in the form that GitHub reads."""
    yaml = pytest.importorskip("yaml", reason="CITATION.cff is YAML")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert f'version="{citation["version"]}"' in (ROOT / "setup.py").read_text(encoding="utf-8")
    sources = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Licence and sources")[2]
    papers = re.findall(r"https://arxiv\.org/abs/[\d.]+", sources)
    assert papers == [reference["url"] for reference in citation["references"]]
    for reference in citation["references"]:
        assert reference["title"] in " ".join(sources.split())


def without_code(text: str) -> str:
    """Prose: what stands in code blocks is an example."""
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", without_code(page.read_text(encoding="utf-8")), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    text = without_code(page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http:", "https:")):
            continue
        path, _, anchor = target.partition("#")
        other = page.parent / path if path else page
        assert other.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(other), f"{page.name} links to {target}"
    for path in re.findall(rf"`((?:{FOLDERS})/[\w./-]+)`", text):
        assert (ROOT / path).exists(), f"{page.name} names {path}"


REFUSED = {"BlockwiseLion": ("telemetry",), "BlockwiseMuon": ("telemetry", "transfer")}  # their pages say so


def test_the_settings_shown_are_all_there_are() -> None:
    """The JSON example is complete, and both optimizers accept it."""
    (params,) = [
        found["params"]
        for code in re.findall(r"^```json\n(.*?)^```", SETTINGS, flags=re.MULTILINE | re.DOTALL)
        if "params" in (found := json.loads(code))
    ]
    assert set(params) == set(OPTIMIZER_KEYS)
    named = {
        key
        for cell in re.findall(r"^\| (`.+?) \| .* \| .* \|$", SETTINGS, flags=re.MULTILINE)
        for key in re.findall(r"`(\w+)`", cell)
    }
    assert set(OPTIMIZER_KEYS) <= named
    for optimizer in OPTIMIZERS.values():
        given = {key: value for key, value in params.items() if key not in REFUSED.get(optimizer.__name__, ())}
        assert optimizer([torch.nn.Parameter(torch.ones(1))], **given).block_settings.lr_multipliers


def test_the_table_of_roles_shows_the_defaults() -> None:
    """Multipliers of the page are the ones in the code."""
    default = LR_PRESETS[DEFAULT_PRESET]
    rows = re.findall(r"^\| [^|]+ \| `(\w+)` \| ([\d.]+) \|", SETTINGS, flags=re.MULTILINE)
    assert {kind: float(value) for kind, value in rows} == default
    for role in Role:
        assert BLOCK_TYPE_OF[role] in default and f"{role.value}" in SETTINGS


def test_the_table_of_presets_is_that_of_the_code() -> None:
    """A user who copies a preset's numbers from the page would train at other rates than with its name."""
    rows = re.findall(r'^ *\| `"(\w+)"` \|((?: (?:[\d.]+ )?\|)+) (\w+) \|', SETTINGS, flags=re.MULTILINE)
    found = {name: ([float(cell) for cell in cells.split("|") if cell.strip()], unit) for name, cells, unit in rows}
    assert found.pop("auto") == ([], UNITS[DEFAULT_PRESET])
    kinds = ("emb", "head", "qk", "ffn", "vo", "norm", "other")
    assert found == {name: ([m[kind] for kind in kinds], UNITS[name]) for name, m in LR_PRESETS.items()}
