# SPDX-License-Identifier: Apache-2.0
"""A survey of the model classes of transformers: what each kind of parameter is tagged as, written down as text.

``python -m tests.helpers.tables.survey`` builds every class on the meta device and writes the record anew, which
`tests/unit/tagging/test_survey.py` compares. Read the difference before it is committed: a line that moves to another
role is a weight that will train at another rate.
"""

from __future__ import annotations

import importlib
import itertools
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ds_blockwise.blocks.settings.block_settings import BlockSettings
from ds_blockwise.blocks.structure import TensorStructure
from ds_blockwise.tagging.registered import RegisteredParameter, registered_parameters
from ds_blockwise.tagging.tag import _structure_of, is_stepped
from tests.helpers import ROOT

RECORD = ROOT / "tests" / "data" / "names" / "transformers.txt"
COMMAND = "python -m tests.helpers.tables.survey"
_HEADER = "# What each kind of parameter of transformers' model classes is tagged as. Written by: " + COMMAND

# Families whose layouts a switch of the config decides, and configs that can't be built as they are
_SETTINGS: dict[str, tuple[dict[str, object], ...]] = {
    "AutoformerConfig": ({"prediction_length": 4},),
    "InformerConfig": ({"prediction_length": 4},),
    "TimeSeriesTransformerConfig": ({"prediction_length": 4},),
    "FalconConfig": (
        {},
        {"new_decoder_architecture": True, "num_kv_heads": 8, "hidden_size": 4096, "num_attention_heads": 64},
        {"multi_query": False},
    ),
    "GPTBigCodeConfig": ({}, {"multi_query": False}),
    "GPT2Config": ({}, {"add_cross_attention": True}),
    "DecisionTransformerConfig": ({}, {"add_cross_attention": True}),
    "ImageGPTConfig": ({}, {"add_cross_attention": True}),
    "DeepseekV2Config": ({}, {"q_lora_rank": None}),
    "CohereConfig": ({}, {"use_qk_norm": True}),
    "StableLmConfig": ({}, {"qk_layernorm": True, "use_qkv_bias": True}),
    "PersimmonConfig": ({}, {"qk_layernorm": False}),
    "NemotronConfig": ({"head_dim": 128},),
    "MiniMaxConfig": ({"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2},),
}
_NUM_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "encoder_layers", "decoder_layers", "num_decoder_layers")
_FEW = 6  # dense layers before those with experts, and the attention layer among state-space ones, are within
_KNOWN_ERRORS = (
    ("no naming rule matches", "unknown"),
    ("is a fused query, key and value weight", "layout?"),
    ("has heads, but neither", "heads?"),
    ("which do not divide into", "rows do not divide into the heads"),
    ("ends with the rows of a rotary key", "no rotary key"),
    ("matches naming rules that disagree", "rules disagree"),
    ("by name but has shape", "another number of dimensions"),
    ("has role norm but shape", "norm of several dimensions"),
    ("and by these names several roles", "tied names disagree"),
    ("holds a matrix per expert, and its module does not say", "storage?"),
)


@dataclass
class Family:
    """One modeling file: the classes that were built, why others were not, and the tags of each kind of parameter."""

    name: str
    built: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)
    kinds: dict[str, set[str]] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """The record of this family."""
        found = [f"== {self.name}", "  built: " + (" ".join(sorted(self.built)) or "none")]
        found += [f"  not built: {name}: {why}" for name, why in sorted(self.failed.items())]
        by_tag: dict[str, list[str]] = {}
        for kind, tags in self.kinds.items():
            for tag in tags:
                by_tag.setdefault(tag, []).append(kind)
        for tag, kinds in sorted(by_tag.items()):
            leaves: dict[tuple[str, str], list[str]] = {}
            for kind in sorted(kinds):
                name, of, parent = kind.partition(" ")
                stem, _, leaf = name.rpartition(".")
                leaves.setdefault((stem, of + parent), []).append(leaf)
            found.append(f"  {tag}")
            for (stem, parent), ends in leaves.items():
                leaf = ends[0] if len(ends) == 1 else "{" + ",".join(ends) + "}"
                found.append(f"    {stem}.{leaf}{parent}" if stem else f"    {leaf}{parent}")
        return found


def modeling_files() -> list[str]:
    """Names of transformers' modeling files, such as ``llama.modeling_llama``."""
    root = Path(importlib.import_module("transformers").__file__ or "").parent / "models"
    return sorted(f"{path.parent.name}.{path.stem}" for path in root.glob("*/modeling_*.py"))


def survey(file: str) -> Family:
    """Build every model class of one modeling file on the meta device and tag one parameter of each kind."""
    family = Family(file)
    transformers = importlib.import_module("transformers")
    try:
        module = importlib.import_module(f"transformers.models.{file}")
    except ImportError as error:
        family.failed["*"] = _reason(error)
        return family
    for name, cls in sorted(vars(module).items()):
        is_model = isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
        if not is_model or cls.__module__ != module.__name__ or name.endswith("PreTrainedModel"):
            continue
        if cls.config_class is None:
            continue
        for settings in _SETTINGS.get(cls.config_class.__name__, ({},)):
            model = _build(cls, settings)
            if isinstance(model, Exception):
                family.failed[name] = _reason(model)
                continue
            family.built.add(name)
            for kind, tag in tags_by_kind(model, cls.base_model_prefix):
                family.kinds.setdefault(kind, set()).add(tag)
    return family


