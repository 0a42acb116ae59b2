# SPDX-License-Identifier: Apache-2.0
"""The documentation cannot drift: links resolve, generated pages are those of the code, the site builds."""

import copy
import importlib.util
import json
import re
import subprocess
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from markdown_it import MarkdownIt
from markdown_it.token import Token

from ds_blockwise.optimizers.registry import OPTIMIZERS, SCHEDULES
from ds_blockwise.optimizers.schedules.shapes import SHAPES
from tests.helpers import ROOT
from tests.helpers.literals import literals_of
from tests.helpers.pages import schedule_figure

DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
SOURCES = sorted(
    path for name in ("ds_blockwise", "megatron_patch", "launch", "benchmarks") for path in (ROOT / name).rglob("*.py")
)


def relative(path):
    return path.relative_to(ROOT).as_posix()


@cache
def tokens_of(page: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))


def links_of(page: Path) -> list[str]:
    inline = [child for token in tokens_of(page) for child in token.children or ()]
    return [
        str(token.attrGet("href") or token.attrGet("src")) for token in inline if token.type in ("link_open", "image")
    ]


@cache
def anchors_of(page: Path) -> set[str]:
    """What the headings of a page are called in links, by the rule that GitHub and the site share."""
    tokens, found = tokens_of(page), set()
    for token, inline in pairwise(tokens):
        if token.type == "heading_open":
            text = "".join(child.content for child in inline.children or ())
            found.add(re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_resolve(page):
    """To files and to headings; also those that the site does not see, such as the README's."""
    for link in links_of(page):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = page if not path else (page.parent / path).resolve()
        assert target.exists(), link
        assert target.is_relative_to(DOCS) or not page.is_relative_to(DOCS), f"{link} leaves the site"
        if anchor:
            assert anchor in anchors_of(target), f"{link}: {relative(target)} has {sorted(anchors_of(target))}"


@pytest.mark.parametrize("path", [*PAGES, *SOURCES], ids=relative)
def test_pages_that_are_named_exist(path):
    """Errors and docstrings send people to pages; a page that moves must take them along."""
    text = path.read_text(encoding="utf-8")
    for name in re.findall(r"(?<![\w/-])docs/[\w/]+\.(?:md|csv|png)\b", text):
        assert (ROOT / name).is_file(), name


def test_errors_that_are_explained_exist():
    """People search the page for the words of their message."""
    quoted = re.findall(r"“([^”]+)”", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"))
    assert len(quoted) > 40
    literals = [text for path in SOURCES for text in literals_of(path)]
    gone = [words for words in quoted if not any(words in text for text in literals)]
    assert not gone, gone


def blocks_of(name, kind):
    fences = [token for token in tokens_of(DOCS / name) if token.type == "fence"]
    return [token.content for token in fences if token.info == kind]


def published_adam_mini(model):
    adam_mini = pytest.importorskip("adam_mini", reason="the published package is in the extra 'dev'")
    return adam_mini.Adam_mini(
        model.named_parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, dim=32, n_heads=2, verbose=False
    )


@pytest.mark.parametrize(
    ("code", "peer"),
    zip(
        blocks_of("migration.md", "python"),
        (
            lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1),
            published_adam_mini,
        ),
        strict=True,
    ),
    ids=["adamw", "adam-mini"],
)
def test_code_of_the_migration_page_is_what_one_comes_from(code, peer):
    """The same updates as before, divided by the learning rate."""
    pytest.importorskip("transformers", reason="the example builds a model of transformers")
    found = {}
    until, _, rest = code.partition("tag_parameters(model)")
    exec(until, found)
    before = copy.deepcopy(found["model"])
    exec(f"tag_parameters(model){rest}", found)
    other = copy.deepcopy(before)
    for parameter, trained in zip(other.parameters(), found["model"].parameters(), strict=True):
        parameter.grad = trained.grad.clone()
    peer(other).step()
    for old, ours, theirs in zip(*(m.parameters() for m in (before, found["model"], other)), strict=True):
        torch.testing.assert_close((old - ours) / 1e-3, (old - theirs) / 1e-3, rtol=1e-4, atol=1e-4)


def test_the_settings_of_the_pages_are_accepted():
    """By the optimizer and the schedule that they name; test_newcomer.py runs the tutorial's script."""
    examples = [
        json.loads(code)
        for name in ("tutorial.md", "guides/deepspeed.md", "reference/settings_json.md")
        for code in blocks_of(name, "json")
        if '"scheduler"' in code
    ]
    assert len(examples) == 3
    for example in examples:
        optimizer = OPTIMIZERS[example["optimizer"]["type"]](
            [torch.nn.Parameter(torch.ones(1))], **example["optimizer"]["params"]
        )
        schedule = SCHEDULES[example["scheduler"]["type"]](optimizer, **example["scheduler"]["params"])
        assert schedule.min_lr < example["optimizer"]["params"]["lr"]


def test_the_schedules_page_shows_every_shape(tmp_path):
    """Its JSONs are accepted, they are all that there are, and the figure is drawn from them."""
    examples = schedule_figure.examples()
    assert {example["params"]["shape"] for example in examples} == set(SHAPES)
    for example in examples:
        assert schedule_figure.schedule_of(example).min_lr < schedule_figure.PEAK
    assert schedule_figure.draw(tmp_path / "shapes.png") == len(SHAPES)
    (whole,) = [json.loads(code)["scheduler"] for code in blocks_of("schedules.md", "json") if '"scheduler"' in code]
    assert schedule_figure.schedule_of(whole).warmup_num_steps == 2500


def test_generated_pages_are_those_of_the_code():
    """Each key and option that the code takes is on its page, as it is now."""
    pytest.importorskip("deepspeed", reason="the options of launch/ need the extra 'deepspeed'")
    pytest.importorskip("megatron.core", reason="the options of launch/ need the extra 'megatron'")
    from tests.helpers.pages import PAGES as GENERATED

    for path, page in GENERATED.items():
        assert path.read_text(encoding="utf-8") == page(), f"run make docs, which writes {relative(path)}"


def test_the_page_of_python_has_every_public_name():
    """And no name that is gone."""
    megatron_patch = pytest.importorskip("megatron_patch", reason="needs the extra 'megatron'")
    import ds_blockwise

    shown = re.findall(r"^::: ([\w.]+)", (DOCS / "reference/api.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    for package in (ds_blockwise, megatron_patch):
        public = {f"{package.__name__}.{name}" for name in package.__all__}
        assert public <= set(shown), sorted(public - set(shown))
    for name in shown:
        module, _, attribute = name.rpartition(".")
        assert hasattr(sys.modules[module], attribute), name


def test_the_site_builds(tmp_path):
    """Strict: each warning of MkDocs is an error, unknown pages and anchors among them."""
    for module in ("mkdocs", "material", "mkdocstrings_handlers"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs {module}: pip install '.[docs]' (make setup brings it)")
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "reference" / "api.html").is_file()
