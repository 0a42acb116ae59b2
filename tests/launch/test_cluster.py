# SPDX-License-Identifier: Apache-2.0
"""`launch/cluster`: the exact commands and variables that each host gets, and the restarts; others are stubs."""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers import ROOT
from tests.helpers.launch.stubs import CLUSTER, RUN, Bench

PROGRAM = str(ROOT / "launch" / "pretrain_llama.py")
SCRIPTS = sorted(p for p in CLUSTER.iterdir() if p.suffix in (".sh", ".sbatch"))
JOB = [PROGRAM, "--run-file", RUN, "--auto-resume", "--set", "training.steps=9"]
QUIET = ["--log_level", "warning"]
# what env.sh gives every rank on a host without GPUs
SHARED = {
    "NCCL_SOCKET_IFNAME": "eth7",
    "GLOO_SOCKET_IFNAME": "eth7",
    "NCCL_DEBUG": "WARN",
    "DEEPSPEED_TIMEOUT": "10",
    "LAUNCH_JOIN_SECONDS": "300",
    "LAUNCH_SILENCE_SECONDS": "60",
    "PYTHONUNBUFFERED": "1",
}
# What Slurm does: the command once for each task, with its place; ends with the largest status.
SRUN = """\
import os, subprocess, sys
argv = sys.argv[1:]
nodes, per_node = int(argv[argv.index("--nodes") + 1]), int(argv[argv.index("--ntasks-per-node") + 1])
command = argv[argv.index("bash"):]
worst = 0
for task in range(nodes * per_node):
    place = {"SLURM_PROCID": task, "SLURM_NODEID": task // per_node, "SLURM_LOCALID": task % per_node,
             "SLURM_NTASKS": nodes * per_node, "SLURM_NNODES": nodes, "SLURMD_NODENAME": f"gpu{task // per_node + 4}"}
    env = {**os.environ, **{k: str(v) for k, v in place.items()}}
    worst = max(worst, subprocess.run(command, env=env).returncode)
sys.exit(worst)
"""
SCONTROL = """\
import sys
if sys.argv[1:3] == ["show", "hostnames"]:
    assert sys.argv[3] == "gpu[4-5]", sys.argv
    print("gpu4\\ngpu5")
"""


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    bench = Bench(tmp_path)
    bench.stub("deepspeed", "torchrun", "python")
    (tmp_path / "hostfile").write_text("# two hosts\nnode1 slots=4\n\nnode2 slots=2\n", encoding="utf-8")
    return bench


