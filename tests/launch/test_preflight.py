# SPDX-License-Identifier: Apache-2.0
"""The check before training names what differs between hosts, on every rank, before anything is built."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("deepspeed", reason="the main job needs the extra 'deepspeed'")
pytest.importorskip("megatron.core", reason="the main job needs the extra 'megatron'")

import preflight
from data import token_files
from job import rendezvous
from tests.helpers.launch.host_ranks import start
from tests.helpers.launch.job_server import jobs
from tests.helpers.launch.project import make_project, prepare_project


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_project(tmp_path_factory.mktemp("preflight"))


@pytest.fixture
def hosts(prepared: Path, tmp_path: Path) -> Path:
    """A folder for each of four hosts, with the same project and data at the same relative paths."""
    for name in ("node1", "node2", "node3", "node4"):
        shutil.copytree(prepared, tmp_path / name)
    return tmp_path


ARGUMENTS = ["--run", "run.yaml", "--auto-resume", "--set", "data.directory=data"]


def _check(hosts: Path, edit: Callable[[int], None] = lambda rank: None, arguments: list[str] | None = None):
    def body(rank: int) -> None:
        os.chdir(hosts / os.environ["SLURMD_NODENAME"])
        edit(rank)
        preflight.main(arguments or ARGUMENTS)

    return body


def _refused(hosts: Path, edit: Callable[[int], None], **more) -> str:
    """What every one of two ranks on two hosts says alike."""
    results = start(hosts, _check(hosts, edit), **more).wait()
    assert {status for status, _ in results.values()} == {rendezvous.REFUSED}, results
    texts = {text[text.rindex("ValueError: ") :] for _, text in results.values()}
    assert len(texts) == 1, texts
    return texts.pop()


def test_hosts_that_are_alike_pass(hosts: Path) -> None:
    results = start(hosts, _check(hosts), world_size=4, per_host=2).wait()
    assert [status for status, _ in results.values()] == [0] * 4, results
    assert "pre-flight check passed for run.yaml: node1 (ranks 0-1), node2 (ranks 2-3)" in results[0][1]


def test_other_versions_and_other_code_are_named(hosts: Path) -> None:
    def edit(rank: int) -> None:
        if rank == 1:
            version = importlib.metadata.version
            importlib.metadata.version = lambda name: "0.1.2" if name == "deepspeed" else version(name)
            preflight._CODE = ("launch",)

    here = importlib.metadata.version("deepspeed")
    text = _refused(hosts, edit)
    assert "2 problems" in text
    assert f"- deepspeed differs: {here} on node1 (rank 0); 0.1.2 on node2 (rank 1): install the same versions" in text
    assert "- ds_blockwise, megatron_patch and launch differs: " in text
    assert "bring every host to the same commit" in text


@pytest.mark.parametrize("place", ["launch", "ds_blockwise/launch"])
def test_the_code_is_found_where_a_wheel_puts_it(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There launch/ lies inside the package."""
    for folder in (place, "ds_blockwise", "megatron_patch"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(preflight, "__file__", str(tmp_path / place / "preflight.py"))
    assert preflight._root() == tmp_path


@pytest.mark.parametrize(
    "name",
    [
        "launch/preflight.py",
        "launch/cluster/slurm.sbatch",
        "ds_blockwise/kernels/cpp/a.h",
        "ds_blockwise/hosts/x/y/z.py",
    ],
)
def test_code_is_compared_in_every_folder(name: str, tmp_path: Path) -> None:
    for each in (
        "launch/a.py",
        "megatron_patch/b.py",
        "ds_blockwise/c.py",
        "docs/d.md",
        "ds_blockwise/notes.txt",
        name,
    ):
        path = tmp_path / each
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("first", encoding="utf-8")
    before = preflight._code(tmp_path)
    (tmp_path / "ds_blockwise" / "notes.txt").write_text("no code", encoding="utf-8")
    assert preflight._code(tmp_path) == before
    (tmp_path / name).write_text("other", encoding="utf-8")
    assert preflight._code(tmp_path) != before


@pytest.mark.parametrize(
    ("name", "says"),
    [("run.yaml", "run file run.yaml"), ("model.yaml", "model file model.yaml"), ("mini.json", "JSON")],
)
def test_another_configuration_is_named(hosts: Path, name: str, says: str) -> None:
    def edit(rank: int) -> None:
        if rank == 2:
            with Path(name).open("a", encoding="utf-8") as file:
                file.write("\n")

    text = _refused(hosts, edit, world_size=4)
    assert "1 problem in" in text
    assert says in text
    assert "bytes on node1 (rank 0), node2 (rank 1), node4 (rank 3); " in text
    assert "bytes on node3 (rank 2): give every host the same file" in text


def test_another_command_line_is_named(hosts: Path) -> None:
    def body(rank: int) -> None:
        _check(hosts, arguments=[*ARGUMENTS, "--set", f"training.seed={rank}"])(rank)

    results = start(hosts, body).wait()
    for status, text in results.values():
        assert status == rendezvous.REFUSED
        assert "--set differs: ['data.directory=data', 'training.seed=0'] on node1 (rank 0); " in text
        assert "start every host with the same command line" in text


def test_other_data_are_named(hosts: Path) -> None:
    def edit(rank: int) -> None:
        if rank == 1:
            path = Path("data") / "train.idx"
            content = bytearray(path.read_bytes())
            content[-1] ^= 1  # same length
            path.write_bytes(bytes(content))
            (Path("data") / "validation.bin").unlink()

    text = _refused(hosts, edit)
    assert "2 problems" in text
    assert "- data/train.idx differs: " in text
    assert "- data/validation.bin differs: " in text
    assert "; not there on node2 (rank 1): copy the prepared data to every host" in text


def test_a_file_that_one_host_lacks_is_named_on_all(hosts: Path) -> None:
    text = _refused(hosts, lambda rank: Path("model.yaml").unlink() if rank == 1 else None)
    assert "model.yaml: (file) = " in text
    assert "[only on node2 (rank 1)]" in text


def test_mistakes_of_all_hosts_are_named_once(hosts: Path) -> None:
    arguments = [*ARGUMENTS, "--set", "training.global_batch_size=7"]
    results = start(hosts, _check(hosts, arguments=arguments)).wait()
    for status, text in results.values():
        assert status == rendezvous.REFUSED
        assert "1 problem in" in text
        assert "training.global_batch_size = 7: allowed: a multiple of 4" in text
        assert "only on" not in text


def test_a_class_of_models_that_megatron_core_lacks_is_named(hosts: Path) -> None:
    def edit(rank: int) -> None:
        import megatron_patch.model

        megatron_patch.model.MEGATRON_VERSION = "0.17.1"

    results = start(hosts, _check(hosts, edit, arguments=[*ARGUMENTS, "--set", "model_class=hybrid"])).wait()
    for status, text in results.values():
        assert status == rendezvous.REFUSED
        assert "run.yaml: model_class = 'hybrid': allowed: gpt with megatron-core 0.17.1: HybridModel came with" in text
        assert "0.18; leave it out, or pip install 'megatron-core>=0.18,<0.20'" in text


def test_gpus_that_are_in_use_are_named(hosts: Path) -> None:
    def edit(rank: int) -> None:
        preflight._free_gpu_memory = lambda local: ((40, 79)[rank] << 30, 80 << 30)

    text = _refused(hosts, edit)
    assert "- GPU 0 of node1 (rank 0) has 40.0 of 80.0 GiB free: allowed: at least 90%" in text
    assert "node2" not in text
    assert "1 problem in" in text
    results = start(hosts, _check(hosts, edit), env={"LAUNCH_FREE_GPU_FRACTION": "0.5"}).wait()
    assert [status for status, _ in results.values()] == [0, 0], results


def test_two_launchers_on_one_host_are_named(hosts: Path) -> None:
    results = start(hosts, _check(hosts), env={"SLURMD_NODENAME": "node1"}).wait()
    for status, text in results.values():
        assert status == rendezvous.REFUSED
        assert "ranks 0 and 1 both are local rank 0 of node1: allowed: one launcher for each host" in text


def test_ranks_that_jump_between_hosts_are_named(hosts: Path) -> None:
    def env_of(rank: int) -> dict[str, str]:
        return {"SLURMD_NODENAME": f"node{rank % 2 + 1}", "LOCAL_RANK": str(rank // 2)}

    results = start(hosts, _check(hosts), world_size=4, env_of=env_of).wait()
    for status, text in results.values():
        assert status == rendezvous.REFUSED
        assert "ranks 0, 2 are on node1: allowed: ranks that follow each other" in text
        assert "--distribution=block" in text


def test_the_main_job_ends_before_anything_is_built(hosts: Path) -> None:
    """The same check inside of `pretrain_llama.py`: differing data, both ranks, no output folder."""
    shutil.rmtree(hosts / "node2" / "data")
    shutil.copytree(_other_data(hosts), hosts / "node2" / "data")
    prelude = f"""
import os
os.environ.update(SLURMD_NODENAME=f"node{{rank + 1}}", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
os.chdir(f"{hosts}/node{{rank + 1}}")
"""
    job = jobs().start(hosts / "logs", *ARGUMENTS, "--set", "output=runs", prelude=prelude)
    text = job.fail()
    assert text.count("ValueError: ") == 2, text
    assert text.count("- data/metadata.json differs: ") == 2, text
    assert "on node1 (rank 0); " in text
    assert not list(hosts.glob("node*/runs"))


def _other_data(hosts: Path) -> Path:
    folder = hosts / "other"
    folder.mkdir()
    project = make_project(folder)
    (project / "texts" / "00.txt").write_text("something else " * 500, encoding="utf-8")
    run, _ = preflight.load_run(project / "run.yaml")
    assert run is not None
    token_files.prepare(run.data, run.shape.vocab_size, run.file)
    return project / "data"
