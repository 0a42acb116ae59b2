# SPDX-License-Identifier: Apache-2.0
"""Lion's Triton kernel in Triton's interpreter: every bit is that of torch's operations."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

from tests.helpers.kernel_cases import CASES, clone, item_of
from tests.unit.kernels.test_cpp import BF16, F16, F32, F64
from tests.unit.kernels.test_cpp_lion import ODD, check_random_table, check_tables_of_models, same_bits

triton_kernels = pytest.importorskip("ds_blockwise.kernels.triton.backend", reason="Triton is not installed")

INTERPRETED = triton_kernels.unavailable(torch.device("cpu")) is None
pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:invalid value encountered:RuntimeWarning"
    ),  # NumPy's, of numbers that are asked for
    pytest.mark.skipif(not INTERPRETED, reason="Triton's interpreter is off (TRITON_INTERPRET=1)"),
]


@pytest.fixture
def kernels():
    return triton_kernels.TritonKernels()


@pytest.mark.parametrize("seed", range(24))
def test_it_has_the_bits_of_the_reference_on_random_tables(kernels, seed):
    """Numbers that cancel, have no sign, are not finite; own betas, a floor, cautious decay, scaled gradients.

    Without the tiniest: the interpreter's sum of a product and a number that much smaller may be rounded twice.
    """
    check_random_table(kernels, seed, [F32, F32, BF16, F16], ODD, 20_000)


def close_in_fp64(a, b):
    """The interpreter rounds a product of fp64 numbers before it adds; a GPU does not."""
    return torch.allclose(a, b, rtol=1e-14, atol=1e-18) if a.dtype == F64 else same_bits(a, b)


@pytest.mark.parametrize("name", CASES)
def test_it_has_the_bits_of_the_reference_on_tables_of_models(kernels, name):
    check_tables_of_models(kernels, name, close_in_fp64)


def test_a_launch_for_each_form_whatever_the_number_of_tensors(kernels, monkeypatch):
    """Ten tensors, some of whose rows end at vectors. Torch's operations take five launches for each run of a table."""
    launches = []
    run = triton_kernels._launch

    def counted(kernel, programs, *args, **meta):
        launches.append((kernel.__name__, meta["enable_fp_fusion"]))
        run(kernel, programs, *args, **meta)

    monkeypatch.setattr(triton_kernels, "_launch", counted)
    check_tables_of_models(kernels, "odd rows")
    assert launches == [("prepare_kernel", False), *[("update_kernel", False)] * 2] * 2


def test_a_second_moment_that_a_state_still_holds_is_not_read(kernels):
    """Adam's update would be made of it."""
    with_it, without = (
        [clone(item_of(case, i, False)[0], kernels) for i, case in enumerate(CASES["flat"]())] for _ in range(2)
    )
    for item in without:
        del item.state["exp_avg_sq"]
    before = [item.state["exp_avg_sq"].clone() for item in with_it]
    for items in (with_it, without):
        kernels.step_by_sign_(items)
    assert all(same_bits(a.param, b.param) for a, b in zip(with_it, without, strict=True))
    assert all(same_bits(item.state["exp_avg_sq"], was) for item, was in zip(with_it, before, strict=True))
