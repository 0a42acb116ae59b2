# SPDX-License-Identifier: Apache-2.0
"""Where a rank stands when it saves or loads: the topology of its engine, its storage, and the checkpoint there.

All ranks load one version of one checkpoint, or none does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist
from deepspeed.utils import groups
from deepspeed.utils.bwc import bwc_pipeline_parallel_world_size, bwc_tensor_model_parallel_world_size

from ds_blockwise.checkpoint.folder import LATEST, Checkpoint, resolve_tag
from ds_blockwise.checkpoint.folder_rules.tags import Validation
from ds_blockwise.checkpoint.manifest import (
    CheckpointError,
    ReplacedError,
    Topology,
    check_version,
    listed_files,
    of_one_version,
    once_more,
    verify,
)
from ds_blockwise.hosts.deepspeed.checkpoint.rehearse import model_path
from ds_blockwise.hosts.deepspeed.checkpoint.tag_folder import that_run_code
from ds_blockwise.hosts.deepspeed.engine import (
    Engine,
    is_wrapped,
    offload_device,
    tensor_parallel_mpu,
    trusts,
    verifies,
)
from ds_blockwise.parallel.agree import first_error, gather

_Found = tuple[Checkpoint | None, list[str], str | None]  # on one storage: the checkpoint, its files, an error


def topology_of(engine: Engine) -> Topology:
    """Numbers of ranks, wrapper and precision: what decides whether DeepSpeed's files fit an engine as they are."""
    return {
        "world_size": dist.get_world_size(),
        "dp": int(engine.seq_dp_world_size),
        "tp": int(bwc_tensor_model_parallel_world_size(tensor_parallel_mpu(engine))),
        "pp": int(bwc_pipeline_parallel_world_size(engine.mpu)),
        "zero_stage": int(engine.zero_optimization_stage()),
        "wrapper": type(engine.optimizer).__name__ if is_wrapped(engine) else "none",
        "dtype": "bf16" if engine.bfloat16_enabled() else "fp16" if engine.fp16_enabled() else "fp32",
        "offload": offload_device(engine),
        "ep": int(groups._get_max_expert_size() or 1) if engine.has_moe_layers else 1,
    }


def tag_validation(engine: Engine) -> Validation:
    """What the JSON's ``"checkpoint": {"tag_validation": ...}`` says; ``fail`` without it.

    DeepSpeed's own default is to warn, and to let every rank write under its own tag.
    """
    said = str((engine._config._param_dict.get("checkpoint") or {}).get("tag_validation", "fail")).lower()
    return "warn" if said == "warn" else "ignore" if said == "ignore" else "fail"


def node_of(engine: Engine) -> int:
    """Number of the storage that this rank writes to: 0, or with node-local storage its node's first rank."""
    return dist.get_rank() - int(engine.local_rank) if engine.use_node_local_storage() else 0


def leads(engine: Engine) -> bool:
    """Whether this rank makes, renames and removes the folders of its storage."""
    return dist.get_rank() == node_of(engine)


def find_together(
    engine: Engine, folder: Path, tag: str | None, *, latest: str = LATEST
) -> tuple[Checkpoint | None, list[str]]:
    """Collective over all ranks: the checkpoint that all will load.

    Args:
        engine: of this rank; the first rank of each storage looks.
        folder: the checkpoints folder, as this rank sees it.
        tag: one on all ranks; default what ``latest`` says.
        latest: name of that file.

    Returns:
        The checkpoint and its files, the largest first; None if there is nothing to load.

    Raises:
        CheckpointError: on every rank: there is no such checkpoint, or the storages hold different ones.
    """
    said: _Found | None = None
    if leads(engine):
        try:
            said = (*once_more(lambda: _with_files(folder, tag, latest)), None)
        except Exception as error:  # all ranks must hear of whatever one of them meets
            said = (None, [], str(error) if isinstance(error, CheckpointError) else f"{folder}: {error}")
    by_node = {rank: answer for rank, answer in enumerate(gather(said)) if answer is not None}
    errors = dict.fromkeys(error for _, _, error in by_node.values() if error is not None)
    if errors:
        raise CheckpointError("\n".join(errors))
    tags = {rank: None if found is None else found.tag for rank, (found, _, _) in by_node.items()}
    if len(set(tags.values())) > 1:
        listed = ", ".join(f"rank {rank}: {name}" for rank, name in tags.items())
        raise CheckpointError(
            f"the nodes would load different checkpoints from {folder} ({listed}). Name one that all have by its tag."
        )
    checkpoint, names, _ = by_node[node_of(engine)]
    return checkpoint, names


def _with_files(folder: Path, tag: str | None, latest: str) -> tuple[Checkpoint | None, list[str]]:
    found = resolve_tag(folder, tag, latest=latest)
    if found is None:
        return None, []
    with of_one_version(found.folder, found.version):
        return found, listed_files(found.folder)


