# SPDX-License-Identifier: Apache-2.0
"""Small LLaMAs of three widths: does the width rule keep the best learning rate, and does a preset help at each width?

    python -m benchmarks.compare.widths            # docs/compare/widths.csv; goes on where it was stopped
    python -m benchmarks.compare.widths --docs     # also writes the table into docs/rates.md

Each width has a sweep by factors of 2 and two seeds for each rule and each preset, on the bytes of Python's standard
library. A sweep grows while its edge is best. One process, one thread.
"""

from __future__ import annotations

import argparse
import statistics
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from benchmarks.costs.telemetry import model_of
from benchmarks.provenance import PROVENANCE, ROOT, provenance, read_csv, write_between, write_csv
from ds_blockwise import BlockwiseAdamW, BlockwiseCosineLR, tag_parameters
from ds_blockwise.blocks.settings.transfer import TRANSFER_RULES

CSV = ROOT / "docs/compare/widths.csv"
BASE_WIDTH = 64
WIDTHS = (64, 128, 256)
OFF = "off"
RULES = (OFF, *TRANSFER_RULES)
UNIFORM, TUNED = "uniform", "tuned"
PRESETS = {UNIFORM: "`uniform` (AdamW)", OFF: "`adamw_scale`", TUNED: "`tuned`"}
"""Without a rule; named as in the CSV."""
WAYS = (*RULES, UNIFORM, TUNED)
GRID = (2e-3, 4e-3, 8e-3)
WIDEN = 4  # how often a sweep may grow
SEEDS = (1, 2)
LAYERS, VOCAB = 2, 256
BATCH, LENGTH, STEPS, WARMUP = 16, 48, 200, 20
MIN_LR_SHARE = 0.05
VALIDATION = 64  # sequences
# said in full, so that a result never changes its meaning with the package's defaults
MULTIPLIERS = {"emb": 1.25, "head": 1.25, "qk": 1.0, "ffn": 0.75, "vo": 0.5, "norm": 0.125, "other": 0.125}
OTHER_MULTIPLIERS = {UNIFORM: dict.fromkeys(MULTIPLIERS, 1.0), TUNED: MULTIPLIERS | {"norm": 1.0}}
SETTINGS = f"{LAYERS} layers, {STEPS} steps of {BATCH} x {LENGTH} bytes"
COLUMNS = ("width", "rule", "lr", "seed", "loss", "parameters", "settings", "cpu_seconds", *PROVENANCE)
Row = dict[str, str]


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what the CSV lacks, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--docs", action="store_true", help="also write the table into docs/rates.md")
    parser.add_argument("--csv", type=Path, default=CSV, help="where results are kept")
    options = parser.parse_args(arguments)
    rows = [row for row in read_csv(options.csv) if row["settings"] == SETTINGS] if options.csv.is_file() else []
    text = _text()
    for width in WIDTHS:
        for way in WAYS:
            if width != BASE_WIDTH or way not in TRANSFER_RULES:  # at the base width every rule is the identity
                _sweep(width, way, rows, text, options.csv)
    tables = {"widths": markdown(rows), "widths presets": preset_table(rows)}
    print(*tables.values(), sep="\n\n")
    if options.docs:
        for name, table in tables.items():
            write_between(ROOT / "docs/rates.md", name, table)


def _sweep(width: int, rule: str, rows: list[Row], text: torch.Tensor, csv: Path) -> None:
    rates = list(GRID)
    for grown in range(WIDEN + 1):
        for lr in rates:
            for seed in SEEDS:
                key = (str(width), rule, f"{lr:g}", str(seed))
                if all(key != (row["width"], row["rule"], row["lr"], row["seed"]) for row in rows):
                    rows.append(_trained(width, rule, lr, seed, text))
                    write_csv(csv, COLUMNS, rows)
        found = losses(rows, width, rule)  # of an earlier run perhaps, at more rates than these
        best = min(rates, key=lambda lr: found[lr])
        if rates[0] < best < rates[-1] or grown == WIDEN:
            return
        rates = [rates[0] / 2, *rates] if best == rates[0] else [*rates, rates[-1] * 2]


