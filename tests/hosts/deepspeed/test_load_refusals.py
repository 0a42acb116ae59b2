# SPDX-License-Identifier: Apache-2.0
"""engine.load_checkpoint of files that do not fit or that run code: refused alike on every rank, nothing changed.

And the loads that were promised and failed half-way: from AdamW's checkpoints, with and without schedules.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

from ds_blockwise.checkpoint import manifest
from ds_blockwise.checkpoint.manifest import MANIFEST, files_in, sums_of, write_manifest
from tests.helpers import models
from tests.helpers.deepspeed.compared import assert_same
from tests.helpers.deepspeed.engines import engine_config, masters, open_engine, prepare_deepspeed
from tests.helpers.deepspeed.guarded import everything, raised, train
from tests.helpers.distributed import Outcome, RankContext, passes
from tests.helpers.suites import Suite

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")

LR = 1e-2
COSINE = {"type": "BlockwiseCosineLR", "params": {"total_num_steps": 10, "warmup_num_steps": 0, "min_lr": 0.0}}
WARMUP = {"type": "WarmupLR", "params": {"warmup_num_steps": 8, "warmup_type": "linear", "warmup_max_lr": 0.08}}
ADAMW = {"params": {"torch_adam": True}}
MODEL, OPTIM = "mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt"


@contextmanager
def engine(
    optimizer: str = "BlockwiseAdamMini", *, sizes: dict[str, int] | None = None, **options: Any
) -> Iterator[Any]:
    """An engine as a user builds it: guarded if the optimizer is ours."""

    def build() -> torch.nn.Module:
        return models.set_small_weights(models.NanoGPT(models.NanoConfig(**(sizes or {}))))

    config = engine_config(optimizer, **options)
    if optimizer == "SGD":
        config["optimizer"]["params"] = {"lr": LR, "momentum": 0.9}
        config["zero_allow_untested_optimizer"] = True
    with open_engine(config, build) as run:
        yield run


def saved(
    context: RankContext, folder: Path, steps: int = 2, optimizer: str = "BlockwiseAdamMini", **options: Any
) -> Any:
    with engine(optimizer, **options) as run:
        train(run, context, *range(steps))
        run.engine.save_checkpoint(str(folder), tag="t", client_state=CLIENT_STATE)
        found = everything(run)
    context.barrier()
    return found


CLIENT_STATE: dict[str, Any] = {"args": argparse.Namespace(layers=3, dtype=torch.bfloat16), "mean": np.float64(0.25)}


def refused(context: RankContext, run: SimpleNamespace, folder: Path, kind: type[Exception], *words: str) -> str:
    """The error of a load, the same on every rank, after which every bit of the engine is as it was."""
    before, own = everything(run), run.engine.lr_scheduler and dict(vars(run.engine.lr_scheduler))
    text = raised(lambda: run.engine.load_checkpoint(str(folder)), kind)
    assert_same(everything(run), before)
    assert own is None or vars(run.engine.lr_scheduler) == own
    texts: list[str] = [""] * context.world_size
    torch.distributed.all_gather_object(texts, text)
    assert len({each.removeprefix("rank 1: ").removeprefix("rank 0: ") for each in texts}) == 1, texts
    assert all(word in text for word in words), text
    return text


def edit(
    context: RankContext, folder: Path, name: str, change: Callable[[Any], object], *, manifest: bool = True
) -> None:
    """Change the contents of a file, on rank 0, and write the manifest anew as an attacker would."""
    if context.rank == 0:
        path = folder / "t" / name
        loaded = torch.load(path, weights_only=False)
        change(loaded)
        torch.save(loaded, path)
        said = json.loads((folder / "t" / MANIFEST).read_text(encoding="utf-8"))
        (folder / "t" / MANIFEST).unlink()
        if manifest:
            keys = ("kind", "tag", "global_steps", "topology", "settings")
            sums = sums_of(folder / "t", files_in(folder / "t"))
            write_manifest(folder / "t", files=sums, **{key: said[key] for key in keys})
    context.barrier()


# ------------------------------------------------------------------------------- the checks


def other_models(context: RankContext, folder: Path, stage: int) -> None:
    """More layers, fewer, other shapes: the weights were half replaced before the error came."""
    saved(context, folder, stage=stage)
    others = [({"n_layer": 3}, "transformer.h.2"), ({"n_layer": 1}, "transformer.h.1"), ({"n_embd": 18}, "18")]
    for sizes, word in others[: 3 if stage == 2 else 1]:  # seconds each
        with engine(stage=stage, sizes=sizes) as run:
            train(run, context, 0)
            refused(context, run, folder, ValueError, word, "nothing was loaded")
    if context.rank == 0:
        (folder / "t" / MANIFEST).unlink()
    context.barrier()
    with engine(stage=stage, sizes={"n_layer": 3}) as run:
        refused(context, run, folder, ValueError, "transformer.h.2", "nothing was loaded")


def other_optimizers(context: RankContext, folder: Path, stage: int) -> None:
    """SGD's momentum is no first moment; its state was passed over without a word."""
    saved(context, folder, optimizer="SGD", stage=stage)
    with engine(stage=stage) as run:
        train(run, context, 0)
        refused(context, run, folder, ValueError, "no first moment", "momentum_buffer")


