# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's load_checkpoint, made safe against damaged files, wrong topologies and overwritten settings.

Nothing is loaded before every file has been verified, the ranks sharing the work, and what is wrong on one rank is
raised on all. `checkpoint.save` is the other half. Checked with DeepSpeed 0.19.8.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

from ds_blockwise.checkpoint import folder as files
from ds_blockwise.checkpoint.folder import Checkpoint
from ds_blockwise.checkpoint.folder_rules.tags import agreed_tag, refuse_patterns
from ds_blockwise.checkpoint.manifest import (
    CheckpointError,
    NotReadError,
    Topology,
    once_more,
)
from ds_blockwise.checkpoint.record import settings_of
from ds_blockwise.checkpoint.record_changes import differences
from ds_blockwise.checkpoint.record_types import Settings
from ds_blockwise.hosts.deepspeed.checkpoint.load_portable import load_portable
from ds_blockwise.hosts.deepspeed.checkpoint.recording import files_mapped
from ds_blockwise.hosts.deepspeed.checkpoint.rehearse import misfits, model_file, starts_anew, universal_misfits
from ds_blockwise.hosts.deepspeed.checkpoint.save import load_rank_state, save_checkpoint
from ds_blockwise.hosts.deepspeed.checkpoint.schedule import load_schedule, restore_groups, set_rates
from ds_blockwise.hosts.deepspeed.checkpoint.tag_folder import ModelFile, take_own_entry, universal_misfit
from ds_blockwise.hosts.deepspeed.checkpoint.topology import (
    check_not_replaced,
    find_together,
    topology_of,
    verify_together,
)
from ds_blockwise.hosts.deepspeed.engine import Engine, Loaded, LoadOptions, trusts, verifies
from ds_blockwise.optimizers.base import BlockwiseOptimizer
from ds_blockwise.optimizers.second_moment import start_matrices_anew
from ds_blockwise.parallel.agree import first_error, gather, is_first_rank, together

__all__ = ["guard", "load_checkpoint", "load_rank_state", "save_checkpoint"]

logger = logging.getLogger(__name__)

_RIGID = ("world_size", "dp", "tp", "pp", "ep", "wrapper", "dtype")  # of a topology: what DeepSpeed's files depend on
_OF_WEIGHTS = ("tp", "pp")  # what the files of the weights alone depend on, below ZeRO-3
_SHOWN = 16  # lines of an error


def guard(engine: Engine) -> None:
    """Let ``engine.save_checkpoint`` and ``engine.load_checkpoint`` be this module's; ``attach`` calls it.

    Args:
        engine: any ``DeepSpeedEngine``; only this object is changed.
    """
    trusts(engine)  # a wrong value is refused before training, not after
    verifies(engine)
    engine.save_checkpoint = functools.partial(save_checkpoint, engine)
    engine.load_checkpoint = functools.partial(load_checkpoint, engine)