def verify_together(engine: Engine, checkpoint: Checkpoint, names: list[str]) -> None:
    """Collective over all ranks: compare a checkpoint with its manifest, as far as the JSON says (`verifies`).

    Names and sizes are always compared, each file's by one rank of its storage.

    Args:
        engine: of this rank.
        checkpoint: as `find_together` found it.
        names: its files.

    Raises:
        CheckpointError: on every rank: files are damaged or absent, or hold Python objects that nobody trusts.
        ReplacedError: on every rank: a save replaced or removed it.
    """
    said = gather((node_of(engine), _own_files(engine, checkpoint)))
    peers = {rank: own for rank, (node, own) in enumerate(said) if node == node_of(engine)}
    mine = _dealt(names, peers)[engine.global_rank]
    replaced: str | None = None
    try:
        problems = _problems(engine, checkpoint, mine)
    except ReplacedError as error:
        problems, replaced = [], str(error)
    except Exception as error:  # all ranks must hear of whatever one of them meets
        problems = [str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"]
    raise_replaced(replaced)
    bad = [problem for found in gather(problems) for problem in found]
    if bad:
        listed = "\n  - ".join(dict.fromkeys(bad))
        raise CheckpointError(
            f"checkpoint {checkpoint.folder} is damaged; nothing was loaded:\n  - {listed}\nRestore these files from a "
            f"copy, or load another checkpoint: pass its tag, or write it into {LATEST!r}."
        )


def _own_files(engine: Engine, checkpoint: Checkpoint) -> list[str]:
    """`_read_by` where it is known, before anything was verified."""
    if not _knows_its_files(engine, checkpoint):
        return []
    try:
        return _read_by(engine, checkpoint)
    except CheckpointError:  # what is missing is reported by whoever verifies
        return []


def _dealt(names: list[str], readers: Mapping[int, list[str]]) -> dict[int, list[str]]:
    """Which rank verifies which files: the one that will read it if it is alone, so that it reads it once.

    Args:
        names: of all files, the largest first.
        readers: by rank the files that it will read.
    """
    counts = Counter(name for read in readers.values() for name in read)
    dealt = {rank: [name for name in read if counts[name] == 1 and name in names] for rank, read in readers.items()}
    rest = [name for name in names if counts[name] != 1]
    for number, rank in enumerate(readers):
        dealt[rank] += rest[number :: len(readers)]
    return dealt


def _problems(engine: Engine, checkpoint: Checkpoint, mine: list[str]) -> list[str]:
    """What is wrong with this rank's share of the files, and with those whose contents it has to look at."""
    how = verifies(engine)
    if how == "own" and not _knows_its_files(engine, checkpoint):
        how = "all"
    problems = verify(checkpoint.folder, mine, contents=how == "all", version=checkpoint.version)
    if how == "own" and not problems:
        problems = verify(checkpoint.folder, _read_by(engine, checkpoint), version=checkpoint.version)
    if checkpoint.manifest is None:
        problems += _absent(engine, checkpoint)
    if not problems and not trusts(engine):
        problems += that_run_code(checkpoint.folder, mine)
    return problems


def _knows_its_files(engine: Engine, checkpoint: Checkpoint) -> bool:
    """Whether a rank reads one model file and one of moments; pipelines read files of layers, experts their own."""
    several = engine.pipeline_parallelism or engine.has_moe_layers or engine.load_universal_checkpoint()
    return checkpoint.kind == "deepspeed" and not several


def _read_by(engine: Engine, checkpoint: Checkpoint) -> list[str]:
    """Names of the files that this rank will read."""
    paths = [model_path(engine, checkpoint.folder)]
    if engine.zero_optimization():
        paths.append(Path(engine._get_zero_ckpt_name(str(checkpoint.folder.parent), checkpoint.tag)))
    return [path.name for path in paths if path.is_file()]


def _absent(engine: Engine, checkpoint: Checkpoint) -> list[str]:
    """Files that this rank would ask for in vain, where no manifest lists them."""
    if engine.load_universal_checkpoint():
        return []  # it has other files, which `universal_misfits` looks for
    load_dir, tag = str(checkpoint.folder.parent), checkpoint.tag
    if not engine._get_all_ckpt_names(load_dir, tag):
        return ["*model_states.pt: missing"]
    if not engine.zero_optimization():
        return []
    path = Path(engine._get_zero_ckpt_name(load_dir, tag))
    name = path.name
    return [] if path.is_file() else [f"{name}: missing (or saved with fewer ranks, or another precision)"]


def check_not_replaced(engine: Engine, checkpoint: Checkpoint) -> None:
    """Collective over all ranks: the checkpoint is still what `find_together` found.

    Args:
        engine: of this rank.
        checkpoint: as it was found.

    Raises:
        ReplacedError: on every rank: a save replaced or removed it.
    """
    replaced: str | None = None
    if leads(engine):
        try:
            check_version(checkpoint.folder, checkpoint.version)
        except ReplacedError as error:
            replaced = str(error)
    raise_replaced(replaced)


def raise_replaced(replaced: str | None) -> None:
    """Collective over all ranks: raise what any of them found out.

    Raises:
        ReplacedError: on every rank.
    """
    message = first_error(replaced)
    if message is not None:
        raise ReplacedError(message)
