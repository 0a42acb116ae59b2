# SPDX-License-Identifier: Apache-2.0
"""Stubs in the place of `deepspeed`, `srun` and others, for the tests of `launch/cluster`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.helpers import ROOT

CLUSTER = ROOT / "launch" / "cluster"
RUN = str(ROOT / "configs" / "run" / "tiny.yaml")
# Writes down how it was called.
NOTE = """\
import json, os, sys, time
calls = os.environ["CALLS"]
name = os.path.basename(sys.argv[0])
with open(calls, "a") as file:
    file.write(json.dumps({"name": name, "argv": sys.argv[1:], "env": dict(os.environ)}) + "\\n")
"""
# Ends with the next of the statuses that the test asks for.
ENDS = """\
time.sleep(float(os.environ.get("STUB_SECONDS", "0")))
if name == "deepspeed" and "--hostfile" in sys.argv:
    path = sys.argv[sys.argv.index("--hostfile") + 1]
    with open(calls + ".hostfile", "w") as copy:
        copy.write(open(path).read())
statuses = [int(s) for s in os.environ.get("STATUSES", "").split()]
done = sum(json.loads(line)["name"] == name for line in open(calls))
sys.exit(statuses[done - 1] if done <= len(statuses) else 0)
"""


@dataclass
class Bench:
    """A folder of stubs, first on the PATH, and what they wrote down."""

    folder: Path
    env: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.bin = self.folder / "bin"
        self.bin.mkdir()
        kept = ("HOME", "LANG", "TMPDIR")
        self.env = {k: v for k, v in os.environ.items() if k in kept} | {
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "CALLS": str(self.folder / "calls"),
            "VENV": "",
            "RESTART_WAIT": "0",
            "NETWORK_INTERFACE": "eth7",
        }

    def stub(self, *names: str, body: str = "") -> None:
        for name in names:
            path = self.bin / name
            # it notes the call first: the body may not come back
            path.write_text(f"#!{sys.executable} -S\n{NOTE}{body or ENDS}", encoding="utf-8")
            path.chmod(0o755)

    def command(self, script: str, *arguments: str) -> list[str]:
        return ["/bin/bash", str(CLUSTER / script), *arguments]

    def run(self, script: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        given = arguments or (RUN, "--set", "training.steps=9")
        return subprocess.run(
            self.command(script, *given),
            env=self.env | env,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def calls(self, name: str) -> list[dict[str, Any]]:
        path = Path(self.env["CALLS"])
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return [call for call in map(json.loads, lines) if call["name"] == name]
