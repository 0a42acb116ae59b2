# SPDX-License-Identifier: Apache-2.0
"""The first ten minutes: what README, tutorial and guides say to type works after its install line, from a wheel."""

from __future__ import annotations

import re
import shlex
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from ds_blockwise.cli.init import FILES
from tests.helpers import ROOT
from tests.helpers.newcomer import Environment, blocks_of, build_wheel, set_up_extras

pytestmark = pytest.mark.spawns
Environments = Callable[..., Environment]
GUIDES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs/guides").glob("*.md"))
PAGES = ("README.md", "docs/tutorial.md", *GUIDES)
MAIN_JOB = "launch/pretrain_llama.py"
SCRIPTS = {"train.py": 6.0, "my_training.py": 3.0}  # below what the loss falls
# the main job is cut down by its own option --set
CUT = (
    *("steps=6", "warmup_steps=1", "global_batch_size=8", "micro_batch_size=4", "validation_sequences=8"),
    *("validation_interval=3", "log_interval=2", "checkpoint_interval=3"),
)
# what the screen shows, by the beginning of the command
SHOWN = {
    "python launch/prepare_data.py --run": "data/tiny ready",
    "python launch/": "usage:",
    f"deepspeed --num_gpus 2 {MAIN_JOB}": "(fell by ",
    "ds-blockwise blocks": "total:",
    "ds-blockwise check checkpoints": "no problem found",
    "ds-blockwise check": "no problems",
    "ds-blockwise plan --help": "usage:",
    "ds-blockwise plan": "fits in 80 GB",
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def environments(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environments:
    """Makes an environment with some extras, once."""
    made: dict[tuple[str, ...], Environment] = {}

    def environment(*extras: str) -> Environment:
        if extras not in made:
            made[extras] = Environment(tmp_path_factory.mktemp("environment") / "bare", wheel, extras)
        return made[extras]

    return environment


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What a page's commands find where they are typed: the repository, but not the packages, which are the wheel's."""
    folder = tmp_path / "clone"
    folder.mkdir()
    for name in ("configs", "launch"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def run(environment: Environment | None, line: str, clone: Path) -> str:
    """Run a command of a page; what it wrote to stdout."""
    assert environment is not None, f"no install line above {line}"
    words = shlex.split(line, comments=True)
    if words[0] == "deepspeed":
        words[1:1] = ["--master_port", free_port()]
        if MAIN_JOB in words:
            words += [word for setting in CUT for word in ("--set", f"training.{setting}")]
    done = environment.run(words, clone)
    assert done.returncode == 0, f"{line}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def losses(printed: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", printed)]


def follow(environment: Environment | None, line: str, clone: Path) -> None:
    """Do what a line of a page says."""
    words = shlex.split(line, comments=True)
    if words[0] == "make":  # test_interrupt.py runs `make train`
        dry = ["make", "--dry-run", "--always-make", *words[1:]]
        assert subprocess.run(dry, cwd=ROOT, capture_output=True, check=True).stdout
    elif words[0] == "sbatch":  # test_cluster.py runs it, with a stand-in for srun
        assert [word for word in words if (clone / word).is_file()] == words[-2:]
    elif words[-1] in SCRIPTS:
        shown = losses(run(environment, line, clone))
        assert len(shown) == 3 and shown == sorted(shown, reverse=True), shown
        assert shown[-1] < SCRIPTS[words[-1]]
    else:
        printed = run(environment, line, clone)
        assert next(text for beginning, text in SHOWN.items() if line.startswith(beginning)) in printed, printed


@pytest.mark.parametrize("page", PAGES)
def test_every_block_works_after_its_install_line(page: str, environments: Environments, clone: Path) -> None:
    """The quick start needed transformers, which its install line did not bring: it worked for us alone."""
    environment, set_up = None, None
    for kind, code in blocks_of(ROOT / page):
        if kind == "heading":
            environment = set_up or environment  # what a section installs beside `make setup` is for that section
        elif kind == "python":
            compile(code, page, "exec")
            if name := re.match(r"# (\w+\.py)\n", code):  # others are excerpts
                (clone / name[1]).write_text(code, encoding="utf-8")
        elif kind == "json" and code.startswith("{"):
            (clone / "ds_config.json").write_text(code, encoding="utf-8")
        elif kind == "bash":
            for line in code.splitlines():
                if line.startswith("pip install"):
                    found = re.fullmatch(r"\.(?:\[([\w,]+)\])?", shlex.split(line)[2])
                    assert found is not None, line
                    environment = environments(*(found[1].split(",") if found[1] else ()))
                elif line == "make setup":
                    environment = set_up = environments(*set_up_extras())
                else:
                    follow(environment, line, clone)


@pytest.mark.parametrize(
    ("command", "variables"),
    [
        ("deepspeed --num_gpus 2 train.py", {"DS_BLOCKWISE_AUTOLOAD": "1"}),
        ("deepspeed --num_gpus 1 --module ds_blockwise.run train.py", {}),
        ("python -m torch.distributed.run --nproc_per_node 1 -m ds_blockwise.run train.py", {}),
    ],
)
def test_a_script_that_never_imports_us(
    command: str, variables: dict[str, str], environments: Environments, tmp_path: Path
) -> None:
    """README's script without our line, as a tool has it that takes a JSON (test_autoload.py: the switch off)."""
    (script,) = (code for kind, code in blocks_of(ROOT / "README.md") if kind == "python" and "# train.py" in code)
    lines = [line for line in script.splitlines() if "import ds_blockwise" not in line]
    (tmp_path / "train.py").write_text("\n".join(lines), encoding="utf-8")
    words = shlex.split(command)
    words[1:1] = ["--master_port", free_port()] if words[0] == "deepspeed" else []
    words[3:3] = ["--master_port", free_port()] if words[0] == "python" else []
    done = environments("deepspeed").run(words, tmp_path, **variables)
    assert done.returncode == 0, done.stderr[-3000:]
    shown = losses(done.stdout)
    assert len(shown) == 3 and shown[-1] < SCRIPTS["train.py"], shown


def test_what_init_writes_passes_the_check(environments: Environments, tmp_path: Path) -> None:
    """From the wheel, with the extras that the main job needs; the run file names model and JSON."""
    environment = environments("deepspeed", "megatron", "launch")
    printed = run(environment, "ds-blockwise init my_run", tmp_path)
    assert re.findall(r"^wrote my_run/(\S+)$", printed, flags=re.MULTILINE) == list(FILES)
    assert "no problems" in run(environment, "ds-blockwise check my_run/run.yaml", tmp_path)
    subprocess.run(["bash", "-n", "my_run/slurm.sbatch"], cwd=tmp_path, check=True)
    assert re.search(r"^\S+ slots=\d+$", (tmp_path / "my_run" / "hostfile").read_text(), flags=re.MULTILINE)


def test_the_environment_has_only_what_was_asked_for(environments: Environments, tmp_path: Path) -> None:
    """Else the tests above say nothing."""
    environment = environments()
    done = environment.run(["python", "-c", "import ds_blockwise, torch; print(ds_blockwise.__file__)"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(environment.site)
    for name in ("deepspeed", "transformers", "yaml", "pytest", "launch"):
        assert environment.run(["python", "-c", f"import {name}"], tmp_path).returncode == 1
