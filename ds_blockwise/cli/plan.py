# SPDX-License-Identifier: Apache-2.0
"""The ``plan`` command of ``ds-blockwise``: which file it reads, the table, the JSON, the figure."""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_EXTRA = "pip install 'ds_blockwise[launch]'"


def add_plan_command(commands: Any) -> None:
    """Add it to the parser of ``ds-blockwise``; sets ``run``, called with the arguments."""
    plan = commands.add_parser("plan", help="memory, traffic, time and GPU-hours of a run, before it is started")
    plan.add_argument(
        "run_file",
        type=Path,
        metavar="RUN",
        help="a run file, or a folder with one for each number of nodes, such as configs/run/llama_2b",
    )
    plan.add_argument("--nodes", type=int, help="default: the run file's cluster.nodes; of a folder: the largest")
    plan.add_argument("--gpus-per-node", type=int, help="default: the run file's")
    plan.add_argument("--gpu", help="default: the run file's cluster.gpu")
    plan.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    plan.add_argument("--deepspeed-config", type=Path, metavar="JSON", help="another one than the run file's")
    plan.add_argument("--json", action="store_true", help="print JSON instead of a table")
    plan.add_argument("--plot", type=Path, metavar="PNG", help="default: plan.png; an empty name writes none")
    plan.set_defaults(run=_run_plan)


def _run_plan(args: argparse.Namespace) -> tuple[str, int]:
    try:
        plans = importlib.import_module("ds_blockwise.runs.plan")
        importlib.import_module("yaml")
    except ModuleNotFoundError as error:
        raise ImportError(f"`ds-blockwise plan` needs {error.name}: {_EXTRA}") from error
    runs = _runs(args)
    chosen = _choose(runs, args.nodes)
    nodes = args.nodes or chosen.cluster.nodes
    gpus, gpu = args.gpus_per_node or chosen.cluster.gpus_per_node, args.gpu or chosen.cluster.gpu
    plan = plans.make_plan(chosen, nodes, gpus, gpu)
    series = _series(plans, runs, chosen, gpus, gpu)
    path = Path("plan.png") if args.plot is None else args.plot
    if str(path) not in ("", "."):
        _plot(series, chosen, path)
    if args.json:
        found = {"run": chosen.name, "plan": plan.to_dict(), "over_nodes": [p.to_dict() for p in series]}
        return json.dumps(found, indent=2), 0
    return "\n".join(_lines(plans, chosen, plan, series, path)), 0


def _runs(args: argparse.Namespace) -> list[Any]:
    run_check = importlib.import_module("ds_blockwise.runs.check")
    files = sorted(args.run_file.glob("*.yaml")) if args.run_file.is_dir() else [args.run_file]
    if not files:
        raise ValueError(f"{args.run_file} holds no run file (*.yaml)")
    runs = []
    for file in files:
        run, problems = run_check.check_run_file(file, args.set, args.deepspeed_config)
        problems.raise_if_any()
        runs.append(run)
    if len({run.name for run in runs}) > 1:  # variants lie in the same folder
        first = min(runs, key=lambda run: (run.cluster.nodes, len(run.name))).name
        runs = [run for run in runs if run.name == first]
    return sorted(runs, key=lambda run: run.cluster.nodes)


def _choose(runs: Sequence[Any], nodes: int | None) -> Any:
    if nodes is None:
        return runs[-1]
    fitting = [run for run in runs if run.cluster.nodes <= nodes]
    return fitting[-1] if fitting else runs[0]


def _series(plans: Any, runs: Sequence[Any], chosen: Any, gpus: int, gpu: str) -> list[Any]:
    """A plan for each file of a folder; of a single file for the powers of two that can share its batch."""
    if len(runs) > 1:
        return [plans.make_plan(run, run.cluster.nodes, gpus, gpu) for run in runs]
    found = []
    for nodes in (2**k for k in range(7)):
        ranks = nodes * gpus // chosen.parallel.tensor
        if ranks and chosen.training.global_batch_size % ranks == 0:
            found.append(plans.make_plan(chosen, nodes, gpus, gpu))
    return found or [plans.make_plan(chosen, chosen.cluster.nodes, gpus, gpu)]