def load_checkpoint(
    engine: Engine,
    load_dir: str | Path,
    tag: str | int | None = None,
    load_module_strict: bool = True,
    load_optimizer_states: bool = True,
    load_lr_scheduler_states: bool = True,
    load_module_only: bool = False,
    custom_load_fn: object = None,
) -> Loaded:
    """Load a checkpoint after verifying it as the JSON says (`verifies`); a collective over all ranks.

    With one of our optimizers the settings of its param groups stay those of the present JSON, and the learning rate
    follows the loaded schedule. Portable checkpoints are recognised by their manifest.

    Args:
        engine: any ``DeepSpeedEngine``.
        load_dir: the checkpoints folder.
        tag: default what ``latest`` names, or the newest complete checkpoint if that is not there.
        load_module_strict: as DeepSpeed's, like all that follow.
        load_optimizer_states: load the moments.
        load_lr_scheduler_states: load the schedule's position.
        load_module_only: load the weights alone.
        custom_load_fn: loads the module's state dict.

    Returns:
        Path and client state as DeepSpeed's; ``(None, None)`` if there is no checkpoint and no tag was given.

    Raises:
        CheckpointError: on every rank, before anything is loaded: no such checkpoint, damaged files (all named), or
            files that hold Python objects, which can run code, without ``"checkpoint": {"trust": true}`` in the JSON.
        ReplacedError: on every rank: a save replaced the checkpoint while it was loaded, and so it did again when the
            load was repeated.
        ValueError: on every rank, before anything is loaded: the tag breaks the rule of `folder_rules.tags`, the ranks'
            tags differ, or the checkpoint was saved by another number of ranks, another ZeRO wrapper or precision, or
            is of another model, optimizer or schedule.
    """
    folder = together(lambda: files.checkpoints_folder("load_dir", load_dir))
    agreed = agreed_tag(tag)
    if load_module_only and isinstance(engine.optimizer, DeepSpeedZeroOptimizer_Stage3):
        load_optimizer_states = False  # else DeepSpeed loads nothing at all there: the weights are in the ZeRO files
    options: LoadOptions = {
        "load_module_strict": load_module_strict,
        "load_optimizer_states": load_optimizer_states,
        "load_lr_scheduler_states": load_lr_scheduler_states,
        "load_module_only": load_module_only,
        "custom_load_fn": custom_load_fn,
    }
    universal = engine.load_universal_checkpoint()
    latest = files.LATEST_UNIVERSAL if universal else files.LATEST

    def one_version() -> Loaded:
        checkpoint = _find(engine, folder, agreed, latest)
        if checkpoint is None:
            return _nothing(folder, universal=universal)
        loaded = _load_found(engine, checkpoint, options, universal=universal)
        check_not_replaced(engine, checkpoint)
        return loaded

    return once_more(one_version)


def _nothing(load_dir: Path, *, universal: bool) -> Loaded:
    if universal:
        raise ValueError(f"there is no universal checkpoint in {load_dir}: {files.LATEST_UNIVERSAL} names none.")
    if is_first_rank():
        logger.warning("there is no checkpoint in %s: nothing was loaded", load_dir)
    return None, None


def _load_found(engine: Engine, checkpoint: Checkpoint, options: LoadOptions, *, universal: bool) -> Loaded:
    """Load a checkpoint whose files were verified, after everything in it was compared with the engine."""
    moments = options["load_optimizer_states"] and not options["load_module_only"]
    scheduled = options["load_lr_scheduler_states"] and not options["load_module_only"]
    if checkpoint.kind == "portable" and not universal:
        portable = functools.partial(load_portable, engine, checkpoint.folder, **options)
        return _load_into_groups(engine, portable, scheduled, tell=True, moments=moments)
    refuse_patterns(checkpoint.folder.parent)
    if universal:
        _check_universal(engine, checkpoint)
    else:
        together(lambda: _check_topology(engine, checkpoint, options))
    model = _rehearse(engine, checkpoint, options, universal=universal)
    # below ZeRO-3 DeepSpeed loads a universal checkpoint's moments whatever it was asked for
    anew = together(lambda: starts_anew(engine, model)) if universal else None
    # DeepSpeed would load the schedule after the weights, and fail there on a checkpoint without one
    undo = load_schedule(engine, model["lr_scheduler"], _updates_of(model)) if scheduled else None
    without: LoadOptions = {**options, "load_lr_scheduler_states": False}
    folder = str(checkpoint.folder.parent)
    original = functools.partial(type(engine).load_checkpoint, engine, folder, checkpoint.tag, **without)
    # a function of the user may keep what it is given, and an optimizer of another kind the moments
    mapped = options["custom_load_fn"] is None and isinstance(engine.basic_optimizer, BlockwiseOptimizer)
    try:
        load = functools.partial(_by_deepspeed, engine, original, mapped=mapped)
        path, client_state = _load_into_groups(engine, load, scheduled, tell=universal, moments=moments, anew=anew)
    except Exception:
        if undo is not None:
            undo()
        raise
    if scheduled and model["lr_scheduler"] is None:
        set_rates(engine)
    if options["load_lr_scheduler_states"] and client_state is not None:
        client_state.pop("lr_scheduler", None)  # as DeepSpeed leaves it out where it loads it
    return path, client_state


def _updates_of(model: ModelFile) -> int:
    return max(0, model["global_steps"] - model["skipped_steps"])


