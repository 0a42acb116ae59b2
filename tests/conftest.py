# SPDX-License-Identifier: Apache-2.0
"""Settings that every test needs before torch or a host is imported."""

import os
import sys
from collections.abc import Iterator

import pytest

from tests.helpers import reliability
from tests.helpers.support_page.page import OUTCOMES, PAGE, write
from tests.helpers.support_page.rows import ROWS

_DEFAULTS = {
    "OMP_NUM_THREADS": "1",  # several processes share few cores
    "HF_HUB_OFFLINE": "1",  # every model is built from a config
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "DS_ACCELERATOR": "cpu",  # GPU tests run with DS_ACCELERATOR=cuda in the environment
    "WANDB_MODE": "disabled",
}
for _name, _value in _DEFAULTS.items():
    os.environ.setdefault(_name, _value)
if os.environ["DS_ACCELERATOR"] == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton kernels run on CPU tensors; read when triton is imported


def pytest_sessionstart(session: pytest.Session) -> None:
    """Counts of earlier attacks do not belong to this run."""
    if os.environ.get("WRITE_RELIABILITY") and not hasattr(session.config, "workerinput"):
        reliability.clear()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """First, so that ``-m`` sees the marker."""
    from tests.helpers.spawning import starts_processes

    for item in items:
        if starts_processes(item):
            item.add_marker("spawns")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    OUTCOMES.note(report)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """``make support`` and ``make reliability``: pages are written from this very run."""
    if hasattr(session.config, "workerinput"):
        return  # the workers of pytest-xdist see a part of the outcomes each
    if os.environ.get("WRITE_RELIABILITY") and session.exitstatus == pytest.ExitCode.OK:
        reliability.write()
    if not os.environ.get("WRITE_SUPPORT"):
        return
    problems = write(ROWS)
    print("\n" + "\n".join(problems or [f"{PAGE} is written"]))
    if problems:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="module", autouse=True)
def _no_process_group_is_left() -> Iterator[None]:
    """A default process group that a module leaves behind fails modules after it, in some orders only."""
    import torch.distributed as dist

    before = dist.is_initialized()
    yield
    assert before or not dist.is_initialized(), "this module leaves a default process group behind"


@pytest.fixture(scope="module")
def ends_process_groups() -> Iterator[None]:
    """For modules that build Megatron models in the test's process, whose groups last as long as a process."""
    yield
    import torch.distributed as dist

    parallel_state = sys.modules.get("megatron.core.parallel_state")
    if parallel_state is not None:
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """A test that draws numbers must draw the same ones alone and in the whole suite."""
    import torch

    torch.manual_seed(1234)
