# SPDX-License-Identifier: Apache-2.0
"""The same updates on a CUDA device as on the CPU (`make test-gpu`)."""

import pytest
import torch
from test_optimizer_contract import feed, tiny

from ds_blockwise import BlockwiseAdamMini, BlockwiseAdamW, tag_parameters

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

LR = 1e-3


@pytest.mark.parametrize("cls", [BlockwiseAdamW, BlockwiseAdamMini])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_makes_the_same_updates_as_the_cpu(cls, dtype):
    """Reductions run in another order on a GPU; fp64 sums keep that out of the result."""
    on_cpu, on_gpu = tiny(dtype=dtype), tiny(dtype=dtype).cuda()
    tag_parameters(on_gpu)
    pairs = [(m, cls(m.parameters(), lr=LR)) for m in (on_cpu, on_gpu)]
    for step in range(4):
        before = [[p.detach().double().cpu() for p in m.parameters()] for m, _ in pairs]
        feed(on_cpu, step)
        for p, q in zip(on_cpu.parameters(), on_gpu.parameters(), strict=True):
            q.grad = p.grad.cuda()
        for _, optimizer in pairs:
            optimizer.step()
        for index, (p, q) in enumerate(zip(on_cpu.parameters(), on_gpu.parameters(), strict=True)):
            cpu, gpu = p.detach().double() - before[0][index], q.detach().double().cpu() - before[1][index]
            # bf16 weights of 0.02 round by up to 2^-14: one rounding may fall to the other side
            tolerance = 1e-6 * LR + 1e-9 if dtype == torch.float32 else 2.0**-13
            torch.testing.assert_close(gpu, cpu, rtol=1e-5, atol=tolerance)
