# SPDX-License-Identifier: Apache-2.0
"""Whether tensors are as they were: every change that a kernel must not meet is seen, by both ways to look."""

from __future__ import annotations

import functools
import sys
import sysconfig
from collections.abc import Callable

import pytest
import torch

from ds_blockwise.kernels.base import StepState
from ds_blockwise.kernels.close_look import CloseLook
from ds_blockwise.kernels.cpp import backend, build, look
from tests.helpers.kernel_cases import LOOKS, the_look

Change = Callable[[torch.Tensor], object]


class Plain(torch.Tensor):
    """A class that changes nothing, as users and libraries make them."""


class Tensors:
    """Two parameters, a 16-bit copy, a state with two moments and one with one, two gradients."""

    def __init__(self) -> None:
        # torch itself refuses to replace the memory of what requires gradients by that of another kind of number
        self.params = [torch.nn.Parameter(torch.ones(size), requires_grad=False) for size in ((4, 6), (6,))]
        self.copies = [torch.ones(4, 6, dtype=torch.bfloat16)]
        both: StepState = {"step": 1, "exp_avg": torch.ones(4, 6), "exp_avg_sq": torch.ones(4)}
        one: StepState = {"step": 1, "exp_avg": torch.ones(6)}
        self.states, self.grads = [both, one], [torch.ones(4, 6), torch.ones(6)]

    @property
    def lists(self) -> tuple[list[torch.Tensor], list[StepState], list[torch.Tensor]]:
        return self.params + self.copies, self.states, self.grads


def _free(size: int) -> Change:
    return lambda tensor: tensor.untyped_storage().resize_(size)


def _set_data(make: Change) -> Change:
    """What is made takes the place of the memory, the object stays."""
    return lambda tensor: setattr(tensor, "data", make(tensor.detach()))


SEEN_IN_ALL: dict[str, Change] = {
    "another size": _set_data(lambda t: torch.ones(7)),
    "another shape": _set_data(lambda t: t.view(1, -1)),
    "another shape of two dimensions": _set_data(lambda t: t.view(-1, 1)),
    "another dtype of the same width": _set_data(lambda t: t.view(torch.int32)),
    "another dtype": _set_data(lambda t: t.double()),
    "the sign bit, the same memory": _set_data(lambda t: t._neg_view()),
    "a step of two": _set_data(lambda t: torch.stack([t, t], -1)[..., 0]),
    "expanded": _set_data(lambda t: torch.ones(1).expand(t.shape)),
    "the memory freed": _free(0),
    "most of the memory freed": _free(4),
    "the last element freed": lambda t: t.untyped_storage().resize_(4 * t.numel() - 4),
    "the end of a larger storage": _set_data(
        lambda t: torch.cat([t.flatten(), t.flatten()])[t.numel() :].view(t.shape)
    ),
}
MOVED: Change = _set_data(torch.clone)

PLACES: dict[str, Callable[[Tensors], torch.Tensor]] = {
    "a parameter": lambda of: of.params[0],
    "the last parameter": lambda of: of.params[1],
    "a first moment": lambda of: of.states[0]["exp_avg"],
    "a second moment": lambda of: of.states[0]["exp_avg_sq"],
    "the last first moment": lambda of: of.states[1]["exp_avg"],
    "a gradient": lambda of: of.grads[0],
    "the last gradient": lambda of: of.grads[1],
}


def _remembered(name: str, tensors: Tensors) -> CloseLook:
    close = CloseLook(the_look(name))
    assert not close.still_holds(*tensors.lists)
    close.remember(*tensors.lists)
    assert close.still_holds(*tensors.lists)
    assert close.still_holds(*(list(each) for each in tensors.lists))
    return close


@pytest.mark.parametrize("name", LOOKS)
@pytest.mark.parametrize("place", PLACES)
def test_every_change_of_a_tensor_is_seen(place: str, name: str) -> None:
    """A kernel writes through raw addresses: what is not seen is a write into somebody else's memory."""
    for change, act in [*SEEN_IN_ALL.items(), ("moved", MOVED)]:
        tensors = Tensors()
        close = _remembered(name, tensors)
        act(PLACES[place](tensors))
        moved_gradient = change == "moved" and "gradient" in place
        assert close.still_holds(*tensors.lists) == moved_gradient, change
        close.forget()
        assert not close.still_holds(*tensors.lists)


