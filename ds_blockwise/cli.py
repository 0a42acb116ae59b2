# SPDX-License-Identifier: Apache-2.0
"""The ``ds-blockwise`` command: ``blocks`` prints how a model is cut, ``convert`` and ``check`` work on checkpoints."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ds_blockwise.checkpoint_files import CheckpointError
from ds_blockwise.cli_checkpoint import add_commands
from ds_blockwise.policy import suggest
from ds_blockwise.settings import OPTIMIZER_KEYS, check_extra_keys
from ds_blockwise.tagging import tag_parameters

_POLICY_KEYS = ("lr_multipliers", "weight_decay_multipliers", "granularity", "rules")
_OURS = ("BlockwiseAdamW", "BlockwiseAdamMini")

MODEL_HELP = (
    "a Hugging Face config.json (or the folder that holds it), a Megatron-core model file such as "
    "configs/model/tiny.yaml, or package.module:function, a function without arguments that returns a torch module"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; default ``sys.argv[1:]``.

    Returns:
        Exit status: 0; 1 if ``check`` found problems; 2 for an error, which is printed to stderr without a traceback.
    """
    args = _parser().parse_args(argv)
    try:
        text, status = args.run(args)
    except (ValueError, TypeError, OSError, ImportError, CheckpointError) as error:
        print(f"ds-blockwise: error: {error}", file=sys.stderr)
        return 2
    try:
        print(text)
    except BrokenPipeError:
        # the reader (head, less) has seen enough; leave without Python's own complaint at shutdown
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return int(status)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ds-blockwise", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    blocks = commands.add_parser(
        "blocks", help="print each parameter's role, multiplier, blocks and optimizer-state bytes"
    )
    blocks.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    blocks.add_argument("--ds-config", type=Path, metavar="JSON", help="DeepSpeed JSON with the optimizer's settings")
    blocks.add_argument("--json", action="store_true", help="print JSON instead of a table")
    blocks.set_defaults(run=_run_blocks)
    add_commands(commands)
    return parser


def _run_blocks(args: argparse.Namespace) -> tuple[str, int]:
    settings = {} if args.ds_config is None else read_optimizer_settings(args.ds_config)
    report = tag_parameters(load_model(args.model), **settings)
    return json.dumps(report.to_dict(), indent=2) if args.json else str(report), 0


def read_optimizer_settings(path: Path) -> dict[str, Any]:
    """Read the block settings (multipliers, granularity, rules) from a DeepSpeed JSON.

    Raises:
        ValueError: not JSON, no optimizer of ours, or an unknown key.
        OSError: the file cannot be read.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    optimizer = config.get("optimizer", {}) if isinstance(config, dict) else {}
    name = optimizer.get("type")
    if name not in _OURS:
        raise ValueError(f'{path}: "optimizer": {{"type": {name!r}}} is not one of {", ".join(_OURS)}')
    params = optimizer.get("params", {})
    check_extra_keys(name, {k: v for k, v in params.items() if k not in OPTIMIZER_KEYS})
    return {key: params[key] for key in _POLICY_KEYS if key in params}


def load_model(source: str) -> nn.Module:
    """Build a model on the meta device (no memory is used for its parameters).

    Args:
        source: see ``ds-blockwise blocks --help``.

    Raises:
        ValueError: the source is none of the known kinds.
        ImportError: the library that builds such a model is not installed.
    """
    path = Path(source)
    if path.is_dir():
        path = path / "config.json"
    if path.suffix == ".json" and path.is_file():
        return _hugging_face_model(path)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return _megatron_model(path)
    if ":" in source and not path.exists():
        return _from_function(source)
    raise ValueError(f"cannot build a model from {source!r}: give {MODEL_HELP}")


def _hugging_face_model(path: Path) -> nn.Module:
    try:
        transformers = importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        raise _missing(error, "transformers", "hf") from error
    config = transformers.AutoConfig.from_pretrained(str(path.parent))
    with torch.device("meta"):
        return cast("nn.Module", transformers.AutoModelForCausalLM.from_config(config))


def _megatron_model(path: Path) -> nn.Module:
    try:
        megatron_patch = importlib.import_module("megatron_patch")
    except ModuleNotFoundError as error:
        raise _missing(error, "megatron", "megatron") from error
    return cast("nn.Module", megatron_patch.build_meta_gpt(path))


def _missing(error: ModuleNotFoundError, package: str, extra: str) -> Exception:
    if (error.name or "").partition(".")[0] != package:
        return error
    return ImportError(f"this model needs {package}: pip install 'ds_blockwise[{extra}]'")


def _from_function(source: str) -> nn.Module:
    module_name, _, function_name = source.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    module = importlib.import_module(module_name)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"{module_name} has no function {function_name!r}{suggest(function_name, dir(module))}")
    with torch.device("meta"):
        model = function()
    if not isinstance(model, nn.Module):
        raise ValueError(f"{source} returned {type(model).__name__}, not a torch module")
    return model
