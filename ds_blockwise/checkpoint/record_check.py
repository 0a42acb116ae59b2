# SPDX-License-Identifier: Apache-2.0
"""Whether a record, read from a file that may be damaged or forged, describes something that can be.

What is checked here is what the readers of a record take for granted: types, parts that tile their parameter, ranges
inside the tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ds_blockwise.blocks.roles import Role
from ds_blockwise.blocks.settings.defaults import GRANULARITIES
from ds_blockwise.checkpoint.record_types import (
    PackedMatrices,
    PackedPlacement,
    PackedShard,
    PortableRecord,
    Record,
    RunRecord,
)
from ds_blockwise.checkpoint.typed_data import typed

_LARGEST_NUMEL = 1 << 48
_DIMENSIONS = 8
_ROLES = frozenset(role.value for role in Role)


def check_record(record: object) -> Record:
    """The record itself, of a state dict.

    Raises:
        ValueError: it is damaged, with the place.
    """
    checked = typed(record, Record, "record")
    _raise(_parameter_problems(checked["parameters"]))
    _raise(_tensor_problems(checked))
    return checked


def check_run_record(record: object) -> RunRecord:
    """What a record says about the whole run.

    Raises:
        ValueError: it is damaged, with the place.
    """
    return typed(record, RunRecord, "record")


def check_portable_record(record: object) -> PortableRecord:
    """The record itself, of a portable checkpoint.

    Raises:
        ValueError: it is damaged, with the place.
    """
    checked = typed(record, PortableRecord, "record")
    _raise(_parameter_problems(checked["parameters"]))
    return checked


def _raise(problems: Iterable[str]) -> None:
    found = next(iter(problems), None)
    if found is not None:
        raise ValueError(found)


def _parameter_problems(parameters: Mapping[str, PackedMatrices]) -> Iterator[str]:
    for name, packed in parameters.items():
        problem = _shape_problem(packed) or _parts_problem(packed)
        if problem is not None:
            yield f"record.parameters[{name!r}]: {problem}"


def _shape_problem(packed: PackedMatrices) -> str | None:
    shape, matrices = packed["shape"], packed.get("matrices")
    if len(shape) > _DIMENSIONS or math.prod(shape) > _LARGEST_NUMEL:
        return f"no parameter has the shape {shape}"
    if matrices is not None and (len(matrices) != 3 or math.prod(matrices) != math.prod(shape)):
        return f"the matrices {matrices} do not have the elements of the shape {shape}"
    if packed["axis"] >= max(1, len(matrices or shape)):
        return f"axis {packed['axis']} is none of the shape {matrices or shape}"
    return None


def _parts_problem(packed: PackedMatrices) -> str | None:
    shape, matrices = packed["shape"], packed.get("matrices")
    size = (matrices or shape)[packed["axis"]] if shape else 1
    at, blocks, ends = 0, 0, []
    for part in packed["parts"]:
        problem = _part_problem(part)
        if problem is not None:
            return f"part {part}: {problem}"
        start, end, _, _, _, _, _, rows, first = part
        if start != at or end <= start:
            return f"the parts do not tile the {size} indices of its block axis"
        at = end
        if rows:
            if (end - start) % rows or first > blocks:
                return f"part {part}: blocks of {rows} rows from number {first} on do not fit"
            ends.append(first + (end - start) // rows)
            blocks = max(ends)
    count = matrices[0] if matrices is not None else 1
    if at != size or blocks * count != packed["num_blocks"]:
        return f"its parts end at {at} of {size} with {blocks * count} blocks of {packed['num_blocks']}"
    return None


def _part_problem(part: list[Any]) -> str | None:
    if len(part) != 9:
        return "it must have nine entries"
    start, end, role, head_rows, granularity, lr, weight_decay, rows, first = part
    try:
        typed([start, end, rows, first], list[int], "a bound")
        typed([lr, weight_decay], list[float], "a multiplier")
        typed([] if head_rows is None else [head_rows], list[int], "the rows of a head")
    except ValueError as error:
        return str(error)
    if not isinstance(role, str) or role not in _ROLES:
        return f"there is no role {role!r}"
    if granularity not in GRANULARITIES:
        return f"there is no granularity {granularity!r}"
    if lr < 0 or weight_decay < 0 or head_rows == 0:
        return "a negative multiplier, or a head without rows"
    return None


def _tensor_problems(record: Record) -> Iterator[str]:
    for index, tensor in enumerate(record["tensors"]):
        for placement in () if tensor is None else tensor["placements"]:
            numel = 0 if tensor is None else tensor["numel"]
            problem = _placement_problem(placement, numel, record["parameters"])
            if problem is not None:
                yield f"record.tensors[{index}], {placement['fqn']!r}: {problem}"


def _placement_problem(p: PackedPlacement, numel: int, parameters: Mapping[str, PackedMatrices]) -> str | None:
    packed = parameters.get(p["fqn"])
    if packed is None:
        return "the record does not describe that parameter"
    local = math.prod(packed["shape"])
    if (shard := p["shard"]) is not None:
        problem = _shard_problem(shard, packed["shape"])
        if problem is not None:
            return problem
        held = sum(end - start for start, end in shard["chunks"][shard["rank"]])
        local = local // max(1, packed["shape"][shard["dim"]]) * held
    if p["param_start"] + p["numel"] > local or p["flat_start"] + p["numel"] > max(numel, p["flat_start"]):
        return f"{p['numel']} elements from {p['param_start']} on of {local}, at {p['flat_start']} of {numel}"
    return None if all(cut <= local for cut in p["cuts"]) else f"cuts outside its {local} elements"


def _shard_problem(shard: PackedShard, shape: list[int]) -> str | None:
    if shard["dim"] >= len(shape) or shard["rank"] >= len(shard["chunks"]):
        return f"no dimension {shard['dim']} or no shard {shard['rank']}"
    size = shape[shard["dim"]]
    for ranges in shard["chunks"]:
        if any(len(each) != 2 or not each[0] <= each[1] <= size for each in ranges):
            return f"a shard outside the {size} indices of dimension {shard['dim']}"
    return None
