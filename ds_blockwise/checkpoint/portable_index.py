# SPDX-License-Identifier: Apache-2.0
"""``portable.json``: reading it, and whether it lists what a portable checkpoint must have."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch

from ds_blockwise.blocks.spec import BlockSpec
from ds_blockwise.checkpoint.given_files import read_json
from ds_blockwise.checkpoint.manifest import CheckpointError
from ds_blockwise.checkpoint.portable_types import PortableIndex
from ds_blockwise.checkpoint.record import spec_of
from ds_blockwise.checkpoint.record_check import check_portable_record
from ds_blockwise.checkpoint.typed_data import typed

FORMAT = 1
INDEX = "portable.json"
TRAINED = ("weights", "exp_avg", "exp_avg_sq")  # one tensor of each per trained parameter
KINDS = (*TRAINED, "frozen", "buffers")

_SHOWN = 8  # problems in one error
_FILE = re.compile(r"[\w.-]+\.safetensors")


def read_index(path: Path) -> PortableIndex:
    """The index of a portable checkpoint; every tensor that it lists has the shape that its parameter asks for.

    Raises:
        CheckpointError: it is missing, damaged, incomplete, or of a later format.
    """
    try:
        said = read_json(path)
        if not isinstance(said, dict):
            raise TypeError(f"it is a {type(said).__name__}, not a mapping")
        missing = {"format", "record", "parameters", "param_groups", "origin", "tensors"} - set(said)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. A portable checkpoint has this file.") from error
    if missing:
        raise CheckpointError(f"{path} is incomplete: it lacks {', '.join(sorted(missing))}. Convert the source again.")
    if said["format"] != FORMAT:
        raise CheckpointError(
            f"{path} has format {said['format']!r}; this version of ds_blockwise reads {FORMAT}. Install a later "
            f"version, or convert the source again."
        )
    try:
        index = typed(said, PortableIndex, INDEX)
        check_portable_record(index["record"])
        _check_lists(index)
        problems = list(islice(_tensor_problems(index), _SHOWN))
    except ValueError as error:
        problems = [str(error)]
    if problems:
        listed = "; ".join(problems)
        raise CheckpointError(f"{path} is damaged: {listed}. Restore it from a copy, or convert the source again.")
    return index


def _check_lists(index: PortableIndex) -> None:
    """Refuse an index that lacks one of the lists that a reader asks for."""
    lacking = [kind for kind in KINDS if kind not in index["tensors"]]
    if lacking:
        raise ValueError(f"it lists no {', '.join(lacking)}")
    other = sorted(set(index["parameters"]) ^ set(index["record"]["parameters"]))
    if other:
        raise ValueError(f"the record describes other parameters than it lists ({', '.join(other[:_SHOWN])})")


def _tensor_problems(index: PortableIndex) -> Iterator[str]:
    """Whether there are three tensors of each parameter, of the shapes that they must have."""
    parameters, groups = index["parameters"], len(index["param_groups"])
    for kind in KINDS:
        for name, stored in index["tensors"][kind].items():
            if not _FILE.fullmatch(stored["file"]):
                yield f"{kind} of {name!r} are in {stored['file']!r}, which is not a file of safetensors"
            if not isinstance(getattr(torch, stored["dtype"], None), torch.dtype):
                yield f"{kind} of {name!r} have the dtype {stored['dtype']!r}, which torch does not have"
    for kind in TRAINED:
        tensors = index["tensors"][kind]
        yield from (f"{kind} of {name!r} are missing" for name in parameters if name not in tensors)
        yield from (f"{kind} of {name!r} belong to no parameter" for name in tensors if name not in parameters)
    for name, facts in parameters.items():
        if facts["group"] >= groups:
            yield f"{name!r} is in group {facts['group']} of {groups}"
        spec = spec_of(index["record"], name)
        for kind, shape in zip(TRAINED, (spec.shape, spec.shape, _second_shape(index, spec)), strict=True):
            stored_shape = tuple(index["tensors"][kind][name]["shape"]) if name in index["tensors"][kind] else shape
            if stored_shape != shape:
                yield f"{kind} of {name!r} have the shape {stored_shape} instead of {shape}"


def _second_shape(index: PortableIndex, spec: BlockSpec) -> tuple[int, ...]:
    if not index["record"]["shares_second_moment"]:
        return spec.shape
    rows = sum(part.end - part.start for part in spec.parts if not part.rows_per_block)
    return (spec.num_blocks + rows * spec.structure.numel_per_row * spec.structure.num_matrices,)
