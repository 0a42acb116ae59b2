# SPDX-License-Identifier: Apache-2.0
"""Megatron-LM's stock training scripts with our optimizers: command-line arguments, and a launcher for any script.

    torchrun ... -m megatron_patch.pretrain pretrain_gpt.py --blockwise-optimizer BlockwiseAdamMini --optimizer adam ...

`patch_training` wraps two functions of ``megatron.training`` by name: ``pretrain``, to add the arguments, and the
factory ``training.get_megatron_optimizer``, to convert what it returns. ``megatron.training`` belongs to the
Megatron-LM repository and is not in the package ``megatron-core``: the tests run against a module with the same names
and signatures (core_v0.16.1), not against Megatron-LM itself.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import inspect
import json
import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypedDict, TypeVar

from ds_blockwise.blocks.settings.auto_settings import AUTO
from ds_blockwise.blocks.settings.defaults import LR_PRESETS, PUBLISHED
from ds_blockwise.optimizers.registry import OPTIMIZERS
from ds_blockwise.optimizers.settings import BACKENDS, BLOCK_KEYS, MOMENTUM_DTYPES, MomentumDtype
from megatron_patch.convert import convert_

P = ParamSpec("P")
R = TypeVar("R")
ArgsProvider = Callable[[argparse.ArgumentParser], argparse.ArgumentParser]

_JSON_SETTINGS = (*BLOCK_KEYS, "own")
_SWITCHES = {
    "cautious_weight_decay": "Weight decay only where it agrees with the update.",
    "fused_step": "Clip, update and write the model's weights in one pass; needs --use-distributed-optimizer.",
}
_TRAINING = "megatron.training.training"
_FACTORY = "get_megatron_optimizer"
_MUON_FACTORY = "get_megatron_muon_optimizer"  # takes the factory's place for --optimizer muon and dist_muon


class Settings(TypedDict):
    """Keyword arguments of `convert_`; those that only some optimizers have are `own_settings_in`."""

    kind: str
    lr_multipliers: object
    weight_decay_multipliers: object
    betas_by_type: object
    cautious_weight_decay: bool
    granularity: object
    rules: object
    transfer: object
    momentum_dtype: MomentumDtype
    backend: str
    fused_step: bool


def add_blockwise_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add our arguments; usable as, or inside, Megatron-LM's ``extra_args_provider``.

    Args:
        parser: Megatron-LM's parser; changed.

    Returns:
        ``parser``.
    """
    group = parser.add_argument_group(title="blockwise")
    group.add_argument(
        "--blockwise-optimizer",
        choices=list(OPTIMIZERS),
        default=None,
        help="Optimizer that takes Adam's place; needs --optimizer adam. Without it nothing is changed.",
    )
    for name, example, words in (
        ("lr-multipliers", '{"preset": "tuned", "head": 1}', (*LR_PRESETS, AUTO)),
        ("weight-decay-multipliers", '{"norm": 0}', ()),
        ("betas-by-type", '{"norm": [null, 0.99]}', ()),
        ("granularity", '{"value": "tensor"}', (PUBLISHED,)),
        ("rules", '[{"match": "adapter", "role": "ffn"}]', ()),
        ("transfer", '{"base_width": 256}', ()),
        ("own", '{"momentum": 0.9, "orthogonalize": {"qk": "head"}} for BlockwiseMuon', ()),
    ):
        group.add_argument(
            f"--blockwise-{name}",
            type=functools.partial(_json_value, words=words),
            default=None,
            help=f"JSON, such as {example}, {''.join(f'{word}, ' for word in words)}or the path of a JSON file.",
        )
    group.add_argument(
        "--blockwise-momentum-dtype", choices=list(MOMENTUM_DTYPES), default="fp32", help="Storage of the first moment."
    )
    for name, what in _SWITCHES.items():
        group.add_argument(f"--blockwise-{name.replace('_', '-')}", action="store_true", help=what)
    group.add_argument("--blockwise-backend", choices=list(BACKENDS), default="auto", help="Kernels.")
    return parser