def _plot(series: Sequence[Any], run: Any, path: Path) -> None:
    try:
        plan_plot = importlib.import_module("ds_blockwise.runs.plan_plot")
    except ModuleNotFoundError as error:
        raise ImportError(f"the figure needs {error.name}: {_EXTRA}; or pass --plot ''") from error
    size = f"{run.shape.count_parameters() / 1e9:.2f}B parameters"
    plan_plot.plot_plans(series, f"{run.name}, {size}, batch {run.training.global_batch_size}, {series[0].gpu}", path)


def _lines(plans: Any, run: Any, plan: Any, series: Sequence[Any], path: Path) -> list[str]:
    own = str(run.deepspeed["optimizer"]["type"])
    gpu = plans.GPUS[plan.gpu]
    lines = [
        f"{run.name}: {run.shape.count_parameters():,} parameters, {run.training.steps:,} steps of "
        f"{run.tokens_per_step:,} tokens ({run.file})",
        f"{plan.nodes} nodes x {plan.gpus_per_node} {plan.gpu} = tensor {plan.tp} x data {plan.dp}, micro batch "
        f"{plan.micro_batch} x {plan.accumulation} accumulated, activation checkpointing: "
        f"{run.training.activation_checkpointing}",
        "",
        *_memory_table(plan),
        "",
        f"fits in {gpu.memory / 1e9:.0f} GB with {own}: {'yes' if plan.fits else 'NO'}; largest micro batch that fits: "
        f"{plan.largest_micro_batch or 'none'}",
        f"a GPU sends in a step: {plan.dp_bytes / 1e9:.2f} GB over data-parallel ranks, {plan.tp_bytes / 1e9:.2f} GB "
        f"over tensor-parallel ranks",
        "optimizer's part of a step: " + ", ".join(f"{n} {s * 1e3:.2f} ms" for n, s in plan.optimizer_seconds.items()),
        "",
        "nodes   step, ms        MFU, %     days          GPU-hours",
    ]
    for p in series:
        lines.append(
            f"{p.nodes:>5}   {_range(p.step_seconds, 1e3, 0):<13}   {_range(p.mfu[::-1], 100, 0):<8}   "
            f"{_range(p.days, 1, 2):<11}   {_range(p.gpu_hours, 1, 0)}"
        )
    lines += [
        "",
        "published, % of the peak: " + "; ".join(f"{text} {share:.0%}" for text, _, share in plans.REFERENCES),
    ]
    if str(path) not in ("", "."):
        lines.append(f"figure: {path}")
    return lines


_ROWS = (
    ("weights", "weights"),
    ("gradients", "gradients"),
    ("masters", "fp32 master weights"),
    ("exp_avg", "first moments"),
    ("exp_avg_sq", "second moments"),
    ("step_gradients", "fp32 gradients, in the step"),
    ("buckets", "ZeRO's buckets"),
    ("activations", "activations"),
    ("workspace", "loss, recomputed layer"),
    ("offloaded", "of these in CPU memory"),
    ("on_gpu", "peak on the GPU"),
)


def _memory_table(plan: Any) -> list[str]:
    names = list(plan.memory)
    lines = [f"{'GB per GPU':<28}" + "".join(f"{name:>19}" for name in names)]
    for field, text in _ROWS:
        values = [getattr(plan.memory[name], field) / 1e9 for name in names]
        lines.append(f"{text:<28}" + "".join(f"{value:>19.3f}" for value in values))
    return lines


def _range(pair: tuple[float, float], factor: float, digits: int) -> str:
    low, high = (f"{value * factor:,.{digits}f}" for value in pair)
    return f"{low} to {high}"