def other_stages(context: RankContext, folder: Path, _: None) -> None:
    """Without a manifest DeepSpeed finds out in the middle."""
    saved(context, folder, optimizer="AdamW", stage=1, **ADAMW)
    with engine(stage=0) as run:
        train(run, context, 0)
        refused(context, run, folder, RuntimeError, "has no optimizer state", "Nothing was loaded")


def from_adamw(context: RankContext, folder: Path, stage: int) -> None:
    """The migration that the README promises: moments are kept, the schedule goes on where the run was."""
    wanted = saved(context, folder, steps=3, optimizer="AdamW", stage=stage, **ADAMW)
    first = {k: v for k, v in wanted.items() if k.startswith("state") and k.endswith("exp_avg")}
    for schedule in (None, COSINE, WARMUP) if stage == 2 else (COSINE,):  # seconds each
        with engine(stage=stage, **({"scheduler": schedule} if schedule else {})) as run:
            path, client_state = run.engine.load_checkpoint(str(folder))
            assert path is not None and client_state["mean"] == 0.25 and "lr_scheduler" not in client_state
            now = everything(run)
            assert_same({k: now[k] for k in first}, first)
            assert_same({k: now[k] for k in now if "master" in k}, {k: v for k, v in wanted.items() if "master" in k})
            assert run.engine.global_steps == 3
            (lr,) = {group["lr"] for group in run.engine.basic_optimizer.param_groups}
            if schedule is COSINE:  # update number 3 of 10
                assert lr == pytest.approx(LR * 0.5 * (1 + math.cos(math.pi * 0.3)), rel=1e-12)
            elif schedule is WARMUP:  # as DeepSpeed's would have it after three updates
                assert lr == rate_after(3)
            else:
                assert lr == LR
            train(run, context, 3)
            assert run.engine.global_steps == 4
    with engine(stage=stage, scheduler=COSINE) as run:
        run.engine.load_checkpoint(str(folder), load_lr_scheduler_states=False)
        assert run.engine.lr_scheduler.last_batch_iteration == -1


def rate_after(steps: int) -> float:
    """Of a schedule that was there from the start."""
    from deepspeed.runtime.lr_schedules import WarmupLR

    there = WarmupLR(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], LR), **WARMUP["params"])
    for _ in range(steps):
        there.step()
    (rate,) = there.get_last_lr()
    return float(rate)


def from_adamw_with_a_schedule(context: RankContext, folder: Path, _: None) -> None:
    """DeepSpeed's schedules count as ours do; a position that is none is refused before the weights."""
    saved(context, folder, steps=3, optimizer="AdamW", stage=2, scheduler=WARMUP, **ADAMW)
    with engine(stage=2, scheduler=COSINE) as run:
        run.engine.load_checkpoint(str(folder))
        assert run.engine.lr_scheduler.last_batch_iteration == 2
    for said in ({"steps": 3}, {"last_batch_iteration": "3"}, {"last_batch_iteration": -7}):
        other = folder.with_name(f"{folder.name}-{len(str(said))}")
        saved(context, other, stage=2, scheduler=COSINE)
        edit(context, other, MODEL, lambda model: model.update(lr_scheduler=said))  # noqa: B023
        with engine(stage=2, scheduler=COSINE) as run:
            train(run, context, 0)
            refused(
                context, run, other, ValueError, "BlockwiseCosineLR cannot take in", "load_lr_scheduler_states=False"
            )


