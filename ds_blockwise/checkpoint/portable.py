# SPDX-License-Identifier: Apache-2.0
"""The portable checkpoint: safetensors keyed by parameter name in unsharded form, readable at any topology.

A folder holds ``portable.json`` (the index), ``<kind>-NNNNN.safetensors`` (the tensors) and ``training_state.pt``
(schedule, counters, the user's own state; loads with ``weights_only``). This file knows no ranks, no DeepSpeed and no
engine. A reader asks for the window of a parameter that its rank holds, and only the rows of that window are read.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from ds_blockwise.blocks.ranges import TensorShard
from ds_blockwise.blocks.segment_table import SegmentTable, build_table, whole_placement
from ds_blockwise.blocks.spec import BlockSpec
from ds_blockwise.checkpoint.folder import publish, start_partial, write_latest
from ds_blockwise.checkpoint.folder_rules.lock import holding
from ds_blockwise.checkpoint.folder_rules.tags import checked_tag
from ds_blockwise.checkpoint.given_files import load_torch_file, why_not_inside, why_not_readable
from ds_blockwise.checkpoint.manifest import CheckpointError, files_in, sums_of, write_manifest
from ds_blockwise.checkpoint.portable_index import FORMAT, INDEX, KINDS, read_index
from ds_blockwise.checkpoint.portable_types import Source, StoredTensor, TrainingState
from ds_blockwise.checkpoint.record import spec_of
from ds_blockwise.checkpoint.state_dicts import bad_values
from ds_blockwise.checkpoint.typed_data import typed
from ds_blockwise.kernels.update import block_sums

TRAINING_STATE = "training_state.pt"
# safetensors' own names of the dtypes that `save_portable` may meet
_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    **{"BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}
SHARD_BYTES = 1 << 30  # a file is written at once, so this is also what a conversion holds in memory


class Rows(Protocol):
    """A tensor, or a tensor in a file of which only some rows are read."""

    def __getitem__(self, rows: slice, /) -> torch.Tensor: ...


class _FileSlice(Rows, Protocol):
    def get_shape(self) -> list[int]: ...

    def get_dtype(self) -> str: ...


class _TensorFile(Protocol):
    """What ``safetensors.safe_open`` returns."""

    def get_slice(self, name: str) -> _FileSlice: ...

    def get_tensor(self, name: str) -> torch.Tensor: ...


@dataclass(frozen=True)
class Stored:
    """Where a tensor of a portable checkpoint is, and what it looks like."""

    file: str
    shape: tuple[int, ...]
    dtype: str


# ---------------------------------------------------------------- second moments, unsharded


def global_table(spec: BlockSpec) -> SegmentTable:
    """The table of a whole parameter on one rank; its slots are the global numbering of second moments.

    Blocks come first, by id, then one value per element of element-wise parts in the order of the tensor.
    """
    return build_table(spec.numel, [whole_placement(spec, None)], shares_second_moment=True)


def per_block(values: torch.Tensor, spec: BlockSpec) -> torch.Tensor:
    """The mean of every block.

    Args:
        values: one per element of the unsharded parameter, any shape, fp32 or fp64.
        spec: its blocks.

    Returns:
        1-D, same dtype, in the numbering of `global_table`. Where all values of a block are equal, exactly that value.
    """
    table = global_table(spec)
    sums = block_sums(values.reshape(-1).contiguous(), table, square=False)
    return (sums / table.slot_numel).to(values.dtype)


def per_element(values: torch.Tensor, spec: BlockSpec) -> torch.Tensor:
    """The inverse of `per_block`: one value per element, in the parameter's unsharded shape."""
    return global_table(spec).expand(values).reshape(spec.shape)


# ------------------------------------------------------------------------------ writing


def save_portable(
    source: Source, output: Path, shard_bytes: int = SHARD_BYTES, *, unchanged: Callable[[], None] = lambda: None
) -> Path:
    """Write a portable checkpoint as a complete tag folder, and let ``latest`` name it.

    Args:
        source: what to write; at most ``shard_bytes`` of its tensors (or one tensor) are in memory at a time.
        output: the checkpoints folder; the tag is the source's.
        shard_bytes: size of a file.
        unchanged: called when all is written; raises if the source is no longer what it was.

    Returns:
        The tag folder.

    Raises:
        ValueError: there is a checkpoint of that tag already, or it breaks the rule for tags.
        FolderInUseError: another job saves there.
        CheckpointError, OSError: the disk is full or the folder cannot be written; what was written is removed.
    """
    tag = checked_tag(source.origin["tag"])
    if (output / tag).exists():
        raise ValueError(f"{output / tag} exists already. Remove it, or give another OUTPUT.")
    with holding(output):
        return _save(source, output, tag, shard_bytes, unchanged)


