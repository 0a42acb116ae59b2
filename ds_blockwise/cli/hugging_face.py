# SPDX-License-Identifier: Apache-2.0
"""Models of a Hugging Face ``config.json``: of the class that it names, without any code from its folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ds_blockwise.cli.extras import needs
from ds_blockwise.runs.reading.problems import Problems
from ds_blockwise.runs.reading.whole_files import LONGEST_FILE, read_text

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# A small model keeps everything that attention depends on: the hidden size, heads, layouts, norms
_SMALL_LAYERS = 4
_SMALL_VOCABULARY = 256
_SMALL_WIDTH = 64  # of an FFN
_FFN_WIDTHS = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "n_inner", "ffn_dim")
_BY_HAND = "build the model in a function of yours and give package.module:function"


def build_from_config(path: Path, *, small: bool) -> nn.Module:
    """The model of a Hugging Face config, on the meta device, or small with fp32 weights on the CPU.

    Its class is the first of the config's ``architectures``; without them, the causal language model of its
    ``model_type``. Code beside the config (``auto_map``) is not run.

    Args:
        path: the JSON file, whatever its name.
        small: the first layers, a small vocabulary and narrow FFNs, with weights.

    Raises:
        ValueError: the file is no such config, names a class that transformers lacks, or cannot be built.
        ImportError: transformers is not installed.
    """
    values = _read(path)
    with needs("hf", "this model"):
        import transformers
    with _as_value_error(path, "transformers does not read it"):
        config = transformers.AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    if small:
        _shrink(config)
    name = _architecture(path, values)
    with needs("hf", "this model"):  # the class' module is imported only here
        build = transformers.AutoModelForCausalLM.from_config if name is None else _model_class(path, name, config)
    what = "a causal language model (it names no architectures)" if name is None else name
    with torch.device("cpu" if small else "meta"), _as_value_error(path, f"transformers cannot build {what} from it"):
        model: nn.Module = build(config)
    return model.float() if small else model


def _read(path: Path) -> dict[str, Any]:
    problems = Problems()
    text = read_text(path, "Hugging Face config", LONGEST_FILE, problems)
    problems.raise_if_any()
    assert text is not None
    with _as_value_error(path, "it is not JSON"):
        values = json.loads(text)  # Infinity, which some configs hold, included
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        raise ValueError(
            f'{path} is no config of a Hugging Face model: it has no "model_type". Give the config.json that '
            f"save_pretrained writes, or the folder that holds it."
        )
    return values


def _architecture(path: Path, values: dict[str, Any]) -> str | None:
    named = values.get("architectures")
    if not named:
        return None
    if not isinstance(named, list) or not isinstance(named[0], str):
        raise ValueError(f'{path}: "architectures" = {named!r}: allowed: a list with the name of a transformers class')
    return named[0]


def _model_class(path: Path, name: str, config: PretrainedConfig) -> type[nn.Module]:
    import transformers

    found = getattr(transformers, name, None)
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        raise ValueError(
            f'{path}: "architectures" = {name!r}: allowed: a class of transformers {transformers.__version__}, which '
            f"has no such model. If the class comes with the model's folder, or from another package, {_BY_HAND}."
        )
    expected = getattr(found, "config_class", None)
    if isinstance(expected, type) and not isinstance(config, expected):
        raise ValueError(
            f'{path}: "architectures" = {name!r}, whose config is {expected.__name__}, but "model_type" = '
            f"{config.model_type!r} is {type(config).__name__}. Correct one of the two, or {_BY_HAND}."
        )
    return found


@contextmanager
def _as_value_error(path: Path, what: str) -> Iterator[None]:
    """Whatever a library raises over a user's file is a mistake in the file, and is said in a line."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: {what}: {type(error).__name__}: {reason[:500]}") from error


def _shrink(config: PretrainedConfig) -> None:
    towers = (getattr(config, name, None) for name in getattr(config, "sub_configs", {}))
    for part in (config, *towers):
        if isinstance(getattr(part, "num_hidden_layers", None), int):
            _shrink_part(part)


def _shrink_part(config: Any) -> None:
    layers = config.num_hidden_layers
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == layers:  # a kind for each layer
            setattr(config, name, value[:_SMALL_LAYERS])
    config.num_hidden_layers = min(layers, _SMALL_LAYERS)
    if isinstance(getattr(config, "vocab_size", None), int):
        config.vocab_size = min(config.vocab_size, _SMALL_VOCABULARY)
        padding = getattr(config, "pad_token_id", None)
        if padding is not None and padding >= config.vocab_size:
            config.pad_token_id = None
    for name in _FFN_WIDTHS:
        if isinstance(value := getattr(config, name, None), int):
            setattr(config, name, min(value, _SMALL_WIDTH))
