# SPDX-License-Identifier: Apache-2.0
"""Models from what a command line can name: a Hugging Face config, a Megatron-core model file, a function.

On the meta device to be looked at, small with real weights to be run, or with the weights of a training.
"""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import torch
from torch import nn

from ds_blockwise.cli.extras import needs
from ds_blockwise.cli.hugging_face import build_from_config
from ds_blockwise.values import suggest

MODEL_HELP = (
    "a Hugging Face config.json (or the folder that holds it), a Megatron-core model file such as "
    "configs/model/tiny.yaml, or package.module:function, a function without arguments that returns a torch module"
)
_FILES = (".json", ".yaml", ".yml")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)


def load_model(source: str, *, small: bool = False) -> nn.Module:
    """Build a model on the meta device (no memory is used for its parameters), or a small one with real weights.

    Args:
        source: see ``ds-blockwise blocks --help``.
        small: real fp32 weights on the CPU; the first layers, a small vocabulary and narrow FFNs, where the source is
            a file. A function builds what it builds.

    Raises:
        ValueError: the source is none of the known kinds.
        ImportError: the library that builds such a model is not installed.
    """
    path = Path(source)
    if path.is_dir():
        path = _config_in(path)
    if path.suffix == ".json" and path.is_file():
        return build_from_config(path, small=small)
    if path.suffix in _FILES[1:] and path.is_file():
        return _megatron_model(path, small)
    if _is_function(source):
        return _from_function(source, small)
    raise _not_a_model(source)


def _is_function(source: str) -> bool:
    return ":" in source and not Path(source).exists()


def _config_in(folder: Path) -> Path:
    path = folder / "config.json"
    if not path.exists():
        raise ValueError(f"{folder} holds no config.json: give {MODEL_HELP}")
    return path


def _not_a_model(source: str) -> ValueError:
    """Why a source that no reader takes is none."""
    path = Path(source)
    if path.exists():
        return ValueError(f"{source} is no model: give {MODEL_HELP}")
    if _HUB_ID.fullmatch(source) and path.suffix not in _FILES:
        return ValueError(
            f"{source!r}: no such file or folder. Names on the Hugging Face Hub are not read here: download the "
            f"model's config.json and give the folder that holds it."
        )
    return ValueError(f"{source!r}: no such file or folder. Correct the path: give {MODEL_HELP}")


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
    if _is_function(source):
        warning = f"{source} may return random weights, and their sharpness says nothing about training"
        return load_model(source, small=True), warning
    if not path.exists():
        raise _not_a_model(source)
    if path != path.parent / "config.json" and not path.is_dir():
        raise ValueError(f"{source} is no model with weights: give the folder, as save_pretrained writes it")
    folder = path if path.is_dir() else path.parent
    has_weights = any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin"))
    if not has_weights and not random_init:
        raise ValueError(
            f"{folder} holds no weights (*.safetensors, pytorch_model*.bin), and the sharpness of random weights "
            f"says nothing about training. Give a folder as save_pretrained writes it, or --random-init."
        )
    with needs("hf", "this model"):
        import transformers
    if not has_weights:
        torch.manual_seed(0)
        drawn: nn.Module = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        )
        return drawn.float(), f"{folder} holds no weights: these are RANDOM ones"
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=torch.float32, output_loading_info=True, local_files_only=True
    )
    if loading["missing_keys"] or loading["mismatched_keys"]:
        lacking = sorted(map(str, [*loading["missing_keys"], *loading["mismatched_keys"]]))
        raise ValueError(f"the weights in {folder} do not fill the model: {', '.join(lacking[:5])} would be random")
    assert isinstance(model, nn.Module)
    return model, ""


def _megatron_model(path: Path, small: bool) -> nn.Module:
    with needs("megatron", "this model"):
        megatron_patch = importlib.import_module("megatron_patch")  # a layer above this package
        model: nn.Module = (megatron_patch.build_small_gpt if small else megatron_patch.build_meta_gpt)(path)
    return model


def _from_function(source: str, small: bool) -> nn.Module:
    module_name, _, function_name = source.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        if not f"{module_name}.".startswith(f"{missing}."):  # of what the user's module imports
            raise ImportError(f"{module_name}, for {source!r}, imports {missing}, which is not installed") from error
        raise ValueError(
            f"{source!r}: there is no module {missing!r} in the working directory or among Python's packages. Give "
            f"{MODEL_HELP}"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"{module_name} has no function {function_name!r}{suggest(function_name, dir(module))}")
    with torch.device("cpu" if small else "meta"):
        model = function()
    if not isinstance(model, nn.Module):
        raise ValueError(f"{source} returned {type(model).__name__}, not a torch module")
    return model
