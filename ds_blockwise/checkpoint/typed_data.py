# SPDX-License-Identifier: Apache-2.0
"""Compares data that was read from a file with the type that the code declares for it.

The types are those of the readers themselves (`TypedDict`, lists, unions), so what is checked is what is relied on.
"""

from __future__ import annotations

import functools
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, TypeVar, Union

import torch

from ds_blockwise.values import is_finite

_T = TypeVar("_T")

LARGEST_INTEGER = 1 << 62
_SHOWN = 5  # lines of an error


def typed(value: object, expected: type[_T], what: str) -> _T:
    """The value itself.

    Args:
        value: what was read.
        expected: the declared type. Keys of a TypedDict that it does not name are ignored.
        what: the value's name, for the error.

    Raises:
        ValueError: it is of another type; with the place in it, the value there and what is allowed. Integers must be
            0 or more, numbers finite, tensors plain (on the CPU, dense, each element stored).
    """
    found = list(islice(_misfits(value, expected, what), _SHOWN + 1))
    if found:
        more = "; and more" if len(found) > _SHOWN else ""
        raise ValueError("; ".join(found[:_SHOWN]) + more)
    return typing.cast("_T", value)


def _misfits(value: object, expected: Any, where: str) -> Iterator[str]:
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if expected is Any or expected is object:
        return
    if origin in (Union, types.UnionType):
        if all(next(_misfits(value, each, where), None) is not None for each in arguments):
            structured = [each for each in arguments if _is_table(each) or typing.get_origin(each) is list]
            if len(structured) == 1 and isinstance(value, (Mapping, list)):
                yield from _misfits(value, structured[0], where)
            else:
                yield _wrong(value, where, " or ".join(_name(each) for each in arguments))
    elif typing.is_typeddict(expected):
        yield from _in_table(value, expected, where)
    elif _is_table(expected):
        if not isinstance(value, Mapping):
            yield _wrong(value, where, "a mapping")
            return
        for key, item in value.items():
            if arguments[:1] != (Any,) and not isinstance(key, str):
                yield _wrong(key, f"a key of {where}", "a string")
            elif arguments:
                yield from _misfits(item, arguments[1], f"{where}[{key!r}]")
    elif origin in (list, Sequence):
        if not isinstance(value, (list, tuple)):
            yield _wrong(value, where, "a list")
            return
        for index, item in enumerate(value):
            yield from _misfits(item, arguments[0], f"{where}[{index}]")
    elif not _fits(value, expected):
        yield _wrong(value, where, _name(expected))


def _in_table(value: object, expected: Any, where: str) -> Iterator[str]:
    if not isinstance(value, Mapping):
        yield _wrong(value, where, "a mapping")
        return
    fields = _fields(expected)
    missing = sorted(key for key in expected.__required_keys__ if key not in value)
    if missing:
        yield f"{where} lacks {', '.join(missing)}"
    for key, each in fields.items():
        if key in value:
            yield from _misfits(value[key], each, f"{where}.{key}")


@functools.cache
def _fields(expected: Any) -> dict[str, Any]:
    return typing.get_type_hints(expected)


def _is_table(expected: Any) -> bool:
    return typing.is_typeddict(expected) or typing.get_origin(expected) in (dict, Mapping) or expected is dict


def _fits(value: object, expected: Any) -> bool:
    if expected is None or expected is type(None):
        return value is None
    if expected is int:
        return type(value) is int and 0 <= value < LARGEST_INTEGER
    if expected is float:
        return type(value) in (int, float) and is_finite(typing.cast("float", value))
    if expected is torch.Tensor:
        return isinstance(value, torch.Tensor) and _is_plain(value)
    return isinstance(value, expected)


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether every element is there: not a tensor without storage, nor one that repeats the same few bytes."""
    if tensor.device.type == "meta" or tensor.layout != torch.strided or tensor.is_quantized:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _name(expected: Any) -> str:
    if expected is None or expected is type(None):
        return "null"
    names = {
        int: "an integer of 0 or more",
        float: "a finite number",
        str: "a string",
        bool: "true or false",
        torch.Tensor: "a plain tensor",
    }
    if expected in names:
        return names[expected]
    return "a mapping" if _is_table(expected) else str(getattr(expected, "__name__", expected))


def _wrong(value: object, where: str, allowed: str) -> str:
    if isinstance(value, torch.Tensor):
        shown = f"a tensor ({value.layout}, {value.device}) of shape {tuple(value.shape)}"
    elif isinstance(value, (str, int, float, bool, type(None))):
        shown = _short(value)
    else:
        shown = f"a {type(value).__name__}"
    return f"{where} must be {allowed}, got {shown}"


def _short(value: str | int | float | bool | None) -> str:
    if isinstance(value, int) and abs(value) >= LARGEST_INTEGER:
        return "an integer that large"  # Python refuses to write those of thousands of digits
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
