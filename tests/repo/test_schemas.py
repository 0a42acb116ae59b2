# SPDX-License-Identifier: Apache-2.0
"""`configs/schema`: every shipped file fits, and a schema takes what the code takes. test_site.py: they are as made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_blockwise.optimizers.registry import OPTIMIZERS, SCHEDULES
from ds_blockwise.optimizers.settings import _ADAMW_KEYS
from tests.helpers import ROOT

jsonschema = pytest.importorskip("jsonschema", reason="needs the extra 'dev'")

SCHEMAS = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (ROOT / "configs/schema").glob("*.json")}
TEMPLATES = ROOT / "ds_blockwise" / "cli" / "templates"
FILES = [
    *[("deepspeed", path) for folder in ("deepspeed", "hf") for path in (ROOT / "configs" / folder).glob("*.json")],
    *[("run", path) for folder in ("run", "recipe") for path in (ROOT / "configs" / folder).rglob("*.yaml")],
    *[("model", path) for path in (ROOT / "configs/model").glob("*.yaml")],
    *[
        ("run", TEMPLATES / "run.yaml"),
        ("model", TEMPLATES / "model.yaml"),
        ("deepspeed", TEMPLATES / "deepspeed.json"),
    ],
]
# of every kind that a person may write by mistake
VALUES: tuple[Any, ...] = (
    *(-1, -0.5, 0, 0.5, 1, 2, 50000.0, 1.5, True, False, "text", "auto", [], [0.9, 0.95], [0.9, 1.0], [None, 0.9]),
    *([0.9], {}, {"unknown": 1}, {"norm": 0.5}, {"query": 1}, {"norm_in": 2}, {"norm": -1}, {"norm": "row"}),
    *({"query": "head"}, {"bias": "row"}, {"norm": [0.9, None]}, {"norm": [0.9, 2]}, {"norm": {"start": 1, "end": 0}}),
    *({"norm": {"start": 1}}, {"preset": "paper"}, {"preset": "papr"}, {"auto": {}}, {"auto": {"after": 0.1}}),
    *({"auto": {"unknown": 1}}, {"base_width": 256}, {"base_width": 256, "rule": "sqrt"}, {"rule": "mup"}),
    *({"interval": 10}, {"interval": 10, "band": [0, 1]}, {"band": {"emb": [0, 1]}}, {"band": {"query": [0, 1]}}),
    *({"on_alarm": "stop"}, {"on_alarm": "halt"}, {"ffn": "matrix"}, {"ffn": "none"}, "paper", "uniform", "published"),
    *("fp32", "bf16", "fp16", "cpp", "compact", "rms", "mup", "polar_express", "wsd", "1-sqrt", None),
    *(
        [{"match": "a", "role": "ffn"}],
        [{"match": "a", "rol": "ffn"}],
        [{"role": "ffn"}],
        [{"match": "a", "role": "f"}],
    ),
    *([{"match": "a", "role": "qkv", "layout": "concat"}], [{"match": "a", "lr_multiplier": 2, "optional": True}]),
    *([{"match": "a", "granularity": "row"}], [{"match": "a", "betas": [0.9, None]}], [{"match": "a", "num_heads": 4}]),
)


def validator(schema: dict[str, Any]) -> Any:
    jsonschema.Draft7Validator.check_schema(schema)
    return jsonschema.Draft7Validator(schema)


@pytest.mark.parametrize(("kind", "file"), FILES, ids=[path.relative_to(ROOT).as_posix() for _, path in FILES])
def test_shipped_files_fit(kind: str, file: Path) -> None:
    yaml = pytest.importorskip("yaml", reason="run files need the extra 'launch'")
    text = file.read_text(encoding="utf-8")
    values = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    assert [error.message for error in validator(SCHEMAS[kind]).iter_errors(values)] == []
    if kind == "deepspeed":
        assert validator(SCHEMAS[kind]).is_valid({"$schema": "schema/deepspeed.json", **values})


def entry(dotted: str, value: object) -> dict[str, Any]:
    """A mapping with one value deep inside."""
    for key in reversed(dotted.split(".")):
        value = {key: value}
    assert isinstance(value, dict)
    return value


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        ("deepspeed", "optimiser", {}),
        ("deepspeed", "optimizer.parms", {}),
        ("deepspeed", "optimizer.type", "BlockwiseAdamini"),
        ("deepspeed", "scheduler.type", "BlockwiseCosine"),
        ("deepspeed", "optimizer.params.lr_multiplier", {}),
        ("run", "trainig", {}),
        ("run", "training.step", 1),
        ("run", "training.steps", "many"),
        ("run", "training.activation_checkpointing", "some"),
        ("run", "cluster.gpu", "h1000"),
        ("run", "model_class", "hybird"),
        ("model", "num_layer", 1),
    ],
)
def test_a_wrong_key_or_value_is_marked_where_it_stands(kind: str, key: str, value: object) -> None:
    values = entry(key, value)
    if key.startswith("optimizer.params"):
        values["optimizer"]["type"] = "BlockwiseAdamMini"
    errors = list(validator(SCHEMAS[kind]).iter_errors(values))
    places = [(list(error.absolute_path), error.message) for error in errors]
    *section, last = key.split(".")
    assert any(at == [*section, last] or (at == section and last in text) for at, text in places), places


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_takes_what_its_schema_takes(name: str) -> None:
    """Key by key: a red line under something that works, or none under something that does not, misleads."""
    check = validator(SCHEMAS["deepspeed"])
    (params,) = (
        case["then"]["properties"]["params"]["properties"]
        for case in SCHEMAS["deepspeed"]["properties"]["optimizer"]["allOf"]
        if case["if"]["properties"]["type"]["const"] == name
    )
    wrong = []
    for key in [*params, "unknown"]:
        for value in VALUES:
            fits = check.is_valid({"optimizer": {"type": name, "params": {key: value}}})
            if key in _ADAMW_KEYS and type(value) is int:
                continue  # to Python 1 is true
            if value == "auto" and key in ("lr", "betas", "eps", "weight_decay"):
                assert fits  # Trainer fills it in
                continue
            if fits != _takes(OPTIMIZERS[name], {key: value}):
                wrong.append((key, value, "schema" if fits else "constructor"))
    assert wrong == []


def _takes(cls: Any, params: dict[str, Any]) -> bool:
    try:
        cls([torch.zeros(1)], **params)
    except (ValueError, TypeError):
        return False
    return True


@pytest.mark.parametrize("name", SCHEDULES)
def test_no_schedule_that_works_is_marked(name: str) -> None:
    """Which keys go together is left to the check."""
    check = validator(SCHEMAS["deepspeed"])
    base = {"total_num_steps": 100, **({"shape": "wsd"} if name == "BlockwiseLR" else {})}
    works = 0
    for key in (
        "total_num_steps",
        "warmup_num_steps",
        "warmup_fraction",
        "min_lr",
        "shape",
        "decay_shape",
        "decay_fraction",
    ):
        for value in filter(lambda value: value is not None, VALUES):  # null is for Python
            params = {**base, key: value}
            if _takes_schedule(SCHEDULES[name], params):
                works += 1
                assert check.is_valid({"scheduler": {"type": name, "params": params}}), params
    assert works > 10
    assert not check.is_valid({"scheduler": {"type": name, "params": {**base, "warmup_steps": 5}}})
    assert not check.is_valid({"scheduler": {"type": name, "params": {**base, "total_num_steps": "many"}}})


def _takes_schedule(cls: Any, params: dict[str, Any]) -> bool:
    try:
        cls(torch.optim.SGD([torch.zeros(1)], lr=1.0), **params)
    except (ValueError, TypeError):
        return False
    return True
