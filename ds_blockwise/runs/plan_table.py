# SPDX-License-Identifier: Apache-2.0
"""The table of ``ds-blockwise plan``: memory by optimizer, traffic, and time over the number of nodes."""

from __future__ import annotations

from collections.abc import Sequence

from ds_blockwise.runs.plan import GPUS, REFERENCES, Plan
from ds_blockwise.runs.run_file import RunConfig

_ROWS = (
    ("weights", "weights"),
    ("gradients", "gradients"),
    ("masters", "fp32 master weights"),
    ("exp_avg", "first moments"),
    ("exp_avg_sq", "second moments"),
    ("step_gradients", "fp32 gradients, in the step"),
    ("matrices", "Muon's matrices, in the step"),
    ("buckets", "ZeRO's buckets"),
    ("activations", "activations"),
    ("workspace", "loss, recomputed layer"),
    ("offloaded", "of these in CPU memory"),
    ("on_gpu", "peak on the GPU"),
)


def plan_table(run: RunConfig, plan: Plan, over_nodes: Sequence[Plan]) -> list[str]:
    """A plan as lines of text.

    Args:
        run: what is planned.
        plan: for the cluster that was asked for.
        over_nodes: for other numbers of nodes, one row each.
    """
    optimizer = str(run.deepspeed["optimizer"]["type"])
    nodes = f"{plan.nodes} node{'s' * (plan.nodes > 1)}"
    lines = [
        f"{run.name}: {run.shape.count_parameters():,} parameters, {run.training.steps:,} steps of "
        f"{run.tokens_per_step:,} tokens ({run.file})",
        f"{nodes} x {plan.gpus_per_node} {plan.gpu} = tensor {plan.tp} x data {plan.dp}, "
        f"micro batch {plan.micro_batch} x {plan.accumulation} accumulated, activation checkpointing: "
        f"{run.training.activation_checkpointing}",
        "",
        *_memory_rows(plan),
        "",
        f"fits in {GPUS[plan.gpu].memory / 1e9:.0f} GB with {optimizer}: {'yes' if plan.fits else 'NO'}; largest micro "
        f"batch that fits: {plan.largest_micro_batch or 'none'}",
        f"a GPU sends in a step: {plan.dp_bytes / 1e9:.2f} GB over data-parallel ranks, {plan.tp_bytes / 1e9:.2f} GB "
        f"over tensor-parallel ranks",
        "optimizer's part of a step: " + ", ".join(f"{n} {s * 1e3:.2f} ms" for n, s in plan.optimizer_seconds.items()),
        *_muon_rows(plan),
        "",
        "nodes   step, ms          MFU, %     days          GPU-hours",
    ]
    lines += [
        f"{p.nodes:>5}   {_range(p.step_seconds, 1e3, 0):<15}   {_range(p.mfu[::-1], 100, 0):<8}   "
        f"{_range(p.days, 1, 2):<11}   {_range(p.gpu_hours, 1, 0)}"
        for p in over_nodes
    ]
    return [*lines, "", "published MFU:", *(f"{share:>6.0%}  {text}" for text, _, share in REFERENCES)]


def _muon_rows(plan: Plan) -> list[str]:
    muon = plan.muon
    if muon is None:
        return []
    ranks = plan.tp * plan.dp
    return [
        f"of this Muon's matrices: {muon.dp_bytes / 1e9:.3f} GB over data-parallel ranks, {muon.tp_bytes / 1e9:.3f} GB "
        f"over tensor-parallel ranks; {muon.flops:.3g} FLOPs of Newton-Schulz on the GPU that has most, "
        f"{muon.share_of_step:.2%} of its step's; {muon.owners} of {ranks} GPUs have some"
    ]


def _memory_rows(plan: Plan) -> list[str]:
    lines = [f"{'GB per GPU':<28}" + "".join(f"{name:>19}" for name in plan.memory)]
    for field, text in _ROWS:
        values = [getattr(memory, field) / 1e9 for memory in plan.memory.values()]
        if field == "matrices" and plan.muon is None:
            continue
        lines.append(f"{text:<28}" + "".join(f"{value:>19.3f}" for value in values))
    return lines


def _range(pair: tuple[float, float], factor: float, digits: int) -> str:
    low, high = (f"{value * factor:,.{digits}f}" for value in pair)
    return f"{low} to {high}"
