# SPDX-License-Identifier: Apache-2.0
"""Which backend steps which tensors, and what is said about it."""

import pytest
import torch

from ds_blockwise import BlockwiseAdamMini, BlockwiseAdamW
from ds_blockwise.kernels import select as backends
from ds_blockwise.kernels.base import ReferenceKernels
from ds_blockwise.kernels.select import kernels_for
from ds_blockwise.kernels.self_check import disagreement
from ds_blockwise.optimizers.registry import OPTIMIZERS
from tests.helpers.kernel_user import as_two_ranks, as_user
from tests.helpers.optimizers import SHORT_NAMES
from tests.unit.optimizers.test_base import feed, tiny

BOTH = [OPTIMIZERS[name] for name in SHORT_NAMES]
CPU = torch.device("cpu")


def test_cpu_tensors_are_stepped_by_compiled_kernels():
    """A user with a compiler would get the slow reference and never know."""
    model = tiny()
    optimizer = BlockwiseAdamMini(model.parameters())
    assert optimizer.backend_of(next(model.parameters())) == "cpp"


def test_without_a_compiler_the_reference_steps_and_says_so_once(tmp_path):
    """An image without g++ is common; training must go on, and its owner must learn why it is slow."""
    done = as_user(tmp_path, "auto", CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    assert "stepped by reference" in done.stdout
    assert done.stderr.count("reference backend, which is several times slower") == 1
    assert "no C++ compiler 'no-such-compiler'" in done.stderr


def test_a_rank_that_alone_cannot_compile_is_named_on_every_rank(tmp_path):
    """Rank 1's machine has no compiler. Its log was silent, and copies of a weight would have drifted apart."""
    pytest.importorskip("deepspeed", reason="needs DeepSpeed")
    ranks = as_two_ranks(tmp_path, {}, {"CXX": "no-such-compiler", "TORCH_EXTENSIONS_DIR": str(tmp_path)})
    for status, said in ranks:
        last = said.strip().splitlines()[-1]
        assert status == 1 and "ranks would step their cpu tensors with different kernels: cpp and reference" in last
        assert "rank 1 cannot: " in last and "no C++ compiler 'no-such-compiler'" in last
    warning = "cpu tensors of rank 1 on "
    assert [said.count(warning) for _, said in ranks] == [0, 1], "the rank itself says it too"


def test_asking_for_cpp_without_a_compiler_is_an_error(tmp_path):
    """Someone who asked for the fast kernels would train with the slow ones."""
    done = as_user(tmp_path, "cpp", CXX="no-such-compiler")
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError")
    assert "'no-such-compiler'" in last
    assert "install g++" in last


@pytest.mark.parametrize("backend", ["cuda", "c++", 1, None])
def test_unknown_backends_are_refused(backend):
    """A misspelt backend would be ignored."""
    with pytest.raises(ValueError, match=r"backend must be one of auto, cpp, triton, reference, got"):
        BlockwiseAdamW(tiny().parameters(), backend=backend)


def test_triton_is_refused_where_it_cannot_run(monkeypatch):
    """Asking for a GPU kernel on a CPU tensor must not end in another backend."""
    monkeypatch.setattr(backends, "_triton_unavailable", lambda device: f"no kernels for {device}")
    model = tiny()
    optimizer = BlockwiseAdamW(model.parameters(), backend="triton")
    feed(model, 0)
    with pytest.raises(ValueError, match=r'backend "triton" cannot be had: no kernels for cpu'):
        optimizer.step()


class WrongKernels(ReferenceKernels):
    """Off by a thousandth, as after a wrong reduction."""

    name = "wrong"

    def step_(self, items):
        for item in items:
            item.grad = item.grad * 1.001
        super().step_(items)


def test_wrong_kernels_are_found_before_they_step_anything(monkeypatch, caplog):
    """A driver or compiler that nobody has tested must not train with wrong updates."""
    assert "differ from the reference by" in disagreement(WrongKernels(), CPU)
    monkeypatch.setattr(backends, "_triton_unavailable", lambda device: None)
    monkeypatch.setattr(backends, "_triton", WrongKernels)
    # a device that is neither known nor cached yet, so that "auto" asks for Triton; the check itself runs on the CPU
    monkeypatch.setattr(backends, "disagreement", lambda kernels, device: disagreement(kernels, CPU))
    assert kernels_for("auto", torch.device("meta")).name == "reference"
    assert "the wrong kernels differ from the reference" in caplog.text
    backends._chosen.cache_clear()


def test_kernels_that_do_not_compile_are_replaced_and_said(monkeypatch, caplog):
    """Machines with a GPU and no C compiler are common; Triton needs one."""

    def broken(kernels, device):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(backends, "_triton_unavailable", lambda device: None)
    monkeypatch.setattr(backends, "_triton", WrongKernels)
    monkeypatch.setattr(backends, "disagreement", broken)
    assert kernels_for("auto", torch.device("meta")).name == "reference"
    assert "RuntimeError: Failed to find C compiler" in caplog.text
    backends._chosen.cache_clear()


@pytest.mark.parametrize("former", ["apex", "te"])
def test_a_former_backend_is_refused_with_the_line_to_write(former: str) -> None:
    with pytest.raises(ValueError, match=rf"backend '{former}' is not offered any more. Write \"backend\": \"auto\""):
        BlockwiseAdamW([torch.nn.Parameter(torch.ones(1))], lr=1e-3, backend=former)
