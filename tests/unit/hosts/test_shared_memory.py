# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's shared-memory operator, which it compiles at the first start on a CPU: left out unless it is wanted."""

from __future__ import annotations

import importlib
import logging

import pytest

pytest.importorskip("deepspeed", reason="needs DeepSpeed")

import deepspeed
from deepspeed.accelerator import get_accelerator
from deepspeed.git_version_info import installed_ops

import ds_blockwise  # noqa: F401 - registers with DeepSpeed

torch_backend = importlib.import_module("deepspeed.comm.torch")  # the name is torch itself in `deepspeed.comm`
NAME = "deepspeed_shm_comm"
LOADED = object()


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of operators that DeepSpeed would have compiled or loaded, on a machine that can compile them."""
    found: list[str] = []

    class Builder:
        NAME = NAME

        def load(self) -> object:
            found.append(self.NAME)
            return LOADED

        def absolute_name(self) -> str:
            return f"deepspeed.ops.comm.{self.NAME}_op"

    monkeypatch.setitem(deepspeed.ops.__compatible_ops__, NAME, True)
    monkeypatch.setattr(get_accelerator(), "create_op_builder", lambda name: Builder(), raising=False)
    monkeypatch.setattr(get_accelerator(), "device_name", lambda index=None: "cpu", raising=False)
    monkeypatch.delenv("DS_BUILD_SHM_COMM", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    return found


def test_it_is_not_compiled_on_a_cpu(loads: list[str], caplog: pytest.LogCaptureFixture) -> None:
    """A user's script stood still for minutes at its first start, without a word."""
    caplog.set_level(logging.INFO)
    assert torch_backend.build_shm_op() is None and loads == []
    (line,) = [record.getMessage() for record in caplog.records if NAME in record.getMessage()]
    assert "DS_BUILD_SHM_COMM=1" in line


def test_other_ranks_say_nothing(
    loads: list[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("RANK", "1")
    assert torch_backend.build_shm_op() is None and loads == []
    assert NAME not in caplog.text


@pytest.mark.parametrize(("value", "wanted"), [("1", True), ("0", False)])
def test_the_variable_decides(loads: list[str], monkeypatch: pytest.MonkeyPatch, value: str, wanted: bool) -> None:
    monkeypatch.setenv("DS_BUILD_SHM_COMM", value)
    assert torch_backend.build_shm_op() is (LOADED if wanted else None)
    assert loads == [NAME] * wanted


def test_one_that_was_installed_with_deepspeed_is_used(loads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing has to be compiled then."""
    monkeypatch.setitem(installed_ops, NAME, True)
    assert torch_backend.build_shm_op() is LOADED and loads == [NAME]


def test_another_accelerator_is_left_alone(loads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(get_accelerator(), "device_name", lambda index=None: "cuda", raising=False)
    assert torch_backend.build_shm_op() is LOADED and loads == [NAME]


def test_registering_again_wraps_nothing_twice() -> None:
    from ds_blockwise.hosts.deepspeed.register import register

    wrapped = torch_backend.build_shm_op
    register()
    assert torch_backend.build_shm_op is wrapped
