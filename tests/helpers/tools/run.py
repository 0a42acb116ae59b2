# SPDX-License-Identifier: Apache-2.0
"""``make test-tools``: each tool's page followed to the letter, in an environment of the tool's own, on two ranks.

An environment sees the packages of `make setup` below its own, so that no second torch is fetched. The updates that the
engines made are compared with the oracle of the tests. What was found is written into docs/tools.csv.

ONLY="trl" takes one tool. TOOLS_FOLDER keeps the environments elsewhere than in build/tools.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import venv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch

from tests.helpers import ROOT
from tests.helpers.newcomer import without_checkout
from tests.helpers.oracle import Hyper, Oracle, assert_same_update, clipped
from tests.helpers.support_page.claims import PAGE
from tests.helpers.support_page.tools import HEADING, read_rows, section, write_rows
from tests.helpers.tables.oracle_names import hf_llama_classes
from tests.helpers.tools.material import SIZES, write_material
from tests.helpers.tools.record import FOLDER as RECORDS

_VERSIONS_OF = ("deepspeed", "transformers", "torch")
_LOW, _HIGH = 20000, 32000  # ports below those that the system hands out


@dataclass(frozen=True)
class Tool:
    """One tool that can be installed here.

    Attributes:
        page: in docs/tools, with the files and the command.
        package: on the package index; its version goes into the table.
        install: arguments of pip; several lists one after the other.
        updates: that its run makes.
        empty: modules that are put in without content: the tool imports them for what is not tried here.
        engines: the module classes of the engines that it builds, the trained one first.
    """

    page: str
    package: str
    install: tuple[tuple[str, ...], ...]
    updates: int
    empty: tuple[str, ...] = ()
    engines: tuple[str, ...] = ("LlamaForCausalLM",)


TOOLS = {
    "trl": Tool(
        "trl.md",
        "trl",
        (("trl==1.16.0",),),
        updates=3,
        engines=("LlamaForCausalLM", "LlamaForCausalLM", "LlamaForSequenceClassification"),
    ),
    "ms-swift": Tool("ms_swift.md", "ms-swift", (("ms-swift==4.6.0",),), updates=3),
    "llama-factory": Tool(
        "llama_factory.md",
        "llamafactory",
        # without what it asks for: its ranges bring a CUDA build of torch, which is gigabytes
        (
            (
                *(
                    "--no-deps",
                    "llamafactory==0.9.5",
                    "transformers==5.6.0",
                    "tokenizers==0.22.2",
                    "accelerate==1.11.0",
                ),
                *("peft==0.18.1", "trl==0.24.0", "datasets==4.0.0", "dill==0.3.8", "multiprocess==0.70.16"),
                *("fsspec==2025.3.0", "huggingface_hub==1.33.0", "pydantic==2.12.3", "pydantic_core==2.41.4", "xxhash"),
                *("pandas==2.3.3", "pytz", "fire", "termcolor", "omegaconf", "tyro<0.9.0", "shtab", "docstring_parser"),
                *("sentencepiece", "tiktoken", "modelscope==1.40.2", "modelscope-hub", "hf_transfer", "scipy"),
                *("av==16.0.0", "pillow==11.3.0", "httpx==0.28.1", "httpcore==1.0.9", "torchdata==0.11.0", "aiohttp"),
                *("aiohappyeyeballs", "aiosignal", "attrs", "frozenlist", "multidict", "propcache", "yarl", "uvicorn"),
                *("fastapi==0.163.2", "starlette==0.52.1", "sse-starlette==3.7.0"),
            ),
        ),
        updates=3,
        empty=("torchaudio",),  # its wheels need CUDA; it reads sound
    ),
    "axolotl": Tool(
        "axolotl.md",
        "axolotl",
        # of what it asks for, what a run imports: the rest brings a CUDA build of torch, or is for clouds
        (
            (
                *("--no-deps", "axolotl==0.19.0", "deepspeed==0.18.9", "transformers==5.16.1", "tokenizers==0.23.1"),
                *("accelerate==1.13.0", "peft==0.20.0", "trl==1.9.0", "datasets==4.8.4", "dill==0.4.1"),
                *("multiprocess==0.70.19", "fsspec==2025.10.0", "huggingface_hub==1.17.0", "hf_xet==1.4.3", "xxhash"),
                *("pydantic==2.12.5", "pydantic_core==2.41.5", "pydantic-extra-types", "pandas==2.3.3", "pytz"),
                *("bitsandbytes==0.50.2", "torchao==0.17.0", "kernels==0.16.0", "kernels_data", "optimum==1.16.2"),
                *(
                    "axolotl-contribs-lgpl==0.0.7",
                    "axolotl-contribs-mit==0.0.6",
                    "schedulefree==1.4.1",
                    "evaluate==0.4.1",
                ),
                *("mistral-common==1.11.5", "pycountry", "tiktoken", "jsonschema", "jsonschema-specifications"),
                *(
                    "referencing",
                    "rpds-py",
                    "sentencepiece",
                    "einops",
                    "numba",
                    "llvmlite",
                    "addict",
                    "colorama",
                    "fire",
                ),
                *("termcolor", "fastcore", "python-dotenv==1.0.1", "typer==0.25.1", "shellingham", "httpx==0.28.1"),
                *("httpcore==1.0.9", "aiohttp", "aiohappyeyeballs", "aiosignal", "attrs", "frozenlist", "multidict"),
                *("propcache", "yarl", "posthog==6.7.11", "backoff", "distro", "six", "python-dateutil", "monotonic"),
                *("wandb", "sentry-sdk", "gitpython", "gitdb", "smmap", "opentelemetry-api", "opentelemetry-sdk"),
                *("opentelemetry-semantic-conventions", "importlib-metadata", "zipp"),
            ),
        ),
        updates=3,
    ),
}


def environment_of(name: str, tool: Tool) -> Path:
    """The folder of a tool's virtual environment; made once for what it holds."""
    folder = Path(os.environ.get("TOOLS_FOLDER", ROOT / "build" / "tools")) / name
    made_of, complete = repr((tool.install, tool.empty)), folder / "complete"
    if complete.exists() and complete.read_text(encoding="utf-8") == made_of:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=False)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "below.pth").write_text(f"{Path(torch.__file__).parents[1]}\n", encoding="utf-8")
    for arguments in tool.install:
        command = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", *arguments]
        subprocess.run(command, check=True, env=without_checkout())
    for module in tool.empty:
        (site / f"{module}.py").write_text("", encoding="utf-8")
    for script in ("accelerate", "deepspeed", "torchrun"):
        _own_script(Path(sys.executable).parent / script, folder)
    complete.write_text(made_of, encoding="utf-8")
    return folder


