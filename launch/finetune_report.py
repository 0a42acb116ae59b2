# SPDX-License-Identifier: Apache-2.0
"""What a fine-tuning leaves behind for people: `loss.png` and a table in the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from job.report import boxed, loss_axes


def table(summary: dict[str, Any]) -> str:
    """The short table that ends a fine-tuning."""
    fell = summary["loss_before"] - summary["loss_after"]
    return boxed(
        [
            ("model", summary["model"]),
            ("optimizer", f"{summary['optimizer']}, base lr {summary['base_lr']:g}"),
            ("parameters", f"{summary['parameters']:,}, of which {summary['trained_parameters']:,} are trained"),
            ("text", f"{' '.join(summary['source'])}, {summary['steps']:,} steps"),
            (
                "validation loss",
                f"{summary['loss_before']:.4f} -> {summary['loss_after']:.4f} (fell by {fell:.4f} nats)",
            ),
            ("training time", f"{summary['seconds']:.0f} s"),
            ("written to", summary["output"]),
        ]
    )


def plot_losses(history: list[dict[str, Any]], summary: dict[str, Any], path: Path) -> None:
    """Draw training and validation loss over optimizer steps.

    Args:
        history: Trainer's log, entries with ``step`` and ``loss`` or ``eval_loss``.
        summary: For the title.
        path: PNG file to write.
    """
    curves = (
        [(entry["step"], float(entry[key])) for entry in history if key in entry] for key in ("loss", "eval_loss")
    )
    with loss_axes(path, *curves) as axes:
        axes.set_title(f"{summary['model']} on {' '.join(summary['source'])}, {summary['optimizer']}")
