# SPDX-License-Identifier: Apache-2.0
"""What the C++ backend refuses and promises when an optimizer steps by it."""

import pytest
import torch

from ds_blockwise import BlockwiseAdamMini, BlockwiseAdamW, tag_parameters
from ds_blockwise.optimizers.registry import OPTIMIZERS
from ds_blockwise.optimizers.second_moment import per_block
from tests.helpers.optimizers import SHORT_NAMES
from tests.unit.optimizers.test_base import feed, tiny

BOTH = [OPTIMIZERS[name] for name in SHORT_NAMES]
WITH_LION = [*BOTH, OPTIMIZERS["BlockwiseLion"]]


def test_cpp_refuses_tensors_that_are_not_on_the_cpu():
    """Raw addresses of another device would be a crash without a word."""
    model = tiny().to("meta")
    tag_parameters(model)
    optimizer = BlockwiseAdamMini(model.parameters(), backend="cpp")
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with pytest.raises(ValueError, match='backend "cpp" steps CPU tensors, but this one is on meta'):
        optimizer.step()


@pytest.mark.parametrize("cls", WITH_LION)
def test_state_on_another_device_is_noticed(cls):
    """A state that was moved by hand would be read through a wrong address."""
    model = tiny()
    optimizer = cls(model.parameters(), backend="cpp")
    feed(model, 0)
    optimizer.step()
    first = next(model.parameters())
    optimizer.state[first]["exp_avg"] = optimizer.state[first]["exp_avg"].to("meta")
    with pytest.raises(ValueError, match="its state on meta"):
        optimizer.step()


@pytest.mark.parametrize(
    "change", [lambda t: t.bfloat16(), lambda t: torch.cat([t.flatten()] * 2), lambda t: t.flatten()[:1]]
)
@pytest.mark.parametrize(
    ("cls", "key"), [*((cls, "exp_avg") for cls in WITH_LION), *((cls, "exp_avg_sq") for cls in BOTH)]
)
def test_state_that_does_not_fit_is_refused(cls, key, change):
    """Checkpoint tools write into ``state``; other dtypes or sizes would be read as garbage or beyond the end."""
    model = tiny()
    optimizer = cls(model.parameters(), backend="cpp")
    feed(model, 0)
    optimizer.step()
    largest = max(model.parameters(), key=torch.numel)
    value = optimizer.state[largest][key]
    changed = change(value)
    optimizer.state[largest][key] = changed
    if "exp_avg_sq" in optimizer.state[largest]:
        per_block(optimizer.state[largest]["exp_avg_sq"])  # or it would be taken for a loaded one
    if key == "exp_avg" and changed.dtype == torch.bfloat16:
        optimizer.step()  # what momentum_dtype allows
        return
    with pytest.raises(ValueError, match=r"parameter '.*'.*(its state \(|exp_avg_sq \d+ values of)"):
        optimizer.step()


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_autograd_notices_the_update(backend):
    """A backward through values that a step has replaced must fail, as with every torch optimizer."""
    model = tiny()
    optimizer = BlockwiseAdamW(model.parameters(), backend=backend)
    loss = sum((p * p).sum() for p in model.parameters())
    feed(model, 0)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("cls", WITH_LION)
def test_the_number_of_threads_does_not_change_a_bit(cls):
    """A resume on a machine with another number of cores would not be bitwise."""
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            model = torch.nn.ModuleDict({"embedding": torch.nn.Embedding(3000, 120), "mlp": torch.nn.Linear(700, 900)})
            feed(model, 1)
            for p in model.parameters():
                torch.nn.init.constant_(p, 0.5)
            rules = [{"match": "emb", "role": "embedding"}, {"match": "mlp", "role": "ffn", "granularity": "tensor"}]
            tag_parameters(model, rules=rules)
            optimizer = cls(model.parameters(), backend="cpp")
            optimizer.step()
            optimizer.step()
            results.append([p.detach().clone() for p in model.parameters()])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cls", WITH_LION)
def test_a_16_bit_copy_is_written_in_the_same_pass(cls, dtype, backend):
    """Master weights and model would drift apart."""
    model = tiny()
    optimizer = cls(model.parameters(), backend=backend)
    copies = {p: torch.full_like(p, 7.0, dtype=dtype) for p in model.parameters()}
    for p, copy in copies.items():
        optimizer.write_copy(p, copy)
    feed(model, 0)
    optimizer.step()
    for p, copy in copies.items():
        assert torch.equal(copy, p.to(dtype))


def test_a_copy_that_does_not_fit_is_refused():
    """Raw writes into a smaller tensor would corrupt memory."""
    param = next(tiny().parameters())
    optimizer = BlockwiseAdamW([param])
    for wrong in (torch.empty(3, dtype=torch.bfloat16), torch.empty_like(param)):
        with pytest.raises(ValueError, match="must be a contiguous bf16 or fp16 tensor of that shape"):
            optimizer.write_copy(param, wrong)