def _own_script(source: Path, folder: Path) -> None:
    """A command of the environment below, run by this one's Python."""
    target = folder / "bin" / source.name
    if source.is_file() and not target.exists():
        body = source.read_bytes().partition(b"\n")[2]
        target.write_bytes(b"#!" + bytes(folder / "bin" / "python") + b"\n" + body)
        target.chmod(0o755)


def files_and_commands(page: Path) -> tuple[dict[str, str], list[str]]:
    """The files of a page, by the name in the first line of their block, and the lines of its bash blocks."""
    files, commands = {}, []
    text = page.read_text(encoding="utf-8")
    for kind, code in re.findall(r"^```(\w+)\n(.*?)^```", text, flags=re.M | re.S):
        named = re.match(r"(?:#|//) ([\w./]+)\n", code)
        if named is not None:
            files[named[1]] = code[named.end() :] if kind == "json" else code
        elif kind == "bash":
            commands += [line for line in code.replace("\\\n", " ").splitlines() if line.strip()]
    return files, commands


def run_page(name: str, tool: Tool, folder: Path) -> list[tuple[str, Path]]:
    """Do what a tool's page says, in a folder; returns its commands, each with the folder of its records.

    Raises:
        RuntimeError: a command failed.
    """
    environment = environment_of(name, tool)
    files, commands = files_and_commands(ROOT / "docs" / "tools" / tool.page)
    write_material(folder)
    for file, text in files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text, encoding="utf-8")
    done: list[tuple[str, Path]] = []
    hook = ROOT / "tests" / "helpers" / "tools" / "hook"
    variables = without_checkout() | {
        "PATH": f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{hook}{os.pathsep}{ROOT}",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "cache"),
        "MODELSCOPE_CACHE": str(folder / "cache"),
        "MASTER_PORT": _free_port(),
        "DO_NOT_TRACK": "1",
    }
    for command in commands:
        records = folder / f"records_{len(done)}"
        records.mkdir()
        line = command.replace("deepspeed --num_gpus", f"deepspeed --master_port {variables['MASTER_PORT']} --num_gpus")
        ran = subprocess.run(
            ["bash", "-c", line],
            cwd=folder,
            env=variables | {RECORDS: str(records)},
            capture_output=True,
            text=True,
            timeout=1200,
            check=False,
        )
        if ran.returncode:
            raise RuntimeError(f"{command}\n{ran.stdout[-3000:]}\n{ran.stderr[-6000:]}")
        done.append((command, records))
    return done


def in_one_line(commands: Sequence[str]) -> str:
    """The commands of a page as they stand in the table."""
    return "; ".join(" ".join(command.split()) for command in commands)


def _free_port() -> str:
    for port in range(_LOW, _HIGH):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return str(port)
    raise RuntimeError("no port is free")


