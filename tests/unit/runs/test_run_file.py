# SPDX-License-Identifier: Apache-2.0
"""Run files: bases, overrides, sections, and every mistake in one list."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ds_blockwise.runs.engine_json import compose
from ds_blockwise.runs.run_file import RunConfig, check_run, load_run
from tests.helpers.run_files import MISSING, project, put, sound


def load(folder: Path, *overrides: str, **changes: Any) -> tuple[RunConfig | None, str]:
    """The run with some entries changed, and its problems as one text."""
    parts = sound()
    for key, value in changes.items():
        put(parts[0], key.replace("__", "."), value)
    run, problems = load_run(project(folder, *parts), overrides=overrides)
    return run, "\n".join(problems.lines)


# overrides -> words of the message: key, value, what is allowed, what to do
MISTAKES: dict[str, tuple[str, tuple[str, ...]]] = {
    "misspelt key": ("training.stepz=3", ("--set: training.stepz = 3", "keys steps, warmup_", "mean 'steps'?")),
    "misspelt section": ("trainings=3", ("trainings = 3", "keys name, model, ", "did you mean 'training'?")),
    "key of no kind": ("zzz=3", ("zzz = 3", "remove it")),
    "key that is no text": ("training.on=3", ("training.on = 3", "remove it")),
    "wrong type": (
        "training.steps=many",
        ("training.steps = 'many'", "a whole number, at least 1; correct the value"),
    ),
    "text of digits": ("training.steps='5'", ("training.steps = '5'", "a whole number")),
    "fraction of a step": ("training.steps=1.5", ("training.steps = 1.5", "a whole number")),
    "truth is no number": ("training.steps=true", ("training.steps = True", "a whole number")),
    "negative": ("training.warmup_steps=-1", ("training.warmup_steps = -1", "at least 0")),
    "range": ("data.validation_fraction=0.9", ("data.validation_fraction = 0.9", "a number from 0.001 to 0.5")),
    "optional": ("training.sequence_length=0", ("sequence_length = 0", "a whole number, at least 1, or null")),
    "no text": ("name=5", ("name = 5", "allowed: text;")),
    "no source": ("data.source=[]", ("data.source = ", "text or a list of texts")),
    "one of the sources": ("data.source=[a, 1]", ("data.source[1] = 1", "allowed: text;")),
    "section is text": ("training=fast", ("training = 'fast'", "a section of keys", "indent its keys below it")),
    "section is empty": ("training=", ("training = None", "a section of keys")),
    "override of no number": ("training.steps=010", ("--set: training.steps = '010'", "its digits alone")),
    "override of no key": ("foo.bar=1", ("--set: foo = {'bar': 1}", "the keys name, model")),
    "override without value": ("training.steps", ("--set: training.steps", "section.key=value")),
    "override of no section": ("name.x=1", ("--set: name.x", "a key of a section")),
    "override that is no YAML": (
        "name=[1",
        ("--set: name = '[1'", "a value in YAML", "in quotes if it is text"),
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named(name: str, tmp_path: Path) -> None:
    override, words = MISTAKES[name]
    _, text = load(tmp_path, override)
    assert all(word in text for word in words), text
    assert len(text.splitlines()) == 1


def test_a_missing_section_names_its_required_keys(tmp_path: Path) -> None:
    run, text = load(tmp_path, training=MISSING)
    assert run is None
    for key in ("steps", "warmup_steps", "global_batch_size", "micro_batch_size", "validation_sequences"):
        assert f"run.yaml: training.{key} = None: allowed: a whole number, at least " in text
    assert text.count("add this required key") == 6


def test_mistakes_of_all_files_are_listed_at_once(tmp_path: Path) -> None:
    """One correction per start of a job on 64 nodes would take a day."""
    run, model, engine = sound()
    put(run, "training.steps", "many")
    put(run, "cluster.nodes", 0)
    put(model, "hidden_size", -1)
    path = project(tmp_path, run, model, engine)
    (tmp_path / "ds.json").write_text("{", encoding="utf-8")
    _, problems = load_run(path)
    for words in ("training.steps = 'many'", "cluster.nodes = 0", "model.yaml: hidden_size = -1", "ds.json: (file)"):
        assert sum(words in line for line in problems.lines) == 1, problems.lines


def test_contradictions_are_listed_at_once(tmp_path: Path) -> None:
    parts = sound()
    put(parts[2], "optimizer", MISSING)
    overrides = ["training.global_batch_size=6", "training.warmup_steps=900"]
    run, problems = load_run(project(tmp_path, *parts), overrides=overrides)
    assert run is not None
    check_run(run, 8, problems)
    compose(run, problems)
    with pytest.raises(ValueError, match="3 problems") as error:
        problems.raise_if_any()
    for key in ("training.global_batch_size", "training.warmup_steps", "optimizer"):
        assert key in str(error.value)


def test_a_run_is_frozen(tmp_path: Path) -> None:
    """Ranks and the record of the run must see the same numbers."""
    run, _ = load(tmp_path)
    assert run is not None
    for part, name in ((run, "name"), (run.training, "steps"), (run.shape, "num_layers")):
        with pytest.raises(AttributeError):
            setattr(part, name, 1)


# ------------------------------------------------------------------------------------------- bases


def test_a_base_is_read_from_where_it_stands(tmp_path: Path) -> None:
    """Sections are merged key by key; paths mean the folder of the file that states them."""
    (tmp_path / "shared").mkdir()
    base = project(tmp_path / "shared", *sound())
    (tmp_path / "mine.yaml").write_text(f"base: shared/{base.name}\ncluster: {{nodes: 4}}\n", encoding="utf-8")
    run, problems = load_run(tmp_path / "mine.yaml")
    assert not problems and run is not None
    assert (run.cluster.nodes, run.cluster.gpus_per_node) == (4, 4)
    assert run.model_file == tmp_path / "shared" / "model.yaml"


def test_a_base_that_leads_back_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: b.yaml\n", encoding="utf-8")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n", encoding="utf-8")
    _, problems = load_run(tmp_path / "a.yaml")
    assert any("base" in line and "does not lead back" in line for line in problems.lines)
