# SPDX-License-Identifier: Apache-2.0
"""The report of a run: `loss.png`, `telemetry.png`, `summary.json` and a table in the terminal."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypedDict

import torch
from matplotlib.axes import Axes
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ds_blockwise.atomic_files import replace_text
from ds_blockwise.figure_style import (
    BLOCK_TYPE_COLOURS,
    INK,
    TRAINING_COLOUR,
    VALIDATION_COLOUR,
    finish_lines,
    label_lines,
    new_figure,
    save,
    scale_y,
    step_axis,
)
from ds_blockwise.runs.run_file import RunConfig
from job.process_groups import Processes
from job.trainer import TrainerState

ADAMW_STATE_BYTES = 8.0  # two fp32 moments for each parameter
_TELEMETRY_TITLES = {
    "lr": "effective learning rate",
    "lr_multiplier": "multiplier",
    "update_ratio": "RMS of update / RMS of parameters",
    "grad_rms": "RMS of gradient (after clipping)",
    "second_moment": "mean second moment",
    "momentum_rms": "RMS of momentum",
    "grad_norm": "gradient norm before clipping, whole model",
    "clip_factor": "clipping factor, whole model",
}
_LINEAR = ("lr_multiplier", "clip_factor")
_OF_THE_WHOLE_MODEL = ("grad_norm", "clip_factor")
_PACKAGES = ("torch", "deepspeed", "megatron-core", "ds_blockwise", "tokenizers")


class Summary(TypedDict):
    """The content of `summary.json`; losses in nats per token."""

    run: str
    completed: bool
    optimizer: str
    zero_stage: int
    processes: int
    data_parallel: int
    tensor_parallel: int
    parameters: int
    steps: int
    tokens: int
    initial_validation_loss: float
    final_validation_loss: float
    validation_loss_fell_by: float
    final_train_loss: float | None
    tokens_per_second: float | None
    train_seconds: float
    wall_seconds: float
    optimizer_state_bytes_per_parameter: float
    adamw_state_bytes_per_parameter: float
    versions: dict[str, str]
    config_sha256: str


def state_bytes_per_parameter(
    optimizer: torch.optim.Optimizer,
    model: torch.nn.Module,
    processes: Processes,
    *,
    zero_stage: int,
) -> float:
    """Bytes of optimizer state for each parameter of one copy of the model, measured.

    Args:
        optimizer: The optimizer that holds the state (`engine.basic_optimizer`).
        model: This rank's part of the model.
        processes: All must call.
        zero_stage: At 0 every data-parallel rank holds a whole copy of the state.
    """
    held = sum(_stored_bytes(value) for state in optimizer.state.values() for value in state.values())
    copies = processes.dp_size if zero_stage == 0 else 1
    # Under ZeRO-3 a parameter's own storage is empty; its true size is `ds_numel`.
    local = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    parameters = processes.sum_over_world(local) / processes.dp_size
    return processes.sum_over_world(held) / copies / parameters


def _stored_bytes(value: object) -> int:
    """Bytes of a tensor's storage, or of a list of tensors; of a quantized one those of its parts."""
    if isinstance(value, list | tuple):
        return sum(map(_stored_bytes, value))
    if not isinstance(value, torch.Tensor):
        return 0
    if is_traceable_wrapper_subclass(value):
        return sum(_stored_bytes(getattr(value, name)) for name in value.__tensor_flatten__()[0])
    return value.numel() * value.element_size()


def summarize(
    run: RunConfig,
    state: TrainerState,
    processes: Processes,
    *,
    optimizer: str,
    zero_stage: int,
    state_bytes: float,
    config_sha256: str,
) -> Summary:
    """The results of a run."""
    tokens = state.step * run.tokens_per_step
    initial, final = state.validation_curve[0][1], state.validation_curve[-1][1]
    return {
        "run": run.name,
        "completed": state.step == run.training.steps,
        "optimizer": optimizer,
        "zero_stage": zero_stage,
        "processes": processes.world_size,
        "data_parallel": processes.dp_size,
        "tensor_parallel": run.parallel.tensor,
        "parameters": run.shape.count_parameters(),
        "steps": state.step,
        "tokens": tokens,
        "initial_validation_loss": initial,
        "final_validation_loss": final,
        "validation_loss_fell_by": initial - final,
        "final_train_loss": state.train_curve[-1][1] if state.train_curve else None,
        "tokens_per_second": tokens / state.train_seconds if state.train_seconds else None,
        "train_seconds": state.train_seconds,
        "wall_seconds": state.wall_seconds,
        "optimizer_state_bytes_per_parameter": state_bytes,
        "adamw_state_bytes_per_parameter": ADAMW_STATE_BYTES,
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in _PACKAGES},
        },
        "config_sha256": config_sha256,
    }


def write_summary(summary: Mapping[str, object], path: Path) -> None:
    """Write the results as JSON."""
    replace_text(path, json.dumps(summary, indent=2) + "\n")


