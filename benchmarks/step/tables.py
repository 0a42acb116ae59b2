# SPDX-License-Identifier: Apache-2.0
"""Rows of the kernel benchmark's CSV, the table of docs/benchmarks.md and the acceptance lines, made from them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.provenance import PROVENANCE
from benchmarks.step.peers import ADAM_MINI, ADAMW, PEERS, Contender, Missing
from benchmarks.step.probe import COPY, Timing
from benchmarks.step.shapes import Case
from ds_blockwise.optimizers.registry import OPTIMIZERS

RATIOS = {name: f"over {name}" for name in PEERS}
COLUMNS = (
    "size",
    "layout",
    "device",
    "contender",
    "family",
    "backend",
    "momentum",
    "parameters",
    "tensors",
    "threads",
    "rounds",
    "steps_per_sample",
    "median_ms",
    "p20_ms",
    "p80_ms",
    "ns_per_parameter",
    "bytes_per_parameter",
    "bytes_moved",
    "working_set_bytes",
    "gb_per_s",
    "probe",
    "probe_gb_per_s",
    "share_of_probe",
    "copy_gb_per_s",
    "share_of_copy",
    *RATIOS.values(),
    "note",
    *PROVENANCE,
)
FASTEST_FUSED = ("torch AdamW fused", "DeepSpeed FusedAdam", "apex FusedAdam", "TE FusedAdam")
MINI = "BlockwiseAdamMini"
ADAMW_OURS = "BlockwiseAdamW"
LAYOUT_NAMES = {"whole": "whole tensors", "flat": "ZeRO shard"}
PROBE_NAMES = {"compiled": "one compiled loop without arithmetic", "sweeps": "a series of plain torch operations"}
FASTEST_ON_CPU = ("DeepSpeedCPUAdam", "torch AdamW fused")
LIMITS = {"67M": {MINI: 0.72, ADAMW_OURS: 0.95}}  # of time over the faster peer's; 1 where there is none

Row = dict[str, str]


def timed_rows(
    case: Case,
    contenders: Iterable[Contender],
    timings: dict[str, Timing],
    probes: dict[str, Timing],
    common: Row,
) -> list[Row]:
    """One row per contender that was timed.

    Args:
        case: what was stepped.
        contenders: who may have been.
        timings: by contender's name.
        probes: by probe's name.
        common: columns that all rows share.
    """
    medians = {name: timing.median for name, timing in timings.items()}
    copy_rate = 8 * case.numel / probes[COPY].median / 1e9
    rows = []
    for contender in (c for c in contenders if c.name in timings):
        timing, family = timings[contender.name], contender.family
        moved = contender.bytes_per_parameter * case.numel
        rate = moved / timing.median / 1e9
        imitated, probe_bytes = (ADAMW, 28) if family == ADAMW else (ADAM_MINI, 20)  # Lion's traffic is Adam-mini's
        probe_rate = probe_bytes * case.numel / probes[imitated].median / 1e9
        tensors = case.named if contender.name == "adam-mini (published)" else case.params
        row = {
            **dict.fromkeys(COLUMNS, ""),
            **common,
            "size": case.size,
            "layout": case.layout,
            "contender": contender.name,
            "family": family,
            "backend": contender.backend,
            "momentum": contender.momentum,
            "parameters": str(case.numel),
            "tensors": str(len(tensors)),
            "rounds": str(len(timing.seconds)),
            "steps_per_sample": str(timing.steps_per_sample),
            "median_ms": f"{timing.median * 1e3:.5g}",
            "p20_ms": f"{timing.quantile(0.2) * 1e3:.5g}",
            "p80_ms": f"{timing.quantile(0.8) * 1e3:.5g}",
            "ns_per_parameter": f"{timing.median * 1e9 / case.numel:.4g}",
            "bytes_per_parameter": str(contender.bytes_per_parameter),
            "bytes_moved": str(moved),
            "working_set_bytes": str((8 + contender.state_bytes) * case.numel),
            "gb_per_s": f"{rate:.4g}",
            "probe_gb_per_s": f"{probe_rate:.4g}",
            "share_of_probe": f"{rate / probe_rate:.3f}",
            "copy_gb_per_s": f"{copy_rate:.4g}",
            "share_of_copy": f"{rate / copy_rate:.3f}",
        }
        if contender.ours:
            row.update({RATIOS[peer]: f"{timing.median / medians[peer]:.4f}" for peer in RATIOS if peer in medians})
        rows.append(row)
    return rows


def missing_rows(case: Case, missing: Iterable[Missing], common: Row) -> list[Row]:
    """One row with a note for each contender that could not run."""
    return [
        {
            **dict.fromkeys(COLUMNS, ""),
            **common,
            "size": case.size,
            "layout": case.layout,
            "contender": entry.name,
            "parameters": str(case.numel),
            "note": f"not run: {entry.reason}",
        }
        for entry in missing
    ]


# --------------------------------------------------------------------------------- acceptance


@dataclass(frozen=True)
class Check:
    """One acceptance limit with what was measured."""

    what: str
    value: float | None
    limit: float
    at_most: bool = True

    @property
    def passed(self) -> bool | None:
        """None if there is nothing to judge."""
        if self.value is None:
            return None
        return self.value <= self.limit if self.at_most else self.value >= self.limit

    def __str__(self) -> str:
        if self.value is None:
            return f"----  {self.what}: not measured"
        sign = "<=" if self.at_most else ">="
        return f"{'PASS' if self.passed else 'FAIL'}  {self.what}: {self.value:.3f} (must be {sign} {self.limit:.3f})"


def acceptance(rows: Sequence[Row]) -> list[Check]:
    """What issues 3 (GPU) and 20 (CPU) ask for, for the sizes that the rows have."""
    cuda = rows[0]["device"] == "cuda"
    return _accept_gpu(rows) if cuda else _accept_cpu(rows)


def _accept_cpu(rows: Sequence[Row]) -> list[Check]:
    checks = []
    for size, layout in dict.fromkeys((row["size"], row["layout"]) for row in rows):
        for ours in (MINI, ADAMW_OURS):
            row = find(rows, size, layout, ours)
            name = f"{row['contender'] if row else ours} over the faster peer, {size}, {LAYOUT_NAMES[layout]}"
            checks.append(_against_peers(row, name, LIMITS.get(size, {}).get(ours, 1.0)))
    return checks


def _against_peers(row: Row | None, what: str, limit: float) -> Check:
    ratios = [float(row[RATIOS[peer]]) for peer in FASTEST_ON_CPU if row[RATIOS[peer]]] if row else []
    # the larger ratio is the one to the faster peer
    return Check(what, max(ratios) if len(ratios) == len(FASTEST_ON_CPU) else None, limit)


def _accept_gpu(rows: Sequence[Row]) -> list[Check]:
    checks = []
    for layout in LAYOUT_NAMES:
        for ours, limit in ((MINI, 0.75), (ADAMW_OURS, 1.03)):
            row = find(rows, "1B", layout, ours)
            if row is None:
                continue
            ratios = [float(row[RATIOS[peer]]) for peer in FASTEST_FUSED if row[RATIOS[peer]]]
            name = f"{row['contender']}, 1B, {LAYOUT_NAMES[layout]}"
            # the largest ratio is the one to the fastest peer
            checks.append(Check(f"{name}, over the fastest fused AdamW", max(ratios, default=None), limit))
            checks.append(Check(f"{name}, share of the copy rate", float(row["share_of_copy"]), 0.85, at_most=False))
    return checks


def find(rows: Sequence[Row], size: str, layout: str, optimizer: str) -> Row | None:
    """The row of one of our optimizers with fp32 momentum and its fastest kind of backend; None if none was timed."""
    order = ("triton", "cpp", "reference")
    found = [
        row
        for row in rows
        if (row["size"], row["layout"]) == (size, layout)
        and row["contender"].startswith(f"{optimizer}[")
        and row["momentum"] == "fp32"
        and row["median_ms"]
    ]
    return min(found, key=lambda row: order.index(row["backend"]), default=None)


# ------------------------------------------------------------------------------------- page


def markdown(rows: Sequence[Row], figure: str) -> str:
    """The table of docs/benchmarks.md: milliseconds of one step by contender, ratios, and the provenance.

    Args:
        rows: of the CSV.
        figure: path of the plot, relative to the page.
    """
    columns = list(dict.fromkeys((row["size"], row["layout"]) for row in rows))
    shown = [column for column in columns if column[0] in ("1M", "5M", "67M", "200M", "1B")] or columns
    largest = max(shown, key=lambda column: _numel(rows, column))
    names = list(dict.fromkeys(row["contender"] for row in rows if row["median_ms"]))
    cells = {(row["contender"], row["size"], row["layout"]): row for row in rows}
    head = [f"{size}, {'whole' if layout == 'whole' else 'shard'}" for size, layout in shown]
    lines = [
        f"| optimizer | bytes moved per parameter | {' | '.join(f'{h}, ms' for h in head)} | rate / the probe's |",
        f"|---|---:|{'---:|' * (len(shown) + 1)}",
    ]
    for name in names:
        line = [cells.get((name, *column)) for column in shown]
        times = [_milliseconds(row["median_ms"]) if row else "-" for row in line]
        share = next((r["share_of_probe"] for r in line if r and (r["size"], r["layout"]) == largest), "") or "-"
        bytes_ = next(row["bytes_per_parameter"] for row in rows if row["contender"] == name and row["median_ms"])
        lines.append(f"| {name} | {bytes_} | {' | '.join(times)} | {share} |")
    lines += ["", *_ratios(rows, shown), "", _provenance(rows, largest), "", f"![nanoseconds per parameter]({figure})"]
    return "\n".join(lines)


def limits(machines: Sequence[Sequence[Row]]) -> str:
    """Ours over the faster of `FASTEST_ON_CPU`, beside the limits, on several machines; bold where it is above.

    Args:
        machines: rows of a CSV of each.
    """
    optimizers = (ADAMW_OURS, MINI)
    heads = [f"{optimizer}, {rows[0]['cpu']}" for rows in machines for optimizer in optimizers]
    lines = [
        f"| parameters | {' | '.join(heads)} | limits |",
        f"|---|{'---:|' * (len(heads) + 1)}",
    ]
    for size, layout in dict.fromkeys((row["size"], row["layout"]) for rows in machines for row in rows):
        allowed = [LIMITS.get(size, {}).get(optimizer, 1.0) for optimizer in optimizers]
        cells = []
        for rows in machines:
            for optimizer, limit in zip(optimizers, allowed, strict=True):
                check = _against_peers(find(rows, size, layout, optimizer), "", limit)
                number = "-" if check.value is None else f"{check.value:.2f}"
                cells.append(f"**{number}**" if check.passed is False else number)
        both = " / ".join(f"{limit:.2f}" for limit in allowed)
        lines.append(f"| {size}, {LAYOUT_NAMES[layout]} | {' | '.join(cells)} | {both} |")
    where = "; ".join(_machine(rows[0]) for rows in machines)
    return "\n".join([*lines, "", f"Time over that of the faster of {' and '.join(FASTEST_ON_CPU)}. {where}."])


def _machine(row: Row) -> str:
    cache = int(row["l3_bytes"]) >> 20
    measured = f"{row['rounds']} rounds, {row['date']}, commit {row['commit']}"
    return f"{row['cpu']}: {cache} MiB of last-level cache, {measured}"


def _ratios(rows: Sequence[Row], columns: Sequence[tuple[str, str]]) -> list[str]:
    # results of before a peer was added have no column for it
    peers = [peer for peer in RATIOS if any(row.get(RATIOS[peer]) for row in rows)]
    lines = [f"| ours over peer (time) | {' | '.join(peers)} |", f"|---|{'---:|' * len(peers)}"]
    for size, layout in columns:
        for optimizer in reversed(OPTIMIZERS):
            row = find(rows, size, layout, optimizer)
            if row:
                ratios = [row[RATIOS[peer]] for peer in peers]
                cells = " | ".join(f"{float(ratio):.2f}" if ratio else "-" for ratio in ratios)
                lines.append(f"| {row['contender']}, {size}, {LAYOUT_NAMES[layout]} | {cells} |")
    return lines


def _provenance(rows: Sequence[Row], largest: tuple[str, str]) -> str:
    first = rows[0]
    timed = [row for row in rows if (row["size"], row["layout"]) == largest and row["median_ms"]]
    adamw, mini = (next(r["probe_gb_per_s"] for r in timed if r["family"] == family) for family in (ADAMW, ADAM_MINI))
    where = first["gpu"] if first["device"] == "cuda" else f"{first['cpu']}, {first['cores']} cores"
    cache = int(first["l3_bytes"]) / (1 << 20)
    return (
        f"Median time of one step. All optimizers step the same fp32 tensors in turn; ours use their default "
        f"multipliers and fused QKV. A shard is what the middle one of three ZeRO ranks holds; it begins and ends "
        f"inside a block. The probe is {PROBE_NAMES[first['probe']]} with the same reads and writes; it moved {adamw} "
        f"GB/s with AdamW's traffic and {mini} GB/s with Adam-mini's, at the largest size shown. The last-level cache "
        f"of {cache:,.0f} MiB is shared with whatever else the processor runs: a size that fits it does not measure "
        f"memory. Measured by `benchmarks/step/run.py` on {where}, {first['threads']} threads, "
        f"torch {first['torch']}, DeepSpeed {first['deepspeed']}, {first['date']}, commit {first['commit']}."
    )


def _milliseconds(text: str) -> str:
    """Two decimals below 10, one above; ``-`` for what was not timed."""
    if not text:
        return "-"
    value = float(text)
    return f"{value:.2f}" if value < 10 else f"{value:,.1f}"


def _numel(rows: Sequence[Row], column: tuple[str, str]) -> int:
    return max(int(row["parameters"]) for row in rows if (row["size"], row["layout"]) == column)
