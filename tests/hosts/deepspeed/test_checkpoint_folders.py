# SPDX-License-Identifier: Apache-2.0
"""engine.save_checkpoint and load_checkpoint: what is no tag, ranks that disagree, another job in the folder."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from ds_blockwise.checkpoint.folder_rules import lock
from ds_blockwise.checkpoint.folder_rules.lock import LOCK, FolderInUseError, holding
from ds_blockwise.checkpoint.manifest import CheckpointError, ReplacedError, verify
from tests.helpers.deepspeed.compared import assert_same
from tests.helpers.deepspeed.engines import prepare_deepspeed
from tests.helpers.deepspeed.guarded import engine_of, everything, nano, raised, train, tree, warnings_of
from tests.helpers.distributed import Outcome, RankContext, passes
from tests.helpers.suites import Suite

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")


def check_tags(context: RankContext, stage: int) -> None:
    """What breaks the rule on any rank is refused on all, before a file or a folder is made."""
    folder = context.tmp_path / "tags"
    rank = context.rank
    with engine_of(nano(stage)) as run:
        train(run, context, 0)
        for tag in ("a/b", "../x", str(context.tmp_path / "x"), "latest", "x.partial", "x.replaced", "", "a\n", "[a]"):
            given = (tag, "good")[rank]
            text = raised(lambda: run.engine.save_checkpoint(str(folder), tag=given), ValueError)  # noqa: B023
            assert "cannot name a checkpoint" in text
            text = raised(lambda: run.engine.load_checkpoint(str(folder), tag=given), ValueError)  # noqa: B023
            assert "cannot name a checkpoint" in text
        error: type[Exception] = (ValueError, TypeError)[rank]
        assert "must be a string or an integer" in raised(
            lambda: run.engine.save_checkpoint(str(folder), tag=("good", b"x")[rank]), error
        )
        assert "'0', '1'" in raised(lambda: run.engine.save_checkpoint(str(folder), tag=rank), ValueError)
        context.barrier()
        assert [path.name for path in context.tmp_path.iterdir()] == []
        context.barrier()
        if rank == 0:
            (folder / "data").mkdir(parents=True)
            (folder / "data" / "corpus").write_text("precious", encoding="utf-8")
        context.barrier()
        assert "it would be replaced" in raised(lambda: run.engine.save_checkpoint(str(folder), tag="data"), ValueError)
        context.barrier()
        assert tree(folder) == {"data/corpus": b"precious"}
        run.engine.save_checkpoint(str(folder), tag=7)
        run.engine.save_checkpoint(str(folder), tag=Path("best so far"))
        wanted = everything(run)
    with engine_of(nano(stage)) as run:
        assert "got '7', 'best so far'" in raised(
            lambda: run.engine.load_checkpoint(str(folder), tag=("7", "best so far")[rank]), ValueError
        )
        assert "got '7', None" in raised(
            lambda: run.engine.load_checkpoint(str(folder), tag=("7", None)[rank]), ValueError
        )
        for tag in (7, "7", None):
            path, _ = run.engine.load_checkpoint(str(folder), tag=tag)
            assert ("best so far" if tag is None else "/7/") in str(path)
            assert_same(everything(run), wanted)


def check_tag_validation(context: RankContext, said: str) -> None:
    """DeepSpeed's setting: rank 0's tag for all, with a warning or without."""
    folder = context.tmp_path / "validation"
    with engine_of(nano(1, config={"checkpoint": {"tag_validation": said}})) as run:
        with warnings_of("ds_blockwise.checkpoint.folder_rules.tags") as lines:
            run.engine.save_checkpoint(str(folder), tag=f"rank{context.rank}")
        assert len(lines) == (said == "Warn" and context.rank == 0)
        assert all("('rank0', 'rank1'): rank 0's, 'rank0', is taken" in line.replace("\n", " ") for line in lines)
    context.barrier()
    assert (folder / "latest").read_text(encoding="utf-8") == "rank0"
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"rank0"}
    assert verify(folder / "rank0") == []


def check_other_folder(context: RankContext, _: None) -> None:
    """Ranks that save into different folders: a checkpoint without half of its files looked complete."""
    from ds_blockwise.hosts.deepspeed.checkpoint import save

    folder = context.tmp_path / f"of_rank_{context.rank}"
    with engine_of(nano(2)) as run, pytest.MonkeyPatch.context() as patch:
        patch.setattr(save, "_SIGHT_S", 0.0)
        text = raised(lambda: run.engine.save_checkpoint(str(folder)), CheckpointError)
        assert "rank 1: " in text
        assert "All ranks must save into one folder" in text
        assert "use_node_local_storage" in text
    context.barrier()
    assert [path.name for path in context.tmp_path.rglob("*")] == ["of_rank_0"]


def check_patterns(context: RankContext, stage: int) -> None:
    """DeepSpeed looks for the files of a checkpoint with glob: a folder called a[1] was saved into and never loaded."""
    folder, link = context.tmp_path / "lr=[1e-3]", context.tmp_path / "link"
    with engine_of(nano(stage)) as run:
        train(run, context, 0)
        with warnings_of("ds_blockwise.hosts.deepspeed.checkpoint.save") as lines:
            run.engine.save_checkpoint(str(folder))
        assert len(lines) == (context.rank == 0)
        wanted = everything(run)
        if context.rank == 0:
            link.symlink_to(folder)
        context.barrier()
    with engine_of(nano(stage)) as run:
        text = raised(lambda: run.engine.load_checkpoint(str(folder)), ValueError)
        assert "load through a link to it" in text
        run.engine.load_checkpoint(str(link))
        assert_same(everything(run), wanted)


def check_in_use(context: RankContext, _: None) -> None:
    """Another job writes in the folder: every rank is told who, and nothing is touched; then the folder is free."""
    folder, other = context.tmp_path / "in_use", context.tmp_path / "free"
    with engine_of(nano(2)) as run, pytest.MonkeyPatch.context() as patch:
        patch.setattr(lock, "PATIENCE_S", 0.0)
        train(run, context, 0)
        if context.rank == 0:
            with holding(folder):  # writes the name of a holder
                record = (folder / LOCK).read_bytes()
            (folder / LOCK).write_bytes(record)
            theirs = (folder / LOCK).open("rb")
            fcntl.flock(theirs, fcntl.LOCK_EX)
        context.barrier()
        before = tree(folder)
        text = raised(lambda: run.engine.save_checkpoint(str(folder), tag="t"), FolderInUseError)
        assert "is in use: process " in text
        assert "Give this job a folder of its own" in text
        context.barrier()
        assert tree(folder) == before
        if context.rank == 0:
            theirs.close()
        run.engine.save_checkpoint(str(folder), tag="t")
        assert (folder / LOCK).is_file()
        run.engine.save_checkpoint(str(other), tag="t")
        context.barrier()
        assert (other / LOCK).is_file()
        assert not (folder / LOCK).exists()  # it saves elsewhere now
        context.barrier()  # rank 0 lets go of the lock in what it does next


def check_replaced(context: RankContext, times: int) -> None:
    """Replaced while DeepSpeed loads it: once, and the new one is loaded; twice, and all ranks say so."""
    folder = context.tmp_path / "replaced"
    with engine_of(nano(2)) as run:
        versions = []
        for step in range(3):
            train(run, context, step)
            run.engine.save_checkpoint(str(folder), tag=f"version{step}")
            versions.append(everything(run))
    if context.rank == 0:
        shutil.copytree(folder / "version0", folder / "best")
    context.barrier()
    with engine_of(nano(2)) as run, pytest.MonkeyPatch.context() as patch:
        original = type(run.engine).load_checkpoint
        loads: list[int] = []

        def load(*arguments: Any, **options: Any) -> Any:
            loaded = original(*arguments, **options)
            loads.append(len(loads))
            context.barrier()
            if context.rank == 0 and len(loads) <= times:
                (folder / "best").rename(folder / f"gone{len(loads)}")
                shutil.copytree(folder / f"version{len(loads)}", folder / "best")
            return loaded

        patch.setattr(type(run.engine), "load_checkpoint", load)
        if times == 1:
            path, _ = run.engine.load_checkpoint(str(folder), tag="best")
            assert "best" in path
            assert_same(everything(run), versions[1])
        else:
            text = raised(lambda: run.engine.load_checkpoint(str(folder), tag="best"), ReplacedError)
            assert "is being replaced or removed by a job that saves there" in text
        assert len(loads) == 2


CHECKS: dict[str, Callable[[RankContext, Any], None]] = {
    name.removeprefix("check_"): check for name, check in globals().items() if name.startswith("check_")
}


def run_case(context: RankContext, case: tuple[str, Any]) -> None:
    prepare_deepspeed()
    import ds_blockwise  # noqa: F401 - registers the optimizers

    name, what = case
    own = context.tmp_path / f"{name}-{what}"
    own.mkdir(exist_ok=True)
    CHECKS[name](RankContext(context.rank, context.world_size, own), what)


TABLE: dict[str, tuple[str, Any]] = {
    "tags-z0": ("tags", 0),
    "tags-z3": ("tags", 3),
    "tag_validation-warn": ("tag_validation", "Warn"),
    "tag_validation-ignore": ("tag_validation", "Ignore"),
    "other_folder": ("other_folder", None),
    "patterns-z1": ("patterns", 1),
    "in_use": ("in_use", None),
    "replaced-once": ("replaced", 1),
    "replaced-twice": ("replaced", 2),
}
SUITE = Suite(run_case, {name: (2, case) for name, case in TABLE.items()})
outcome = SUITE.outcome()


@SUITE.cases()
def test_folders_of_checkpoints(outcome: Outcome, name: str) -> None:
    """See the check of that name: a checkpoint lost or of two versions, or ranks that wait for ever."""
    passes(outcome, name)
