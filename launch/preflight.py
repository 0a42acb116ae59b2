# SPDX-License-Identifier: Apache-2.0
"""Check that all hosts of a job have the same code, configuration and data. The main job begins with it.

By itself, under the launcher and with the command line of the main job:
    PROGRAM=launch/preflight.py HOSTFILE=hostfile launch/cluster/ssh.sh configs/run/tiny.yaml

Compared: package versions, this project's code, command line, run file, model file, DeepSpeed JSON, the prepared
data, the layout of the ranks. A GPU needs LAUNCH_FREE_GPU_FRACTION of its memory free.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import os
import platform
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypedDict

import torch

from ds_blockwise.runs.check import check_and_compose
from ds_blockwise.runs.reading.problems import Problems
from ds_blockwise.runs.run_file import HYBRID, RunConfig, load_run
from job.options import job_options
from job.rendezvous import Host, RankInfo, connect, exit_status, join, ranks_text

FREE_GPU_FRACTION = 0.9  # a GPU that another job uses holds more than a tenth
_PACKAGES = ("torch", "deepspeed", "megatron-core", "ds-blockwise", "numpy", "triton", "tokenizers", "transformers")
_CODE = ("ds_blockwise", "megatron_patch", "launch")  # with all folders below them
_CODE_SUFFIXES = (".py", ".cpp", ".h", ".sh", ".sbatch")
_EDGE = 1 << 20  # bytes at each end of a token file that are hashed; the whole file would take minutes
# kind of fact -> what to do about a difference
_REMEDIES = {
    "package": "install the same versions on every host (make setup takes them from constraints.txt)",
    "code": "bring every host to the same commit",
    "option": "start every host with the same command line",
    "file": "give every host the same file",
    "data": "copy the prepared data to every host, or put it on a shared file system",
    "layout": "let one launcher start all hosts with the same number of ranks in all",
}


class Facts(TypedDict):
    """What one rank found."""

    compared: list[tuple[str, str, str]]  # kind, name, value: must be the same on every rank
    problems: list[str]
    gpu: tuple[int, int] | None  # free and total bytes of its memory


def collect_facts(options: argparse.Namespace, run: RunConfig | None, problems: Problems, this_rank: RankInfo) -> Facts:
    """What this process found; a missing file is a fact, too.

    Args:
        options: The command line.
        run: The run; None if its files don't describe one.
        problems: Found so far.
        this_rank: This process.
    """
    compared = {("package", name): version for name, version in _versions().items()}
    compared["code", "ds_blockwise, megatron_patch and launch"] = _code(_root())
    for name, value in vars(options).items():
        if name not in ("run", "deepspeed_config", "local_rank"):  # files are compared by their content
            compared["option", f"--{name.replace('_', '-')}"] = repr(value)
    compared["file", f"run file {options.run}"] = _describe(Path(options.run))
    if run is not None:
        compared["file", f"model file {run.model_file}"] = _describe(run.model_file)
        compared["file", f"DeepSpeed JSON {run.deepspeed_file}"] = _describe(run.deepspeed_file)
        for folder, _ in run.data.read_blend(run.file, Problems()):
            for path in _data_files(Path(folder)):
                compared["data", str(path)] = _describe(path)
    compared["layout", "WORLD_SIZE"] = str(this_rank.world_size)
    return {
        "compared": [(kind, name, value) for (kind, name), value in compared.items()],
        "problems": problems.lines,
        "gpu": _free_gpu_memory(this_rank.local_rank),
    }


def compare(ranks: list[RankInfo], facts: list[Facts]) -> list[str]:
    """What is wrong, a line each, with the hosts and ranks that it concerns.

    Args:
        ranks: All ranks.
        facts: From `collect_facts`, in the same order.
    """
    return [
        *_problems(ranks, facts),
        *_layout(ranks),
        *_differences(ranks, facts),
        *_busy_gpus(ranks, facts),
    ]


def are_facts(found: object) -> bool:
    """Whether something has the form of `Facts`, as JSON gives it back."""
    if not isinstance(found, dict) or found.keys() != Facts.__annotations__.keys():
        return False
    compared, problems, gpu = found["compared"], found["problems"], found["gpu"]
    return (
        isinstance(compared, list)
        and all(isinstance(fact, list) and len(fact) == 3 and _are_texts(fact) for fact in compared)
        and all(fact[0] in _REMEDIES for fact in compared)
        and isinstance(problems, list)
        and _are_texts(problems)
        and (gpu is None or (isinstance(gpu, list) and len(gpu) == 2 and all(type(size) is int for size in gpu)))
    )


def _are_texts(values: list[object]) -> bool:
    return all(isinstance(text, str) for text in values)


def check_together(
    options: argparse.Namespace,
    this_rank: RankInfo,
    store: torch.distributed.Store,
    run: RunConfig | None,
    problems: Problems,
) -> tuple[Host, ...]:
    """The pre-flight check; all processes must call.

    Raises:
        TimeoutError: Ranks did not come up.
        ValueError: Lists what is wrong, with hosts and ranks.
    """
    return join(this_rank, store, collect_facts(options, run, problems, this_rank), compare, are_facts)


def load_and_check(
    options: argparse.Namespace, this_rank: RankInfo, store: torch.distributed.Store
) -> tuple[RunConfig, dict[str, Any], tuple[Host, ...]]:
    """Read the run and go through the pre-flight check; all processes must call.

    Returns:
        The run, DeepSpeed's configuration for it, and the hosts.

    Raises:
        TimeoutError: Ranks did not come up.
        ValueError: Lists what is wrong with the configuration or differs between hosts.
    """
    run, problems = load_run(options.run, overrides=options.set, deepspeed_file=options.deepspeed_config)
    config: dict[str, Any] = {}
    if run is not None:
        config = check_and_compose(run, this_rank.world_size, problems)
        if run.model_class == HYBRID:
            from megatron_patch.model import check_model_class  # imports Megatron-core, which takes seconds

            check_model_class(run.model_class, run.file, problems)
    hosts = check_together(options, this_rank, store, run, problems)
    assert run is not None  # else there were problems
    return run, config, hosts


def _problems(ranks: list[RankInfo], facts: list[Facts]) -> list[str]:
    found: dict[str, list[RankInfo]] = {}
    for info, fact in zip(ranks, facts, strict=True):
        for line in fact["problems"]:
            found.setdefault(line, []).append(info)
    return [line if len(who) == len(ranks) else f"{line} [only {_on(who)}]" for line, who in found.items()]


def _layout(ranks: list[RankInfo]) -> list[str]:
    lines = []
    seen: dict[tuple[str, int], RankInfo] = {}
    for info in ranks:
        other = seen.setdefault((info.host, info.local_rank), info)
        if other is not info:
            lines.append(
                f"ranks {other.rank} and {info.rank} both are local rank {info.local_rank} of {info.host}: allowed: "
                f"one launcher for each host, and hosts with different names; stop one of the two, or set "
                f"SLURMD_NODENAME to tell hosts of one name apart"
            )
    for host in dict.fromkeys(info.host for info in ranks):
        here = [info.rank for info in ranks if info.host == host]
        if here != list(range(here[0], here[0] + len(here))):
            lines.append(
                f"{ranks_text(here)} are on {host}: allowed: ranks that follow each other, because tensor-parallel "
                f"ranks do; start them host by host (srun: --distribution=block)"
            )
    return lines


def _differences(ranks: list[RankInfo], facts: list[Facts]) -> list[str]:
    values: dict[tuple[str, str], dict[str, list[RankInfo]]] = {}
    by_rank = [{(kind, name): value for kind, name, value in fact["compared"]} for fact in facts]
    for key in dict.fromkeys(key for compared in by_rank for key in compared):
        for info, compared in zip(ranks, by_rank, strict=True):
            values.setdefault(key, {}).setdefault(compared.get(key, "not there"), []).append(info)
    return [
        f"{name} differs: {'; '.join(f'{value} {_on(who)}' for value, who in groups.items())}: {_REMEDIES[kind]}"
        for (kind, name), groups in values.items()
        if len(groups) > 1
    ]


def _busy_gpus(ranks: list[RankInfo], facts: list[Facts]) -> list[str]:
    fraction = float(os.environ.get("LAUNCH_FREE_GPU_FRACTION", FREE_GPU_FRACTION))
    lines = []
    for info, fact in zip(ranks, facts, strict=True):
        if fact["gpu"] is None:
            continue
        free, total = fact["gpu"]
        if free < fraction * total:
            lines.append(
                f"GPU {info.local_rank} of {info.host} (rank {info.rank}) has {free / 2**30:.1f} of "
                f"{total / 2**30:.1f} GiB free: allowed: at least {fraction:.0%} (LAUNCH_FREE_GPU_FRACTION); end the "
                f"other programs there (nvidia-smi lists them)"
            )
    return lines


def _on(ranks: Iterable[RankInfo]) -> str:
    hosts: dict[str, list[int]] = {}
    for info in ranks:
        hosts.setdefault(info.host, []).append(info.rank)
    return "on " + ", ".join(f"{host} ({ranks_text(ranks)})" for host, ranks in hosts.items())


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    if torch.cuda.is_available():
        found["CUDA of torch"] = str(torch.version.cuda)
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def _root() -> Path:
    """The folder of all packages: the repository, or what a wheel with launch/ inside the package is installed in."""
    parent = Path(__file__).resolve().parent.parent
    return parent if (parent / "ds_blockwise").is_dir() else parent.parent


def _code(root: Path) -> str:
    """Digest of this project's code: names and contents of its files, at any depth."""
    digest = hashlib.sha256()
    for path in sorted(p for folder in _CODE for p in (root / folder).rglob("*") if p.suffix in _CODE_SUFFIXES):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _data_files(directory: Path) -> list[Path]:
    return sorted(p for p in directory.glob("*") if p.name == "metadata.json" or p.suffix in (".idx", ".bin"))


