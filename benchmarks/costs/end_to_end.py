# SPDX-License-Identifier: Apache-2.0
"""The main job's step with our optimizers and with DeepSpeed's AdamW: time, the optimizer's part, peak memory.

python -m benchmarks.costs.end_to_end      # ZeRO-2 and ZeRO-Offload, two rounds in rotated order

Every arm is the real job, started by the DeepSpeed launcher on two processes. The model has 41M parameters and few
tokens in a batch, so that the optimizer is a visible part of a step; real runs have more tokens for each parameter.
"""

from __future__ import annotations

import argparse
import json
import shutil
import socket
import statistics
import subprocess
import sys
from pathlib import Path

import torch
import yaml

from benchmarks.provenance import BENCHMARKS_PAGE, PROVENANCE, ROOT, provenance, write_between, write_csv
from ds_blockwise.kernels.select import kernels_for

PROCESSES = 2
MODEL = {
    "num_layers": 6,
    "hidden_size": 768,
    "ffn_hidden_size": 2048,
    "num_heads": 12,
    "num_kv_heads": 4,
    "head_dim": 64,
    "vocab_size": 2048,
    "sequence_length": 64,
}
# JSON in configs/deepspeed, what it is called, and what of DeepSpeed it is compared under
ARMS = {
    "adamw": ("AdamW (torch)", "ZeRO-2"),
    "adamw_fused": ("AdamW (DeepSpeed FusedAdam)", "ZeRO-2"),
    "blockwise_adamw": ("BlockwiseAdamW", "ZeRO-2"),
    "blockwise_adam_mini": ("BlockwiseAdamMini", "ZeRO-2"),
    "adamw_offload": ("AdamW (DeepSpeedCPUAdam)", "ZeRO-Offload"),
    "blockwise_adamw_offload": ("BlockwiseAdamW", "ZeRO-Offload"),
    "blockwise_adam_mini_offload": ("BlockwiseAdamMini", "ZeRO-Offload"),
}
BASELINES = {"ZeRO-2": "adamw_fused", "ZeRO-Offload": "adamw_offload"}
COMPILED = {"adamw_fused": "FusedAdam", "adamw_offload": "DeepSpeedCPUAdam"}
COLUMNS = (
    "arm",
    "optimizer",
    "zero",
    "backend",
    "model_parameters",
    "tokens_per_step",
    "processes",
    "rounds",
    "timed_steps",
    "step_ms",
    "step_p20_ms",
    "step_p80_ms",
    "optimizer_ms",
    "optimizer_share",
    "step_over_adamw",
    "optimizer_over_adamw",
    "peak_in_steps_mib_rank0",
    "peak_in_steps_mib_rank1",
    "peak_mib_rank0",
    "peak_mib_rank1",
    "state_bytes_per_parameter",
    *PROVENANCE,
)
MIB = 1 << 20


def main(arguments: list[str] | None = None) -> None:
    """Run every arm in every round, write."""
    options = _options(arguments)
    run_file = _prepare(options.work, options.steps)
    backend = kernels_for("auto", torch.device("cpu")).name  # compiled here, not by two ranks at once
    for arm, name in COMPILED.items():
        if arm in options.arms:
            _compile(name)
    notes: dict[str, list[list[dict]]] = {arm: [] for arm in options.arms}
    summaries: dict[str, dict] = {}
    for index in range(options.rounds):
        at = index % len(options.arms)
        for arm in options.arms[at:] + options.arms[:at]:
            print(f"round {index + 1} of {options.rounds}: {arm}", flush=True)
            ranks, summaries[arm] = _run(arm, run_file, options.drop)
            notes[arm].append(ranks)
    facts = provenance()
    rows = [{**_row(arm, notes[arm], summaries[arm], backend), **facts} for arm in options.arms]
    compare(rows)
    write_csv(options.out / "end_to_end.csv", COLUMNS, rows)
    print(markdown(rows))
    if options.docs:
        write_between(BENCHMARKS_PAGE, "end-to-end", markdown(rows))


def _prepare(work: Path, steps: int) -> Path:
    """Write the model and the run file, prepare the data if they are not there; returns the run file."""
    work.mkdir(parents=True, exist_ok=True)
    tiny = yaml.safe_load((ROOT / "configs/run/tiny.yaml").read_text(encoding="utf-8"))
    (work / "model.yaml").write_text(yaml.safe_dump(MODEL), encoding="utf-8")
    run = {
        "name": "end_to_end",
        "model": "model.yaml",
        "deepspeed": str(ROOT / "configs/deepspeed/blockwise_adam_mini.json"),
        "output": str(work),
        "data": tiny["data"],
        "parallel": {"tensor": 1, "pipeline": 1},
        "training": {
            "steps": steps,
            "warmup_steps": 2,
            "global_batch_size": PROCESSES,
            "micro_batch_size": 1,
            "validation_sequences": 2 * PROCESSES,
            "validation_interval": steps,
            "log_interval": steps,
            "checkpoint_interval": 0,
            "seed": 1234,
        },
    }
    path = work / "run.yaml"
    path.write_text(yaml.safe_dump(run), encoding="utf-8")
    command = [sys.executable, "launch/prepare_data.py", "--run", "configs/run/tiny.yaml"]
    subprocess.run(command, cwd=ROOT, check=True)
    return path


