# SPDX-License-Identifier: Apache-2.0
"""Tensors that somebody replaces between two steps: a kernel must never read or write memory that is not theirs."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from ds_blockwise import tag_parameters
from ds_blockwise.optimizers.base import BlockwiseOptimizer
from ds_blockwise.optimizers.registry import OPTIMIZERS
from tests.helpers.attacks import Input, attack, number_of_inputs
from tests.helpers.kernel_cases import LOOKS, use_look
from tests.helpers.optimizers import SHORT_NAMES

BACKENDS = ("cpp", "reference", "triton")
ROWS, COLUMNS = 12, 33
RULES = [{"match": "emb", "role": "embedding"}, {"match": "mlp", "role": "ffn"}, {"match": "norm", "role": "norm"}]

Change = Callable[[torch.Tensor, random.Random], torch.Tensor]


def _other_size(tensor: torch.Tensor, rng: random.Random) -> torch.Tensor:
    size = rng.choice([n for n in (0, 1, 7, tensor.numel() - 1, tensor.numel() + 1, 5000) if n != tensor.numel()])
    return torch.zeros(size, dtype=tensor.dtype)


def _other_dtype(tensor: torch.Tensor, rng: random.Random) -> torch.Tensor:
    return tensor.to(rng.choice([torch.complex64, torch.float8_e4m3fn]))


def _freed(tensor: torch.Tensor, rng: random.Random) -> torch.Tensor:
    large = torch.cat([torch.zeros(rng.randrange(9)), tensor.detach().flatten()])
    view = large[large.numel() - tensor.numel() :].view(tensor.shape)
    large.untyped_storage().resize_(rng.choice([0, 4, 4 * tensor.numel() - 4]))
    return view


def _other_shape(tensor: torch.Tensor, rng: random.Random) -> torch.Tensor:
    return tensor.detach().flatten()[None].clone()


def _elsewhere(tensor: torch.Tensor, rng: random.Random) -> torch.Tensor:
    return torch.empty_like(tensor, device="meta")


def _viewed(tensor: torch.Tensor, rng: random.Random) -> torch.Tensor:
    # the same address and the same number of bytes as before
    return tensor.detach().view(-1)[None] if rng.random() < 0.5 else tensor.detach().view(torch.float16)


def _strided(tensor: torch.Tensor, rng: random.Random) -> torch.Tensor:
    return torch.stack([tensor.detach(), torch.full_like(tensor, 9.0)], -1)[..., 0]


def _same(tensor: torch.Tensor, rng: random.Random) -> torch.Tensor:
    return tensor.detach().clone()


def _sign_bit(tensor: torch.Tensor, rng: random.Random) -> torch.Tensor:
    # the imaginary part of a conjugate: stored with its sign reversed
    return torch.complex(torch.zeros_like(tensor), -tensor.detach()).conj().imag


BREAKS: dict[str, Change] = {
    f.__name__: f for f in (_other_size, _other_shape, _other_dtype, _freed, _viewed, _elsewhere)
}
KEEPS: dict[str, Change] = {f.__name__: f for f in (_strided, _same, _sign_bit)}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(ROWS, COLUMNS)
        self.mlp = nn.Linear(COLUMNS, ROWS)
        self.norm = nn.LayerNorm(COLUMNS)


def _made(cls: type[BlockwiseOptimizer], backend: str, steps: int) -> tuple[Model, BlockwiseOptimizer]:
    torch.manual_seed(0)
    model = Model()
    tag_parameters(model, rules=RULES)
    optimizer = cls(model.parameters(), lr=1e-2, backend=backend)
    for step in range(steps):
        _feed(model, step)
        optimizer.step()
    return model, optimizer


def _feed(model: Model, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=generator)


def _target(model: Model, index: int) -> nn.Parameter:
    return list(model.parameters())[index]


def _act(
    cls: type[BlockwiseOptimizer], backend: str, steps: int, index: int, where: str, change: Change, seed: int
) -> list[torch.Tensor]:
    """Replace one tensor and step; returns the parameters."""
    model, optimizer = _made(cls, backend, steps)
    _feed(model, 9)
    param, rng = _target(model, index), random.Random(seed)
    if where == "param":
        param.data = change(param.data, rng)
    elif where == "grad":
        assert param.grad is not None
        param.grad.data = change(param.grad.data, rng)
    elif where in optimizer.state[param]:
        old = optimizer.state[param][where]
        new = change(old, rng)
        if hasattr(old, "_is_per_block"):
            new._is_per_block = True  # type: ignore[attr-defined]
        optimizer.state[param][where] = new
    optimizer.step()
    return [p.detach() for p in model.parameters()]


def _inputs(count: int) -> Iterator[Input]:
    rng = random.Random(20)
    expected: dict[tuple[str, int], list[torch.Tensor]] = {}
    for number in range(count):
        cls = OPTIMIZERS[rng.choice(list(SHORT_NAMES))]
        backend = rng.choice(BACKENDS if number % 8 == 0 else BACKENDS[:2])
        where = rng.choice(["param", "grad", "exp_avg", "exp_avg_sq"])
        steps = rng.choice([0, 1, 2]) if where in ("param", "grad") else rng.choice([1, 2])
        breaks = rng.random() < 0.7
        names = list(BREAKS if breaks else KEEPS)
        # torch itself refuses to set the memory of another device
        left_out = (
            ("_elsewhere",) if where in ("param", "grad") else ("_strided", "_sign_bit", "_other_shape", "_viewed")
        )
        names = [n for n in names if n not in left_out]
        name, index = rng.choice(names), rng.randrange(5)
        change = (BREAKS | KEEPS)[name]
        key = (cls.__name__, steps)
        if key not in expected:
            model, optimizer = _made(cls, "reference", steps)
            _feed(model, 9)
            optimizer.step()
            expected[key] = [p.detach() for p in model.parameters()]
        yield Input(
            f"{cls.__name__}, {backend}, after {steps} steps, {where} of parameter {index}: {name}, seed {number}",
            lambda a=(cls, backend, steps, index, where, change, number): _act(*a),
            "refuse" if breaks else "accept",
            lambda got, want=expected[key]: _difference(got, want),  # type: ignore[misc]
        )


def _difference(got: list[torch.Tensor], want: list[torch.Tensor]) -> str | None:
    worst = max(float((a - b).abs().max()) for a, b in zip(got, want, strict=True))
    return None if worst / 1e-2 < 1e-4 else f"updates differ by {worst / 1e-2:.1e} of lr"


def _names_it(error: BaseException) -> str | None:
    text = str(error)
    named = any(name in text for name in ("emb.weight", "mlp.weight", "mlp.bias", "norm.weight", "norm.bias"))
    return None if named else "the message does not name the parameter"


@pytest.mark.parametrize("look", LOOKS)
def test_replaced_tensors_are_refused_by_name_or_stepped_right(look: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong size was heap corruption, a freed or moved tensor a segmentation fault, with the C++ kernels."""
    use_look(look, monkeypatch)
    tally = attack("tensors replaced between steps", _inputs(number_of_inputs(300)), unfit=_names_it)
    tally.keep("replaced_tensors")


