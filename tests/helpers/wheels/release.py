# SPDX-License-Identifier: Apache-2.0
"""``make release``: sdist and wheel of the present commit, checked as a user gets them. Nothing is uploaded.

The wheel that is built from the sdist is the same as the one from the repository, `twine check` finds nothing, and the
wheel works in an environment that holds what it requires and no more. The notes come from CHANGELOG.md.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

from ds_blockwise.checkpoint.record import VERSION
from tests.helpers import ROOT
from tests.helpers.newcomer import Environment

FOLDER = ROOT / "build" / "release"
TOOLS = ("build", "twine")
_STEP = """
import torch, ds_blockwise
torch.manual_seed(0)
model = torch.nn.TransformerEncoderLayer(8, nhead=2, dim_feedforward=16, dropout=0.0)
ds_blockwise.tag_parameters(model)
weight = model.linear1.weight
before = weight.detach().clone()
optimizer = ds_blockwise.BlockwiseAdamMini(model.parameters(), lr=1e-2, weight_decay=0.0, lr_multipliers="paper")
model(torch.randn(3, 1, 8)).square().sum().backward()
gradient = weight.grad.double()
optimizer.step()
# the first step of a row: gradient over the root of its mean square, times the FFN's multiplier
expected = 6 * gradient / (gradient.square().mean(dim=1, keepdim=True).sqrt() + 1e-8)
error = ((before - weight.detach()).double() / 1e-2 - expected).abs().max().item()
assert error < 1e-4, error
print(f"a step of ds_blockwise {ds_blockwise.__version__} on torch {torch.__version__}: error {error:.1e}")
"""


def notes(version: str, changelog: str) -> str:
    """The section of a version in CHANGELOG.md, without its heading.

    Raises:
        ValueError: there is none, or nothing stands in it.
    """
    found = re.search(rf"^## {re.escape(version)}\b[^\n]*\n(.*?)(?=^## |\Z)", changelog, flags=re.M | re.S)
    if found is None or not found[1].strip():
        raise ValueError(
            f"CHANGELOG.md has no entries under ## {version}: write them, or correct the version in setup.py"
        )
    return found[1].strip() + "\n"


def sources(folder: Path) -> Path:
    """The present commit's files, in a folder of their own."""
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")
    return folder


def unpacked(sdist: Path, folder: Path) -> Path:
    """An sdist's files; returns the folder that holds its setup.py."""
    with tarfile.open(sdist) as tar:
        tar.extractall(folder, filter="data")
    (inside,) = folder.iterdir()
    return inside


def files_of(wheel: Path) -> dict[str, tuple[int, int]]:
    """What a wheel holds: by name the checksum and the permissions. Its own list of files is left out."""
    with zipfile.ZipFile(wheel) as found:
        return {
            info.filename: (info.CRC, info.external_attr >> 16)
            for info in found.infolist()
            if not info.filename.endswith("/RECORD")
        }


def differences(one: Path, other: Path) -> list[str]:
    """Names of files that are not the same in two wheels."""
    left, right = files_of(one), files_of(other)
    return sorted(name for name in left.keys() | right.keys() if left.get(name) != right.get(name))


def tools(names: tuple[str, ...] = TOOLS) -> Mapping[str, str]:
    """The environment in which Python finds `TOOLS`, which are installed once into a folder of their own."""
    folder = FOLDER / "tools"
    if not folder.exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder), *names]
        subprocess.run(command, check=True)
    return {**os.environ, "PYTHONPATH": str(folder)}


def built(kind: str, project: Path, target: Path) -> Path:
    """The one distribution of a kind, ``sdist`` or ``wheel``, that a project's folder gives."""
    command = [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", str(target), str(project)]
    done = subprocess.run(command, env=dict(tools()), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"python -m build --{kind} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    (found,) = target.glob("*.tar.gz" if kind == "sdist" else "*.whl")
    return found


def try_wheel(wheel: Path, folder: Path) -> str:
    """Install a wheel without extras and use it as somebody does who has nothing else; what it printed.

    Raises:
        RuntimeError: a command failed.
    """
    environment, said = Environment(folder / "environment", wheel), []
    for words in (
        ["ds-blockwise", "--help"],
        ["ds-blockwise", "configs", "blockwise_muon", "--to", "."],
        ["ds-blockwise", "init", "run"],
        ["python", "-c", _STEP],
    ):
        done = environment.run(words, folder)
        if done.returncode:
            raise RuntimeError(f"{' '.join(words[:2])} failed with the wheel:\n{done.stdout}\n{done.stderr[-2000:]}")
        said.append(done.stdout)
    return said[-1].strip()


def main() -> int:
    """Build and check; 1 if anything is not as it should be."""
    status = subprocess.run(
        ["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    if status:
        print(f"make release builds a commit, and these files are in none:\n{status}", end="")
        return 1
    text = notes(VERSION, (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
    out = FOLDER / VERSION
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as place:
        there = Path(place)
        project = sources(there / "sources")
        sdist, wheel = built("sdist", project, out), built("wheel", project, out)
        again = built("wheel", unpacked(sdist, there / "sdist"), there / "again")
        if wrong := differences(wheel, again):
            print(f"the wheel from the sdist differs in {', '.join(wrong)}: see MANIFEST.in")
            return 1
        command = [sys.executable, "-m", "twine", "check", "--strict", str(sdist), str(wheel)]
        if subprocess.run(command, env=dict(tools()), check=False).returncode:
            return 1
        print(try_wheel(wheel, there))
    (out / "NOTES.md").write_text(text, encoding="utf-8")
    print(f"{out.relative_to(ROOT)}: {sdist.name}, {wheel.name}, NOTES.md. Nothing was uploaded.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
