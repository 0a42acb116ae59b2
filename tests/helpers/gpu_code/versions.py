# SPDX-License-Identifier: Apache-2.0
"""``make test-triton-versions``: every kernel of every mix, compiled by each Triton from the oldest promised one on.

A wheel is installed into a folder of its own, beside torch and without it; no GPU is needed.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.helpers import ROOT

FOLDER = ROOT / "build" / "triton"
CAPABILITIES = ("80", "90")
# bytes a thread: assemblers differ (3.7.1: 40 for sm_80); the pinned one may spill nothing (`make test`)
MOST_SPILLED = 48


def floor() -> tuple[int, ...]:
    """The oldest version that setup.py promises."""
    (found,) = re.findall(r"triton>=([\d.]+)", (ROOT / "setup.py").read_text(encoding="utf-8"))
    return numbers(found)


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def offered() -> list[str]:
    """The newest patch of each minor version that pip offers, from the oldest promised one on."""
    command = [sys.executable, "-m", "pip", "index", "versions", "triton"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (line,) = re.findall(r"^Available versions: (.+)$", text, re.M)
    newest: dict[tuple[int, ...], str] = {}
    for version in sorted(re.findall(r"[\d.]+(?=,|$)", line), key=numbers):
        if numbers(version)[:2] >= floor():
            newest[numbers(version)[:2]] = version
    return list(newest.values())


def installed(version: str) -> Path:
    """The folder of this version's wheel; fetched once."""
    folder = FOLDER / version
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=FOLDER) as partial:
            target = Path(partial) / version
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary", ":all:"]
            subprocess.run([*command, "--target", str(target), f"triton=={version}"], check=True)
            target.rename(folder)
    return folder


def compiled_by(version: str) -> str:
    """Compile everything anew and say what came of it.

    Raises:
        RuntimeError: a kernel does not compile, or its code spills more than `MOST_SPILLED`.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join((str(installed(version)), str(ROOT)))
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, "-m", "tests.helpers.gpu_code", *CAPABILITIES],
            env={**environment, "TRITON_CACHE_DIR": cache},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    launches = [json.loads(line) for line in done.stdout.splitlines()]
    most = max(launches, key=lambda launch: launch["spilled"])
    if most["spilled"] > MOST_SPILLED:
        raise RuntimeError(f"registers are spilled: {most}")
    if any(launch["triton"] != version for launch in launches):
        raise RuntimeError(f"Triton {launches[0]['triton']} was found before {version}")
    by_kernel: dict[str, list[int]] = {}
    for launch in launches:
        by_kernel.setdefault(launch["kernel"], []).append(launch["registers"])
    registers = ", ".join(f"{name} {min(found)} to {max(found)}" for name, found in by_kernel.items())
    cost = f"{len(launches)} launches in {time.monotonic() - begin:.0f} s"
    return f"{cost}; registers: {registers}; at most {most['spilled']} bytes spilled"


def main() -> int:
    """The versions named as arguments (``oldest`` and ``newest`` are names too), or all of them."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    every = offered()
    named = {"oldest": every[0], "newest": every[-1]}
    failed = 0
    for version in [named.get(argument, argument) for argument in sys.argv[1:]] or every:
        try:
            print(f"Triton {version}: {compiled_by(version)}", flush=True)
        except RuntimeError as error:
            failed += 1
            print(f"Triton {version} FAILED: {error}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