def _another(make: Change) -> Callable[[Tensors], None]:
    """Another object in the place of a gradient and of a first moment."""

    def act(of: Tensors) -> None:
        of.grads[0] = make(of.grads[0])  # type: ignore[assignment]
        of.states[0]["exp_avg"] = make(of.states[0]["exp_avg"])  # type: ignore[typeddict-item]

    return act


def _only_gradient(make: Change) -> Callable[[Tensors], None]:
    def act(of: Tensors) -> None:
        of.grads[0] = make(of.grads[0])  # type: ignore[assignment]

    return act


SEEN_IN_LISTS: dict[str, Callable[[Tensors], object]] = {
    "a tensor class": _only_gradient(lambda t: t.as_subclass(Plain)),
    "a parameter": _only_gradient(lambda t: torch.nn.Parameter(t)),
    "meta": _only_gradient(lambda t: t.to("meta")),
    "a sparse gradient": _only_gradient(torch.Tensor.to_sparse),
    "compressed rows": _only_gradient(torch.Tensor.to_sparse_csr),
    "a quantized gradient": _only_gradient(lambda t: torch.quantize_per_tensor(t, 1.0, 0, torch.qint8)),
    "a functional gradient": _only_gradient(torch._to_functional_tensor),
    "no tensor": _only_gradient(lambda t: 3),
    "None": _only_gradient(lambda t: None),
    "zeros without memory": _only_gradient(lambda t: torch._efficientzerotensor(t.shape)),
    "copies": _another(torch.clone),
    "a gradient less": lambda of: of.grads.pop(),
    "a gradient more": lambda of: of.grads.append(of.grads[0]),
    "a gradient that is a copy": lambda of: of.copies.append(of.grads.pop(0)),
    "gradients in another order": lambda of: of.grads.reverse(),
    "parameters in another order": lambda of: of.params.reverse(),
    "a copy less": lambda of: of.copies.pop(),
    "states in another order": lambda of: of.states.reverse(),
    "a second moment less": lambda of: of.states[0].pop("exp_avg_sq"),
    "a second moment more": lambda of: of.states[1].update(exp_avg_sq=torch.ones(6)),
    "a moment replaced": lambda of: of.states[1].update(exp_avg=torch.ones(6)),
}