def one_rank(context: RankContext, folder: Path, stage: int) -> None:
    """What only one rank can see is said by all."""
    saved(context, folder, stage=stage)
    masters_key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"

    def lengthen(file: Any) -> None:
        held = file["optimizer_state_dict"][masters_key]
        held[0] = torch.cat([held[0], torch.zeros(7)])

    edit(context, folder, OPTIM, lengthen)
    with engine(stage=stage) as run:
        train(run, context, 0)
        refused(context, run, folder, ValueError, OPTIM, "elements there")


class Runs:
    """Unpickled, it leaves a file behind."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def code(context: RankContext, folder: Path, manifest: bool) -> None:
    """A pickle that calls something must not be loaded unasked, in whichever file; nor be in vain where it is asked."""
    marker = folder.with_name(f"{folder.name}-ran")
    for name in (MODEL, OPTIM):
        other = folder.with_name(f"{folder.name}-{name[:4]}")
        saved(context, other, stage=2)
        edit(context, other, name, lambda file: file.update(mine=Runs(marker)), manifest=manifest)
        with engine(stage=2) as run:
            train(run, context, 0)
            refused(context, run, other, RuntimeError, name, "mkdir", '"checkpoint": {"trust": true}')
        assert not marker.exists()
    if manifest:
        other = folder.with_name(f"{folder.name}-trusted")
        saved(context, other, stage=2)
        edit(context, other, MODEL, lambda file: file.update(mine=Harmless(3)))
        with engine(stage=2, checkpoint={"trust": True}) as run:
            _, client_state = run.engine.load_checkpoint(str(other))
            assert client_state["mine"].value == 3
        text = raised(lambda: engine(stage=2, checkpoint={"trust": "yes"}).__enter__(), ValueError)
        assert '"checkpoint": {"trust": ...} must be true or false' in text


def how_much_is_verified(context: RankContext, folder: Path, stage: int) -> None:
    """On 64 nodes every byte that is read in vain counts; what is not looked at must be what the page says."""
    saved(context, folder, stage=stage)
    own = f"zero_pp_rank_{context.rank}_mp_rank_00_optim_states.pt"
    model = MODEL if stage < 3 else own.replace("optim", "model")
    everything_of = sorted(files_in(folder / "t"))
    for how, mine in (("all", None), ("own", sorted([model, own])), ("size", [])):
        with (
            mock.patch.object(manifest, "sum_of", side_effect=manifest.sum_of) as summed,
            engine(stage=stage, checkpoint={"verify": how}) as run,
        ):
            assert run.engine.load_checkpoint(str(folder))[0] is not None
        read = [call.args[0].name for call in summed.call_args_list]
        together: list[Any] = [None] * context.world_size
        dist.all_gather_object(together, read)
        if mine is None:
            assert sorted(name for names in together for name in names) == everything_of, "each file once, by one rank"
            assert own in read, "by the rank that reads it anyway"
        else:
            assert sorted(read) == mine, how
    if context.rank == 0:  # a bit of rank 1's moments
        with (folder / "t" / OPTIM).open("r+b") as file:
            file.seek(-3000, os.SEEK_END)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 1]))
    context.barrier()
    for how in ("all", "own"):
        with engine(stage=stage, checkpoint={"verify": how}) as run:
            train(run, context, 0)
            refused(context, run, folder, RuntimeError, OPTIM, "its contents have changed")
    if context.rank == 0:  # cut
        with (folder / "t" / OPTIM).open("r+b") as file:
            file.truncate((folder / "t" / OPTIM).stat().st_size - 1)
    context.barrier()
    with engine(stage=stage, checkpoint={"verify": "size"}) as run:
        train(run, context, 0)
        refused(context, run, folder, RuntimeError, OPTIM, "it was cut or overwritten")
    text = raised(lambda: engine(stage=stage, checkpoint={"verify": "none"}).__enter__(), ValueError)
    assert '"checkpoint": {"verify": ...} must be one of all, own, size, got \'none\'' in text


class Harmless:
    """Not on the list, though it does nothing."""

    def __init__(self, value: int) -> None:
        self.value = value


def weights_alone(context: RankContext, folder: Path, stage: int) -> None:
    """Where moments are not asked for, those of another optimizer do not stand in the way."""
    wanted = saved(context, folder, optimizer="SGD", stage=stage)
    with engine(stage=stage) as run:
        run.engine.load_checkpoint(str(folder), load_module_only=True)
        assert_same(
            {f"master {k}": v for k, v in masters(run).items()}, {k: v for k, v in wanted.items() if "master" in k}
        )


def counters(context: RankContext, folder: Path, _: None) -> None:
    """What names an attribute of the engine in a portable checkpoint sets the three counters and nothing else."""
    from ds_blockwise.hosts.deepspeed.checkpoint.inspect import convert_checkpoint

    saved(context, folder, stage=2)
    output = folder.with_name(f"{folder.name}-portable")
    if context.rank == 0:
        _, notes = convert_checkpoint(folder, output)
        # what loads only with a list of harmless types does not fit a file that loads without one
        assert sorted(note.split(" is left out")[0] for note in notes) == ["'args'", "'mean'"], notes

    def forge(state: Any) -> None:
        state["counters"] |= {"training": 7, "optimizer": 1, "global_rank": 5}
        state["loss_scale"] |= {"scale_factor": 0.0, "backward": 3}

    context.barrier()
    edit(context, output, "training_state.pt", forge)
    with engine(stage=2) as run:
        own = run.engine.optimizer
        run.engine.load_checkpoint(str(output))
        assert run.engine.optimizer is own and run.engine.global_rank == context.rank
        assert run.engine.training in (True, False) and run.engine.global_steps == 2
        train(run, context, 2)
    edit(context, output, "training_state.pt", lambda state: state.update(counters={"global_steps": "two"}))
    with engine(stage=2) as run:
        refused(context, run, output, RuntimeError, "training_state.pt", "must be an integer of 0 or more, got 'two'")


CHECKS: dict[str, Callable[[RankContext, Path, Any], None]] = {
    each.__name__: each
    for each in (
        *(other_models, other_optimizers, other_stages, from_adamw, from_adamw_with_a_schedule),
        *(one_rank, code, how_much_is_verified, weights_alone, counters),
    )
}


def run_case(context: RankContext, case: tuple[str, Any]) -> None:
    prepare_deepspeed()
    import ds_blockwise  # noqa: F401 - registers the optimizers

    name, what = case
    CHECKS[name](context, context.tmp_path / f"{name}-{what}", what)


def _cases() -> dict[str, tuple[int, tuple[str, Any]]]:
    table: dict[str, tuple[str, Any]] = {}
    for name, stages in (("other_models", (0, 2, 3)), ("from_adamw", (0, 2, 3)), ("one_rank", (1, 3))):
        table |= {f"{name}-z{stage}": (name, stage) for stage in stages}
    table |= {f"how_much_is_verified-z{stage}": ("how_much_is_verified", stage) for stage in (2, 3)}
    table |= {f"other_optimizers-z{stage}": ("other_optimizers", stage) for stage in (0, 2)}
    table |= {name: (name, None) for name in ("other_stages", "from_adamw_with_a_schedule", "counters")}
    table |= {"code-manifest": ("code", True), "code-foreign": ("code", False), "weights_alone": ("weights_alone", 2)}
    return {name: (2, case) for name, case in table.items()}


SUITE = Suite(run_case, _cases())
outcome = SUITE.outcome()


@SUITE.cases()
def test_loads_that_do_not_fit(outcome: Outcome, name: str) -> None:
    """See the check of that name."""
    passes(outcome, name)
