# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's save_checkpoint, made safe against crashes and full disks.

DeepSpeed writes ``latest`` in place, and a rank whose write fails leaves the others waiting. Here all files go to
``<tag>.partial``, a manifest with their sums follows, one rename makes the checkpoint visible, and only then
``latest`` moves. What fails on one rank is raised on all. Checked with DeepSpeed 0.19.8.
"""

from __future__ import annotations

import functools
import io
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.checkpoint.constants import UNIVERSAL_CHECKPOINT_INFO
from deepspeed.utils import groups
from deepspeed.utils.bwc import bwc_pipeline_parallel_world_size, bwc_tensor_model_parallel_world_size

from ds_blockwise.checkpoint import folder as files
from ds_blockwise.checkpoint.folder import PARTIAL, CheckpointError
from ds_blockwise.checkpoint.record import KEY, settings_of
from ds_blockwise.hosts.deepspeed.checkpoint.universal import universal_checkpoint_info
from ds_blockwise.hosts.deepspeed.checks import tensor_parallel_mpu
from ds_blockwise.optimizers.base import BlockwiseOptimizer
from ds_blockwise.parallel.agree import gather, is_first_rank

logger = logging.getLogger(__name__)

# What a rank that writes alone does inside DeepSpeed's save: (attribute of the engine or None for itself, method).
_WRITERS = (
    ("checkpoint_engine", "save"),
    ("checkpoint_engine", "makedirs"),
    (None, "_save_checkpoint"),
    (None, "_save_zero_checkpoint"),
    (None, "_copy_recovery_script"),
)


def topology_of(engine: Any) -> dict[str, Any]:
    """Numbers of ranks, wrapper and precision: what decides whether DeepSpeed's files fit an engine as they are."""
    offload = engine.zero_offload_optimizer()
    device = "none" if offload is None else str(getattr(offload.device, "value", offload.device))
    return {
        "world_size": dist.get_world_size(),
        "dp": int(engine.seq_dp_world_size),
        "tp": int(bwc_tensor_model_parallel_world_size(tensor_parallel_mpu(engine))),
        "pp": int(bwc_pipeline_parallel_world_size(engine.mpu)),
        "zero_stage": int(engine.zero_optimization_stage()),
        "wrapper": type(engine.optimizer).__name__ if engine.optimizer is not engine.basic_optimizer else "none",
        "dtype": "bf16" if engine.bfloat16_enabled() else "fp16" if engine.fp16_enabled() else "fp32",
        "offload": device,
        "ep": int(groups._get_max_expert_size() or 1) if engine.has_moe_layers else 1,
    }


def save_checkpoint(
    engine: Any,
    save_dir: str | Path,
    tag: str | None = None,
    client_state: dict[str, Any] | None = None,
    save_latest: bool = True,
    exclude_frozen_parameters: bool = False,
    rank_state: Any = None,
) -> bool:
    """Save a checkpoint that is either whole or not there; a collective over all ranks.

    Args:
        engine: any ``DeepSpeedEngine``.
        save_dir: the checkpoints folder; made if it is missing.
        tag: name of the checkpoint; default ``global_step<N>``.
        client_state: what the caller wants back from `load_checkpoint`.
        save_latest: let ``latest`` name this checkpoint afterwards.
        exclude_frozen_parameters: as DeepSpeed's.
        rank_state: plain containers and tensors of this rank alone (random states, say); see `load_rank_state`.

    Returns:
        True.

    Raises:
        CheckpointError: on every rank, with rank, file, cause and free space: something could not be written. The
            unfinished folder is gone; ``latest`` and all other checkpoints are as they were.
        ValueError: ``save_dir`` is empty, the ranks' tags differ, or ``client_state`` has the key ``ds_blockwise``.
    """
    if not save_dir:
        raise ValueError(f"save_dir must name a folder, got {save_dir!r}")
    state = dict(client_state or {})
    if KEY in state:
        raise ValueError(f"client_state has the key {KEY!r}, which this package uses itself. Rename it.")
    own, info = _own_entries(engine)
    state |= {KEY: own} if UNIVERSAL_CHECKPOINT_INFO in state else {KEY: own, **info}
    tag = f"global_step{engine.global_steps}" if tag is None else str(tag)
    original = functools.partial(
        type(engine).save_checkpoint,
        engine,
        str(save_dir),
        client_state=state,
        exclude_frozen_parameters=exclude_frozen_parameters,
    )
    if engine.checkpoint_engine.is_decoupled():
        _warn_decoupled(engine)
        return bool(original(tag=tag, save_latest=save_latest))
    save = _Save(engine, Path(save_dir), tag)
    save.start()
    with save.recording():
        try:
            original(tag=tag + PARTIAL, save_latest=False)
        except Exception as error:  # reported by `finish` on all ranks
            save.record("DeepSpeed's save_checkpoint", error)
            # What can still raise (copying NVMe swap files) stands between DeepSpeed's first and its last barrier: the
            # others wait in the last one.
            dist.barrier()
        if rank_state is not None:
            save.write_rank_state(rank_state)
    save.finish(own, save_latest)
    return True