def table(summary: Summary, output: Path) -> str:
    """The short table that ends a run."""
    rate = summary["tokens_per_second"]
    rows = [
        ("optimizer", f"{summary['optimizer']}, ZeRO-{summary['zero_stage']}"),
        (
            "processes",
            f"{summary['processes']} ({summary['data_parallel']} data-parallel x "
            f"{summary['tensor_parallel']} tensor-parallel)",
        ),
        ("parameters", f"{summary['parameters']:,}"),
        ("steps", f"{summary['steps']:,} ({summary['tokens']:,} tokens)"),
        (
            "validation loss",
            f"{summary['initial_validation_loss']:.4f} -> {summary['final_validation_loss']:.4f} "
            f"(fell by {summary['validation_loss_fell_by']:.4f} nats)",
        ),
        ("speed", f"{rate:,.0f} tokens/s" if rate else "no step in this run"),
        ("wall time", f"{summary['wall_seconds']:.0f} s"),
        (
            "optimizer state",
            f"{summary['optimizer_state_bytes_per_parameter']:.3f} bytes per parameter "
            f"(AdamW: {ADAMW_STATE_BYTES:.1f})",
        ),
        ("written to", str(output)),
    ]
    return boxed(rows)


def boxed(rows: list[tuple[str, str]]) -> str:
    """Names and values in two columns between two rules."""
    width = max(len(name) for name, _ in rows)
    rule = "-" * (width + 2 + max(len(value) for _, value in rows))
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    return "\n".join([rule, *lines, rule])


def plot_loss(run: RunConfig, state: TrainerState, optimizer: str, path: Path) -> None:
    """Draw both curves over optimizer steps, with tokens on a second axis.

    Args:
        run: For the title and the number of tokens in a step.
        state: The curves.
        optimizer: Name for the title.
        path: PNG file to write.
    """
    with loss_axes(path, state.train_curve, state.validation_curve) as axes:
        _token_axis(axes, run.tokens_per_step)
        millions = run.shape.count_parameters() / 1e6
        axes.set_title(f"LLaMA {run.name}, {millions:,.2f}M parameters, {optimizer}")


@contextmanager
def loss_axes(
    path: Path, train: Sequence[tuple[float, float]], validation: Sequence[tuple[float, float]]
) -> Iterator[Axes]:
    """Axes with both curves over optimizer steps; the figure is written when the block ends.

    Args:
        path: PNG file to write.
        train: (step, loss in nats per token); may be empty.
        validation: Likewise, at least one point; the last is written beside it.
    """
    figure, (axes,) = new_figure(8.0, 5.0)
    lines = {}
    if train:
        (lines["training"],) = axes.plot(*zip(*train, strict=True), color=TRAINING_COLOUR, linewidth=1.0)
    final = f"validation\n{validation[-1][1]:.3f}"
    (lines[final],) = axes.plot(*zip(*validation, strict=True), color=VALIDATION_COLOUR, marker="o", markersize=4)
    step_axis(axes)
    axes.set_ylabel("loss (nats per token)")
    scale_y(axes, [loss for _, loss in (*train, *validation) if math.isfinite(loss)], log=False)
    label_lines(axes, lines)
    yield axes
    save(figure, path)


def plot_telemetry(run: RunConfig, state: TrainerState, path: Path) -> None:
    """Draw every quantity that telemetry read over optimizer steps, a line per block type.

    Args:
        run: For the title.
        state: With at least one reading of telemetry.
        path: PNG file to write.
    """
    kinds = [kind for kind in BLOCK_TYPE_COLOURS if kind in state.telemetry[0][1]]
    names = [name for name in _TELEMETRY_TITLES if any(name in values[kinds[0]] for _, values in state.telemetry)]
    rows = -(-len(names) // 2)
    figure, panels = new_figure(11.0, 2.7 * rows, rows, 2, sharex=True)
    for axes, name in zip(panels, names, strict=False):
        lines, drawn = {}, list[float]()
        of_the_model = name in _OF_THE_WHOLE_MODEL
        for kind in kinds[:1] if of_the_model else kinds:
            points = [(step, values[kind][name]) for step, values in state.telemetry if name in values[kind]]
            colour = INK if of_the_model else BLOCK_TYPE_COLOURS[kind]
            (line,) = axes.plot(*zip(*points, strict=True), color=colour, label=kind)
            lines["model" if of_the_model else kind] = line
            drawn += [value for _, value in points if math.isfinite(value)]
        scale_y(axes, drawn, log=name not in _LINEAR)
        finish_lines(axes, lines, size=7.5)
        axes.set_title(_TELEMETRY_TITLES[name])
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    for axes in panels[-2:]:
        step_axis(axes)
    figure.suptitle(f"LLaMA {run.name}, per block type")
    save(figure, path)


def _token_axis(axes: Axes, tokens_per_step: int) -> None:
    scale = tokens_per_step / 1e6
    second = axes.secondary_xaxis("top", functions=(lambda steps: steps * scale, lambda millions: millions / scale))
    second.set_xlabel("tokens (millions)")
