# SPDX-License-Identifier: Apache-2.0
"""A look at many tensors in one call of the compiled library (``look.h``), by torch's and Python's C interfaces.

A fact that Python asks a tensor for costs 50 to 100 nanoseconds, and a dozen decide. Nothing here is needed: where a
function is missing, or says something else than Python, `compiled_look` is None and Python asks.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import sysconfig
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ds_blockwise.kernels.base import StepState
from ds_blockwise.kernels.cpp.build import library_at_hand

Tensors = list[torch.Tensor]
States = list[StepState]

# of torch's C interface, which is stable: torch/csrc/inductor/aoti_torch/c/shim.h
_OF_TENSORS = (
    "layout",
    "dtype",
    "device_type",
    "device_index",
    "dim",
    "data_ptr",
    "storage_size",
    "storage_offset",
    "sizes",
    "strides",
)
_IS_NEG = "_ZN2at6native6is_negERKNS_6TensorE"  # ``at::native::is_neg``: the C interface has no such function
# of Python's, which is stable too
_OF_PYTHON = (
    "PyList_Size",
    "PyList_GetItem",
    "PyDict_GetItem",
    "PyType_IsSubtype",
    "PyBytes_FromStringAndSize",
    "PyBytes_Size",
    "PyBytes_AsString",
    "Py_IncRef",
    "PyErr_Clear",
)
_MOMENTS = ("exp_avg", "exp_avg_sq")
_WORD = ctypes.sizeof(ctypes.c_void_p)
_METH_FASTCALL = 0x0080


class CompiledLook(NamedTuple):
    """Facts of tensors: class, layout, dtype, device, sign bit, shape, strides, address, size of the storage, offset.

    Both functions take a list of tensors that stay, a list of states, of which the two moments are looked at, and a
    list of gradients, whose addresses are no fact. All are lists, nothing else.

    Attributes:
        facts: returns the facts; None if something in the lists is no tensor, or has no memory.
        facts_hold: whether the facts that come first are those of the lists that follow.
    """

    facts: Callable[[Tensors, States, Tensors], bytes | None]
    facts_hold: Callable[[bytes, Tensors, States, Tensors], bool]


def compiled_look() -> CompiledLook | None:
    """The look of the compiled library; None where there is none, or where it sees something else than Python."""
    library = library_at_hand()
    return None if library is None else _look_of(library)


@functools.cache
def _look_of(library: ctypes.CDLL) -> CompiledLook | None:
    if sys.implementation.name != "cpython" or sysconfig.get_config_var("Py_GIL_DISABLED"):
        return None
    try:
        table = _table()
        library.ds_blockwise_set_look_table(table)
        names = ("ds_blockwise_facts", "ds_blockwise_facts_hold")
        look = CompiledLook(*(_python_function(getattr(library, name)) for name in names))
    except (AttributeError, OSError, StopIteration):  # another torch or Python than those it was written for
        return None
    return look if _sees_what_python_sees(look) else None


def _table() -> ctypes.Array[ctypes.c_int64]:
    """``LookTable`` of look.h, field by field.

    Raises:
        AttributeError, OSError, StopIteration: something cannot be found.
    """
    torchs = _loaded_torch()
    functions = [getattr(torchs, f"aoti_torch_get_{fact}") for fact in _OF_TENSORS] + [getattr(torchs, _IS_NEG)]
    functions += [getattr(ctypes.pythonapi, name) for name in _OF_PYTHON]
    addresses = [ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions]
    objects = [id(each) for each in (torch.Tensor, torch.nn.Parameter, *_MOMENTS, True, False, None)]
    tensor = torch.empty(1)
    size = torch.Tensor.__basicsize__
    places = [
        _place_of(id(torch.Tensor), id(tensor), size),
        _place_of(tensor._cdata, id(tensor), size),
        _place_of(tensor.untyped_storage()._cdata, tensor._cdata, 8 * _WORD),  # among the first: no tensor is smaller
    ]
    return (ctypes.c_int64 * (len(addresses) + len(objects) + len(places)))(*addresses, *objects, *places)


def _loaded_torch() -> ctypes.CDLL:
    folder = Path(torch.__file__).parent / "lib"
    path = next(path for name in ("libtorch_cpu.so", "libtorch_cpu.dylib") if (path := folder / name).exists())
    return ctypes.CDLL(str(path), os.RTLD_NOW | os.RTLD_NOLOAD)


def _place_of(word: int, begin: int, size: int) -> int:
    """Where an address lies in an object that begins at another one and has so many bytes; from its beginning."""
    return next(at for at in range(0, size, _WORD) if ctypes.c_int64.from_address(begin + at).value == word)


class _Definition(ctypes.Structure):
    """``PyMethodDef``."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("function", ctypes.c_void_p),
        ("flags", ctypes.c_int),
        ("doc", ctypes.c_char_p),
    )


_DEFINITIONS: list[_Definition] = []  # Python reads them as long as the functions live


def _python_function(function: Any) -> Callable[..., Any]:
    """A function that Python calls itself: ctypes takes ten times as long."""
    definition = _Definition(function.__name__.encode(), ctypes.cast(function, ctypes.c_void_p), _METH_FASTCALL, None)
    _DEFINITIONS.append(definition)
    make = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)(
        ("PyCFunction_NewEx", ctypes.pythonapi)
    )
    made: Callable[..., Any] = make(ctypes.addressof(definition), None, None)
    return made


def _sees_what_python_sees(look: CompiledLook) -> bool:
    """Whether every fact of tensors that differ in one of them each is the one that Python reads."""
    plain = torch.empty(4, 6)
    others = [
        torch.nn.Parameter(plain),
        plain._neg_view(),
        plain.t(),
        plain[1:3],
        plain[0, 1:],
        plain[0, 0],
        plain[:0],
        plain.view(torch.int32),
        plain.to(torch.bfloat16),
        plain.to("meta"),
        torch.empty(30)[:24].view(4, 6),
    ]
    kinds: dict[object, tuple[int, ...]] = {}
    for tensor in (plain, *others):
        found = look.facts([tensor], [], [])
        if found is None:
            return False
        facts = array("q", found)
        *counts, cls, layout_and_dtype, device, dim_and_sign, address, nbytes, offset = facts[:9]
        of_python = (id(type(tensor)), tensor.data_ptr(), tensor.untyped_storage().nbytes(), tensor.storage_offset())
        pairs = [each for pair in zip(tensor.shape, tensor.stride(), strict=True) for each in pair]
        if (
            counts != [1, 1]
            or (cls, address, nbytes, offset) != of_python
            or facts[9:].tolist() != pairs
            or dim_and_sign != 2 * tensor.dim() + tensor.is_neg()
            or not look.facts_hold(found, [tensor], [], [])
            or look.facts_hold(found, [plain if tensor is not plain else others[0]], [], [])
        ):
            return False
        kinds[tensor.dtype, tensor.device] = layout_and_dtype, device
    state: StepState = {"step": 1, "exp_avg": plain, "exp_avg_sq": others[0]}
    replaced: StepState = {**state, "exp_avg": plain.clone()}
    moments = look.facts([], [state], [others[0]])
    return (
        len(set(kinds.values())) == len(kinds)
        and moments is not None
        and look.facts_hold(moments, [], [state], [torch.nn.Parameter(torch.empty(4, 6))])
        and not look.facts_hold(moments, [], [replaced], [others[0]])
    )