@pytest.mark.parametrize(
    "make", [torch._efficientzerotensor, lambda shape: torch._to_functional_tensor(torch.ones(shape))]
)
@pytest.mark.parametrize("look", LOOKS)
def test_a_gradient_that_never_had_memory_is_refused(
    look: str, make: Callable[[torch.Size], torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Class, layout, shape, dtype and size of the storage are right: its address was a segmentation fault."""
    use_look(look, monkeypatch)
    for cls in (OPTIMIZERS[name] for name in SHORT_NAMES):
        for backend, steps in (("cpp", 0), ("cpp", 2), ("reference", 2)):
            model, optimizer = _made(cls, backend, steps)
            _feed(model, 9)
            model.mlp.weight.grad = make(model.mlp.weight.shape)
            with pytest.raises(ValueError, match=r"parameter 'mlp.weight' or its gradient has no memory"):
                optimizer.step()


@pytest.mark.parametrize("cls", [OPTIMIZERS[name] for name in SHORT_NAMES])
def test_a_dtype_that_no_kernel_steps_is_refused_when_it_is_bound(cls: type[BlockwiseOptimizer]) -> None:
    """A parameter in fp8 was a KeyError of the C++ backend's table."""
    model = Model()
    model.mlp.weight = nn.Parameter(torch.zeros(ROWS, COLUMNS).to(torch.float8_e4m3fn))
    tag_parameters(model, rules=RULES)
    optimizer = cls(model.parameters())
    with pytest.raises(ValueError, match=r"parameter 'mlp.weight' has the dtype torch.float8_e4m3fn; only"):
        optimizer.binding_of(model.mlp.weight)


@pytest.mark.parametrize("cls", [OPTIMIZERS[name] for name in SHORT_NAMES])
def test_a_refused_tensor_leaves_no_state_behind(cls: type[BlockwiseOptimizer]) -> None:
    """A state in the wrong size would make the step fail also after the tensor was put right."""
    model, optimizer = _made(cls, "cpp", 0)
    _feed(model, 0)
    right, weight = model.mlp.weight.data, model.mlp.weight
    weight.data = right[:3].clone()
    with pytest.raises(ValueError, match=r"has the shape \(3, 33\) now, and was tagged with the shape \(12, 33\)"):
        optimizer.step()
    weight.data = right
    optimizer.step()
    assert optimizer.state[weight]["exp_avg"].shape == weight.shape
