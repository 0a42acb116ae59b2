# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's step around the optimizer with ``fused_step`` and without it, measured on this machine, in turn.

python -m benchmarks.costs.fused_step               # 16.9M parameters, one process, ZeRO-2, bf16, clipping
python -m benchmarks.costs.fused_step --docs        # also writes the table into docs/benchmarks.md

Two engines with the same weights get the same gradients from one backward pass each; ``engine.step()`` is
timed, which is norm, clipping, update and copy. The first of the two to step changes from round to round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.costs.one_process import RULES, matrices, process_group
from benchmarks.provenance import BENCHMARKS_PAGE, PROVENANCE, ROOT, provenance, write_between, write_csv
from ds_blockwise.optimizers.registry import OPTIMIZERS

WARM_UP = 2
CLIP = 1e-3  # below the norm, so that every step is clipped
COLUMNS = (
    "optimizer",
    "zero_stage",
    "parameters",
    "gradients",
    "threads",
    "rounds",
    "unfused_ms",
    "fused_ms",
    "fused_over_unfused",
    *PROVENANCE,
)
GRADIENTS: dict[str, dict[str, Any]] = {"bf16": {}, "fp32": {"data_types": {"grad_accum_dtype": "fp32"}}}


def main(arguments: list[str] | None = None) -> None:
    """Measure every optimizer that supports it, with gradients in bf16 and in fp32; print, write."""
    options = _options(arguments)
    common, rows = provenance(), []
    with process_group():
        for name in (name for name, cls in OPTIMIZERS.items() if cls.supports_fused_step):
            for gradients in GRADIENTS:
                rows.append({**measure(name, gradients, options), **common})
                row = rows[-1]
                print(
                    f"{name}, gradients in {gradients}: {row['unfused_ms']} ms, fused {row['fused_ms']} ms "
                    f"({row['fused_over_unfused']})",
                    flush=True,
                )
    write_csv(options.out / "fused_step.csv", COLUMNS, rows)
    if options.docs:
        write_between(BENCHMARKS_PAGE, "fused-step", markdown(rows))


def measure(name: str, gradients: str, options: argparse.Namespace) -> dict[str, str]:
    """Time the steps of both engines in turn.

    Raises:
        ValueError: they end with other weights, or some step was not clipped: not what the figures are said to be of.
    """
    torch.set_num_threads(options.threads)
    engines = {fused: _engine(name, fused, gradients, options) for fused in (False, True)}
    times: dict[bool, list[float]] = {False: [], True: []}
    inputs = torch.ones(1, options.hidden, dtype=torch.bfloat16)
    for number in range(options.rounds + WARM_UP):
        for fused in (False, True) if number % 2 else (True, False):
            engine = engines[fused]
            engine.backward(engine(inputs).square().sum())
            begin = time.perf_counter()
            engine.step()
            if number >= WARM_UP:
                times[fused].append(time.perf_counter() - begin)
            norm = float(engine.get_global_grad_norm())
            if not CLIP < norm < float("inf"):
                raise ValueError(f"{name}, gradients in {gradients}: a norm of {norm} is not clipped to {CLIP}")
    weights = ([p.detach() for p in engines[fused].module.parameters()] for fused in (False, True))
    if not all(map(torch.equal, *weights)):
        raise ValueError(f"{name}, gradients in {gradients}: the two ways of stepping end with other weights")
    unfused, fused_ = (statistics.median(times[fused]) * 1e3 for fused in (False, True))
    found = {
        "optimizer": name,
        "zero_stage": "2",
        "parameters": str(sum(p.numel() for p in engines[True].module.parameters())),
        "gradients": gradients,
        "threads": str(options.threads),
        "rounds": str(options.rounds),
        "unfused_ms": f"{unfused:.4g}",
        "fused_ms": f"{fused_:.4g}",
        "fused_over_unfused": f"{fused_ / unfused:.3f}",
    }
    for engine in engines.values():
        engine.destroy()
    return found


def _engine(name: str, fused: bool, gradients: str, options: argparse.Namespace) -> Any:
    import deepspeed

    import ds_blockwise  # noqa: F401 - registers the optimizers

    torch.manual_seed(0)
    model = matrices(options.hidden, options.layers)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": CLIP,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": name, "params": {"lr": 1e-6, "rules": RULES, "fused_step": fused}},
        **GRADIENTS[gradients],
    }
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def markdown(rows: list[dict[str, str]]) -> str:
    """The table of the page, a line per optimizer and dtype of gradients."""
    lines = [
        "| optimizer | gradients in | DeepSpeed's step, ms | fused, ms | fused / DeepSpeed's |",
        "|---|---|---:|---:|---:|",
    ]
    for row in rows:
        cells = [row[key] for key in ("optimizer", "gradients", "unfused_ms", "fused_ms", "fused_over_unfused")]
        lines.append(f"| {' | '.join(cells)} |")
    first = rows[0]
    lines += [
        "",
        f"Medians of {first['rounds']} steps of each kind in turn by `benchmarks/costs/fused_step.py`: "
        f"{int(first['parameters']) / 1e6:.1f}M weights in bf16, ZeRO-{first['zero_stage']} with clipping, one "
        f"process, threads: {first['threads']}, on {first['cores']} cores ({first['cpu']}), torch {first['torch']}, "
        f"DeepSpeed {first['deepspeed']}, {first['date']}, commit {first['commit']}.",
    ]
    return "\n".join(lines)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="more of them wait for each other on a busy machine")
    parser.add_argument("--rounds", type=int, default=15, help="samples of each kind")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/bench", help="folder of the CSV")
    parser.add_argument("--docs", action="store_true", help="also write the table into docs/benchmarks.md")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
