# SPDX-License-Identifier: Apache-2.0
"""``ds-blockwise suggest``: a starting learning rate from published rules, what to try around it, a JSON to paste."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ds_blockwise.blocks.settings.block_settings import BlockSettings
from ds_blockwise.cli.blocks import read_optimizer_settings
from ds_blockwise.cli.extras import needs
from ds_blockwise.cli.models import MODEL_HELP, load_model
from ds_blockwise.cli.overrides import add_overrides
from ds_blockwise.cli.progress import add_quiet
from ds_blockwise.tagging.report import block_report
from ds_blockwise.tagging.tag import tag_with_settings

if TYPE_CHECKING:
    from ds_blockwise.runs.rates.scaling_rules import TrainingSize
    from ds_blockwise.runs.run_file import RunConfig

HELP = "a starting learning rate from published rules, the rates to try around it and their cost, a DeepSpeed JSON"
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_NUMBER = re.compile(r"(\d+(?:\.\d+)?(?:e\d{1,2})?)([kmbt]?)", re.ASCII | re.IGNORECASE)
_MOST = 10**18


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what ``suggest`` is given."""
    parser.add_argument(
        "model", metavar="MODEL", help=f"{MODEL_HELP}; or a run file, which says tokens and batch as well"
    )
    parser.add_argument("--tokens", type=_count, help="of the whole run, such as 26B or 1.6e6; default: the run file's")
    parser.add_argument(
        "--batch",
        type=_batch,
        metavar="TOKENS",
        help="of an optimizer step on all ranks together, such as 0.5M, or sequences x length, such as 512x1024; "
        "default: the run file's",
    )
    parser.add_argument(
        "--optimizer", metavar="NAME", help="for the JSON; default: the run file's, or BlockwiseAdamMini"
    )
    parser.add_argument("--gpu", help="also say GPU-hours on this kind, such as h100-80g; default: the run file's")
    parser.add_argument("--ds-config", type=Path, metavar="JSON", help="DeepSpeed JSON with rules that the model needs")
    add_overrides(parser)
    parser.add_argument("--json", action="store_true", help="print the DeepSpeed JSON alone")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the DeepSpeed JSON into a new file")
    add_quiet(parser)
    parser.set_defaults(run=run_suggest, awaited="building the model")


@dataclass(frozen=True)
class _Batch:
    """Tokens of a step; the length of a sequence where it was given."""

    tokens: int
    sequence_length: int | None = None


def _count(text: str) -> int:
    found = _NUMBER.fullmatch(text.replace("_", ""))
    value = float(found[1]) * _UNITS[found[2].lower()] if found else 0.0
    if not 1 <= value <= _MOST or value != int(value):
        raise argparse.ArgumentTypeError(f"{text!r}: allowed: a number of tokens, such as 26B, 1.6M, 2e9 or 524288")
    return int(value)


def _batch(text: str) -> _Batch:
    sequences, times, length = text.partition("x")
    if not times:
        return _Batch(_count(text))
    return _Batch(_count(sequences) * _count(length), _count(length))


def run_suggest(args: argparse.Namespace) -> tuple[str, int]:
    """Count the model's parameters, apply the rules, and return the text to print with the exit status."""
    with needs("launch", "`ds-blockwise suggest`"):
        from ds_blockwise.cli.suggest.text import text_of
        from ds_blockwise.runs.rates.suggestion import deepspeed_json, suggest_for
    run = _run_of(args)
    tokens, batch = _length_of(args, run)
    size, has_router = _size_of(args, run, tokens, batch.tokens)
    found = suggest_for(size)
    gpu = args.gpu or (run.cluster.gpu if run is not None else "")
    hours = found.gpu_hours(gpu) if gpu else None
    config = None if run is None else run.deepspeed
    made = deepspeed_json(found, args.optimizer, sequence_length=batch.sequence_length, config=config)
    shown = json.dumps(made, indent=2)
    if args.output is not None:
        _write_new(args.output, shown)
    if args.json:
        return shown, 0
    lines = text_of(found, batch.sequence_length, (gpu, *hours) if hours else None, has_router=has_router)
    lines += _use_of(args, run, size, shown)
    return "\n".join(lines), 0


def _run_of(args: argparse.Namespace) -> RunConfig | None:
    """The run, if a run file was given: the sections of one tell it from a model file."""
    path = Path(args.model)
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        if args.set:
            raise ValueError(f"--set changes a run file, and {args.model} is none: remove it, or give a run file")
        return None
    from ds_blockwise.runs.model_shape import is_model_file
    from ds_blockwise.runs.run_file import load_run

    if is_model_file(path) and not args.set:
        return None
    run, problems = load_run(path, overrides=args.set)
    problems.raise_if_any()
    return run


def _length_of(args: argparse.Namespace, run: RunConfig | None) -> tuple[int, _Batch]:
    """Tokens of the run and of a step."""
    batch, tokens = args.batch, args.tokens
    if run is not None:
        batch = batch or _Batch(run.tokens_per_step, run.shape.sequence_length)
        tokens = tokens or run.training.steps * batch.tokens
    missing = [name for name, value in (("--tokens", tokens), ("--batch", batch)) if value is None]
    if missing:
        raise ValueError(
            f"{' and '.join(missing)} missing: a rate depends on the length of the run and on the batch. Give both, "
            f"such as --tokens 26B --batch 512x1024, or a run file instead of {args.model}"
        )
    return tokens, batch


def _size_of(args: argparse.Namespace, run: RunConfig | None, tokens: int, batch: int) -> tuple[TrainingSize, bool]:
    """The model's parameters by what they are, and whether it has routers."""
    from ds_blockwise.runs.rates.scaling_rules import TrainingSize

    source = args.model if run is None else str(run.model_file)
    settings: dict[str, Any] = {} if args.ds_config is None else read_optimizer_settings(args.ds_config)
    model: nn.Module = load_model(source)
    tag_with_settings(model, BlockSettings.parse(rules=settings.get("rules")))
    counts = {"embedding": 0, "output": 0, "layers": 0}
    roles = set()
    for row in block_report(model).rows:
        role = row.role.removesuffix(" bias")
        roles.add(role)
        counts[role if role in counts else "layers"] += row.numel
    return TrainingSize(**counts, tokens=tokens, batch=batch), "router" in roles


def _write_new(path: Path, text: str) -> None:
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text + "\n")
    except FileExistsError as error:
        raise ValueError(f"{path} is there already, and nothing is overwritten: give --output another name") from error


def _use_of(args: argparse.Namespace, run: RunConfig | None, size: TrainingSize, shown: str) -> list[str]:
    """How the JSON is used, and the JSON."""
    file = args.output or Path("suggested.json")
    written = f"written to {file}" if args.output else "--output FILE writes it"
    lines = ["", f"DeepSpeed JSON ({written})"]
    if run is not None:
        more = f" --set training.steps={size.steps}" if size.steps != run.training.steps else ""
        lines.append(f"  ds-blockwise check {args.model} --deepspeed-config {file}{more}")
    return [*lines, shown]
