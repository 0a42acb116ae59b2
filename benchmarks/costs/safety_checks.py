# SPDX-License-Identifier: Apache-2.0
"""What share of an optimizer's step the checks take that every tensor is still what kernels may read and write.

python -m benchmarks.costs.safety_checks          # a million elements in one tensor, and in 21 as a LLaMA has them
python -m benchmarks.costs.safety_checks --docs   # also writes the table into docs/benchmarks.md

Steps with the checks and steps without them alternate in one process. The checks are behind a switch: if a method were
replaced, Python would forget what it knows of the class, and the next steps would be slower. What is measured is the
processor time of the process with one thread, so that other processes matter little.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: every OpenMP library reads it when it is loaded

import torch
from torch import nn

from benchmarks.provenance import BENCHMARKS_PAGE, PROVENANCE, ROOT, provenance, write_between, write_csv
from benchmarks.step.shapes import Shape, tag
from ds_blockwise import tag_parameters
from ds_blockwise.kernels.step_sets import StepSet
from ds_blockwise.optimizers.registry import OPTIMIZERS

MEASURED = tuple(name for name in OPTIMIZERS if name != "BlockwiseMuon")  # beside whose products they are nothing
CHECKS = ("look_at_stepped", "look_at_states")
COLUMNS = ("optimizer", "tensors", "parameters", "threads", "rounds", "step_us", "checks_us", "share", *PROVENANCE)
WARM_UP = 5


def main(arguments: list[str] | None = None) -> None:
    """Measure each optimizer on each case, print, write."""
    options = _options(arguments)
    torch.set_num_threads(1)
    common = {"threads": "1", "rounds": str(options.rounds), **provenance()}
    cases = (lambda: [one_tensor(options.numel)], llama)
    rows = [{**measure(name, make(), options), **common} for make in cases for name in MEASURED]
    write_csv(options.out / "safety_checks.csv", COLUMNS, rows)
    print(markdown(rows))
    if options.docs:
        write_between(BENCHMARKS_PAGE, "safety-checks", markdown(rows))


def one_tensor(numel: int) -> nn.Parameter:
    """A weight of rows of 1024."""
    model = nn.Module()
    model.weight = nn.Parameter(torch.empty(max(1, numel // 1024), 1024))
    tag_parameters(model, rules=[{"match": ".", "role": "ffn"}])
    return model.weight


def llama() -> list[nn.Parameter]:
    """Two layers, embedding, output layer: 21 tensors of 128 to 300,000 elements, a million in all."""
    shape = Shape(2, 128, 344, 4, 4, 32, 2360)
    params = []
    for tagged in tag(shape, fused=False):
        params.append(nn.Parameter(torch.empty(tagged.shape)))
        params[-1].block_spec, params[-1].block_shard = tagged.block_spec, None
    return params


def measure(name: str, params: list[nn.Parameter], options: argparse.Namespace) -> dict[str, str]:
    """Steps with and without checks, in turn."""
    generator = torch.Generator().manual_seed(1)
    for param in params:
        param.data.normal_(generator=generator).mul_(0.02)
        param.grad = torch.randn(param.shape, generator=generator).mul_(1e-2)
    optimizer = OPTIMIZERS[name](params, lr=1e-5)
    checked, unchecked = [], []
    with switched_checks() as switch:
        for _ in range(WARM_UP):  # the first steps look closely
            optimizer.step()
        for _ in range(options.rounds):
            checked.append(_processor_time(optimizer.step, options.steps))
            switch.on = False
            unchecked.append(_processor_time(optimizer.step, options.steps))
            switch.on = True
    step = statistics.median(checked)
    checks = statistics.median(a - b for a, b in zip(checked, unchecked, strict=True))
    return {
        "optimizer": name,
        "tensors": str(len(params)),
        "parameters": str(sum(param.numel() for param in params)),
        "step_us": f"{step * 1e6:.1f}",
        "checks_us": f"{checks * 1e6:.2f}",
        "share": f"{checks / step:.4f}",
    }


@dataclass
class Switch:
    """Whether steps look at their tensors; what earlier steps found out stays."""

    on: bool = True


@contextmanager
def switched_checks() -> Iterator[Switch]:
    """Inside, the checks of every step are behind a switch."""
    switch = Switch()

    def behind(check: Callable[[StepSet], None]) -> Callable[[StepSet], None]:
        def switched(now: StepSet) -> None:
            if switch.on:
                check(now)

        return switched

    with patch.multiple(StepSet, **{name: behind(getattr(StepSet, name)) for name in CHECKS}):
        yield switch


def _processor_time(step: Callable[[], object], steps: int) -> float:
    begin = time.process_time()
    for _ in range(steps):
        step()
    return (time.process_time() - begin) / steps


def markdown(rows: list[dict[str, str]]) -> str:
    """The table of the page."""
    lines = ["| optimizer | tensors | a step, us | of which checks, us | share |", "|---|---:|---:|---:|---:|"]
    for row in rows:
        cells = [*(row[key] for key in ("optimizer", "tensors", "step_us", "checks_us")), f"{float(row['share']):.1%}"]
        lines.append(f"| {' | '.join(cells)} |")
    first = rows[0]
    lines += [
        "",
        f"Processor time, medians of {first['rounds']} samples of each kind in turn by "
        f"`benchmarks/costs/safety_checks.py`: fp32 tensors of a million elements in all, one thread, on "
        f"{first['cores']} cores ({first['cpu']}), torch {first['torch']}, {first['date']}, commit {first['commit']}.",
    ]
    return "\n".join(lines)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--numel", type=int, default=1 << 20, help="elements of the one tensor")
    parser.add_argument("--rounds", type=int, default=201, help="samples of each kind")
    parser.add_argument("--steps", type=int, default=10, help="steps in a sample")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/bench", help="folder of the CSV")
    parser.add_argument("--docs", action="store_true", help="also write the table into docs/benchmarks.md")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