def _assert_shared(env: dict[str, str], **more: str) -> None:
    expected = SHARED | more
    assert {key: env.get(key) for key in expected} == expected


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_scripts_stop_at_an_error_and_name_no_site(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    sourced = text.startswith("# shellcheck shell=bash")
    assert sourced or text.startswith("#!/usr/bin/env bash\n"), path
    assert sourced != os.access(path, os.X_OK)
    assert "SPDX-License-Identifier: Apache-2.0" in text
    assert sourced or "\nset -euo pipefail\n" in text
    assert not re.search(r"partition=|account=|/(home|scratch|root|work)/", text)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_scripts_pass_shellcheck() -> None:
    done = subprocess.run(
        ["shellcheck", "-x", *map(str, SCRIPTS)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_every_variable_carries_its_reason() -> None:
    """Each line of env.sh that sets something has a comment on it or before it."""
    lines = (CLUSTER / "env.sh").read_text(encoding="utf-8").splitlines()
    assert sum("share " in line for line in lines) >= len(SHARED)
    for number, line in enumerate(lines):
        if re.match(r" *(share [A-Z]|export [A-Z]|: )", line) and "# " not in line:
            above = next(other for other in reversed(lines[:number]) if not re.match(r" *(share|if) ", other))
            assert above.lstrip().startswith("#"), line


def test_local(bench: Bench) -> None:
    done = bench.run("local.sh", GPUS_PER_NODE="3")
    assert done.returncode == 0, done.stderr
    (call,) = bench.calls("deepspeed")
    assert call["argv"] == [*QUIET, "--hostfile", "/dev/null", "--num_gpus", "3", "--master_port", "29500", *JOB]
    _assert_shared(call["env"])
    assert "OMP_NUM_THREADS" not in call["env"]  # no GPU: the main job shares the cores


def test_local_counts_the_gpus(bench: Bench) -> None:
    (bench.bin / "nvidia-smi").write_text("#!/bin/sh\necho GPU 0\necho GPU 1\n", encoding="utf-8")
    (bench.bin / "nvidia-smi").chmod(0o755)
    assert bench.run("local.sh").returncode == 0
    (call,) = bench.calls("deepspeed")
    assert call["argv"][4:6] == ["--num_gpus", "2"]
    _assert_shared(call["env"], OMP_NUM_THREADS="8")


def test_the_environment_wins(bench: Bench) -> None:
    assert bench.run("local.sh", NCCL_SOCKET_IFNAME="ib0", LAUNCH_SILENCE_SECONDS="7").returncode == 0
    _assert_shared(bench.calls("deepspeed")[0]["env"], NCCL_SOCKET_IFNAME="ib0", LAUNCH_SILENCE_SECONDS="7")


def test_another_program_and_the_hosts_of_a_hostfile(bench: Bench) -> None:
    done = bench.run("no_ssh.sh", PROGRAM="other.py", NODE_RANK="1")
    assert done.returncode == 0, done.stderr
    (call,) = bench.calls("deepspeed")
    command = [*QUIET, "--hostfile", "hostfile", "--no_ssh", "--node_rank", "1", "--master_addr", "node1"]
    assert call["argv"] == [*command, "--master_port", "29500", "other.py", *JOB[1:]]
    _assert_shared(call["env"], LAUNCH_HOSTS="node1:4,node2:2")


def test_ssh_through_deepspeeds_own_runner(bench: Bench) -> None:
    """What pdsh is told to start on every host, variables included."""
    (bench.bin / "deepspeed").unlink()
    bench.stub("pdsh", "ssh")
    real = f"{bench.bin}:{Path(sys.executable).parent}:/usr/bin:/bin"
    done = bench.run(
        "ssh.sh", PATH=real, DS_ACCELERATOR="cpu", MASTER_PORT="29777", SHARE_ALSO="WANDB_MODE", WANDB_MODE="offline"
    )
    assert done.returncode == 0, done.stderr
    assert [call["argv"][-2:] for call in bench.calls("ssh")] == [["node1", "hostname"]]  # the runner's check
    (call,) = bench.calls("pdsh")
    argv = call["argv"]
    assert argv[:5] == ["-S", "-f", "1024", "-w", "node1,node2"]
    exports = dict(re.findall(r"export (\w+)=(\S*); ", argv[5]))
    exports = {name: value.strip('"') for name, value in exports.items()}
    _assert_shared(exports, LAUNCH_HOSTS="node1:4,node2:2", PATH=real, WANDB_MODE="offline")
    assert argv[6] == f"cd {bench.folder};"
    assert Path(argv[7]).samefile(sys.executable)
    world = json.loads(base64.urlsafe_b64decode(argv[11].removeprefix("--world_info=")))
    assert world == {"node1": [0, 1, 2, 3], "node2": [0, 1]}
    assert argv[8:11] == ["-u", "-m", "deepspeed.launcher.launch"]
    assert argv[12:15] == ["--node_rank=%n", "--master_addr=node1", "--master_port=29777"]
    assert argv[-len(JOB) :] == JOB
    assert "-o ServerAliveInterval=10 -o ServerAliveCountMax=3" in call["env"]["PDSH_SSH_ARGS_APPEND"]
    assert not Path(call["env"]["DS_ENV_FILE"]).exists()  # removed at the end


def test_ssh_passes_every_character_on(bench: Bench) -> None:
    """A shell on the other host reads the command: what it would expand or run must arrive as it was given."""
    (bench.bin / "deepspeed").unlink()
    bench.stub("pdsh", "ssh")
    value = """a $HOME `id` $(id) "b" 'c' \\ \\$ ; * & | < > # é ~ !"""
    arguments = ["--set", f"name={value}", "--set", "name=$(id)`id`;'\\"]
    env = {"SHARE_ALSO": "ODD", "ODD": value, "NCCL_ODD": value, "PYTHONODD": "$HOME"}
    real = f"{bench.bin}:{Path(sys.executable).parent}:/usr/bin:/bin"
    done = bench.run("ssh.sh", RUN, *arguments, PATH=real, DS_ACCELERATOR="cpu", **env)
    assert done.returncode == 0, done.stderr
    argv = bench.calls("pdsh")[0]["argv"]
    script = "import json, os, sys; print(json.dumps([dict(os.environ), sys.argv]))"
    show = f"{shlex.quote(sys.executable)} -c {shlex.quote(script)}"
    remote = " ".join([argv[5], show, *argv[argv.index(JOB[0]) :]])  # as pdsh and ssh join it
    shown = subprocess.run(["bash", "-c", remote], capture_output=True, text=True, check=True, env={"HOME": "/h"})
    environment, received = json.loads(shown.stdout)
    assert (environment["ODD"], environment["NCCL_ODD"], environment["PYTHONODD"]) == (value, value, "$HOME")
    assert received[-4:] == arguments


@pytest.mark.parametrize("value", ["two\nlines", "%h", "100%%"])
def test_ssh_refuses_what_cannot_be_passed_on(bench: Bench, value: str) -> None:
    bench.stub("pdsh", "ssh")
    done = bench.run("ssh.sh", SHARE_ALSO="ODD", ODD=value)
    assert (done.returncode, bench.calls("deepspeed")) == (2, []), done.stderr
    assert "launch: ODD: %h, %n, %u, %% and several lines cannot be passed on" in done.stderr


def test_torchrun(bench: Bench) -> None:
    done = bench.run("torchrun.sh", NODES="4", MASTER_ADDR="node1", GPUS_PER_NODE="8", MAX_RESTARTS="5", JOB_ID="job7")
    assert done.returncode == 0, done.stderr
    (call,) = bench.calls("torchrun")
    options = ["--nnodes", "4", "--nproc-per-node", "8", "--max-restarts", "5", "--rdzv-backend", "c10d"]
    assert call["argv"] == [*options, "--rdzv-endpoint", "node1:29500", "--rdzv-id", "job7", *JOB]
    _assert_shared(call["env"])


def _slurm(bench: Bench) -> None:
    bench.stub("srun", body=SRUN)
    bench.stub("scontrol", body=SCONTROL)
    bench.env |= {
        "SLURM_JOB_ID": "123456",
        "SLURM_JOB_NODELIST": "gpu[4-5]",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_GPUS_ON_NODE": "2",
    }


def test_slurm_starts_the_launcher_once_on_each_node(bench: Bench) -> None:
    _slurm(bench)
    done = bench.run("slurm.sbatch")
    assert done.returncode == 0, done.stderr
    (srun,) = bench.calls("srun")
    task = ["bash", f"{ROOT}/launch/cluster/slurm_task.sh", RUN, "--set", "training.steps=9"]
    assert srun["argv"][:6] == ["--nodes", "2", "--ntasks-per-node", "1", "--kill-on-bad-exit=1", "--export=ALL"]
    assert srun["argv"][6:] == task
    calls = bench.calls("deepspeed")
    assert len(calls) == 2
    for node, call in enumerate(calls):
        options = ["--no_ssh", "--node_rank", str(node), "--master_addr", "gpu4", "--master_port", "13456"]
        assert call["argv"] == [*QUIET, "--hostfile", call["env"]["HOSTFILE"], *options, *JOB]
        _assert_shared(call["env"], LAUNCH_HOSTS="gpu4:2,gpu5:2", SLURMD_NODENAME=f"gpu{4 + node}")
        assert not Path(call["env"]["HOSTFILE"]).exists()
    written = Path(bench.env["CALLS"] + ".hostfile").read_text(encoding="utf-8")
    assert written == "gpu4 slots=2\ngpu5 slots=2\n"


def test_slurm_starts_one_task_for_each_gpu(bench: Bench) -> None:
    _slurm(bench)
    done = bench.run("slurm.sbatch", TASKS="gpu")
    assert done.returncode == 0, done.stderr
    (srun,) = bench.calls("srun")
    assert srun["argv"][2:4] == ["--ntasks-per-node", "2"]
    assert bench.calls("deepspeed") == []
    calls = bench.calls("python")
    assert len(calls) == 4
    for rank, call in enumerate(calls):
        assert call["argv"] == JOB
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank % 2), "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
        _assert_shared(call["env"], **place, MASTER_ADDR="gpu4", MASTER_PORT="13456", LAUNCH_HOSTS="gpu4:2,gpu5:2")


def test_slurm_takes_another_port_for_a_restart(bench: Bench) -> None:
    _slurm(bench)
    done = bench.run("slurm.sbatch", STATUSES="1 1 0 0")
    assert done.returncode == 0, done.stderr
    assert [call["env"]["MASTER_PORT"] for call in bench.calls("srun")] == ["13456", "13457"]
    assert done.stderr.count("restart 1 of 3") == 1  # by the batch script, not by each node as well


def test_slurm_puts_the_job_back_before_the_time_limit(bench: Bench) -> None:
    _slurm(bench)
    process = subprocess.Popen(
        bench.command("slurm.sbatch", RUN), env=bench.env | {"STUB_SECONDS": "1"}, cwd=bench.folder, text=True
    )
    deadline = time.monotonic() + 30
    while not bench.calls("deepspeed") and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(30) == 0
    assert [call["argv"] for call in bench.calls("scontrol")][1:] == [["requeue", "123456"]]
    assert len(bench.calls("srun")) == 1


def test_a_failed_job_is_started_again_a_few_times(bench: Bench) -> None:
    done = bench.run("local.sh", STATUSES="1 137 0", MAX_RESTARTS="2", GPUS_PER_NODE="1")
    assert done.returncode == 0
    assert len(bench.calls("deepspeed")) == 3
    text = "launch: the job ended with status 1: restart 1 of 2 in 0 s, from its last complete checkpoint\n"
    assert done.stderr == text + text.replace("status 1: restart 1", "status 137: restart 2")


def test_after_the_last_restart_it_gives_up(bench: Bench) -> None:
    done = bench.run("local.sh", STATUSES="9 9 9 9", MAX_RESTARTS="1")
    assert done.returncode == 9
    assert len(bench.calls("deepspeed")) == 2
    assert done.stderr.endswith("launch: the job ended with status 9 after 1 restarts: giving up\n")


def test_a_refused_configuration_is_not_tried_again(bench: Bench) -> None:
    done = bench.run("local.sh", STATUSES="2 0")
    assert done.returncode == 2
    assert len(bench.calls("deepspeed")) == 1
    assert "refused to start (see above): no restart" in done.stderr


def test_a_signal_reaches_the_job_and_ends_the_restarts(bench: Bench) -> None:
    process = subprocess.Popen(
        bench.command("local.sh", RUN),
        env=bench.env | {"STUB_SECONDS": "50"},
        cwd=bench.folder,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 30
    while not bench.calls("deepspeed") and time.monotonic() < deadline:
        time.sleep(0.02)
    process.terminate()
    _, text = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM
    assert text == "launch: stopped by a signal\n"
    assert len(bench.calls("deepspeed")) == 1


@pytest.mark.parametrize(
    ("arguments", "restarts", "resume"),
    [((), 2, ["--auto-resume"]), (("--resume",), 2, []), (("--overwrite",), 1, [])],
)
def test_resume_and_overwrite_take_the_place_of_auto_resume(
    bench: Bench, arguments: tuple[str, ...], restarts: int, resume: list[str]
) -> None:
    done = bench.run("local.sh", RUN, *arguments, STATUSES="1 0", GPUS_PER_NODE="1")
    calls = bench.calls("deepspeed")
    assert (done.returncode, len(calls)) == (2 - restarts, restarts)
    assert calls[0]["argv"][-len([*resume, *arguments, 0]) :] == [RUN, *resume, *arguments]
    assert bench.run("local.sh", RUN, "--verbose", GPUS_PER_NODE="1").returncode == 0
    assert bench.calls("deepspeed")[-1]["argv"][:2] == ["--log_level", "info"]


@pytest.mark.parametrize(
    ("script", "arguments", "env", "says"),
    [
        ("local.sh", ("--set",), {}, "usage: "),
        ("local.sh", ("nothing.yaml",), {}, "nothing.yaml: no such run file"),
        ("local.sh", (), {"VENV": "/nowhere"}, "VENV=/nowhere: no such environment"),
        ("ssh.sh", (), {}, "pdsh is not installed here"),
        ("ssh.sh", (), {"HOSTFILE": "none"}, "none: no such hostfile; its lines read: HOST slots=RANKS"),
        ("no_ssh.sh", (), {"HOSTFILE": RUN, "NODE_RANK": "0"}, "no line of the form: HOST slots=RANKS"),
        ("no_ssh.sh", (), {}, "NODE_RANK=: set it to this host's place in hostfile, from 0"),
        ("torchrun.sh", (), {"NODES": "2"}, "MASTER_ADDR: set it to the first host's name or address"),
        ("slurm.sbatch", (), {"TASKS": "core", "SLURM_SUBMIT_DIR": str(ROOT)}, "TASKS=core: allowed: node, gpu"),
    ],
)
def test_mistakes_are_refused_with_the_remedy(
    bench: Bench, script: str, arguments: tuple[str, ...], env: dict[str, str], says: str
) -> None:
    if says.startswith("pdsh"):
        for name in ("bash", "dirname", "awk", "mktemp"):
            (bench.bin / name).symlink_to(shutil.which(name) or "")
        env = env | {"PATH": str(bench.bin)}
    done = bench.run(script, *arguments, **env)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("launch: "), done.stderr
    assert says in done.stderr
    assert bench.calls("deepspeed") == []
