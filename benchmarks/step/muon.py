# SPDX-License-Identifier: Apache-2.0
"""Time one step of BlockwiseMuon beside torch's and DeepSpeed's Muon on the same matrices, in one process and in turn.

python -m benchmarks.step.muon                             # two layers of a LLaMA of width 512
TORCHDYNAMO_DISABLE=1 python -m benchmarks.step.muon       # DeepSpeed's not compiled, which takes minutes on a CPU

The matrices are those of fused weights: heads of 64 rows apart, as ours takes them by default, roles apart, or each
fused weight as one matrix, as the others do. What they compute in differs: torch's Muon in bf16, DeepSpeed's in what
its accelerator has.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.zero.muon.original_muon import SingleDeviceMuon
from torch import nn

from benchmarks.provenance import BENCHMARKS_PAGE, PROVENANCE, ROOT, provenance, write_between, write_csv
from ds_blockwise import BlockwiseMuon, tag_parameters

COLUMNS = ("optimizer", "matrices", "width", "layers", "median_ms", "lowest_ms", "rounds", "threads", *PROVENANCE)
WHOLE = {"qk": "matrix", "vo": "matrix", "ffn": "matrix"}
ROLES = {"orthogonalize": {"query": "role", "key": "role", "value": "role"}}
SIMPLE = {**ROLES, "normuon": False, "coefficients": "simple"}


class Layer(nn.Module):
    """The matrices of one transformer layer, fused or not; never called."""

    def __init__(self, width: int, *, fused: bool) -> None:
        super().__init__()
        ffn, rows = 8 * width // 3 // 32 * 32, {"q_proj": width, "k_proj": width, "v_proj": width}
        attention = {"qkv_proj": 3 * width} if fused else rows
        up = {"gate_up_proj": 2 * ffn} if fused else {"gate_proj": ffn, "up_proj": ffn}
        self.self_attn, self.mlp = nn.Module(), nn.Module()
        for parent, linears in ((self.self_attn, {**attention, "o_proj": width}), (self.mlp, up)):
            for name, outputs in linears.items():
                setattr(parent, name, nn.Linear(width, outputs, bias=False))
        self.mlp.down_proj = nn.Linear(ffn, width, bias=False)


def _weights(options: argparse.Namespace, *, fused: bool) -> nn.ModuleList:
    torch.manual_seed(0)
    layers = nn.ModuleList(Layer(options.width, fused=fused) for _ in range(options.layers))
    for param in layers.parameters():
        param.grad = torch.randn(param.shape)
    return layers


def _ours(options: argparse.Namespace, settings: dict[str, Any]) -> BlockwiseMuon:
    layers = _weights(options, fused=True)
    heads = {"num_heads": options.width // 64, "num_kv_heads": options.width // 64}
    tag_parameters(layers, rules=[{"match": "qkv_proj", "role": "qkv", "layout": "concat", **heads}])
    return BlockwiseMuon(layers.parameters(), lr=1e-3, weight_decay=0.1, **settings)


def _torchs(options: argparse.Namespace, fused: bool) -> torch.optim.Optimizer:
    params = _weights(options, fused=fused).parameters()
    return torch.optim.Muon(params, lr=1e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")


def _deepspeeds(options: argparse.Namespace, fused: bool) -> torch.optim.Optimizer:
    return SingleDeviceMuon(list(_weights(options, fused=fused).parameters()), lr=1e-3, weight_decay=0.1)


CONTENDERS: dict[tuple[str, str], Callable[[argparse.Namespace], torch.optim.Optimizer]] = {
    ("BlockwiseMuon", "heads and roles apart"): lambda o: _ours(o, {}),
    ("BlockwiseMuon, bf16", "heads and roles apart"): lambda o: _ours(o, {"newton_schulz_dtype": "bf16"}),
    ("BlockwiseMuon", "roles apart"): lambda o: _ours(o, ROLES),
    ("BlockwiseMuon, simple, without row moments", "roles apart"): lambda o: _ours(o, SIMPLE),
    ("BlockwiseMuon, bf16", "roles apart"): lambda o: _ours(o, {**ROLES, "newton_schulz_dtype": "bf16"}),
    ("torch.optim.Muon (bf16)", "roles apart"): lambda o: _torchs(o, fused=False),
    ("DeepSpeed's Muon", "roles apart"): lambda o: _deepspeeds(o, fused=False),
    ("BlockwiseMuon", "fused weights whole"): lambda o: _ours(o, {"orthogonalize": WHOLE}),
    ("torch.optim.Muon (bf16)", "fused weights whole"): lambda o: _torchs(o, fused=True),
    ("DeepSpeed's Muon", "fused weights whole"): lambda o: _deepspeeds(o, fused=True),
}


def main(arguments: list[str] | None = None) -> int:
    """Measure and write."""
    options = _options(arguments)
    optimizers = {name: made(options) for name, made in CONTENDERS.items()}
    seconds: dict[tuple[str, str], list[float]] = {name: [] for name in optimizers}
    for number in range(options.rounds + 1):  # the first makes states, plans and compiled code
        for name, optimizer in optimizers.items():
            began = time.perf_counter()
            optimizer.step()
            if number:
                seconds[name].append(time.perf_counter() - began)
    facts = provenance()
    rows = [
        {
            "optimizer": optimizer,
            "matrices": matrices,
            "width": str(options.width),
            "layers": str(options.layers),
            "median_ms": f"{statistics.median(times) * 1e3:.2f}",
            "lowest_ms": f"{min(times) * 1e3:.2f}",
            "rounds": str(options.rounds),
            "threads": str(torch.get_num_threads()),
            **facts,
        }
        for (optimizer, matrices), times in seconds.items()
    ]
    table = markdown(rows)
    print(table)
    write_csv(options.out / "muon_step.csv", COLUMNS, rows)
    if options.docs:
        write_between(BENCHMARKS_PAGE, "muon-step", table)
    return 0


def markdown(rows: Sequence[dict[str, str]]) -> str:
    """The table of docs/benchmarks.md."""
    lines = ["| optimizer | matrices | step, ms, median | lowest |", "|---|---|---:|---:|"]
    lines += [f"| {r['optimizer']} | {r['matrices']} | {r['median_ms']} | {r['lowest_ms']} |" for r in rows]
    first = rows[0]
    lines += [
        "",
        f"{first['layers']} layers of a LLaMA of width {first['width']}, matrices alone, {first['rounds']} rounds in "
        f"turn. By `benchmarks/step/muon.py` on {first['cpu']}, {first['threads']} threads, torch {first['torch']}, "
        f"DeepSpeed {first['deepspeed']}, {first['date']}, commit {first['commit']}.",
    ]
    return "\n".join(lines)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=512, help="of the residual stream; a multiple of 64")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/bench", help="folder of the CSV")
    parser.add_argument("--docs", action="store_true", help="also write the table into docs/benchmarks.md")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
