# SPDX-License-Identifier: Apache-2.0
"""Two hosts on one machine: each with its own network, name, processes and sshd; they share the file system.

A host is a process that reads its standard input: when the test session ends, however it ends, the input is closed, the
process ends, and with it its namespaces and every process in them. Nothing is left behind.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.helpers import ROOT

TOOLS = ("ip", "sshd", "ssh", "ssh-keygen", "pdsh", "unshare", "nsenter")
START_S = 30.0
_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"

# What the first process of a host does; $1 name, $2 folder with its files.
_INIT = """
set -e
hostname "$1"
mount -t tmpfs tmpfs /run
mkdir /run/sshd
mount --bind "$2/hosts" /etc/hosts
mount --bind "$2/ssh_config" /etc/ssh/ssh_config
ip link set lo up
echo ready
read -r _
/usr/sbin/sshd -f "$2/sshd_config" -E "$2/sshd.$1.log"
echo up
cat > /dev/null
"""


def missing() -> str:
    """Why two hosts cannot be made here; empty if they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    absent = [tool for tool in TOOLS if shutil.which(tool, path=f"{_PATH}:{os.environ['PATH']}") is None]
    if absent:
        return f"not installed: {', '.join(absent)} (packages iproute2 openssh-server pdsh util-linux)"
    return ""


@dataclass
class TestHost:
    """One of the two hosts."""

    __test__ = False  # not a class of tests
    name: str
    address: str
    holder: subprocess.Popen[str]

    @property
    def pid(self) -> int:
        """Of its first process, as the machine numbers it."""
        (first,) = psutil.Process(self.holder.pid).children()
        return first.pid

    def enter(self, *command: str) -> list[str]:
        """The command line that runs a command on this host."""
        return ["nsenter", "-t", str(self.pid), "--net", "--mount", "--uts", "--pid", "--", *command]

    def run(self, *command: str) -> str:
        done = subprocess.run(self.enter(*command), capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout

    def cut_off(self) -> None:
        """Nothing gets in or out; nobody is told."""
        self.run("ip", "link", "set", "eth0", "down")

    def connect(self) -> None:
        self.run("ip", "link", "set", "eth0", "up")

    def ranks(self) -> list[psutil.Process]:
        """Python processes on it: ranks and their launcher."""
        inside = psutil.Process(self.pid).children(recursive=True)
        return [p for p in inside if p.is_running() and "python" in p.name()]

    def kill_ranks(self) -> None:
        for process in self.ranks():
            process.kill()

    def end(self) -> None:
        assert self.holder.stdin is not None
        self.holder.stdin.close()
        try:
            self.holder.wait(10)
        except subprocess.TimeoutExpired:
            self.holder.kill()
            self.holder.wait()


@contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[TestHost, TestHost]]:
    """Hosts `node1` and `node2`, each with an interface eth0, ssh without a password, and a hostfile in the folder."""
    addresses = {"node1": "10.77.0.1", "node2": "10.77.0.2"}
    _write_files(folder, addresses)
    hosts: list[TestHost] = []
    try:
        for name, address in addresses.items():
            unshare = ["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child"]
            holder = subprocess.Popen(
                [*unshare, "sh", "-c", _INIT, "init", name, str(folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={"PATH": _PATH, "HOME": os.environ.get("HOME", "/")},
            )
            hosts.append(TestHost(name, address, holder))
            _expect(holder, "ready")
        one, two = hosts
        veth = ["ip", "link", "add", "eth0", "netns", str(one.pid), "type", "veth"]
        subprocess.run([*veth, "peer", "name", "eth0", "netns", str(two.pid)], check=True)
        for host in hosts:
            host.run("ip", "address", "add", f"{host.address}/24", "dev", "eth0")
            host.connect()
        for host in hosts:
            assert host.holder.stdin is not None
            host.holder.stdin.write("\n")
            host.holder.stdin.flush()
            _expect(host.holder, "up")
        for host in hosts:
            _wait_for_ssh(one, host)
        yield one, two
    finally:
        for host in hosts:
            host.end()


def _write_files(folder: Path, addresses: dict[str, str]) -> None:
    for key in ("user_key", "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
    shutil.copy(folder / "user_key.pub", folder / "authorized_keys")
    public = (folder / "host_key.pub").read_text(encoding="utf-8")
    files = {
        "hosts": "127.0.0.1 localhost\n" + "".join(f"{a} {name}\n" for name, a in addresses.items()),
        "known_hosts": "".join(f"{name},{a} {public}" for name, a in addresses.items()),
        "ssh_config": f"IdentityFile {folder}/user_key\nUserKnownHostsFile {folder}/known_hosts\nLogLevel ERROR\n",
        "sshd_config": f"HostKey {folder}/host_key\nAuthorizedKeysFile {folder}/authorized_keys\nUsePAM no\n"
        "StrictModes no\nPermitRootLogin prohibit-password\nPidFile none\nPrintMotd no\n",
        "hostfile": "".join(f"{name} slots=1\n" for name in addresses),
    }
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


def _expect(holder: subprocess.Popen[str], word: str) -> None:
    assert holder.stdout is not None
    line = holder.stdout.readline().strip()
    assert line == word, f"a host could not be made: {line!r}, expected {word!r}"


def _wait_for_ssh(one: TestHost, host: TestHost) -> None:
    deadline = time.monotonic() + START_S
    while True:
        ssh = one.enter("ssh", "-o", "BatchMode=yes", host.name, "hostname")
        done = subprocess.run(ssh, capture_output=True, text=True, timeout=START_S, check=False)
        if done.stdout.strip() == host.name:
            return
        assert time.monotonic() < deadline, done.stderr
        time.sleep(0.1)


def environment(**more: str) -> dict[str, str]:
    """What a user on one of the hosts has set: no GPU, one thread for each rank, this environment."""
    kept = {k: v for k, v in os.environ.items() if k in ("HOME", "LANG", "TMPDIR", "TORCH_EXTENSIONS_DIR")}
    return kept | {
        "PATH": _PATH,
        "PYTHONPATH": str(ROOT),
        "VENV": str(Path(sys.executable).parent.parent),
        "NETWORK_INTERFACE": "eth0",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "SHARE_ALSO": "DS_ACCELERATOR CUDA_VISIBLE_DEVICES OMP_NUM_THREADS",
        "RESTART_WAIT": "1",
        "MAX_RESTARTS": "0",
        **more,
    }