def _rehearse(engine: Engine, checkpoint: Checkpoint, options: LoadOptions, *, universal: bool) -> ModelFile:
    """Compare what DeepSpeed will read with the engine, on all ranks, before it changes anything.

    Returns:
        The contents of this rank's model file.
    """
    trust, folder = trusts(engine), checkpoint.folder
    damage, found, model = None, [], None
    try:
        path, model = model_file(engine, folder, trust=trust)
        if universal:
            whole = engine.autotp_size() <= 1 and int(engine.mp_world_size) == 1
            found = list(universal_misfits(engine, folder, whole=whole, trust=trust))
        else:
            found = misfits(engine, path, model, options, trust=trust)
    except (CheckpointError, NotReadError) as error:
        damage = str(error)
    except Exception as error:  # of a file that is forged otherwise than the checks know: all ranks must hear of it
        damage = f"{folder} cannot be compared with this engine: {type(error).__name__}: {error}"
        logger.debug("the comparison failed", exc_info=True)
    everywhere: list[tuple[str | None, list[str]]] = gather((damage, found))
    damages = list(dict.fromkeys(said for said, _ in everywhere if said is not None))
    if damages:
        raise CheckpointError("\n".join([*damages, "Nothing was loaded."]))
    lines = list(dict.fromkeys(line for _, each in everywhere for line in each))
    if lines:
        listed = "".join(f"\n  - {line}" for line in lines[:_SHOWN])
        more = f"\n  - and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
        raise ValueError(f"checkpoint {folder} does not fit this engine; nothing was loaded:{listed}{more}")
    assert model is not None, "a rank without a model file has said so"
    return model


def _find(engine: Engine, folder: Path, tag: str | None, latest: str) -> Checkpoint | None:
    """The checkpoint that all ranks will load, with every file verified."""
    checkpoint, names = find_together(engine, folder, tag, latest=latest)
    if checkpoint is None:
        return None
    if is_first_rank():
        for note in checkpoint.notes:
            logger.warning("%s", note)
    verify_together(engine, checkpoint, names)
    return checkpoint


def _check_universal(engine: Engine, checkpoint: Checkpoint) -> None:
    """Refuse a universal checkpoint that DeepSpeed would load wrongly or fail on half-way."""
    misfit = universal_misfit(
        checkpoint.folder,
        partitions_weights=engine.zero_optimization_partition_weights(),
        tp=1 if engine.autotp_size() > 1 else int(engine.mp_world_size),
        round_robin=bool(getattr(engine.optimizer, "round_robin_gradients", False)),
    )
    optimizer = engine.basic_optimizer
    if isinstance(optimizer, BlockwiseOptimizer) and optimizer.second_moment == "none":
        misfit = (
            f"{checkpoint.folder} is a universal checkpoint, from which DeepSpeed loads second moments, and "
            f"{type(optimizer).__name__} keeps none. Load the checkpoint that it was made from, or a portable one made "
            f"of that by ds-blockwise convert."
        )
    message = first_error(misfit)
    if message is not None:
        raise ValueError(message)


def _check_topology(engine: Engine, checkpoint: Checkpoint, options: LoadOptions) -> None:
    """Refuse what DeepSpeed would load wrongly or fail on half-way."""
    optimizer, module_only = options["load_optimizer_states"], options["load_module_only"]
    partitioned = isinstance(engine.optimizer, DeepSpeedZeroOptimizer_Stage3)
    if partitioned and not optimizer:
        said = checkpoint.folder.parent / files.LATEST
        if not said.is_file() or said.read_bytes().strip() != checkpoint.tag.encode():
            raise ValueError(
                f"without optimizer states DeepSpeed's ZeRO-3 loads the weights of the checkpoint that {said} names, "
                f"whatever the tag, and that is not {checkpoint.tag!r}. Write that tag into it, or load the optimizer "
                f"states as well."
            )
    if checkpoint.manifest is None:
        return
    # manifests of older versions know no experts
    saved, own = {"ep": 1, **checkpoint.manifest["topology"]}, topology_of(engine)
    whole = (optimizer and not module_only) or "Stage3" in f"{saved.get('wrapper')} {own['wrapper']}"
    keys = _RIGID if whole and not (partitioned and not optimizer) else _OF_WEIGHTS
    different = [f"{key} was {saved.get(key)}, is {own[key]}" for key in keys if saved.get(key) != own[key]]
    if different:
        way_out = (
            f"Make a portable checkpoint of it, which loads anywhere (ds-blockwise convert {checkpoint.folder} OUTPUT)"
            f", or a universal one with DeepSpeed's ds_to_universal and load that with "
            f'"checkpoint": {{"load_universal": true}}.'
        )
        if saved.get("pp", 1) != 1:  # `ds-blockwise convert` does not read layer files
            way_out = "Those of a pipeline cannot be converted: resume it with the ranks and stages that saved it."
        raise ValueError(
            f"checkpoint {checkpoint.folder} was saved by {_described(saved)}; this engine has {_described(own)} "
            f"({'; '.join(different)}). DeepSpeed's files fit one topology only. {way_out} Nothing was loaded."
        )


