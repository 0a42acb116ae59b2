# SPDX-License-Identifier: Apache-2.0
"""What ``ds-blockwise sharpness measure`` reads: a model with its weights, and text as batches of tokens."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ds_blockwise.cli.models import load_model

_EXTRA = "pip install 'ds_blockwise[hf]'"


def load_trained(source: str, *, random_init: bool = False) -> tuple[nn.Module, str]:
    """A model with its weights, in fp32 on the CPU.

    Args:
        source: a Hugging Face folder with weights, or ``package.module:function``.
        random_init: build the model even where there are no weights.

    Returns:
        The model, and a warning if its weights may be random (empty if they are not).

    Raises:
        ValueError: the source has no weights, or lacks some of them.
        ImportError: transformers is not installed.
    """
    path = Path(source)
    if path.suffix in (".yaml", ".yml"):
        raise ValueError(
            f"{source} describes a model without weights: measure a checkpoint of a run with "
            f"launch/probe_sharpness.py --run RUN"
        )
    if not path.exists() and ":" in source:
        return load_model(
            source, small=True
        ), f"whether the weights that {source} returns are trained is for you to know"
    folder = path if path.is_dir() else path.parent
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("pytorch_model*.bin")):
        if not random_init:
            raise ValueError(
                f"{folder} holds no weights (*.safetensors, pytorch_model*.bin), and the sharpness of random weights "
                f"says nothing about training. Give a folder as save_pretrained writes it, or --random-init."
            )
        torch.manual_seed(0)
        transformers = _transformers()
        config = transformers.AutoConfig.from_pretrained(str(folder))
        model = transformers.AutoModelForCausalLM.from_config(config)
        return cast("nn.Module", model).float(), f"{folder} holds no weights: these are RANDOM ones"
    model, loading = _transformers().AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=torch.float32, output_loading_info=True, local_files_only=True
    )
    if loading["missing_keys"] or loading["mismatched_keys"]:
        lacking = sorted(map(str, [*loading["missing_keys"], *loading["mismatched_keys"]]))
        raise ValueError(f"the weights in {folder} do not fill the model: {', '.join(lacking[:5])} would be random")
    return cast("nn.Module", model), ""


def read_batches(
    text: Path, tokenizer: str, *, batches: int, sequences: int, length: int, vocabulary: int | None
) -> list[torch.Tensor]:
    """The beginning of a text as batches of token ids.

    Args:
        text: UTF-8.
        tokenizer: a `tokenizer.json`, or a folder that holds one or that transformers can read.
        batches: how many.
        sequences: in each batch.
        length: tokens in each sequence.
        vocabulary: of the model; None if unknown.

    Returns:
        int64 tensors ``[sequences, length]``.

    Raises:
        ValueError: the text is too short, or has a token that the model does not know.
        OSError: a file cannot be read.
    """
    ids = _encode(text.read_text(encoding="utf-8"), Path(tokenizer))
    needed = batches * sequences * length
    if len(ids) < needed:
        raise ValueError(
            f"{text} has {len(ids):,} tokens, but {batches} batches of {sequences} x {length} need {needed:,}. Give "
            f"more text, or lower --batches, --batch-size or --length."
        )
    if vocabulary is not None and max(ids[:needed]) >= vocabulary:
        raise ValueError(f"{tokenizer} makes token {max(ids[:needed])}, but the model's vocabulary is {vocabulary}")
    return list(torch.tensor(ids[:needed]).view(batches, sequences, length).unbind())


def _encode(text: str, tokenizer: Path) -> list[int]:
    file = tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer
    if file.is_file() and file.suffix == ".json":
        try:
            tokenizers = importlib.import_module("tokenizers")
        except ModuleNotFoundError as error:
            raise ImportError(f"reading {file} needs {error.name}: {_EXTRA}") from error
        return list(tokenizers.Tokenizer.from_file(str(file)).encode(text, add_special_tokens=False).ids)
    if not tokenizer.is_dir():
        raise ValueError(f"{tokenizer} is no tokenizer: give a tokenizer.json or a folder with one (--tokenizer)")
    found = _transformers().AutoTokenizer.from_pretrained(str(tokenizer), local_files_only=True)
    return list(found.encode(text, add_special_tokens=False))


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        raise ImportError(f"this model needs {error.name}: {_EXTRA}") from error
