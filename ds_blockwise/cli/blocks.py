# SPDX-License-Identifier: Apache-2.0
"""``ds-blockwise blocks``: how a model is cut into blocks, and what their optimizer state costs."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ds_blockwise.blocks.settings.block_settings import BlockSettings
from ds_blockwise.cli.models import MODEL_HELP, load_model
from ds_blockwise.cli.progress import add_quiet
from ds_blockwise.hosts.deepspeed.config.check import json_mistakes
from ds_blockwise.optimizers.base import BlockwiseOptimizer
from ds_blockwise.optimizers.registry import OPTIMIZERS
from ds_blockwise.optimizers.settings import OPTIMIZER_KEYS, check_extra_keys
from ds_blockwise.runs.reading.problems import Problems
from ds_blockwise.runs.reading.whole_files import read_json
from ds_blockwise.tagging.names import canonical_fqn
from ds_blockwise.tagging.report import block_report
from ds_blockwise.tagging.tag import tag_with_settings
from ds_blockwise.tagging.verify_layout import LayoutReport, default_outputs, verify_layout

HELP = "print each parameter's role, multiplier, blocks and optimizer-state bytes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what ``blocks`` is given."""
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--ds-config", type=Path, metavar="JSON", help="DeepSpeed JSON with the optimizer's settings")
    parser.add_argument(
        "--full", action="store_true", help="a line for each parameter, where equal layers share theirs"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="also run a small model of this kind, forward and backward, and check that queries, keys and values are "
        "where the table says",
    )
    add_quiet(parser)
    parser.set_defaults(run=run_blocks, awaited="building the model")


def run_blocks(args: argparse.Namespace) -> tuple[str, int]:
    """Tag the model, verify it if asked, and return the text to print with the exit status."""
    settings = {} if args.ds_config is None else read_optimizer_settings(args.ds_config)
    model = load_model(args.model)
    tag_with_settings(model, BlockSettings.parse(**settings))  # its message has rules in the form of the JSON
    report = block_report(model)
    args.progress.what = "ds-blockwise: running a small model to verify it"
    verified = _verify(args.model, settings.get("rules", ())) if args.verify else None
    if args.json:
        found = report.to_dict()
        if verified is not None:
            found["verified"] = {"parameters": list(verified.parameters), "checks": verified.num_checks}
        return json.dumps(found, indent=2), 0
    table = report.table(full=args.full)
    return table if verified is None else f"{table}\n{verified}", 0


def _verify(source: str, rules: Sequence[Mapping[str, Any]]) -> LayoutReport:
    model = load_model(source, small=True)
    names = [canonical_fqn(name) for name, _ in model.named_parameters(remove_duplicate=False)]
    # a rule for one of the layers that the small model lacks has nothing to match there
    present = [rule for rule in rules if any(re.search(rule["match"], name) for name in names)]
    return verify_layout(model, _outputs, rules=present)


def _outputs(model: nn.Module) -> torch.Tensor:
    try:
        found = default_outputs(model)
    except Exception as error:  # whatever a forward raises that wants something else than token ids
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"--verify runs a model on token ids alone, which {type(model).__name__} does not take ({reason}). Call "
            f"ds_blockwise.verify_layout(model, outputs=...) in Python, with a function that runs the model."
        ) from error
    if not isinstance(found, torch.Tensor):
        raise ValueError(f"--verify needs a tensor from {type(model).__name__}, which gave {type(found).__name__}")
    return found


def block_settings(optimizer: Mapping[str, Any]) -> dict[str, Any]:
    """The block settings (multipliers, granularity, rules, ...) that a JSON's ``"optimizer"`` means."""
    cls = OPTIMIZERS.get(optimizer.get("type", ""), BlockwiseOptimizer)
    return cls.block_arguments(optimizer.get("params", {}))


def read_optimizer_settings(path: Path) -> dict[str, Any]:
    """Read the block settings (multipliers, betas, granularity, rules) from a DeepSpeed JSON.

    Raises:
        ValueError: every mistake in the JSON, no optimizer of ours, or an unknown key.
    """
    problems = Problems()
    config = read_json(path, problems)
    for mistake in json_mistakes(config, may_be_auto=True):
        problems.add(path, *mistake)
    problems.raise_if_any()
    optimizer = config.get("optimizer", {})
    name = optimizer.get("type")
    if name not in OPTIMIZERS:
        raise ValueError(f'{path}: "optimizer": {{"type": {name!r}}} is not one of {", ".join(OPTIMIZERS)}')
    params = optimizer.get("params", {})
    own = OPTIMIZERS[name].own_settings
    check_extra_keys(name, {k: v for k, v in params.items() if k not in (*OPTIMIZER_KEYS, *own)}, own)
    return block_settings(optimizer)
