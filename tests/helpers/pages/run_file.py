# SPDX-License-Identifier: Apache-2.0
"""`docs/reference/run_file.md`, from the schema that reads run files and model files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import MISSING, fields
from typing import Any

from pydantic import TypeAdapter

from ds_blockwise.runs import run_file
from ds_blockwise.runs.model_shape import ARCHITECTURES, GPTShape
from ds_blockwise.runs.plan import GPUS
from ds_blockwise.runs.run_file import ACTIVATION_CHECKPOINTING, MODEL_CLASSES, RunFile
from ds_blockwise.runs.strict_files import StrictSection
from tests.helpers import ROOT
from tests.helpers.pages.text import described, sentence, table

CHOICES = {
    "activation_checkpointing": ACTIVATION_CHECKPOINTING,
    "gpu": tuple(GPUS),
    "architecture": ARCHITECTURES,
    "model_class": MODEL_CLASSES,
}
_HEADS = ("key", "value", "default", "meaning")
_LARGEST = 10**8  # limits above it only keep numbers finite
_INTRODUCTION = """\
# Run file

Written by `make docs` from the code that reads the files; a test compares them.

A run file describes one run of `launch/pretrain_llama.py`: the model, the data, how processes are arranged, the
training, and which DeepSpeed JSON decides the optimizer. A key that is not in these tables is an error that names the
nearest known key. `ds-blockwise check RUN` lists every mistake at once.

- A file may name another one as its `base`, and then states only what differs. Sections are merged key by key.
- `base`, `model` and `deepspeed` are relative to the file that they stand in. `output` and `data.directory` are
  relative to the working directory.
- `--set section.key=value` changes one entry for one command, for example `--set training.steps=100`.
- Numbers, truth values and nulls are those of YAML 1.2: `1e-3` is a number, `yes` is text.

This is the whole of `configs/run/tiny.yaml`:
"""
_MODEL = """\
## Model file

The file that `model` names. `num_parameters` is checked against the sizes, so that a mistyped size is found.
`configs/model/` has LLaMA from 1.3M to 2B parameters, and GPT-2.
"""


def page() -> str:
    """The page's text."""
    example = (ROOT / "configs/run/tiny.yaml").read_text(encoding="utf-8")
    lines = [_INTRODUCTION, "```yaml", example.rstrip(), "```", "", "## Top level", ""]
    schema = TypeAdapter(RunFile).json_schema()
    rows = [("`base`", "path", "", "Another run file, whose entries hold where this one states nothing.")]
    lines += table(_HEADS, [*rows, *_rows(RunFile, schema)])
    for section in fields(RunFile):
        cls = getattr(run_file, str(section.type), None)
        if isinstance(cls, type) and issubclass(cls, StrictSection):
            heading = f"## `{section.name}`"
            lines += [heading, "", *table(_HEADS, _rows(cls, schema["$defs"][cls.__name__]))]
    lines += [_MODEL, *table(_HEADS, _rows(GPTShape, TypeAdapter(GPTShape).json_schema()))]
    return "\n".join(lines).rstrip() + "\n"


def _rows(cls: type[StrictSection], schema: dict[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    meanings = described(cls, "Attributes")
    for field in fields(cls):
        if field.name not in meanings:
            raise ValueError(f"{cls.__name__}.{field.name} is not described in the docstring of its class")
        default = "required" if field.default is MISSING else _shown(field.default)
        kind = _kind(field.name, schema["properties"][field.name])
        yield f"`{field.name}`", kind, default, sentence(meanings[field.name])


def _shown(value: object) -> str:
    if value is None or value in ("", ()):
        return ""
    return f"`{json.dumps(value)}`"


def _kind(name: str, schema: dict[str, Any]) -> str:
    if name in CHOICES:
        return ", ".join(f"`{choice}`" for choice in CHOICES[name])
    if "anyOf" in schema:
        schema = next(choice for choice in schema["anyOf"] if choice.get("type") != "null")
    if "$ref" in schema:
        return "section"
    words = {"integer": "whole number", "number": "number", "string": "text", "boolean": "`true`, `false`"}
    if schema["type"] == "array":
        return "text, or a list of texts"
    kind = words[schema["type"]]
    low, high = schema.get("minimum"), schema.get("maximum", _LARGEST + 1)
    if low is not None and high > _LARGEST:
        return f"{kind}, at least {low:g}"
    return kind if low is None else f"{kind}, {low:g} to {high:g}"
