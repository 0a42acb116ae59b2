# SPDX-License-Identifier: Apache-2.0
"""The optional backends "apex" and "te": which slices they hand over, and what is said where they cannot be had.

Neither package runs without a GPU, so their operations are replaced by one with the same signature and arithmetic
(``csrc/multi_tensor_adam.cu`` of apex, mode 1) on the CPU. On a GPU with the packages installed, `test_gpu` runs them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ds_blockwise import BlockwiseAdamMini, BlockwiseAdamW, tag_parameters
from ds_blockwise.blocks.roles import Role
from ds_blockwise.kernels import nvidia_fused as fused_kernels
from ds_blockwise.kernels import select as backends
from ds_blockwise.kernels.nvidia_fused import FusedAdamKernels, foreign_apex, unavailable
from ds_blockwise.kernels.select import kernels_for
from tests.helpers import ROOT
from tests.helpers.kernel_cases import BF16, CASES, F16, F32, F64, compare, spec, whole
from tests.unit.optimizers.test_base import feed, tiny

CPU = torch.device("cpu")
ADAM = """
CALLS = []

def multi_tensor_adam(chunk, flag, lists, lr, beta1, beta2, eps, step, mode, bias_correction, decay):
    assert mode == 1 and bias_correction == 1 and flag.dtype is __import__("torch").int32
    CALLS.append((len(lists[0]), lr, decay, step))
    for g, p, m, v in zip(*lists, strict=True):
        assert {t.dtype for t in (g, p, m, v)} == {p.dtype} and g.shape == p.shape == m.shape == v.shape
        m.mul_(beta1).add_(g, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        update = (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + eps) + decay * p
        p.sub_(lr * update)
"""
APPLIER = """
class Applier:
    available = True

    def __call__(self, operation, flag, lists, *scalars):
        return operation(65536, flag, lists, *scalars)

multi_tensor_applier = Applier()
"""
PACKAGES = {
    "apex": {
        "apex/__init__.py": "",
        "apex/optimizers/__init__.py": "",
        "apex/multi_tensor_apply/__init__.py": APPLIER,
        "amp_C.py": ADAM,
    },
    "te": {
        "transformer_engine/__init__.py": "",
        "transformer_engine/pytorch/__init__.py": "",
        "transformer_engine/pytorch/optimizers/__init__.py": "",
        "transformer_engine/pytorch/optimizers/multi_tensor_apply.py": APPLIER,
        "transformer_engine_torch.py": ADAM,
    },
    "foreign": {"apex/__init__.py": "", "apex/lib/__init__.py": "", "apex/lib/flash.py": ""},  # as PyPI's apex 0.9.10
}
OPERATIONS = {"apex": "amp_C", "te": "transformer_engine_torch"}


def write_package(folder: Path, name: str) -> None:
    for path, text in PACKAGES[name].items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")


@pytest.fixture
def without_packages(monkeypatch):
    """No such package in this process, and none left behind."""

    def forget():
        tops = ("apex", "amp_C", "transformer_engine", "transformer_engine_torch")
        for module in [m for m in sys.modules if m.partition(".")[0] in tops]:
            del sys.modules[module]
        backends._fused.cache_clear()

    forget()
    yield monkeypatch
    forget()


@pytest.fixture(params=OPERATIONS)
def name(request, without_packages, tmp_path):
    """A backend whose package is installed, and works on the CPU."""
    write_package(tmp_path, request.param)
    without_packages.syspath_prepend(tmp_path)
    without_packages.setattr(fused_kernels, "_DEVICE", "cpu")
    return request.param


@pytest.mark.parametrize("case", [c for c in CASES if c != "dtypes"])
def test_slices_make_the_steps_of_the_reference(name, case):
    """A slice that is missed, taken twice or stepped with its neighbour's multiplier is another update."""
    compare(FusedAdamKernels(name), CASES[case](), shared=False, steps=3)


@pytest.mark.parametrize(("grad", "copied"), [(BF16, BF16), (F16, None), (F32, F16)])
def test_gradients_and_copies_of_16_bits(name, grad, copied):
    """The kernels want one dtype; what the host keeps is not theirs to choose."""
    cases = [replace(whole(spec((5, 130), Role.FFN)), grad=grad, param_copy=copied)]
    compare(FusedAdamKernels(name), cases, shared=False)


def test_one_launch_for_all_slices_of_a_multiplier(name):
    """A launch for each slice would cost more than the update."""
    model = tiny()
    tag_parameters(model)
    optimizer = BlockwiseAdamW(model.parameters(), lr=1e-2, weight_decay=0.1, backend=name)
    feed(model, 0)
    optimizer.step()
    calls = sys.modules[OPERATIONS[name]].CALLS
    parts = {part.lr_multiplier for p in model.parameters() for part in p.block_spec.parts}
    assert len(calls) == len(parts) > 1
    assert sorted(lr for _, lr, _, _ in calls) == pytest.approx(sorted(1e-2 * m for m in parts))
    assert {step for *_, step in calls} == {1}


def test_the_optimizer_reports_the_backend(name):
    model = tiny()
    tag_parameters(model)
    optimizer = BlockwiseAdamW(model.parameters(), backend=name)
    assert optimizer.backend_of(next(model.parameters())) == name


def test_adam_mini_is_refused(name):
    """These kernels would read one second moment per element from a vector of one per block."""
    model = tiny()
    tag_parameters(model)
    optimizer = BlockwiseAdamMini(model.parameters(), backend=name)
    with pytest.raises(ValueError, match=rf'backend "{name}" keeps one second moment per element.*"auto"'):
        optimizer.backend_of(next(model.parameters()))


@pytest.mark.parametrize(("param", "exp_avg"), [(F64, F64), (BF16, F32), (F32, BF16)])
def test_other_dtypes_are_refused(name, param, exp_avg):
    cases = [replace(whole(spec((3, 7), Role.FFN)), param=param, exp_avg=exp_avg)]
    with pytest.raises(ValueError, match=rf'backend "{name}" steps fp32 parameters.*momentum_dtype'):
        compare(FusedAdamKernels(name), cases, shared=False)


# ------------------------------------------------------------------------ what is said without them


@pytest.mark.parametrize(("backend", "remedy"), [("apex", "build NVIDIA's from source"), ("te", "pip install")])
def test_a_package_that_is_not_installed(without_packages, backend, remedy):
    without_packages.setattr(fused_kernels, "_DEVICE", "cpu")
    with pytest.raises(ValueError, match=rf'backend "{backend}" cannot be had:.*not installed.*{remedy}'):
        kernels_for(backend, CPU)


@pytest.mark.parametrize("backend", OPERATIONS)
def test_cpu_tensors_are_refused(without_packages, tmp_path, backend):
    """Their kernels would read CPU addresses on the GPU."""
    write_package(tmp_path, backend)
    without_packages.syspath_prepend(tmp_path)
    assert unavailable(backend, CPU) == "it steps CUDA tensors, and these are on cpu"


@pytest.mark.parametrize("backend", OPERATIONS)
def test_a_package_without_its_extension(without_packages, tmp_path, backend):
    write_package(tmp_path, backend)
    (tmp_path / f"{OPERATIONS[backend]}.py").write_text("raise ImportError('no extension')", encoding="utf-8")
    without_packages.syspath_prepend(tmp_path)
    without_packages.setattr(fused_kernels, "_DEVICE", "cpu")
    with pytest.raises(ValueError, match=rf'backend "{backend}" cannot be had:.*no extension'):
        kernels_for(backend, CPU)


def test_the_other_apex_is_recognised(without_packages, tmp_path):
    """`pip install apex` brings a web toolkit."""
    assert foreign_apex() is None
    write_package(tmp_path, "foreign")
    without_packages.syspath_prepend(tmp_path)
    assert "pip uninstall apex" in foreign_apex()
    without_packages.setattr(fused_kernels, "_DEVICE", "cpu")
    with pytest.raises(ValueError, match=r"not NVIDIA's Apex but another project.*pip uninstall apex"):
        kernels_for("apex", CPU)


def test_megatron_patch_names_the_other_apex(tmp_path):
    """Megatron-core would say that Apex must be installed to use FusedLayerNorm, to somebody who has installed it."""
    write_package(tmp_path, "foreign")
    env = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-c", "import megatron_patch"]
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode != 0
    assert "pip uninstall apex" in ended.stderr.splitlines()[-1]


def test_nvidias_apex_is_welcome(without_packages, tmp_path):
    write_package(tmp_path, "apex")
    without_packages.syspath_prepend(tmp_path)
    assert foreign_apex() is None
