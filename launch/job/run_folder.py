# SPDX-License-Identifier: Apache-2.0
"""The output folder of a run: the checkpoint to resume from, and whether it is still the same run.

This happens before the model is built; only rank 0 changes files.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import shutil
from pathlib import Path

import torch

from ds_blockwise.atomic_files import replace_text
from ds_blockwise.checkpoint.folder import (
    LATEST,
    Checkpoint,
    newest_complete,
    partial_folders,
    remove_all,
    remove_checkpoint,
    remove_unfinished,
    resolve_tag,
)
from ds_blockwise.checkpoint.folder_rules.lock import hold_until_exit
from ds_blockwise.checkpoint.manifest import CheckpointError, once_more
from ds_blockwise.parallel.agree import is_first_rank, together
from ds_blockwise.runs.metrics import EARLIER, METRICS_CSV
from ds_blockwise.runs.reading.problems import Problems
from ds_blockwise.runs.run_file import GPT, RunConfig
from job.process_groups import Processes

logger = logging.getLogger(__name__)

SHARPNESS_CSV = "sharpness.csv"
FIGURES = ("sharpness.png", "sharpness_blocks.png")
CHECKPOINTS = "checkpoints"  # below the run's output folder
RUN_RECORD = "run.json"  # the settings that a run was started with
INIT_FROM = "init_from"  # key of the record: digest of the checkpoint that a run began with
# With another value of one of these a resumed run would have other data or other weights.
_FIXED = ("model", "model_class", "parallel", "processes", "data", "steps", "global_batch_size", "seed")
_ADDED_LATER = {"model_class": GPT}  # what runs had whose records lack the key
_OF_TOPOLOGY = ("parallel", "processes")  # a portable checkpoint goes on under any
# No result depends on these: a change is not reported.
_UNIMPORTANT = ("keep_checkpoints", "checkpoint_interval", "sharpness_interval", "sharpness_batches")


def checkpoints_of(run: RunConfig) -> Path:
    """Folder of a run's checkpoints."""
    return run.output / CHECKPOINTS


def folder_and_tag(source: Path) -> tuple[Path, str | None]:
    """Folder of checkpoints, and tag (None: the newest), for a path to such a folder or to one checkpoint in it."""
    is_folder = (source / LATEST).is_file() or newest_complete(source) is not None
    whole = source.resolve()  # `.` and `..` have no name of their own
    return (source, None) if is_folder else (whole.parent, whole.name)


def find_checkpoint(run: RunConfig, problems: Problems) -> Checkpoint | None:
    """The checkpoint that a resumed run goes on from.

    Args:
        run: The run.
        problems: Notes damage after which the checkpoint to resume from is not certain.
    """
    folder = checkpoints_of(run)
    try:
        checkpoint = once_more(lambda: resolve_tag(folder))
    except CheckpointError as error:
        problems.add(run.file, "output", str(run.output), "a folder with a complete checkpoint", str(error))
        return None
    if checkpoint is None and (broken := _broken(folder)):
        allowed = "a folder with a complete checkpoint, or with none at all"
        remedy = f"{', '.join(broken)} in {folder}: restore the files, or delete the folder to start again"
        problems.add(run.file, "output", str(run.output), allowed, remedy)
    return checkpoint


def _broken(folder: Path) -> list[str]:
    unfinished = partial_folders(folder)
    return [p.name for p in folder.iterdir() if p.is_dir() and p not in unfinished] if folder.is_dir() else []


def check_output(
    run: RunConfig,
    record: dict[str, object],
    checkpoint: Checkpoint | None,
    options: argparse.Namespace,
    problems: Problems,
) -> None:
    """Check that a run may start or resume in its folder.

    Args:
        run: The run.
        record: What decides its result; receives the earlier record's entry about the checkpoint it began with.
        checkpoint: From `find_checkpoint`; None if none was asked for or there is none.
        options: The command line.
        problems: Notes checkpoints that would be deleted, and entries that may not change.
    """
    if checkpoint is None:
        if options.resume:
            allowed = f"a folder with a checkpoint in {CHECKPOINTS}/"
            remedy = "leave out --resume to start from the beginning"
            problems.add(run.file, "output", str(run.output), allowed, remedy)
        elif not (options.overwrite or options.auto_resume) and newest_complete(checkpoints_of(run)) is not None:
            allowed = "a folder without checkpoints"
            remedy = "pass --resume to go on from them, or --overwrite to delete them"
            problems.add(run.file, "output", str(run.output), allowed, remedy)
        return
    before = _read_record(run, checkpoint, problems)
    if before is None:
        return
    if INIT_FROM in before:
        record[INIT_FROM] = before[INIT_FROM]
    before, after = _ADDED_LATER | before, json.loads(json.dumps(record))
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key), after.get(key)
        if old == new or key in _UNIMPORTANT:
            continue
        if key in _FIXED and not (checkpoint.kind == "portable" and key in _OF_TOPOLOGY):
            allowed = f"{old!r}, with which {checkpoint.folder} was written"
            remedy = "set it back, or start a new run in another output folder"
            if key in _OF_TOPOLOGY:
                remedy += " from a portable checkpoint (ds-blockwise convert, then --resume there)"
            problems.add(run.file, key, new, allowed, remedy)
        elif is_first_rank():
            logger.info("resuming with another %s: %s was %s", key, new, old)