def _described(topology: Topology) -> str:
    said = {key: topology.get(key, "?") for key in ("world_size", "dp", "tp", "pp", "zero_stage", "dtype")}
    return "{world_size} ranks (dp {dp}, tp {tp}, pp {pp}) with ZeRO-{zero_stage} in {dtype}".format(**said)


def _load_into_groups(
    engine: Engine, load: Callable[[], Loaded], scheduled: bool, *, tell: bool, moments: bool, anew: str | None = None
) -> Loaded:
    """Load, then give the param groups their own settings back and let all ranks settle.

    Args:
        engine: the engine.
        load: fills it.
        scheduled: whether ``load`` also loads the schedule.
        tell: whether to report other settings; our optimizers' own ``load_state_dict`` does it where it is called.
        moments: whether ``load`` also loads the moments.
        anew: what of them starts anew and is not set by ``load``, for the log.
    """
    optimizer = engine.basic_optimizer
    ours = optimizer if isinstance(optimizer, BlockwiseOptimizer) else None
    own = [] if ours is None else [_settings(group) for group in ours.param_groups]
    own_run = None if ours is None else ours.run_state()
    path, client_state = _load_together(engine, load)
    saved = take_own_entry(client_state)
    if ours is not None and path is not None:
        settings: Settings | None = saved.get("settings") or None
        groups = [] if settings is None else settings.get("groups", [])
        restore_groups(ours, engine.lr_scheduler if scheduled else None, own, groups)
        if scheduled and saved.get("no_schedule"):
            set_rates(engine)
        if tell and settings and is_first_rank() and (changed := differences(settings, settings_of(ours))):
            logger.warning(
                "the checkpoint was saved under other settings; the present ones are used:\n  %s", "\n  ".join(changed)
            )
        # a run that starts anew from another one's state measures anew
        saved_run = None if settings is None else settings.get("run")
        run, steps = (saved_run, int(engine.global_steps)) if scheduled and moments else (own_run, 0)
        ours.load_run_state(run, steps)
        if anew is not None:
            start_matrices_anew(ours.state, ours.bindings())
            ours.report_changes(None, anew)
        ours.settle()
    return path, client_state


def _load_together(engine: Engine, load: Callable[[], Loaded]) -> Loaded:
    """Load; what fails on one rank is raised on all."""
    loaded: Loaded = (None, None)
    failure: Exception | None = None
    try:
        loaded = load()
    except Exception as error:
        # Under ZeRO-3 the others may be in a collective of DeepSpeed's load, which only the end of this rank breaks;
        # elsewhere they come to the exchange below.
        if isinstance(engine.optimizer, DeepSpeedZeroOptimizer_Stage3):
            raise
        failure = error
    message = first_error(None if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    if message is not None:
        raise CheckpointError(f"another rank could not load the checkpoint: {message}")
    return loaded


def _by_deepspeed(engine: Engine, load: Callable[[], Loaded], *, mapped: bool) -> Loaded:
    """Say of whatever DeepSpeed raises that it may have changed weights; `_rehearse` leaves little of that."""
    try:
        if not mapped:
            return load()
        with files_mapped(engine, trust=trusts(engine)):
            path, client_state = load()
        return path, copy.deepcopy(client_state)  # the files may be removed while the caller keeps it
    except Exception as error:
        raise CheckpointError(
            f"DeepSpeed could not load it ({type(error).__name__}: {error}). The weights of this engine may be partly "
            f"replaced: build it again before you load another checkpoint."
        ) from error


def _settings(group: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in group.items() if key != "params"}