def _trained(width: int, rule: str, lr: float, seed: int, text: torch.Tensor) -> Row:
    began = time.process_time()
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = model_of(width, LAYERS, VOCAB)
    tag_parameters(model)
    optimizer = BlockwiseAdamW(
        model.parameters(),
        lr=lr,
        weight_decay=0.1,
        lr_multipliers=OTHER_MULTIPLIERS.get(rule, MULTIPLIERS),
        transfer={"base_width": BASE_WIDTH, "rule": rule} if rule in TRANSFER_RULES else None,
    )
    schedule = BlockwiseCosineLR(optimizer, STEPS, WARMUP, min_lr=MIN_LR_SHARE * lr)
    drawn = torch.Generator().manual_seed(seed)
    training, validation = text[: -VALIDATION * LENGTH], text[-VALIDATION * LENGTH :].view(VALIDATION, LENGTH)
    for _ in range(STEPS):
        starts = torch.randint(len(training) - LENGTH, (BATCH,), generator=drawn)
        batch = torch.stack([training[start : start + LENGTH] for start in starts.tolist()])
        model(input_ids=batch, labels=batch).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    with torch.no_grad():
        loss = float(model(input_ids=validation, labels=validation).loss)
    row = {
        "width": str(width),
        "rule": rule,
        "lr": f"{lr:g}",
        "seed": str(seed),
        "loss": f"{loss:.5f}",
        "parameters": str(sum(p.numel() for p in model.parameters())),
        "settings": SETTINGS,
        "cpu_seconds": f"{time.process_time() - began:.1f}",
        **provenance(),
    }
    print(" ".join(f"{key} {row[key]}" for key in ("width", "rule", "lr", "seed", "loss", "cpu_seconds")), flush=True)
    return row


def _text() -> torch.Tensor:
    """Bytes of the standard library's top modules, one after the other."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8).long()


def losses(rows: Sequence[Row], width: int, rule: str) -> dict[float, float]:
    """Mean final loss over the seeds, by learning rate; a loss that is no number counts as infinite."""
    found: dict[float, list[float]] = {}
    for row in rows:
        named = OFF if width == BASE_WIDTH and rule in TRANSFER_RULES else rule
        if (row["width"], row["rule"]) == (str(width), named):
            loss = float(row["loss"])
            found.setdefault(float(row["lr"]), []).append(loss if loss == loss else float("inf"))
    return {lr: statistics.mean(values) for lr, values in sorted(found.items())}


def best_of(rows: Sequence[Row], width: int, rule: str) -> float:
    """The learning rate with the lowest mean loss."""
    found = losses(rows, width, rule)
    return min(found, key=lambda lr: found[lr])


def markdown(rows: Sequence[Row]) -> str:
    """The table of the page: for each rule and width the best rate, and what the rate of the base width costs."""
    base = best_of(rows, BASE_WIDTH, OFF)
    lines = [
        "| rule | width | best `lr` | its loss | loss at the best `lr` of width 64 | costs |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for rule in RULES:
        for width in WIDTHS:
            found, best = losses(rows, width, rule), best_of(rows, width, rule)
            at_base = found[base]
            cells = (f"{best:g}", f"{found[best]:.3f}", f"{at_base:.3f}", f"{at_base - found[best]:.3f}")
            lines.append(f"| {rule} | {width} | {' | '.join(cells)} |")
    source = _source([row for row in rows if row["rule"] in RULES], "BlockwiseAdamW")
    return "\n".join([*lines, "", f"{source} All losses: `docs/compare/widths.csv`."])


def preset_table(rows: Sequence[Row]) -> str:
    """The second table: each preset's best loss, beside AdamW's at the same width."""
    lines = [
        "| multipliers | width | best `lr` | its loss | minus `uniform`'s | loss at the best `lr` of width 64 "
        "| costs |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for way, label in PRESETS.items():
        base = best_of(rows, BASE_WIDTH, way)
        for width in WIDTHS:
            found, best = losses(rows, width, way), best_of(rows, width, way)
            adamw = min(losses(rows, width, UNIFORM).values())
            at_base = found[base]
            cells = (f"{best:g}", f"{found[best]:.3f}", f"{found[best] - adamw:+.3f}", f"{at_base:.3f}")
            lines.append(f"| {label} | {width} | {' | '.join(cells)} | {at_base - found[best]:.3f} |")
    source = _source([row for row in rows if row["rule"] in PRESETS], "BlockwiseAdamW without a width rule")
    return "\n".join([*lines, "", source])


def _source(rows: Sequence[Row], what: str) -> str:
    seconds = sum(float(row["cpu_seconds"]) for row in rows)
    last = rows[-1]
    commits, dates = (", ".join(dict.fromkeys(row[key] for row in rows)) for key in ("commit", "date"))
    return (
        f"Means of {len(SEEDS)} seeds by `benchmarks/compare/widths.py`: LLaMAs of {last['settings']}, "
        f"{what}, {len(rows)} runs, {seconds / 60:.0f} CPU minutes on one core ({last['cpu']}), "
        f"torch {last['torch']}, {dates}, commit {commits}."
    )


if __name__ == "__main__":
    main()