def _save(source: Source, output: Path, tag: str, shard_bytes: int, unchanged: Callable[[], None]) -> Path:
    partial = start_partial(output, tag)
    try:
        _write(source, partial, shard_bytes)
        unchanged()
        write_manifest(
            partial,
            kind="portable",
            tag=tag,
            global_steps=source.origin["global_steps"],
            topology=source.origin["topology"],
            settings=source.record["settings"],
            files=sums_of(partial, files_in(partial)),
        )
    except BaseException:  # also when it is interrupted: nobody needs half a copy
        shutil.rmtree(partial, ignore_errors=True)
        raise
    folder = publish(partial)
    write_latest(output, tag)
    return folder


def _write(source: Source, folder: Path, shard_bytes: int) -> None:
    stored = {kind: _write_kind(source, kind, folder, shard_bytes) for kind in KINDS}
    names = list(stored["weights"])
    index = {
        "format": FORMAT,
        "record": {key: value for key, value in source.record.items() if key != "tensors"},
        "parameters": {name: {"step": source.steps[name], "group": source.group_of[name]} for name in names},
        "param_groups": source.param_groups,
        "origin": dict(source.origin),
        "tensors": stored,
    }
    torch.save(dict(source.training_state), folder / TRAINING_STATE)
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _write_kind(source: Source, kind: str, folder: Path, shard_bytes: int) -> dict[str, StoredTensor]:
    from safetensors.torch import save_file

    stored: dict[str, StoredTensor] = {}
    waiting: dict[str, torch.Tensor] = {}
    files = 0

    def flush() -> None:
        nonlocal files
        if waiting:
            files += 1
            name = f"{kind}-{files:05d}.safetensors"
            try:
                save_file(waiting, folder / name)
            except Exception as error:  # safetensors has a class of its own for a full disk
                raise CheckpointError(f"{folder / name} cannot be written: {error}") from error
            for key, tensor in waiting.items():
                dtype = str(tensor.dtype).removeprefix("torch.")
                stored[key] = {"file": name, "shape": list(tensor.shape), "dtype": dtype}
            waiting.clear()

    for key in source.names(kind):
        # a copy of its own: safetensors refuses tensors that share memory
        tensor = source.tensor(kind, key).detach().clone(memory_format=torch.contiguous_format)
        if sum(map(_bytes, waiting.values())) + _bytes(tensor) > shard_bytes:
            flush()
        waiting[key] = tensor
    flush()
    return stored


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


# ------------------------------------------------------------------------------ reading