def _build(cls: Any, settings: dict[str, object]) -> nn.Module | Exception:
    """A model with few layers, or with all that its config asks for; the exception if it can't be built by itself."""
    for few in (True, False):
        try:
            config = cls.config_class(**settings)
            if few:
                _take_few_layers(config)
            with torch.device("meta"):
                return cls(config)
        except Exception as error:
            failure = error
    return failure


def _take_few_layers(config: Any) -> None:
    # where a list says what each layer is, the number of layers stays
    values = vars(config)
    lengths = {len(value) for value in values.values() if isinstance(value, (list, tuple))}
    for name in _NUM_LAYERS:
        number = values.get(name)
        if isinstance(number, int) and number > _FEW and number not in lengths:
            setattr(config, name, _FEW)
    for value in values.values():
        if hasattr(value, "model_type"):
            _take_few_layers(value)


def tags_by_kind(model: nn.Module, prefix: str) -> Iterator[tuple[str, str]]:
    """Each kind of parameter with what it is tagged as; kinds are the ends of names with the numbers collapsed.

    Args:
        model: any module.
        prefix: left out at the beginning of names, so that models with and without a head have the same kinds.
    """
    settings = BlockSettings.parse()
    seen: set[tuple[object, ...]] = set()
    for named in registered_parameters(model):
        if named.param.is_floating_point():
            named.param.requires_grad_(True)  # a class may freeze some (Whisper's positions), which a user may train
        if not is_stepped(named):
            continue
        registration = named.first
        end = _end(named.fqn.removeprefix(f"{prefix}.") if prefix else named.fqn)
        parent = type(registration.parent).__name__
        key = (end, parent, type(registration.owner).__name__, len(named.shape))
        if key in seen:
            continue
        seen.add(key)
        tag = _tag(named, settings)
        of_class = " " in tag or "?" in tag
        yield (f"{end} in {parent}" if of_class else end), tag


def _end(fqn: str) -> str:
    parts = ["#" if part.isdigit() else part for part in fqn.split(".")]
    parts = [part for part, _ in itertools.groupby(parts)]
    names = 0
    for at in range(len(parts) - 1, -1, -1):
        names += parts[at] != "#"
        if names == 3:
            return ".".join(parts[at:])
    return ".".join(parts)


def _tag(named: RegisteredParameter, settings: BlockSettings) -> str:
    try:
        structure, _ = _structure_of(named, settings)
    except ValueError as error:
        said = re.sub(r"parameter '[^']*'(?: of shape \([^)]*\))?", "parameter", str(error))
        return next(
            (short for words, short in _KNOWN_ERRORS if words in said), f"refused: {re.sub('[0-9]+', '#', said)[:70]}"
        )
    except Exception as error:  # written down, so that the other families are surveyed; the test allows none
        return f"crash {type(error).__name__}"
    return describe(structure)


def describe(structure: TensorStructure) -> str:
    """The roles of the rows in their order, and how the matrix is stored if it is not ``[outputs, inputs]``."""
    roles = [span.role.value for span in structure.spans]
    unit = next(n for n in range(1, len(roles) + 1) if len(roles) % n == 0 and roles == roles[:n] * (len(roles) // n))
    runs = [
        role if n == 1 else f"{role}*" for role, n in ((r, len(list(g))) for r, g in itertools.groupby(roles[:unit]))
    ]
    text = " ".join(runs)
    if len(roles) > unit:
        text = f"per head: {text}"
    if structure.spans[0].head_rows == 1:
        text += " headless"
    if structure.matrices is not None:
        text += " experts"
    if structure.axis != (1 if structure.matrices is not None else 0):
        text += " [inputs, outputs]"
    return text


def _reason(error: BaseException) -> str:
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__} {re.sub(r'0x[0-9a-f]+', '0x', first.strip())[:80]}"


def record_lines(families: Iterable[Family]) -> list[str]:
    """The whole record as text."""
    version = importlib.import_module("transformers").__version__
    lines = [_HEADER, f"# transformers {version}"]
    for family in families:
        lines += family.lines()
    return lines


def read_record() -> tuple[str, dict[str, list[str]]]:
    """The version of transformers that was recorded, and the lines of each family."""
    families: dict[str, list[str]] = {}
    version = ""
    for line in RECORD.read_text(encoding="utf-8").splitlines():
        if line.startswith("# transformers "):
            version = line.removeprefix("# transformers ")
        elif line.startswith("== "):
            families[line.removeprefix("== ")] = [line]
        elif not line.startswith("#"):
            families[next(reversed(families))].append(line)
    return version, families


def is_incomplete(lines: list[str]) -> bool:
    """Whether a class of a family could not be built for want of another package, here or where it was recorded."""
    return any(
        line.startswith("  not built: ") and ("ImportError" in line or "NotFoundError" in line) for line in lines
    )


def main() -> None:
    """Write the record."""
    start = time.monotonic()
    importlib.import_module("transformers").logging.set_verbosity_error()
    RECORD.write_text("\n".join(record_lines(survey(file) for file in modeling_files())) + "\n", encoding="utf-8")
    print(f"{RECORD}: {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
