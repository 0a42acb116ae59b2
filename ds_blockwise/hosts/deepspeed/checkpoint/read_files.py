# SPDX-License-Identifier: Apache-2.0
"""Reads the files that a DeepSpeed engine saved with one of our optimizers, without an engine and without its ranks.

Read: ZeRO 0 (fp32, or 16 bit in the unfused wrapper), 1, 2, BF16_Optimizer and 3; any data-parallel and tensor-parallel
size. Where each element belongs is said by the record in the optimizer's state; file names and keys: DeepSpeed 0.19.8,
``runtime/engine.py`` 4300-4340 and 5356-5520.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ds_blockwise.blocks.segment_table import Placement, build_table
from ds_blockwise.blocks.spec import BlockSpec
from ds_blockwise.checkpoint.given_files import foreign_globals, is_plain, pickled
from ds_blockwise.checkpoint.manifest import CheckpointError, NoRecordError, Topology, read_manifest
from ds_blockwise.checkpoint.portable import per_block, whole_of
from ds_blockwise.checkpoint.portable_index import TRAINED
from ds_blockwise.checkpoint.portable_types import COUNTERS, LOSS_SCALE, Origin, TrainingState
from ds_blockwise.checkpoint.record import PER_BLOCK_KEY, placements_of, record_in, spec_of
from ds_blockwise.checkpoint.record_types import Record
from ds_blockwise.checkpoint.state_dicts import bad_values
from ds_blockwise.hosts.deepspeed.checkpoint.optimizer_files import (
    BaseState,
    check_state,
    load_optimizer_file,
    unpartitioned,
)
from ds_blockwise.hosts.deepspeed.checkpoint.tag_folder import NOT_OF_THE_USER, ModelFile, TagFolder

_NOT_SOUND = "Such a state trains nothing: take a checkpoint that was saved before."

_State = Mapping[str, Any]  # of one stepped tensor: step and moments


@dataclass(frozen=True)
class _Piece:
    """Elements of one parameter in one file: a placement with the tensors that it points into."""

    path: Path
    mp_rank: int
    placement: Placement
    master: torch.Tensor
    state: _State
    block_start: int  # of the placement's values in a compact second moment

    def read(self, kind: str) -> torch.Tensor:
        """1-D: the placement's elements of the master weights or of a moment, one value each."""
        p = self.placement
        if kind != "weights" and not self.state:
            return torch.zeros(p.numel)  # saved before the first step
        if kind == "exp_avg_sq" and PER_BLOCK_KEY in self.state:
            table = build_table(p.numel, [replace(p, flat_start=0)], shares_second_moment=True)
            return table.expand(self.state[PER_BLOCK_KEY].narrow(0, self.block_start, table.num_blocks))
        flat: torch.Tensor = self.master if kind == "weights" else self.state[kind]
        return flat.detach().reshape(-1).narrow(0, p.flat_start, p.numel)