class Portable:
    """A portable checkpoint, opened for reading. Files are mapped into memory; a tensor is read when it is asked for.

    Attributes:
        folder: its folder.
        record: the optimizer's record, without its stepped tensors.
        parameters: per trained parameter its ``step`` and the index of its param ``group``.
        param_groups: hyper-parameters of the source's groups.
        origin: tag and topology of the source.
        tensors: per kind, per name, where it is stored.

    Raises:
        CheckpointError: the folder is not a portable checkpoint that this version reads.
        ImportError: safetensors is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            import safetensors
        except ModuleNotFoundError as error:
            raise ImportError("portable checkpoints need safetensors: pip install 'ds_blockwise[deepspeed]'") from error
        self.folder = Path(folder)
        index = read_index(self.folder / INDEX)
        self.record = index["record"]
        self.parameters = index["parameters"]
        self.param_groups = index["param_groups"]
        self.origin = index["origin"]
        self.tensors = {
            kind: {name: Stored(s["file"], tuple(s["shape"]), s["dtype"]) for name, s in index["tensors"][kind].items()}
            for kind in KINDS
        }
        self._open = safetensors.safe_open
        self._files: dict[str, _TensorFile] = {}

    @property
    def shares_second_moment(self) -> bool:
        """Whether ``exp_avg_sq`` is stored one value per block (`global_table`) or per element."""
        return self.record["shares_second_moment"]

    def bytes_of(self, kind: str) -> int:
        """Bytes of the tensors of one of `KINDS`."""
        return sum(math.prod(s.shape) * _dtype(s.dtype).itemsize for s in self.tensors[kind].values())

    def problems(self, *, values: bool = False) -> list[str]:
        """Tensors that are not in the files as ``portable.json`` says, a line each.

        Args:
            values: also read them all, and name those with values that no sound run has (`bad_values`).
        """
        found = []
        for kind, name, stored in ((k, n, s) for k in KINDS for n, s in self.tensors[k].items()):
            try:
                with _named(self.folder / stored.file, name):
                    kept = self._file(kind, name).get_slice(name)
                    shape, dtype = tuple(kept.get_shape()), _DTYPES.get(kept.get_dtype())
                if shape != stored.shape:
                    found.append(f"{stored.file}: {name!r} has shape {shape} instead of {stored.shape}")
                elif dtype is not _dtype(stored.dtype):
                    found.append(f"{stored.file}: {name!r} has dtype {kept.get_dtype()} instead of {stored.dtype}")
                elif values and (problem := bad_values(kind, self.tensor(kind, name))) is not None:
                    found.append(f"{stored.file}: {kind} of {name!r} {problem}")
            except CheckpointError as error:
                found.append(str(error))
        return found

    def training_state(self) -> TrainingState:
        """Schedule, counters, loss scale and client state.

        Raises:
            CheckpointError: the file is damaged or holds more than plain containers and tensors.
        """
        path = self.folder / TRAINING_STATE
        try:
            loaded = load_torch_file(path)
        except ValueError as error:
            raise CheckpointError(f"{path} {error}") from error
        try:
            return typed(loaded, TrainingState, "the training state")
        except ValueError as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error

    def tensor(self, kind: str, name: str) -> torch.Tensor:
        """A whole tensor as it is stored (``exp_avg_sq`` may be one value per block)."""
        with _named(self.folder / self.tensors[kind][name].file, name):
            return self._file(kind, name).get_tensor(name)

    def window(self, kind: str, name: str, shard: TensorShard | None, start: int, numel: int) -> torch.Tensor:
        """Elements ``[start, start + numel)`` of the flattened tensor-parallel shard of a parameter.

        Args:
            kind: one of `KINDS`. ``exp_avg_sq`` is always given one value per element.
            name: a parameter.
            shard: the tensor-parallel split; None for the whole parameter.
            start: first element.
            numel: number of elements.

        Returns:
            1-D, in the stored dtype.
        """
        if kind == "exp_avg_sq" and self.shares_second_moment:
            spec = spec_of(self.record, name)
            return window_of(per_element(self.tensor(kind, name), spec), spec.shape, shard, start, numel)
        stored = self.tensors[kind][name]
        if not stored.shape:
            return self.tensor(kind, name).reshape(-1)[start : start + numel]
        with _named(self.folder / stored.file, name):
            return window_of(self._file(kind, name).get_slice(name), stored.shape, shard, start, numel)

    def _file(self, kind: str, name: str) -> _TensorFile:
        file = self.tensors[kind][name].file
        if file not in self._files:
            problem = why_not_inside(self.folder, file) or why_not_readable(self.folder / file)
            if problem is not None:
                raise ValueError(f"the file is {problem}")
            self._files[file] = self._open(str(self.folder / file), framework="pt")
        return self._files[file]


@contextlib.contextmanager
def _named(path: Path, name: str) -> Iterator[None]:
    """Turns what safetensors raises for a damaged file into an error that names the file and the tensor."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(f"{path}: {name!r} cannot be read: {error}") from error


def _dtype(name: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, name)
    return found


def window_of(whole: Rows, shape: tuple[int, ...], shard: TensorShard | None, start: int, numel: int) -> torch.Tensor:
    """Elements ``[start, start + numel)`` of the flattened tensor-parallel shard of a tensor.

    Args:
        whole: the unsharded tensor, or its slice object in a safetensors file.
        shape: unsharded shape, not a scalar's.
        shard: the tensor-parallel split; None for the whole tensor.
        start: first element.
        numel: number of elements.

    Returns:
        1-D tensor.
    """
    local = shape if shard is None else shard.local_shape
    inner = math.prod(local[1:])
    if numel == 0 or inner == 0:
        return whole[0:0].reshape(-1)
    first, last = start // inner, -(-(start + numel) // inner)
    if shard is None:
        rows = whole[first:last]
    elif shard.dim == 0:
        pieces, at = [], 0
        for low, high in shard.chunks[shard.rank]:
            begin, end = max(first, at), min(last, at + high - low)
            if begin < end:
                pieces.append(whole[low + begin - at : low + end - at])
            at += high - low
        rows = torch.cat(pieces)
    else:
        wide = whole[first:last]
        rows = torch.cat([wide.narrow(shard.dim, low, high - low) for low, high in shard.chunks[shard.rank]], shard.dim)
    return rows.reshape(-1)[start - first * inner : start - first * inner + numel]


def whole_of(shard: TensorShard, shards: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """The inverse of `window_of`: the unsharded tensor from the flattened shards of all tensor-parallel ranks.

    Args:
        shard: the split, of any rank.
        shards: per rank its elements, 1-D, all of one dtype.
    """
    whole = torch.empty(shard.global_shape, dtype=next(iter(shards.values())).dtype)
    for rank, flat in shards.items():
        view, at = flat.reshape(replace(shard, rank=rank).local_shape), 0
        for low, high in shard.chunks[rank]:
            whole.narrow(shard.dim, low, high - low).copy_(view.narrow(shard.dim, at, high - low))
            at += high - low
    return whole
