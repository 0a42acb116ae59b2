# SPDX-License-Identifier: Apache-2.0
"""Train the tiny model with four optimizers, one after the other; write a CSV, a figure and the README's table.

python benchmarks/compare_optimizers.py                # trains what runs/tiny lacks, then writes
python benchmarks/compare_optimizers.py --train-again  # trains everything

The uniform baseline AdamW is trained at three learning rates, ours at their shipped ones.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import platform
import re
import socket
import subprocess
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import torch
from matplotlib import pyplot

ROOT = Path(__file__).resolve().parent.parent
RUN_FILE = ROOT / "configs/run/tiny.yaml"
RUNS = ROOT / "runs/tiny"
RESULTS = ROOT / "docs/compare/tiny.csv"
FIGURE = ROOT / "docs/compare/tiny.png"
SWEPT = {"adamw_low": ("adamw", 2e-3), "adamw_high": ("adamw", 8e-3)}
ARMS = {
    "adamw_low": ("AdamW (torch)", "#bbbbbb"),
    "adamw": ("AdamW (torch)", "#444444"),
    "adamw_high": ("AdamW (torch)", "#888888"),
    "adam_mini": ("Adam-mini (ours, all multipliers 1)", "#b45f06"),
    "blockwise_adamw": ("Blockwise AdamW", "#0b5394"),
    "blockwise_adam_mini": ("Blockwise Adam-mini", "#38761d"),
}
COLUMNS = (
    "optimizer",
    "base_lr",
    "state_bytes_per_parameter",
    "final_validation_loss",
    "steps",
    "tokens",
    "parameters",
    "machine",
    "torch",
    "deepspeed",
    "date",
    "commit",
)
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def settings_file(arm: str) -> Path:
    """The arm's DeepSpeed JSON; of a swept arm, its base's with another learning rate and the same ratio to min_lr."""
    if arm not in SWEPT:
        return ROOT / f"configs/deepspeed/{arm}.json"
    base, lr = SWEPT[arm]
    settings = json.loads(settings_file(base).read_text(encoding="utf-8"))
    settings["scheduler"]["params"]["min_lr"] *= lr / settings["optimizer"]["params"]["lr"]
    settings["optimizer"]["params"]["lr"] = lr
    path = ROOT / f"runs/settings/{arm}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=2), encoding="utf-8")
    return path


def train(arm: str) -> None:
    """Run the main job with one DeepSpeed JSON, by the same command as a user's."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--master_port", str(port)]
    command += ["launch/pretrain_llama.py", "--run", str(RUN_FILE), "--overwrite"]
    command += ["--deepspeed-config", str(settings_file(arm))]
    subprocess.run(command, cwd=ROOT, check=True)


def row(arm: str) -> dict[str, str]:
    """One line of the CSV, from the run's own summary."""
    summary = json.loads((RUNS / arm / "summary.json").read_text(encoding="utf-8"))
    settings = json.loads(settings_file(arm).read_text(encoding="utf-8"))
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.strip()
    values = (
        ARMS[arm][0],
        f"{settings['optimizer']['params']['lr']:g}",
        f"{summary['optimizer_state_bytes_per_parameter']:.2f}",
        f"{summary['final_validation_loss']:.3f}",
        summary["steps"],
        summary["tokens"],
        summary["parameters"],
        f"{platform.machine()} CPU with {os.cpu_count()} cores and 2 processes",
        torch.__version__,
        summary["versions"]["deepspeed"],
        datetime.date.today().isoformat(),
        commit,
    )
    return {key: str(value) for key, value in zip(COLUMNS, values, strict=True)}


def markdown(rows: list[dict[str, str]]) -> str:
    """The README's table with its provenance; `tests/test_readme.py` compares it with the CSV."""
    first = rows[0]
    lines = [
        "| optimizer | base lr | optimizer state, bytes per parameter | validation loss |",
        "|---|---:|---:|---:|",
    ]
    lines += [
        f"| {r['optimizer']} | {r['base_lr']} | {r['state_bytes_per_parameter']} | {r['final_validation_loss']} |"
        for r in rows
    ]
    lines += [
        "",
        f"Measured by `benchmarks/compare_optimizers.py`: LLaMA of {int(first['parameters']):,} parameters, "
        f"{first['steps']} steps, {int(first['tokens']):,} tokens of Python source text, one seed, ZeRO-2 on "
        f"{first['machine']}, torch {first['torch']}, DeepSpeed {first['deepspeed']}, {first['date']}, commit "
        f"{first['commit']}. A sanity check on minutes of training, not evidence for the paper's claim: one seed, and "
        f"only AdamW's learning rate was swept.",
        "",
        "![validation loss against steps](docs/compare/tiny.png)",
    ]
    return "\n".join(lines)


def plot() -> None:
    """Validation loss against steps, the same colour per optimizer everywhere."""
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for arm, (label, colour) in ARMS.items():
        with open(RUNS / arm / "csv/loss_validation.csv", newline="", encoding="utf-8") as file:
            points = [(int(line[0]), float(line[1])) for line in list(csv.reader(file))[1:]]
        steps, losses = zip(*points, strict=True)
        label = f"{label}, base lr {row(arm)['base_lr']}"
        axes.plot(steps, losses, label=label, color=colour, marker="o", markersize=3)
    axes.set(xlabel="optimizer steps", ylabel="validation loss (nats per token)", ylim=(None, 4.6))
    axes.set_title("LLaMA of 1.3M parameters on Python source text, one seed")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(FIGURE, dpi=110)


def main() -> None:
    """Train (unless told not to) and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train-again", action="store_true", help="also arms whose run is complete in runs/tiny")
    options = parser.parse_args()
    for arm in ARMS:
        if options.train_again or not (RUNS / arm / "summary.json").is_file():
            train(arm)
    rows = [row(arm) for arm in ARMS]
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with open(RESULTS, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    plot()
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    table = f"{BEGIN}\n{markdown(rows)}\n{END}"
    text = re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: table, text, flags=re.DOTALL)
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