@pytest.mark.parametrize("name", LOOKS)
@pytest.mark.parametrize("change", SEEN_IN_LISTS)
def test_other_objects_are_seen(change: str, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Objects that are no tensors, or have no memory, must be seen without an error: what follows explains it."""
    tensors = Tensors()
    close = _remembered(name, tensors)
    SEEN_IN_LISTS[change](tensors)
    try:
        assert not close.still_holds(*tensors.lists)
    except TypeError:
        assert name == "python" and change in ("no tensor", "None")
    assert "aoti" not in capfd.readouterr().err, "torch prints what its C interface cannot answer"


@pytest.mark.parametrize("name", LOOKS)
def test_new_gradients_are_as_good_as_the_old_ones(name: str) -> None:
    """Every backward makes others, which lie elsewhere."""
    tensors = Tensors()
    close = _remembered(name, tensors)
    held = []
    for _ in range(3):
        held.append(tensors.grads)
        tensors.grads = [torch.randn(4, 6), torch.randn(6)]
        assert close.still_holds(*tensors.lists)
    tensors.states = [{**state} for state in tensors.states]  # type: ignore[misc]
    assert close.still_holds(*tensors.lists)


@pytest.mark.parametrize("name", LOOKS)
def test_many_dimensions_and_a_class_without_a_meaning_are_remembered(name: str) -> None:
    """A class of a library would cost every step a close look."""
    grad = torch.ones([1] * 30 + [3]).as_subclass(Plain)
    close = CloseLook(the_look(name))
    close.remember([torch.ones(3)], [], [grad])
    assert close.still_holds([], [], []) is False
    assert not close.still_holds([torch.ones(3)], [], [grad.clone()[None]])
    param = torch.ones(0)
    close.remember([param], [], [grad])
    assert close.still_holds([param], [], [torch.ones([1] * 30 + [3]).as_subclass(Plain)])


def test_what_is_no_list_is_no_fact() -> None:
    """The library is called by Python as it is: a wrong argument must not be taken for memory."""
    compiled = the_look("compiled")
    assert compiled is not None
    wrong: object
    for wrong in (3, None, (torch.ones(1),), torch.ones(1), "ab"):
        assert compiled.facts(wrong, [], []) is None  # type: ignore[arg-type]
        assert compiled.facts([], wrong, []) is None  # type: ignore[arg-type]
        assert compiled.facts_hold(wrong, [], [], []) is False  # type: ignore[arg-type]
        assert compiled.facts_hold(b"", [], wrong, []) is False  # type: ignore[arg-type]
    assert compiled.facts([torch.ones(1)]) is None  # type: ignore[call-arg]
    assert compiled.facts([], [3], []) == compiled.facts([], [{}], [])  # type: ignore[list-item]
    assert compiled.facts([], [{"exp_avg": 3}], []) is None  # type: ignore[typeddict-item]
    facts = compiled.facts([torch.ones(1)], [], [])
    assert facts is not None
    for length in range(len(facts)):  # facts of fewer tensors
        assert compiled.facts_hold(facts[:length], [torch.ones(1)], [], []) is False


def test_facts_keep_no_object_and_no_error() -> None:
    """Counts of references would leak memory in every step, or free what is in use."""
    compiled = the_look("compiled")
    assert compiled is not None
    tensors = Tensors()
    facts = compiled.facts(*tensors.lists)
    watched = [True, False, None, facts, *tensors.params, *tensors.grads, *tensors.states, tensors.states[0]["exp_avg"]]
    counts = [sys.getrefcount(each) for each in watched]
    other = Tensors().lists
    for _ in range(1000):
        assert compiled.facts_hold(facts, *tensors.lists)  # type: ignore[arg-type]
        assert not compiled.facts_hold(facts, *other)  # type: ignore[arg-type]
        assert compiled.facts([3], [], []) is None  # type: ignore[list-item]
    after = [sys.getrefcount(each) for each in watched]
    assert all(abs(a - b) < 100 for a, b in zip(after, counts, strict=True)), (counts, after)


BREAKS: dict[str, Callable[[pytest.MonkeyPatch], object]] = {
    "a torch without a function": lambda patch: patch.setattr(look, "_IS_NEG", "no_such_function"),
    "a Python without a function": lambda patch: patch.setattr(look, "_OF_PYTHON", ("PyNo_Such",)),
    "a torch in another place": lambda patch: patch.setattr(torch, "__file__", "/nowhere/torch/__init__.py"),
    "a function that says something else": lambda patch: patch.setattr(
        look,
        "_OF_TENSORS",
        tuple({"storage_size": "storage_offset", "storage_offset": "storage_size"}.get(x, x) for x in look._OF_TENSORS),
    ),
    "a Python without the lock": lambda patch: patch.setattr(sysconfig, "get_config_var", lambda name: 1),
    "a Python of another kind": lambda patch: patch.setattr(sys, "implementation", type("Other", (), {"name": "pypy"})),
}


@pytest.mark.parametrize("broken", BREAKS)
def test_another_torch_or_python_is_asked_in_python(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later torch may lack what is read, or keep it elsewhere; then nothing may be read wrong."""
    the_look("compiled")  # there is one to be broken
    library = backend.library()
    find = look._look_of.__wrapped__
    assert find(library) is not None
    BREAKS[broken](monkeypatch)
    assert find(library) is None
    monkeypatch.undo()
    assert find(library) is not None  # and the table of the library is right again


def test_nothing_is_compiled_for_a_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, or with the reference, a look must not need a compiler."""
    the_look("compiled")
    monkeypatch.setattr(build, "_of_the_wheel", lambda: None)
    monkeypatch.setattr(build, "library", functools.cache(lambda: pytest.fail("it is compiled")))
    monkeypatch.setattr(look, "library_at_hand", build.library_at_hand)
    assert look.compiled_look() is None
    monkeypatch.setattr(build, "library", functools.cache(lambda: loaded))
    loaded = backend.library()
    assert look.compiled_look() is None
    assert build.library() is loaded  # now it is loaded, as the first step on a CPU does
    assert look.compiled_look() == look._look_of(loaded) is not None