def check_records(folder: Path, tool: Tool) -> tuple[str, ...]:
    """Compare every update of the trained engine with the oracle; returns what each engine was.

    Args:
        folder: of the records.
        tool: what should have been run.

    Raises:
        AssertionError: an engine, an update or a value is another one.
    """
    engines = [torch.load(path) for path in sorted(folder.glob("engine_?.pt"))]
    assert sorted(engine["module"] for engine in engines) == sorted(tool.engines), engines
    assert all(engine["world_size"] == 2 for engine in engines), engines
    trained = {path.name.rpartition("_update")[0] for path in folder.glob("*_update_*")}
    assert len(trained) == 1, f"one engine should be trained, not {trained}"
    (name,) = trained
    engine = torch.load(folder / f"{name}.pt")
    assert engine["module"] == tool.engines[0] and engine["optimizer"] == "BlockwiseAdamMini", engine
    updates = [torch.load(folder / f"{name}_update_{index}.pt") for index in range(tool.updates)]
    assert not (folder / f"{name}_update_{tool.updates}.pt").exists()
    assert sum(update["lr"] > 0 for update in updates) >= 2
    classes = hf_llama_classes(**SIZES)
    decays = set(updates[0]["weight_decay"])
    for update in updates:
        assert all(gradient.abs().max() > 0 for gradient in update["gradients"].values())
        assert set(update["before"]) == set(classes), set(update["before"]) ^ set(classes)
        assert update["betas"] == (0.9, 0.95) and decays <= {0.0, 0.1}, update["betas"]
    # Trainer's own groups leave norms out
    decay = {"norm": 0.0 if len(decays) > 1 else 1.0}
    hyper = Hyper(updates[0]["lr"], (0.9, 0.95), updates[0]["eps"], max(decays))
    oracle = Oracle(updates[0]["before"], classes, True, hyper, weight_decay_multipliers=decay)
    for index, update in enumerate(updates):
        hyper.lr, was = update["lr"], oracle.weights()
        gradients = update["gradients"]
        oracle.step(clipped(gradients, engine["clipping"]) if engine["clipping"] else gradients)
        if hyper.lr:
            moved = (update["before"], update["after"])
            assert_same_update(
                moved, (was, oracle.weights()), hyper.lr, tolerance=1e-4, weight_roundings=4, what=f"update {index}"
            )
        oracle.set_weights(update["after"])
    return tuple(
        f"{each['module']}: {each['optimizer'] or 'not trained'}, ZeRO-{each['zero_stage']}" for each in engines
    )


def versions(environment: Path, packages: Sequence[str]) -> list[str]:
    """The versions of packages in an environment."""
    code = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"
    command = [str(environment / "bin" / "python"), "-c", code, *packages]
    return subprocess.run(command, env=without_checkout(), capture_output=True, text=True, check=True).stdout.split()


def try_tool(name: str, folder: Path) -> dict[str, str]:
    """Follow a tool's page and compare; a row of the table.

    Raises:
        RuntimeError: a command failed.
        AssertionError: what it trained is not what our optimizer should do.
    """
    tool = TOOLS[name]
    done = run_page(name, tool, folder)
    engines = [engine for _, records in done for engine in check_records(records, tool)]
    own, *others = versions(environment_of(name, tool), (tool.package, *_VERSIONS_OF))
    return {
        "tool": name,
        "version": own,
        "with": ", ".join(f"{package} {version}" for package, version in zip(_VERSIONS_OF, others, strict=True)),
        "engines": "; ".join(engines),
        "result": f"{tool.updates} updates on 2 ranks equal the oracle's (1e-4)",
        "command": in_one_line([command for command, _ in done]),
        "date": date.today().isoformat(),
    }


def write(rows: Sequence[Mapping[str, str]]) -> None:
    """Put rows into docs/tools.csv and its part of docs/support.md."""
    write_rows(rows)
    whole = PAGE.read_text(encoding="utf-8").partition(f"\n{HEADING}\n")[0].rstrip("\n")
    PAGE.write_text("\n".join([whole, *section(read_rows())]) + "\n", encoding="utf-8")


def main() -> int:
    """The tools named as arguments, or all of them; 1 if one of them failed."""
    failed, rows = 0, []
    for name in sys.argv[1:] or TOOLS:
        with tempfile.TemporaryDirectory() as folder:
            try:
                row = try_tool(name, Path(folder))
                rows.append(row)
                print(f"{name} {row['version']}: {row['result']}; {row['engines']}", flush=True)
            except (RuntimeError, AssertionError, subprocess.SubprocessError) as error:
                failed += 1
                print(f"{name} FAILED: {error}", flush=True)
    write(rows)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