class DeepSpeedFiles:
    """One tag folder, opened for reading; a `portable_types.Source`.

    Args:
        folder: the tag folder.
        trust: see `load_file`.

    Attributes:
        steps: per parameter, updates that its state has seen.
        group_of: per parameter, index of its param group.
        param_groups: the groups' hyper-parameters.
        origin: tag, step and topology.
        training_state: schedule, counters, loss scale, client state: plain containers only.
        notes: what a user should know about what was read.

    Raises:
        CheckpointError: files are missing, damaged, of different runs, or hold no record of ours.
        ValueError: a kind of checkpoint that is not read (pipeline, experts), with the reason.
    """

    def __init__(self, folder: Path, *, trust: bool = False) -> None:
        self.folder = Path(folder)
        self.notes: list[str] = []
        self._pieces: dict[str, list[_Piece]] = {}
        self._record: Record | None = None
        self.steps: dict[str, int] = {}
        self.group_of: dict[str, int] = {}
        self.param_groups: list[dict[str, object]] = []
        self._files = files = TagFolder(self.folder, trust=trust)
        loss_scale: Mapping[str, object] = {}
        for (mp_rank, _), path in sorted(files.optim_paths.items()):
            saved = load_optimizer_file(path, trust=trust)
            loss_scale = loss_scale or saved.loss_scale
            self._add(path, mp_rank, saved.base, saved.masters)
        if not files.optim_paths:
            for (mp_rank, _), model in sorted(files.models.items()):
                loss_scale = loss_scale or model.get("optimizer") or {}
                self._add_unpartitioned(files.model_paths[mp_rank, 0], mp_rank, model)
        self._check_coverage()
        self._frozen, self._buffers = self._fixed_names()
        topology = _said_topology(self.folder) or files.topology
        self.origin: Origin = {
            "tag": self.folder.name,
            "global_steps": files.first["global_steps"],
            "topology": topology,
        }
        self.training_state = self._training_state(files.first, loss_scale)

    @property
    def record(self) -> Record:
        """The optimizer's record: of the first file, with the parameters of all."""
        assert self._record is not None, "a file without a record is refused when it is opened"
        return self._record

    def names(self, kind: str) -> list[str]:
        """Names of the tensors of one of `portable.KINDS`."""
        return list(self._pieces) if kind in TRAINED else self._frozen if kind == "frozen" else self._buffers

    def tensor(self, kind: str, name: str) -> torch.Tensor:
        """One tensor in unsharded form; second moments of Adam-mini one per block (`portable.global_table`).

        Raises:
            CheckpointError: it holds values that no sound run has (`bad_values`), or lacks elements.
            ValueError: a frozen parameter or buffer that differs between tensor-parallel ranks.
        """
        if kind not in TRAINED:
            return self._fixed_tensor(kind, name)
        spec = self.spec(name)
        problem = next(self._bad_pieces(kind, name), None)
        if problem is not None:
            raise CheckpointError(f"{self.folder}/{problem}. {_NOT_SOUND}")
        whole = self._assembled(kind, name, spec)
        return per_block(whole, spec) if kind == "exp_avg_sq" and self.record["shares_second_moment"] else whole

    def spec(self, name: str) -> BlockSpec:
        """The blocks of a parameter."""
        return spec_of(self.record, name)

    def bad_values(self) -> Iterator[str]:
        """Each tensor with values that no sound run has: its file, what it is, how many; reads all of them."""
        for name in self._pieces:
            for kind in TRAINED:
                yield from self._bad_pieces(kind, name)
        for kind in ("frozen", "buffers"):
            for name in self.names(kind):
                for path, tensor in self._copies_of_fixed(name):
                    problem = bad_values(kind, tensor)
                    if problem is not None:
                        yield f"{path.name}: {name!r} {problem}"

    def _bad_pieces(self, kind: str, name: str) -> Iterator[str]:
        for piece in self._pieces[name]:
            problem = bad_values(kind, piece.read(kind)) if piece.placement.numel else None
            if problem is not None:
                yield f"{piece.path.name}: {kind} of {name!r} {problem}"

    def content_bytes(self) -> dict[str, int]:
        """Bytes of tensors in the files per kind of content, padding and copies of other ranks included."""
        seen: set[int] = set()
        sizes: dict[str, int] = {}

        def count(kind: str, tensor: object) -> None:
            if isinstance(tensor, torch.Tensor) and tensor.numel() and tensor.data_ptr() not in seen:
                seen.add(tensor.data_ptr())
                sizes[kind] = sizes.get(kind, 0) + tensor.numel() * tensor.element_size()

        for piece in (piece for pieces in self._pieces.values() for piece in pieces):
            count("weights", piece.master)
            for key, value in piece.state.items():
                count(key, value)
        for model in self._files.models.values():
            for value in (*(model["module"] or {}).values(), *(model.get("frozen_param_fragments") or {}).values()):
                count("model", value)
        return sizes

    def _add(self, path: Path, mp_rank: int, base: BaseState, masters: Sequence[torch.Tensor]) -> None:
        """Take in one optimizer state dict and the fp32 weights of its tensors, in the same order."""
        try:
            record = record_in(base)
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error
        if record is None:
            raise NoRecordError(
                f"{path} has no record of ds_blockwise: its optimizer was another one. Load it through the engine "
                f"(engine.load_checkpoint at the topology that saved it), and save again."
            )
        if self._record is None:
            self._record = {**record, "parameters": dict(record["parameters"])}
            self.param_groups = [_plain_group(group) for group in base["param_groups"]]
        for name, packed in record["parameters"].items():
            if self.record["parameters"].setdefault(name, packed) != packed:
                raise CheckpointError(
                    f"{path} describes parameter {name!r} otherwise than the other files do: the "
                    f"files are of different runs."
                )
        ids = [(i, g) for g, group in enumerate(base["param_groups"]) for i in group["params"]]
        if not len(ids) == len(masters) == len(record["tensors"]):
            raise CheckpointError(
                f"{path} has {len(masters)} tensors of weights, {len(ids)} in the optimizer's groups and "
                f"{len(record['tensors'])} in its record. It is damaged, or made of several files."
            )
        for position, ((number, group), master) in enumerate(zip(ids, masters, strict=True)):
            placements = placements_of(record, position)
            state = base["state"].get(number, {})
            check_state(path, position, record, placements, master, state)
            at = 0
            for placement in placements:
                piece = _Piece(path, mp_rank, placement, master, state, at)
                self._pieces.setdefault(placement.spec.fqn, []).append(piece)
                self.steps.setdefault(placement.spec.fqn, int(state.get("step", 0)))
                self.group_of.setdefault(placement.spec.fqn, group)
                if PER_BLOCK_KEY in state:
                    alone = [replace(placement, flat_start=0)]
                    at += build_table(placement.numel, alone, shares_second_moment=True).num_blocks

    def _add_unpartitioned(self, path: Path, mp_rank: int, model: ModelFile) -> None:
        """ZeRO 0: the optimizer's state is in the model file, the fp32 weights in its wrapper or in the module."""
        saved = unpartitioned(path, model)
        if saved.masters:
            return self._add(path, mp_rank, saved.base, saved.masters)
        record = record_in(saved.base)
        count = 0 if record is None else len(record["tensors"])
        names = [p.spec.fqn for i in range(count) if record for p in placements_of(record, i)[:1]]
        module = model["module"] or {}
        lacking = [name for name in names if not isinstance(module.get(name), torch.Tensor)]
        if lacking:
            raise CheckpointError(f"{path} has no weights of {lacking[0]!r}, which its record describes.")
        return self._add(path, mp_rank, saved.base, [module[name] for name in names])

    def _assembled(self, kind: str, name: str, spec: BlockSpec) -> torch.Tensor:
        """The unsharded tensor from the pieces of all ranks, one value per element."""
        by_shard: dict[int, list[_Piece]] = {}
        copy_of = _copies(self._pieces[name])
        for piece in self._pieces[name]:
            by_shard.setdefault(copy_of(piece), []).append(piece)
        shard = self._pieces[name][0].placement.shard
        locals_ = {rank: _joined(kind, pieces) for rank, pieces in sorted(by_shard.items())}
        if shard is None:
            copies = [local.reshape(spec.shape) for local in locals_.values()]
            different = [float((copy - copies[0]).abs().max()) for copy in copies if not torch.equal(copy, copies[0])]
            if different:
                self.notes.append(
                    f"{kind} of {name}: the copies of {len(copies)} tensor-parallel ranks differ by up to "
                    f"{max(different):.2e}; rank 0's is taken"
                )
            return copies[0]
        return whole_of(shard, locals_)

    def _fixed_names(self) -> tuple[list[str], list[str]]:
        first = self._files.first
        module = first["module"] or {}
        buffers = [name for name in first.get("buffer_names") or () if isinstance(module.get(name), torch.Tensor)]
        shapes = first.get("frozen_param_shapes")
        if shapes is not None:
            return [name for name, shape in shapes.items() if math.prod(shape)], buffers
        known = {name: module.get(name) for name in self._pieces}
        # tied weights appear under each of their names
        addresses = {t.data_ptr() for t in known.values() if isinstance(t, torch.Tensor)}
        frozen = [
            name
            for name, value in module.items()
            if isinstance(value, torch.Tensor) and value.numel() and name not in known and name not in buffers
            if value.data_ptr() not in addresses
        ]
        return frozen, buffers

    def _copies_of_fixed(self, name: str) -> Iterator[tuple[Path, torch.Tensor]]:
        """A tensor that is not trained: the whole of it, or a tensor-parallel rank's part, as each of them has it."""
        for mp_rank in range(self._files.tp):
            keys = sorted(key for key in self._files.models if key[0] == mp_rank)
            models, path = [self._files.models[key] for key in keys], self._files.model_paths[keys[0]]
            fragments = [(model.get("frozen_param_fragments") or {}).get(name) for model in models]
            found = [fragment for fragment in fragments if fragment is not None]
            if len(found) == len(models) > 1:
                shape = tuple((models[0].get("frozen_param_shapes") or {}).get(name, ()))
                whole = torch.cat([fragment.reshape(-1) for fragment in found])
                if whole.numel() < math.prod(shape):
                    raise CheckpointError(f"{path} and its neighbours lack elements of {name!r} (of shape {shape})")
                yield path, whole[: math.prod(shape)].reshape(shape)
                continue
            copy = found[0] if found else (models[0]["module"] or {}).get(name)
            if not isinstance(copy, torch.Tensor):
                raise CheckpointError(f"{path} lacks {name!r}, which other files of {self.folder} have")
            yield path, copy

    def _fixed_tensor(self, kind: str, name: str) -> torch.Tensor:
        copies = []
        for path, copy in self._copies_of_fixed(name):
            problem = bad_values(kind, copy)
            if problem is not None:
                raise CheckpointError(f"{path}: {name!r} {problem}. {_NOT_SOUND}")
            copies.append(copy)
        if any(not torch.equal(copy, copies[0]) for copy in copies):
            raise ValueError(
                f"{name!r} is not trained and differs between tensor-parallel ranks: nothing in the checkpoint says "
                f"how it is split, so it cannot be made whole. Train at tensor-parallel size 1, or train {name!r}."
            )
        return copies[0]

    def _check_coverage(self) -> None:
        """Every element of every parameter must be in the files exactly once."""
        for name, pieces in self._pieces.items():
            held: dict[int, list[tuple[int, int]]] = {}
            copy_of = _copies(pieces)
            for piece in pieces:
                p = piece.placement
                held.setdefault(copy_of(piece), []).append((p.param_start, p.param_start + p.numel))
                if int(piece.state.get("step", 0)) != self.steps[name]:
                    raise CheckpointError(
                        f"{piece.path}: parameter {name!r} is at step {piece.state.get('step')}, but at "
                        f"{self.steps[name]} in {pieces[0].path.name}: the files are of different steps."
                    )
            shard, spec = pieces[0].placement.shard, pieces[0].placement.spec
            if shard is not None and len(held) < sum(1 for ranges in shard.chunks if ranges):
                raise CheckpointError(f"{self.folder} has {len(held)} of the {len(shard.chunks)} shards of {name!r}")
            for rank, ranges in held.items():
                shape = spec.shape if shard is None else replace(shard, rank=rank).local_shape
                at = 0
                for start, end in sorted(r for r in ranges if r[0] < r[1]):
                    if start != at:
                        break
                    at = end
                if at != math.prod(shape):
                    raise CheckpointError(
                        f"{self.folder}: elements from {at} on of the {math.prod(shape)} of parameter {name!r} are "
                        f"missing or there twice: files are missing, or of different runs."
                    )

    def _training_state(self, first: ModelFile, loss_scale: Mapping[str, object]) -> TrainingState:
        client_state = {key: value for key, value in first.items() if key not in NOT_OF_THE_USER}
        schedule = {"lr_scheduler": first["lr_scheduler"]}
        for holder in (client_state, schedule):
            for key, value in holder.items():
                foreign = [] if is_plain(value) else foreign_globals(pickled(value))
                if foreign:
                    self.notes.append(f"{key!r} is left out: it holds Python objects ({', '.join(foreign)})")
                    holder[key] = None
        return {
            "lr_scheduler": schedule["lr_scheduler"],
            "counters": {k: int(n) for k, n in first.items() if k in COUNTERS and isinstance(n, (int, float))},
            "loss_scale": {k: loss_scale[k] for k in LOSS_SCALE if isinstance(loss_scale.get(k), (int, float))},
            "client_state": client_state,
        }