def _own_entries(engine: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Our entry of the client state, and the one that DeepSpeed's universal converter needs."""
    optimizer = engine.basic_optimizer
    settings = settings_of(optimizer) if isinstance(optimizer, BlockwiseOptimizer) else None
    # DeepSpeed keeps that key for itself when there are experts
    info = None if engine.has_moe_layers else universal_checkpoint_info(engine)
    entries = {} if info is None else {UNIVERSAL_CHECKPOINT_INFO: info}
    return {"settings": settings, "topology": topology_of(engine), "added": list(entries)}, entries


def _warn_decoupled(engine: Any) -> None:
    if is_first_rank() and not getattr(engine, "_ds_blockwise_warned", False):
        engine._ds_blockwise_warned = True
        logger.warning(
            "%s writes checkpoints while training goes on: they get no manifest and no protection against a crash or "
            "a full disk. Remove its section from the JSON to have both.",
            type(engine.checkpoint_engine).__name__,
        )


@dataclass
class _Save:
    """One save under way.

    Attributes:
        engine: the engine that saves.
        folder: the checkpoints folder.
        tag: final name.
        problems: what this rank could not write.
        written: names of the files that this rank wrote, relative to the partial folder.
    """

    engine: Any
    folder: Path
    tag: str
    problems: list[str] = field(default_factory=list)
    written: set[str] = field(default_factory=set)

    @property
    def partial(self) -> Path:
        return self.folder / (self.tag + PARTIAL)

    @property
    def leads(self) -> bool:
        """Whether this rank makes, renames and removes folders."""
        return leads(self.engine)

    def record(self, what: str, error: Exception) -> None:
        text = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if isinstance(error, RuntimeError) and "inline_container" in text:
            text = f"torch could not write all of it (disk full, quota or limit of file sizes): {text}"
        self.problems.append(f"{what}: {text} ({_free(self.folder)} free)")

    def start(self) -> None:
        """Make the partial folder before anything is collected or written."""
        if self.leads:
            self._attempt(lambda: files.start_partial(self.folder, self.tag), str(self.folder))
        said = gather((self.tag, self.problems))
        tags = {tag for tag, _ in said}
        if len(tags) > 1:
            raise ValueError(f"all ranks must save under one tag, got {', '.join(sorted(map(repr, tags)))}")
        self._raise_if_any([problems for _, problems in said])

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Note failing writes instead of raising: DeepSpeed's next collective needs every rank."""
        patched = [(self.engine, "module_state_dict", vars(self.engine).get("module_state_dict"))]
        self.engine.module_state_dict = _without_empty(self.engine.module_state_dict)
        for attribute, name in _WRITERS:
            owner = self.engine if attribute is None else getattr(self.engine, attribute)
            patched.append((owner, name, vars(owner).get(name)))
            setattr(owner, name, self._recorded(getattr(owner, name), name))
        try:
            yield
        finally:
            for owner, name, before in patched:
                delattr(owner, name) if before is None else setattr(owner, name, before)

    def _recorded(self, method: Callable[..., Any], name: str) -> Callable[..., Any]:
        @functools.wraps(method)
        def recorded(*args: Any, **keywords: Any) -> Any:
            path = str(keywords.get("path", args[1] if name == "save" and len(args) > 1 else args[0] if args else ""))
            try:
                result = method(*args, **keywords)
                if name == "save" and Path(path).is_file():  # not every rank's checkpoint engine writes
                    self._wrote(Path(path))
                return result
            except Exception as error:  # reported by `finish` on all ranks
                self.record(path, error)
                return None

        return recorded

    def _wrote(self, path: Path) -> None:
        if path.is_relative_to(self.partial):
            self.written.add(path.relative_to(self.partial).as_posix())

    def write_rank_state(self, rank_state: Any) -> None:
        path = self.partial / _rank_file(dist.get_rank())

        def write() -> None:
            buffer = io.BytesIO()
            torch.save(rank_state, buffer)
            buffer.seek(0)
            torch.load(buffer, weights_only=True)  # what could not be read back must not be written
            path.write_bytes(buffer.getvalue())
            self._wrote(path)

        self._attempt(write, str(path))

    def finish(self, own: dict[str, Any], save_latest: bool) -> None:
        """Sum the files, write the manifest, rename, move ``latest``; or undo all and raise everywhere."""
        said = gather((node_of(self.engine), self.problems, self.written))
        self._raise_if_any([problems for _, problems, _ in said])
        self._attempt(lambda: self._sum([(node, written) for node, _, written in said]), str(self.partial))
        summed = gather((self.problems, getattr(self, "sums", {})))
        self._raise_if_any([problems for problems, _ in summed])
        if self.leads:
            mine = [sums for (node, _, _), (_, sums) in zip(said, summed, strict=True) if node == node_of(self.engine)]
            self._attempt(lambda: self._publish(own, {k: v for sums in mine for k, v in sums.items()}), str(self.tag))
        self._raise_if_any(gather(self.problems))
        if save_latest:
            if self.leads:
                self._attempt(lambda: files.write_latest(self.folder, self.tag), str(self.folder / files.LATEST))
            self._raise_if_any(gather(self.problems), complete=True)

    def _sum(self, said: list[tuple[int, set[str]]]) -> None:
        rank = dist.get_rank()
        # several ranks may write parts of one file: the first of them sums it
        earlier = set().union(*(written for node, written in said[:rank] if node == said[rank][0]))
        names = self.written - earlier
        if self.leads:  # files that DeepSpeed wrote by other ways than its checkpoint engine
            claimed = set().union(*(written for node, written in said if node == said[rank][0]))
            names = names | (set(files.files_in(self.partial)) - claimed)
        self.sums = files.sums_of(self.partial, sorted(names))

    def _publish(self, own: dict[str, Any], sums: dict[str, dict[str, Any]]) -> None:
        files.write_manifest(
            self.partial,
            kind="deepspeed",
            tag=self.tag,
            global_steps=int(self.engine.global_steps),
            topology=own["topology"],
            settings=own["settings"],
            files=sums,
        )
        files.publish(self.partial)

    def _attempt(self, action: Callable[[], Any], what: str) -> None:
        try:
            action()
        except Exception as error:  # reported on all ranks by the next `_raise_if_any`
            self.record(what, error)

    def _raise_if_any(self, problems: list[list[str]], *, complete: bool = False) -> None:
        lines = [f"rank {rank}: {line}" for rank, found in enumerate(problems) for line in dict.fromkeys(found)]
        if not lines:
            return
        listed = "\n  - ".join(lines)
        if complete:
            raise CheckpointError(
                f"checkpoint {self.tag!r} in {self.folder} is complete, but {files.LATEST!r} still names another:\n"
                f"  - {listed}\nMake room, then write the tag into it."
            )
        if self.leads:
            shutil.rmtree(self.partial, ignore_errors=True)  # a folder that stays is removed by the next save
        raise CheckpointError(
            f"checkpoint {self.tag!r} could not be saved in {self.folder}:\n  - {listed}\nIts files were removed; all "
            f"earlier ones and {files.LATEST!r} are as they were. Make room or correct the path, then save again."
        )


def _without_empty(module_state_dict: Callable[..., Any]) -> Callable[..., Any]:
    """A model's state dict without entries that are None.

    Megatron-core's layers save ``_extra_state = None`` (and do not miss it); DeepSpeed's universal converter asks each
    entry of the state dict for ``.float()``.
    """

    @functools.wraps(module_state_dict)
    def without_empty(*args: Any, **keywords: Any) -> Any:
        state = module_state_dict(*args, **keywords)
        for key in [key for key, value in (state or {}).items() if value is None]:
            del state[key]
        return state

    return without_empty


def _free(folder: Path) -> str:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        return f"{shutil.disk_usage(folder).free / 1e9:.2f} GB"
    except OSError:  # this is about another error already
        return "unknown space"


# ------------------------------------------------------------------------------ one rank


def load_rank_state(path: str | Path) -> Any:
    """What this rank gave to `save_checkpoint` as ``rank_state``; None if the checkpoint has none for it.

    Args:
        path: the path that `load_checkpoint` returned (the tag folder or a file in it).
    """
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    file = folder / _rank_file(dist.get_rank() if dist.is_initialized() else 0)
    return torch.load(file, map_location="cpu", weights_only=True) if file.is_file() else None


def _rank_file(rank: int) -> str:
    return f"rank_state_{rank:05d}.pt"


def node_of(engine: Any) -> int:
    """Number of the storage that this rank writes to: 0, or with node-local storage its node's first rank."""
    return dist.get_rank() - int(engine.local_rank) if engine.use_node_local_storage() else 0


def leads(engine: Any) -> bool:
    """Whether this rank makes, renames and removes the folders of its storage."""
    return dist.get_rank() == node_of(engine)