def _compile(name: str) -> None:
    """DeepSpeed compiles it at first use; not to be interrupted, it would leave a lock that later starts wait for."""
    code = f"import torch; from deepspeed.ops.adam import {name}; {name}([torch.nn.Parameter(torch.ones(1))])"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def _run(arm: str, run_file: Path, drop: int) -> tuple[list[dict], dict]:
    """One run of the main job; returns the notes of its ranks and its summary."""
    folder = run_file.parent / "notes" / arm
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(PROCESSES)]
    command += [
        "--master_port",
        str(port),
        "--module",
        "benchmarks.costs.timed_main_job",
        "--notes",
        str(folder),
        "--drop",
        str(drop),
    ]
    command += ["--run", str(run_file), "--overwrite", "--deepspeed-config", f"configs/deepspeed/{arm}.json"]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{arm} failed:\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}")
    ranks = [json.loads((folder / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in range(PROCESSES)]
    return ranks, json.loads((run_file.parent / arm / "summary.json").read_text(encoding="utf-8"))


def _row(arm: str, rounds: list[list[dict]], summary: dict, backend: str) -> dict[str, str]:
    """One line of the CSV; a step lasts as long as on its slowest rank."""
    steps, optimizer = (
        sorted(max(times) for ranks in rounds for times in zip(*(rank[key] for rank in ranks), strict=True))
        for key in ("step_seconds", "optimizer_seconds")
    )
    step = statistics.median(steps)
    name, zero = ARMS[arm]
    values: dict[str, object] = {
        "arm": arm,
        "optimizer": name,
        "zero": zero,
        "backend": backend if name.startswith("Blockwise") else "",
        "model_parameters": summary["parameters"],
        "tokens_per_step": summary["tokens"] // summary["steps"],
        "processes": PROCESSES,
        "rounds": len(rounds),
        "timed_steps": len(steps),
        "step_ms": f"{step * 1e3:.1f}",
        "step_p20_ms": f"{steps[int(0.2 * len(steps))] * 1e3:.1f}",
        "step_p80_ms": f"{steps[min(len(steps) - 1, int(0.8 * len(steps)))] * 1e3:.1f}",
        "optimizer_ms": f"{statistics.median(optimizer) * 1e3:.2f}",
        "optimizer_share": f"{statistics.median(optimizer) / step:.3f}",
        "state_bytes_per_parameter": f"{summary['optimizer_state_bytes_per_parameter']:.2f}",
    }
    for rank in range(PROCESSES):
        for key in ("peak_in_steps", "peak"):
            peak = max(ranks[rank][f"{key}_bytes"] for ranks in rounds)
            values[f"{key}_mib_rank{rank}"] = f"{peak / MIB:.0f}"
    return {key: str(value) for key, value in values.items()}


def compare(rows: list[dict[str, str]]) -> None:
    """Fill the two columns that compare with DeepSpeed's AdamW under the same ZeRO; empty if it was not run."""
    by_arm = {row["arm"]: row for row in rows}
    for row in rows:
        baseline = by_arm.get(BASELINES[row["zero"]])
        for column, time in (("step_over_adamw", "step_ms"), ("optimizer_over_adamw", "optimizer_ms")):
            row[column] = f"{float(row[time]) / float(baseline[time]):.3f}" if baseline else ""


def markdown(rows: list[dict[str, str]]) -> str:
    """The table of docs/benchmarks.md."""
    lines = [
        "| ZeRO | optimizer | step, ms | optimizer's part, ms | step / AdamW's | optimizer's part / AdamW's | "
        "peak memory of rank 0 + rank 1, MiB | state, bytes per parameter |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        cells = (row["zero"], row["optimizer"], row["step_ms"], row["optimizer_ms"])
        cells += (row["step_over_adamw"] or "-", row["optimizer_over_adamw"] or "-")
        cells += (f"{row['peak_in_steps_mib_rank0']} + {row['peak_in_steps_mib_rank1']}",)
        lines.append(f"| {' | '.join((*cells, row['state_bytes_per_parameter']))} |")
    first = rows[0]
    backend = next((row["backend"] for row in rows if row["backend"]), "none")
    lines += [
        "",
        f"The main job with a LLaMA of {int(first['model_parameters']):,} parameters, {first['tokens_per_step']} "
        f"tokens per step. {first['processes']} processes share {first['cores']} cores ({first['cpu']}). Times are "
        f"medians of {first['timed_steps']} steps in {first['rounds']} rounds, on the slowest rank, {backend} backend. "
        f"AdamW's: DeepSpeed's own kernel under the same ZeRO. The batch is small so that the optimizer shows; "
        f"with more tokens its part of a step is smaller. ZeRO-2 and ZeRO-Offload both compute on the CPU here: "
        f"nothing moves between devices, only DeepSpeed's buffers differ. Peak memory is that of the timed steps, "
        f"with Python and its libraries. Measured by `benchmarks/costs/end_to_end.py`, "
        f"torch {first['torch']}, DeepSpeed {first['deepspeed']}, {first['date']}, commit {first['commit']}.",
    ]
    return "\n".join(lines)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--rounds", type=int, default=2, help="runs of each arm")
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps of a run")
    parser.add_argument("--drop", type=int, default=4, help="first steps that do not count")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/end_to_end", help="folder of the runs themselves")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/bench", help="folder of the CSV")
    parser.add_argument("--docs", action="store_true", help="also write the table into docs/benchmarks.md")
    options = parser.parse_args(arguments)
    if not 0 < options.drop < options.steps - 2:
        parser.error(f"--drop must be from 1 to {options.steps - 3} with {options.steps} steps, got {options.drop}")
    options.work = options.work.resolve()
    return options


if __name__ == "__main__":
    main()
