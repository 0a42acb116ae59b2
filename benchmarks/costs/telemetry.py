# SPDX-License-Identifier: Apache-2.0
"""What telemetry adds to training, measured on this machine: whole steps with and without it, in turn.

python -m benchmarks.costs.telemetry                # a LLaMA of 1.3M parameters, one process
python -m benchmarks.costs.telemetry --docs         # also writes the table into docs/telemetry.md

A step that is read is compared with a step that is not (forward, backward, optimizer), for both optimizers. One step in
``--interval`` is read, so the share of a run is (read - plain) / (interval * plain).
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from torch import nn

from benchmarks.provenance import PROVENANCE, ROOT, provenance, write_between, write_csv
from ds_blockwise import tag_parameters
from ds_blockwise.optimizers.registry import OPTIMIZERS

WARM_UP = 3
COLUMNS = (
    "optimizer",
    "parameters",
    "tokens_per_step",
    "threads",
    "interval",
    "rounds",
    "step_ms",
    "optimizer_ms",
    "read_adds_ms",
    "added",
    *PROVENANCE,
)


def main(arguments: list[str] | None = None) -> None:
    """Measure each optimizer that telemetry can read, print, write."""
    options = _options(arguments)
    common = provenance()
    rows = []
    for name in (name for name, cls in OPTIMIZERS.items() if cls.can_be_measured):
        rows.append({**measure(name, options), **common})
        row = rows[-1]
        print(
            f"{name}: step {row['step_ms']} ms, of which optimizer {row['optimizer_ms']} ms; a reading adds "
            f"{row['read_adds_ms']} ms, {row['added']} of a run at interval {row['interval']}",
            flush=True,
        )
    write_csv(options.out / "telemetry_cost.csv", COLUMNS, rows)
    if options.docs:
        write_between(ROOT / "docs" / "telemetry.md", "telemetry-cost", markdown(rows))


def model_of(hidden: int, layers: int, vocab: int) -> nn.Module:
    """A Hugging Face LLaMA."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=hidden,
            intermediate_size=hidden * 8 // 3,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 32,
            num_key_value_heads=hidden // 32,
            vocab_size=vocab,
            tie_word_embeddings=False,
        )
    )


def measure(name: str, options: argparse.Namespace) -> dict[str, str]:
    """Time steps that are read and steps that are not, alternating, on the same model."""
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    model = model_of(options.hidden, options.layers, options.vocab)
    tag_parameters(model)
    # every second step is read, so that slow phases of the machine meet both kinds
    optimizer = OPTIMIZERS[name](model.parameters(), lr=1e-4, telemetry={"interval": 2})
    tokens = torch.randint(options.vocab, (options.batch, options.length))
    plain: list[float] = []
    read: list[float] = []
    steps: list[float] = []
    for index in range(2 * (options.rounds + WARM_UP)):
        begin = time.perf_counter()
        model(input_ids=tokens, labels=tokens).loss.backward()
        middle = time.perf_counter()
        optimizer.step()
        end = time.perf_counter()
        optimizer.zero_grad()
        if index >= 2 * WARM_UP:
            (read if index % 2 else plain).append(end - middle)
            steps.append(middle - begin)
    step = statistics.median(steps) + statistics.median(plain)
    adds = statistics.median(read) - statistics.median(plain)
    return {
        "optimizer": name,
        "parameters": str(sum(p.numel() for p in model.parameters())),
        "tokens_per_step": str(tokens.numel()),
        "threads": str(options.threads),
        "interval": str(options.interval),
        "rounds": str(options.rounds),
        "step_ms": f"{step * 1e3:.4g}",
        "optimizer_ms": f"{statistics.median(plain) * 1e3:.4g}",
        "read_adds_ms": f"{adds * 1e3:.4g}",
        "added": f"{adds / (options.interval * step):.3%}",
    }


def markdown(rows: list[dict[str, str]]) -> str:
    """The table of the page, a line per optimizer."""
    lines = [
        "| | step, ms | of which optimizer, ms | a reading adds, ms | added to a run at interval "
        f"{rows[0]['interval']} |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        cells = [row[key] for key in ("optimizer", "step_ms", "optimizer_ms", "read_adds_ms", "added")]
        lines.append(f"| {' | '.join(cells)} |")
    first = rows[0]
    lines += [
        "",
        f"Medians of {first['rounds']} steps of each kind by `benchmarks/costs/telemetry.py`: a LLaMA of "
        f"{int(first['parameters']) / 1e6:.1f}M parameters, {int(first['tokens_per_step']):,} tokens a step, one "
        f"process, threads: {first['threads']}, on {first['cores']} cores ({first['cpu']}), "
        f"torch {first['torch']}, {first['date']}, commit {first['commit']}.",
    ]
    return "\n".join(lines)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=4, help="sequences: small, so that the step is short")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1, help="more of them wait for each other on a busy machine")
    parser.add_argument("--interval", type=int, default=100, help="steps between readings in the run that is meant")
    parser.add_argument("--rounds", type=int, default=21, help="samples of each kind")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/bench", help="folder of the CSV")
    parser.add_argument("--docs", action="store_true", help="also write the table into docs/telemetry.md")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