def _copies(pieces: list[_Piece]) -> Callable[[_Piece], int]:
    """Which shard, or which tensor-parallel rank's copy of a whole parameter, a piece belongs to.

    zero.Init before AutoTP cuts whole parameters over the tensor-parallel ranks too: these make one copy together.
    """
    first = pieces[0].placement
    one_copy = sum(piece.placement.numel for piece in pieces) == first.spec.numel

    def copy_of(piece: _Piece) -> int:
        shard = piece.placement.shard
        return shard.rank if shard is not None else 0 if one_copy else piece.mp_rank

    return copy_of


def _joined(kind: str, pieces: Iterable[_Piece]) -> torch.Tensor:
    ordered = sorted((p for p in pieces if p.placement.numel), key=lambda piece: piece.placement.param_start)
    parts = [piece.read(kind) for piece in ordered]
    return torch.cat(parts) if parts else torch.zeros(0)


def _plain_group(group: Mapping[str, object]) -> dict[str, object]:
    """A param group's settings as JSON holds them."""

    def plain(values: Iterable[tuple[str, object]]) -> Iterator[tuple[str, object]]:
        for key, value in values:
            value = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
            if isinstance(value, (bool, int, float, str, list, tuple, type(None))):
                yield key, list(value) if isinstance(value, tuple) else value

    return dict(plain((key, value) for key, value in group.items() if key != "params"))


def _said_topology(folder: Path) -> Topology | None:
    """The topology in the folder's manifest, if it has one."""
    manifest = read_manifest(folder)
    return None if manifest is None else manifest["topology"]
