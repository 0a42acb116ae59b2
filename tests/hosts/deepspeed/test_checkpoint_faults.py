# SPDX-License-Identifier: Apache-2.0
"""Saves and loads that only one rank finds fault with, and entries that would be lost or change what is loaded.

A rank that raises alone leaves the others waiting in the next collective: each error here must come on all of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.deepspeed.engines import prepare_deepspeed
from tests.helpers.deepspeed.guarded import raised, train, tree
from tests.helpers.distributed import Outcome, RankContext, passes
from tests.helpers.suites import Suite
from tests.hosts.deepspeed.test_load_refusals import MODEL, OPTIM, WARMUP, edit, engine, rate_after, refused, saved

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")

NOBODY = 65534


def refused_arguments(context: RankContext, folder: Path) -> None:
    """Wrong on one rank alone; DeepSpeed's own keys, by which a save lost weights; a tag folder as ``load_dir``."""
    from ds_blockwise.checkpoint.manifest import CheckpointError

    with engine(stage=1) as run:
        train(run, context, 0)
        run.engine.save_checkpoint(str(folder), tag="t")
        context.barrier()
        before = tree(folder)
        for words, given in (
            ("'ds_blockwise'", {"ds_blockwise": 1}),
            ("client_state must be a mapping", [1]),
            ("'module', 'optimizer'", {"optimizer": {}, "module": {}}),
            ("'lr_scheduler'", {"lr_scheduler": None}),
        ):
            for ranks in ((1,), (0, 1)):
                state: Any = given if context.rank in ranks else {"mine": 3}
                text = raised(lambda: run.engine.save_checkpoint(str(folder), tag="t", client_state=state), ValueError)  # noqa: B023
                assert words in text, text
        for wrong in ("", None, 5):
            where: Any = wrong if context.rank == 1 else str(folder)
            for act in (run.engine.save_checkpoint, run.engine.load_checkpoint):
                text = raised(lambda: act(where, tag="t"), ValueError)  # noqa: B023
                assert f"_dir must name a folder, got {wrong!r}" in text, text
        text = raised(lambda: run.engine.load_checkpoint(str(folder / "t")), CheckpointError)
        assert "is a checkpoint itself" in text and "tag='t'" in text, text
        context.barrier()
        assert tree(folder) == before


@contextmanager
def not_root() -> Iterator[None]:
    """As a user who may not do everything."""
    if os.geteuid():
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def no_permission(context: RankContext, folder: Path) -> None:
    """A folder in which nothing may even be looked for: rank 0 failed while it wrote its error, rank 1 waited."""
    from ds_blockwise.checkpoint.manifest import CheckpointError

    saved(context, folder, stage=1)
    if context.rank == 0:
        folder.chmod(0o000)
    context.barrier()
    try:
        with engine(stage=1) as run:
            train(run, context, 0)
            with not_root():
                for path in (folder, folder / "inside"):
                    text = raised(lambda: run.engine.save_checkpoint(str(path), tag="t"), CheckpointError)  # noqa: B023
                    assert "Permission denied" in text and str(folder) in text, text
                refused(context, run, folder, CheckpointError, "Permission denied", str(folder))
    finally:
        context.barrier()
        if context.rank == 0:
            folder.chmod(0o700)
        context.barrier()


def forged_on_one_rank(context: RankContext, folder: Path) -> None:
    """An entry that cannot be compared with the engine's: rank 1 failed with torch's own error, rank 0 waited."""
    saved(context, folder, stage=1)

    def forge(file: Any) -> None:
        paddings = file["optimizer_state_dict"]["param_alignment_paddings"]
        file["optimizer_state_dict"]["param_alignment_paddings"] = [[torch.ones(2)] * len(each) for each in paddings]

    edit(context, folder, OPTIM, forge)
    with engine(stage=1) as run:
        train(run, context, 0)
        refused(context, run, folder, ValueError, OPTIM, "param_alignment_paddings[0][0] must be an integer")


OWN_ENTRIES: tuple[tuple[Any, str], ...] = (
    (5, "ds_blockwise must be a mapping, got 5"),
    ({"settings": 5, "topology": {}, "added": []}, "ds_blockwise.settings must be"),
    ({"settings": None, "topology": {}, "added": 7}, "ds_blockwise.added must be a list, got 7"),
    ({"settings": {"groups": [{"lr": float("nan")}]}, "topology": {}, "added": []}, "ds_blockwise.settings.groups[0]"),
)


def own_entry(context: RankContext, folder: Path) -> None:
    """What a save adds to the client state was read after the weights had been replaced."""
    for index, (entry, words) in enumerate(OWN_ENTRIES):
        other = folder.with_name(f"{folder.name}-{index}")
        saved(context, other, stage=1)
        edit(context, other, MODEL, lambda file: file.update(ds_blockwise=entry))  # noqa: B023
        with engine(stage=1) as run:
            train(run, context, 0)
            refused(context, run, other, RuntimeError, MODEL, words, "Nothing was loaded")


def portable_entries(context: RankContext, folder: Path) -> None:
    """A portable checkpoint of a run without a schedule, and with a client state of any keys."""
    from ds_blockwise.hosts.deepspeed.checkpoint.inspect import convert_checkpoint

    output = folder.with_name(f"{folder.name}-portable")
    with engine(stage=2) as run:
        train(run, context, 0, 1, 2)
        run.engine.save_checkpoint(str(folder), tag="t", client_state={7: "seven", "mine": {0: 1.5}})
    if context.rank == 0:
        convert_checkpoint(folder, output)
    context.barrier()
    with engine(stage=2, scheduler=WARMUP) as run:
        path, client_state = run.engine.load_checkpoint(str(output))
        assert path is not None and client_state == {7: "seven", "mine": {0: 1.5}}
        (lr,) = {group["lr"] for group in run.engine.basic_optimizer.param_groups}
        assert lr == rate_after(3)  # the next update was made at the rate of the run without a schedule


def unreadable_latest(context: RankContext, folder: Path) -> None:
    """Weights alone at ZeRO-3, where DeepSpeed reads ``latest`` whatever the tag."""
    saved(context, folder, stage=3)
    if context.rank == 0:
        (folder / "latest").write_bytes(b"\xff\xfe")
    context.barrier()
    with engine(stage=3) as run:
        train(run, context, 0)
        text = raised(
            lambda: run.engine.load_checkpoint(str(folder), tag="t", load_optimizer_states=False),
            (ValueError, RuntimeError),  # type: ignore[arg-type]
        )
        assert "Write that tag into it" in text and "latest" in text, text


CHECKS: dict[str, Callable[[RankContext, Path], None]] = {
    each.__name__: each
    for each in (refused_arguments, no_permission, forged_on_one_rank, own_entry, portable_entries, unreadable_latest)
}


def run_case(context: RankContext, name: str) -> None:
    prepare_deepspeed()
    import ds_blockwise  # noqa: F401 - registers the optimizers

    CHECKS[name](context, context.tmp_path / name)


SUITE = Suite(run_case, {name: (2, name) for name in CHECKS})
outcome = SUITE.outcome()


@SUITE.cases()
def test_faults_that_one_rank_finds(outcome: Outcome, name: str) -> None:
    """See the check of that name."""
    passes(outcome, name)