def _read_record(run: RunConfig, checkpoint: Checkpoint, problems: Problems) -> dict[str, object] | None:
    path = run.output / RUN_RECORD
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        if checkpoint.kind == "portable":
            if is_first_rank():
                logger.info("%s is missing: that model, data, steps and seed are unchanged can't be checked", path)
            return None
        remedy = "restore it, or copy it from a run with the same files"
    except ValueError as error:
        remedy = f"{error}; restore it"
    problems.add(path, "(the file)", None, f"the record of the run that wrote {checkpoint.folder}", remedy)
    return None


def check_source(init_from: str | None, record: dict[str, object], problems: Problems) -> Path | None:
    """Check the checkpoint that a new run begins with.

    Args:
        init_from: The option's value.
        record: Receives the digest of its files.
        problems: Notes a folder without a complete checkpoint.
    """
    if init_from is None:
        return None
    source = Path(init_from)
    folder, tag = folder_and_tag(source)
    try:
        checkpoint = once_more(lambda: resolve_tag(folder, tag))
        remedy = "give a folder of checkpoints, or one of them"
    except (CheckpointError, ValueError) as error:
        checkpoint, remedy = None, str(error)
    if checkpoint is None:
        problems.add("--init-from", "FOLDER", init_from, "a folder with a complete checkpoint", remedy)
        return None
    listed = (checkpoint.manifest or {}).get("files", checkpoint.tag)
    record[INIT_FROM] = json_digest(listed)
    return source


def prepare_output(
    run: RunConfig, record: dict[str, object], processes: Processes, checkpoint: Checkpoint | None
) -> None:
    """Prepare the folder, and log what was found in it; nothing was changed before.

    From here on no other job can write checkpoints there. A new run starts with empty curves: monitors append to what
    they find.

    Args:
        run: The run.
        record: What decides its result; written to the folder.
        processes: All must call.
        checkpoint: The one to resume from; None for a new run.

    Raises:
        CheckpointError: The processes found different checkpoints.
        FolderInUseError: Before anything is changed, another job writes there; a ValueError on the other ranks.
    """
    found: list[str | None] = [None] * processes.world_size
    torch.distributed.all_gather_object(found, None if checkpoint is None else checkpoint.tag)
    if len(set(found)) > 1:
        raise CheckpointError(f"the processes found different checkpoints in {checkpoints_of(run)}: {found}")
    together(lambda: _prepare(run, record, checkpoint) if processes.rank == 0 else None)


def _prepare(run: RunConfig, record: dict[str, object], checkpoint: Checkpoint | None) -> None:
    folder = checkpoints_of(run)
    hold_until_exit(folder)
    for note in remove_unfinished(folder):
        logger.info("%s", note)
    if checkpoint is None:
        remove_all(folder)
        for name in (EARLIER, "tensorboard"):
            shutil.rmtree(run.output / name, ignore_errors=True)
        for name in ("loss.png", "telemetry.png", "summary.json", METRICS_CSV, SHARPNESS_CSV, *FIGURES):
            (run.output / name).unlink(missing_ok=True)
        logger.info("starting from the beginning in %s", run.output)
    else:
        for note in checkpoint.notes:
            logger.info("%s", note)
        steps = "" if checkpoint.global_steps is None else f", {checkpoint.global_steps} of {run.training.steps} steps"
        logger.info("resuming from %s%s", checkpoint.folder, steps)
    replace_text(run.output / RUN_RECORD, json.dumps(record, indent=2) + "\n")


def json_digest(content: object) -> str:
    """SHA-256 of anything that JSON can hold, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def remove_old(folder: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints of a run; 0 keeps all. ``latest`` is never deleted."""
    if keep == 0:
        return
    named = (folder / LATEST).read_text(encoding="utf-8").strip()
    tags = sorted(p for p in folder.glob("step_*") if p.is_dir() and p not in partial_folders(folder))
    for path in tags[:-keep]:
        if path.name != named:
            remove_checkpoint(path)