def with_blockwise_args(provider: ArgsProvider | None = None) -> ArgsProvider:
    """An ``extra_args_provider`` that adds our arguments to those of another one."""

    def provide(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        return add_blockwise_args(parser if provider is None else provider(parser))

    return provide


def settings_in(args: argparse.Namespace) -> Settings | None:
    """Keyword arguments of `convert_` in parsed arguments; None if no optimizer was asked for.

    Raises:
        ValueError: other arguments of ours were given without ``--blockwise-optimizer``.
    """
    if getattr(args, "blockwise_optimizer", None) is None:
        given = [name for name in _JSON_SETTINGS if getattr(args, f"blockwise_{name}", None) is not None]
        given += [name for name in _SWITCHES if getattr(args, f"blockwise_{name}", False)]
        if given:
            raise ValueError(
                f"--blockwise-{given[0].replace('_', '-')} was given without --blockwise-optimizer. Add "
                f"--blockwise-optimizer {' or '.join(OPTIMIZERS)}, or remove it."
            )
        return None
    return {
        "kind": args.blockwise_optimizer,
        "lr_multipliers": args.blockwise_lr_multipliers,
        "weight_decay_multipliers": args.blockwise_weight_decay_multipliers,
        "betas_by_type": args.blockwise_betas_by_type,
        "cautious_weight_decay": args.blockwise_cautious_weight_decay,
        "granularity": args.blockwise_granularity,
        "rules": args.blockwise_rules,
        "transfer": args.blockwise_transfer,
        "momentum_dtype": args.blockwise_momentum_dtype,
        "backend": args.blockwise_backend,
        "fused_step": args.blockwise_fused_step,
    }


def own_settings_in(args: argparse.Namespace) -> Mapping[str, Any]:
    """Keyword arguments of `convert_` that only the chosen optimizer has; empty if none were given.

    Raises:
        ValueError: ``--blockwise-own`` holds something else than a JSON object.
    """
    own = args.blockwise_own or {}
    if not isinstance(own, Mapping):
        raise ValueError(f'--blockwise-own must be a JSON object such as {{"momentum": 0.9}}, got {own!r}')
    return own


def patch_training() -> None:
    """Let Megatron-LM's ``pretrain`` know our arguments and convert the optimizer that it builds; idempotent.

    Call it before the training script is imported. ``extra_args_provider`` of the script keeps working.

    Raises:
        ImportError: Megatron-LM is not on the path, or lacks one of the functions that are wrapped.
    """
    try:
        package, training = importlib.import_module("megatron.training"), importlib.import_module(_TRAINING)
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("megatron"):
            raise
        raise ImportError(
            f"{error.name} cannot be imported: megatron.training is part of the Megatron-LM repository and not of the "
            f"package megatron-core. Put a checkout (core_v0.16.1 was looked at) on PYTHONPATH."
        ) from error
    for name in ("pretrain", "get_args", _FACTORY):
        if not callable(getattr(training, name, None)):
            raise ImportError(
                f"{_TRAINING} has no function {name}; ds_blockwise knows core_v0.16.1. Use that version, or call "
                f"megatron_patch.convert_ after the optimizer is built."
            )
    if getattr(getattr(training, _FACTORY), "calls_ds_blockwise", False):
        return
    setattr(training, _FACTORY, _converting(getattr(training, _FACTORY), training.get_args))
    if hasattr(training, _MUON_FACTORY):
        setattr(training, _MUON_FACTORY, _refusing(getattr(training, _MUON_FACTORY), training.get_args))
    pretrain = _with_args(training.pretrain)
    training.pretrain = pretrain  # type: ignore[attr-defined]  # a module of unknown contents
    package.pretrain = pretrain  # type: ignore[attr-defined]


def _converting(factory: Callable[P, R], get_args: Callable[[], argparse.Namespace]) -> Callable[P, R]:
    signature = inspect.signature(factory)

    @functools.wraps(factory)
    def build(*args: P.args, **kwargs: P.kwargs) -> R:
        settings = settings_in(get_args())
        if settings is None:
            return factory(*args, **kwargs)
        own = own_settings_in(get_args())
        optimizer = factory(*args, **kwargs)
        return convert_(optimizer, signature.bind(*args, **kwargs).arguments["model_chunks"], **settings, **own)

    build.calls_ds_blockwise = True  # type: ignore[attr-defined]  # how `patch_training` knows it again
    return build


def _refusing(factory: Callable[P, R], get_args: Callable[[], argparse.Namespace]) -> Callable[P, R]:
    @functools.wraps(factory)
    def build(*args: P.args, **kwargs: P.kwargs) -> R:
        if settings_in(get_args()) is not None:
            raise ValueError(
                "--blockwise-optimizer replaces Adam, and --optimizer asks for Muon. Set --optimizer adam, or remove "
                "--blockwise-optimizer."
            )
        return factory(*args, **kwargs)

    return build


def _with_args(pretrain: Callable[P, R]) -> Callable[P, R]:
    signature = inspect.signature(pretrain)

    @functools.wraps(pretrain)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        given = signature.bind(*args, **kwargs)
        given.arguments["extra_args_provider"] = with_blockwise_args(given.arguments.get("extra_args_provider"))
        return pretrain(*given.args, **given.kwargs)

    return run


def _json_value(text: str, words: Sequence[str]) -> object:
    """An argument's JSON, or what the file of that name holds; ``words`` stand for themselves."""
    if text in words:
        return text
    source = text
    if not text.lstrip().startswith(("{", "[")):
        try:
            source = Path(text).read_text(encoding="utf-8")
        except OSError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is neither JSON nor a readable file: {error}") from error
    try:
        value: object = json.loads(source)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from error
    if not isinstance(value, (Mapping, Sequence)) or isinstance(value, str):
        raise argparse.ArgumentTypeError(f"{text!r} must hold a JSON object or list, got {value!r}")
    return value


def main(arguments: Sequence[str]) -> None:
    """Run a training script as if it had been started by itself, with our arguments known to it.

    Args:
        arguments: path of the script, then its own arguments.

    Raises:
        SystemExit: no script was named.
    """
    if not arguments or arguments[0].startswith("-"):
        raise SystemExit("usage: python -m megatron_patch.pretrain SCRIPT [ARGUMENTS OF THE SCRIPT]")
    script = Path(arguments[0])
    if not script.is_file():
        raise SystemExit(f"{script} is not a file; give the path of a training script such as pretrain_gpt.py")
    sys.path.insert(0, str(script.resolve().parent))  # as Python does for a script that it starts
    sys.argv = list(arguments)
    patch_training()
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
