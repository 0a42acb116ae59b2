# SPDX-License-Identifier: Apache-2.0
"""``ds-blockwise plan``: memory, traffic and time of a run, as a table or JSON, and a figure."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from ds_blockwise.cli.blocks import block_settings
from ds_blockwise.cli.extras import needs
from ds_blockwise.cli.models import load_model
from ds_blockwise.cli.overrides import add_overrides
from ds_blockwise.cli.progress import add_quiet

if TYPE_CHECKING:
    from ds_blockwise.runs.plan_memory import RankCounts
    from ds_blockwise.runs.run_file import RunConfig

HELP = "memory, traffic, time and GPU-hours of a run, before it is started"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what ``plan`` is given."""
    parser.add_argument(
        "run_file",
        type=Path,
        metavar="RUN",
        help="a run file, or a folder with one for each number of nodes, such as configs/run/llama_2b",
    )
    parser.add_argument("--nodes", type=_count, help="default: the run file's cluster.nodes; of a folder: the largest")
    parser.add_argument("--gpus-per-node", type=_count, help="default: the run file's")
    parser.add_argument("--gpu", help="such as h100-80g; default: the run file's cluster.gpu")
    add_overrides(parser)
    parser.add_argument("--deepspeed-config", type=Path, metavar="JSON", help="use it instead of the run file's")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="default: plan.png; an empty name writes none")
    add_quiet(parser)
    parser.set_defaults(run=run_plan, awaited="counting what each rank holds")


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:9]) and len(text) <= 9):
        raise argparse.ArgumentTypeError(f"{text!r}: allowed: a whole number, at least 1")
    return int(text)


def short_count(parameters: int) -> str:
    """The size of a model as people say it: in billions from 0.1B on, in millions below."""
    return f"{parameters / 1e9:.2f}B" if parameters >= 1e8 else f"{parameters / 1e6:.3g}M"


def run_plan(args: argparse.Namespace) -> tuple[str, int]:
    """Plan, draw, and return the text to print with the exit status."""
    with needs("launch", "`ds-blockwise plan`"):
        from ds_blockwise.runs.plan import GPUS, make_plan
        from ds_blockwise.runs.plan_files import choose_run, plan_over_nodes, read_runs
        from ds_blockwise.runs.plan_table import plan_table
    runs = read_runs(args.run_file, args.set, args.deepspeed_config)
    run = choose_run(runs, args.nodes)
    gpus, gpu = args.gpus_per_node or run.cluster.gpus_per_node, args.gpu or run.cluster.gpu
    if not gpu:
        raise ValueError(
            f"{run.file} names no GPU, as a run on CPUs: say which one to plan for, such as --gpu h100-80g, or set "
            f"cluster.gpu; allowed: {', '.join(GPUS)}"
        )
    plan = make_plan(run, _held(run), args.nodes or run.cluster.nodes, gpus, gpu)
    over_nodes = plan_over_nodes(runs, run, _held, gpus, gpu)
    path = Path("plan.png") if args.plot is None else args.plot
    drawn = str(path) not in ("", ".")
    if drawn:
        with needs("launch", "the figure"):
            from ds_blockwise.runs.plan_plot import plot_plans
        size = f"{short_count(run.shape.count_parameters())} parameters"
        plot_plans(over_nodes, f"{run.name}, {size}, batch {run.training.global_batch_size}, {gpu}", path)
    if args.json:
        found = {"run": run.name, "plan": plan.to_dict(), "over_nodes": [p.to_dict() for p in over_nodes]}
        return json.dumps(found, indent=2), 0
    return "\n".join([*plan_table(run, plan, over_nodes), *([f"figure: {path}"] if drawn else [])]), 0


def _held(run: RunConfig) -> RankCounts:
    from ds_blockwise.runs.plan_memory import count_rank

    settings = block_settings(run.deepspeed["optimizer"])
    return count_rank(load_model(str(run.model_file)), run.parallel.tensor, settings)
