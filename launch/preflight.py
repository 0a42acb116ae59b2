# SPDX-License-Identifier: Apache-2.0
"""Check that all hosts of a job see the same thing, before anything is built. The main job begins with it.

By itself, under the launcher and with the command line of the main job:
    PROGRAM=launch/preflight.py HOSTFILE=hostfile launch/cluster/ssh.sh configs/run/tiny.yaml

Compared: package versions, this project's code, command line, run file, model file, DeepSpeed JSON, the prepared
data, the layout of the ranks; and each GPU's free memory with LAUNCH_FREE_GPU_FRACTION of its whole.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import os
import platform
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ds_blockwise.runs.engine_json import compose
from ds_blockwise.runs.run_file import RunConfig, check_run, load_run
from ds_blockwise.runs.strict_files import Problems
from job.options import job_options
from job.rendezvous import Host, Place, connect, exit_status, meet, ranks_text

FREE_GPU_FRACTION = 0.9  # a GPU that another job uses holds more than a tenth
_PACKAGES = ("torch", "deepspeed", "megatron-core", "ds-blockwise", "numpy", "triton", "tokenizers", "transformers")
_CODE = ("ds_blockwise", "megatron_patch", "launch")
_EDGE = 1 << 20  # bytes at both ends of a token file that its sum is made of; the whole would take minutes
# what kind of fact -> what to do about a difference
_REMEDIES = {
    "package": "install the same versions on every host (make setup takes them from constraints.txt)",
    "code": "bring every host to the same commit",
    "option": "start every host with the same command line",
    "file": "give every host the same file",
    "data": "copy the prepared data to every host, or put it on a shared file system",
    "layout": "let one launcher start all hosts with the same number of ranks in all",
}


def facts_of(options: argparse.Namespace, run: RunConfig | None, problems: Problems, place: Place) -> dict[str, Any]:
    """What this process found; files that are not there count as found missing.

    Args:
        options: The command line.
        run: The run; None if its files don't describe one.
        problems: Found so far.
        place: Where this process stands.
    """
    compared = {("package", name): version for name, version in _versions().items()}
    compared["code", "ds_blockwise, megatron_patch and launch"] = _code()
    for name, value in vars(options).items():
        if name not in ("run", "deepspeed_config", "local_rank"):  # files are compared by what stands in them
            compared["option", f"--{name.replace('_', '-')}"] = repr(value)
    compared["file", f"run file {options.run}"] = _sum(Path(options.run))
    if run is not None:
        compared["file", f"model file {run.model_file}"] = _sum(run.model_file)
        compared["file", f"DeepSpeed JSON {run.deepspeed_file}"] = _sum(run.deepspeed_file)
        for folder, _ in run.data.read_blend(run.file, Problems()):
            for path in _data_files(Path(folder)):
                compared["data", str(path)] = _sum(path)
    compared["layout", "WORLD_SIZE"] = str(place.world_size)
    return {
        "compared": [[kind, name, value] for (kind, name), value in compared.items()],
        "problems": problems.lines,
        "gpu": _free_gpu_memory(place.local_rank),
    }


def judge(places: list[Place], facts: list[Mapping[str, Any]]) -> list[str]:
    """What is wrong, a line each, with the hosts and ranks it is wrong on.

    Args:
        places: Of all ranks.
        facts: From `facts_of`, in the same order.
    """
    return [
        *_problems(places, facts),
        *_layout(places),
        *_differences(places, facts),
        *_busy_gpus(places, facts),
    ]


def check_together(
    options: argparse.Namespace,
    place: Place,
    store: torch.distributed.Store,
    run: RunConfig | None,
    problems: Problems,
) -> tuple[Host, ...]:
    """The pre-flight check; all processes must call.

    Raises:
        TimeoutError: Ranks did not come up.
        ValueError: Lists what is wrong, with hosts and ranks.
    """
    return meet(place, store, facts_of(options, run, problems, place), judge)


def load_and_check(
    options: argparse.Namespace, place: Place, store: torch.distributed.Store
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
        check_run(run, place.world_size, problems)
        config = compose(run, problems)
    hosts = check_together(options, place, store, run, problems)
    assert run is not None  # else there were problems
    return run, config, hosts


def _problems(places: list[Place], facts: list[Mapping[str, Any]]) -> list[str]:
    found: dict[str, list[Place]] = {}
    for place, fact in zip(places, facts, strict=True):
        for line in fact["problems"]:
            found.setdefault(line, []).append(place)
    everybody = len(places)
    return [line if len(who) == everybody else f"{line} [only {_on(who)}]" for line, who in found.items()]


def _layout(places: list[Place]) -> list[str]:
    lines = []
    seen: dict[tuple[str, int], Place] = {}
    for place in places:
        other = seen.setdefault((place.host, place.local_rank), place)
        if other is not place:
            lines.append(
                f"ranks {other.rank} and {place.rank} both are local rank {place.local_rank} of {place.host}: allowed: "
                f"one launcher for each host, and hosts with different names; stop one of the two, or set "
                f"SLURMD_NODENAME to tell hosts of one name apart"
            )
    for host in dict.fromkeys(place.host for place in places):
        ranks = [place.rank for place in places if place.host == host]
        if ranks != list(range(ranks[0], ranks[0] + len(ranks))):
            lines.append(
                f"{ranks_text(ranks)} are on {host}: allowed: ranks that follow each other, because tensor-parallel "
                f"ranks do; start them host by host (srun: --distribution=block)"
            )
    return lines


def _differences(places: list[Place], facts: list[Mapping[str, Any]]) -> list[str]:
    values: dict[tuple[str, str], dict[str, list[Place]]] = {}
    by_rank = [{(kind, name): value for kind, name, value in fact["compared"]} for fact in facts]
    for key in dict.fromkeys(key for compared in by_rank for key in compared):
        for place, compared in zip(places, by_rank, strict=True):
            values.setdefault(key, {}).setdefault(compared.get(key, "not there"), []).append(place)
    return [
        f"{name} differs: {'; '.join(f'{value} {_on(who)}' for value, who in groups.items())}: {_REMEDIES[kind]}"
        for (kind, name), groups in values.items()
        if len(groups) > 1
    ]


def _busy_gpus(places: list[Place], facts: list[Mapping[str, Any]]) -> list[str]:
    fraction = float(os.environ.get("LAUNCH_FREE_GPU_FRACTION", FREE_GPU_FRACTION))
    lines = []
    for place, fact in zip(places, facts, strict=True):
        if fact["gpu"] is None:
            continue
        free, total = fact["gpu"]
        if free < fraction * total:
            lines.append(
                f"GPU {place.local_rank} of {place.host} (rank {place.rank}) has {free / 2**30:.1f} of "
                f"{total / 2**30:.1f} GiB free: allowed: at least {fraction:.0%} (LAUNCH_FREE_GPU_FRACTION); end what "
                f"else runs there (nvidia-smi names it)"
            )
    return lines


def _on(places: Iterable[Place]) -> str:
    hosts: dict[str, list[int]] = {}
    for place in places:
        hosts.setdefault(place.host, []).append(place.rank)
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


def _code() -> str:
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for path in sorted(p for folder in _CODE for p in (root / folder).rglob("*") if p.suffix in (".py", ".cpp", ".sh")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _data_files(directory: Path) -> list[Path]:
    return sorted(p for p in directory.glob("*") if p.name == "metadata.json" or p.suffix in (".idx", ".bin"))


def _sum(path: Path) -> str:
    """Size and sum of a file; of a long one, of both its ends."""
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
    """Free and whole memory of this rank's GPU in bytes; None without CUDA."""
    return torch.cuda.mem_get_info(local_rank) if torch.cuda.is_available() else None


def main(arguments: list[str] | None = None) -> None:
    """The check by itself.

    Args:
        arguments: Command line of the main job, without the program's name; default `sys.argv`.

    Raises:
        TimeoutError: Ranks did not come up.
        ValueError: Lists what is wrong, with hosts and ranks.
    """
    options = job_options(arguments, __doc__.splitlines()[0])
    place = Place.of_this_process()
    store = connect(place)
    run, _, hosts = load_and_check(options, place, store)
    store.add("done", 1)
    if place.rank == 0:
        print(f"pre-flight check passed for {run.file}: {', '.join(map(str, hosts))}", flush=True)
        while store.add("done", 0) < place.world_size:  # the store ends with this process
            time.sleep(0.02)


if __name__ == "__main__":
    exit_status(main)