def _describe(path: Path) -> str:
    """Size and digest of a file; of a long one the digest of both ends."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            digest = hashlib.sha256(file.read(_EDGE))
            file.seek(max(0, size - _EDGE))
            digest.update(file.read(_EDGE))
    except OSError as error:
        return f"unreadable ({error.strerror})"
    return f"{digest.hexdigest()[:12]}, {size} bytes"


def _free_gpu_memory(local_rank: int) -> tuple[int, int] | None:
    """Free and total memory of this rank's GPU in bytes; None without CUDA."""
    return torch.cuda.mem_get_info(local_rank) if torch.cuda.is_available() else None


def main(arguments: list[str] | None = None) -> None:
    """Run the check without training.

    Args:
        arguments: Command line of the main job, without the program's name; default `sys.argv`.

    Raises:
        TimeoutError: Ranks did not come up.
        ValueError: Lists what is wrong, with hosts and ranks.
    """
    options = job_options(arguments, __doc__.splitlines()[0])
    this_rank = RankInfo.from_environment()
    store = connect(this_rank)
    run, _, hosts = load_and_check(options, this_rank, store)
    store.add("done", 1)
    if this_rank.rank == 0:
        print(f"pre-flight check passed for {run.file}: {', '.join(map(str, hosts))}", flush=True)
        while store.add("done", 0) < this_rank.world_size:  # the store ends with this process
            time.sleep(0.02)


if __name__ == "__main__":
    exit_status(main)
