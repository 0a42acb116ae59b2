# SPDX-License-Identifier: Apache-2.0
"""Where a figure comes from: hardware, versions, date, commit; and tables between the markers of a page."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS_PAGE = ROOT / "docs/benchmarks.md"
PROVENANCE = (
    "cpu",
    "cores",
    "l3_bytes",
    "gpu",
    "python",
    "torch",
    "deepspeed",
    "triton",
    "adam_mini",
    "compiler",
    "date",
    "commit",
)
_NONE = "none"


def provenance() -> dict[str, str]:
    """One value for each column of `PROVENANCE`; ``none`` where there is no such thing."""
    return {
        "cpu": _cpu_model(),
        "cores": str(cores()),
        "l3_bytes": str(last_level_cache()),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else _NONE,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(name) for name in ("deepspeed", "triton", "adam_mini")},
        "compiler": _compiler(),
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
    }


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def last_level_cache() -> int:
    """Bytes of the largest cache that the first core reports; 0 if the system does not say."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text(encoding="ascii").strip()
        sizes.append(int(text.rstrip("KMG")) * {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1], 1))
    return max(sizes)


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    if path.is_file():
        found = re.search(r"^model name\s*:\s*(.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        if found:
            return found.group(1).strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return _NONE


def _compiler() -> str:
    command = shutil.which(os.environ.get("CXX", "c++"))
    if command is None:
        return _NONE
    done = subprocess.run([command, "--version"], check=True, capture_output=True, text=True)
    return done.stdout.splitlines()[0]


def _commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, check=False, capture_output=True, text=True
    )
    return done.stdout.strip() if done.returncode == 0 else _NONE


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> None:
    """Write rows of text; every row has every column."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> list[dict[str, str]]:
    """What `write_csv` wrote."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def markers(name: str) -> tuple[str, str]:
    """The two comments between which a script writes."""
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def between(text: str, name: str) -> str:
    """What stands between the markers of ``name``.

    Raises:
        ValueError: the text has no such markers.
    """
    begin, end = markers(name)
    found = re.search(f"{re.escape(begin)}\n(.*?)\n?{re.escape(end)}", text, flags=re.DOTALL)
    if found is None:
        raise ValueError(f"the page has no lines {begin} and {end}; add them where the table belongs")
    return found.group(1)


def write_between(path: Path, name: str, content: str) -> None:
    """Replace what stands between the markers of ``name`` in a file.

    Raises:
        ValueError: the file has no such markers.
    """
    text = path.read_text(encoding="utf-8")
    between(text, name)
    begin, end = markers(name)
    pattern = f"{re.escape(begin)}.*?{re.escape(end)}"
    path.write_text(
        re.sub(pattern, lambda _: f"{begin}\n{content}\n{end}", text, flags=re.DOTALL),
        encoding="utf-8",
    )
