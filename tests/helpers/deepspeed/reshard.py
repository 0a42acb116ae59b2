# SPDX-License-Identifier: Apache-2.0
"""What every rank does in a cell of the checkpoint matrix: train, save, convert, load, compare, train on.

All engines train one small Megatron-core model on the same exact gradients, so that at every topology and dtype the
fp32 weights and moments after a step are those of one unsharded run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.helpers.deepspeed.engine_cases import BETAS, EPS, FULL_NAME, LR, WEIGHT_DECAY
from tests.helpers.deepspeed.engines import (
    DTYPES,
    engine_config,
    feed_step,
    model_weights,
    open_engine,
    prepare_deepspeed,
)
from tests.helpers.deepspeed.reshard_cells import CELLS, TOPOLOGIES, Cell, Topology
from tests.helpers.distributed import RankContext
from tests.helpers.megatron import gpt_shards
from tests.helpers.models import GradientPlan, small_weight
from tests.helpers.oracle import BY_ROLE, Hyper, Oracle, Weights, assert_same_update, told, update_errors
from tests.helpers.tables.oracle_names import ROLE, megatron_classes, regroup

SHAPE = "gqa"
STEPS_BEFORE, STEPS_AFTER = 3, 2


# ------------------------------------------------------------------------- the model, its gradients


@dataclass(frozen=True)
class SameGradients(GradientPlan):
    """Every rank feeds the same: 12 times an integer of 6 bits and a power of two.

    The mean over 1, 2, 3 or 4 ranks is then exact, in bf16 too and in any order of adding and dividing.
    """

    def share(self, name: str, shape: tuple[int, ...], step: int, index: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * step + sum(map(ord, name)))
        return 12 * torch.randint(-28, 29, shape, generator=generator).float() * self._scale(shape, step)


PLAN = SameGradients(1, dtype=torch.bfloat16)
DECAY_MULTIPLIERS = {"norm": 0.0, "value": 0.5}
SHAPES = gpt_shards.full_shapes(SHAPE)


def start_weight(name: str) -> Tensor:
    """A weight that bf16 can hold, so that runs in bf16 start where runs in fp32 do."""
    return small_weight(name, SHAPES[name]).bfloat16().float()


@contextmanager
def engine_of(
    topology: Topology, *, universal_load: bool = False, frozen: str | None = None
) -> Iterator[SimpleNamespace]:
    """A real engine of a topology; ``run.tp_rank`` and ``run.dp_rank`` say where this process is."""
    from megatron.core import parallel_state

    from megatron_patch import mpu_adapter

    with gpt_shards.parallel(topology.tp):
        tp_rank = parallel_state.get_tensor_model_parallel_rank()

        def build() -> nn.Module:
            model = gpt_shards.gpt(SHAPE, DTYPES[topology.dtype])
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    whole = start_weight(name)
                    parameter.copy_(whole if topology.tp == 1 else gpt_shards.cut(name, whole, tp_rank))
                    parameter.requires_grad_(name != frozen)
            return model

        params = {"lr": LR, "betas": list(BETAS), "eps": EPS, "weight_decay": WEIGHT_DECAY, "backend": "cpp"}
        universal = {"checkpoint": {"load_universal": True}} if universal_load else {}
        config = engine_config(
            FULL_NAME[topology.optimizer],
            stage=topology.stage,
            dtype=topology.dtype,
            zero=topology.zero,
            params={**params, "weight_decay_multipliers": DECAY_MULTIPLIERS, **BY_ROLE, **topology.params},
            **topology.config,
            **universal,
        )
        with open_engine(config, build, mpu=mpu_adapter()) as run:
            run.tp, run.tp_rank, run.shapes = topology.tp, tp_rank, SHAPES
            run.dp_rank = parallel_state.get_data_parallel_rank()
            yield run


def train(run: SimpleNamespace, first: int, count: int) -> list[dict[str, dict[str, Tensor]]]:
    """Steps ``first`` to ``first + count``; the whole state before the first of them and after each."""

    def cut(name: str, whole: Tensor) -> Tensor:
        return whole if run.tp == 1 else gpt_shards.cut(name, whole, run.tp_rank)

    states = [whole_state(run)]
    for step in range(first, first + count):
        for group in run.engine.basic_optimizer.param_groups:
            group["lr"] = lr_at(step)
        feed_step(run, PLAN, step, run.dp_rank, shapes=SHAPES, cut=cut)
        states.append(whole_state(run))
    return states


def lr_at(step: int) -> float:
    """The learning rate of a step; not constant, so that a step at the wrong place shows."""
    return LR * (0.7, 1.1, 0.9, 1.4, 1.2)[step]


def whole_state(run: SimpleNamespace) -> dict[str, dict[str, Tensor]]:
    """``{"weights" | "exp_avg" | "exp_avg_sq": {name: unsharded tensor}}``, on every rank, one value per element."""
    pieces = []
    optimizer = run.engine.basic_optimizer
    for binding in optimizer.bindings():
        state = optimizer.state[binding.tensor]
        flats = {"weights": binding.tensor.detach().reshape(-1).cpu()}
        if state:
            second = state["exp_avg_sq"].reshape(-1)
            if optimizer.shares_second_moment:
                assert second.numel() == binding.table.num_blocks, "second moments must be one per block in memory"
                second = binding.table.expand(second)
            flats |= {"exp_avg": state["exp_avg"].reshape(-1).cpu(), "exp_avg_sq": second.cpu()}
        for p in binding.table.placements:
            values = {kind: flat[p.flat_start : p.flat_start + p.numel].clone() for kind, flat in flats.items()}
            # zero.Init before AutoTP cuts whole parameters over all ranks
            tp_rank = 0 if p.shard is None and getattr(run, "cut_over_all", False) else run.tp_rank
            pieces.append((p.spec.fqn, tp_rank, p.param_start, values))
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, pieces)
    parts: dict[tuple[str, str, int], dict[int, Tensor]] = {}
    for name, tp_rank, start, values in (piece for pieces in everyone for piece in pieces):
        for kind, value in values.items():
            if value.numel():
                parts.setdefault((kind, name, tp_rank), {})[start] = value
    state: dict[str, dict[str, Tensor]] = {"weights": {}, "exp_avg": {}, "exp_avg_sq": {}}
    for kind, name in {key[:2] for key in parts}:
        locals_ = [
            torch.cat([found[at] for at in sorted(found)])
            for rank in range(run.tp)
            if (found := parts.get((kind, name, rank)))
        ]
        state[kind][name] = joined(name, locals_, run.shapes[name], getattr(run, "cut", gpt_shards.cut))
    return state


def joined(
    name: str, flats: list[Tensor], shape: tuple[int, ...], cut: Callable[[str, Tensor, int], Tensor] = gpt_shards.cut
) -> Tensor:
    """The inverse of ``cut``: a whole tensor from what the tensor-parallel ranks hold, found by cutting indices."""
    if len(flats) == 1:
        return flats[0].view(shape)
    whole = torch.full(shape, float("nan"), dtype=flats[0].dtype)
    index = torch.arange(whole.numel()).view(shape)
    for rank, flat in enumerate(flats):
        whole.view(-1)[cut(name, index, rank).reshape(-1)] = flat
    return whole


# ------------------------------------------------------------------------------ what is expected


def reference(source: str, target: str, value_tensor: bool) -> list[tuple[float, Weights, Weights]]:
    """Per step after the checkpoint: lr, fp64 weights before and after, of a run that was never cut or stopped."""
    hyper = Hyper(LR, BETAS, EPS, WEIGHT_DECAY)
    classes = megatron_classes(layers=gpt_shards.LAYERS, **gpt_shards.SHAPES[SHAPE])
    start = {name: start_weight(name) for name in SHAPES}

    def oracle(weights: Weights, mini: bool, classes: Any) -> Oracle:
        return Oracle(weights, classes, mini, hyper, weight_decay_multipliers=DECAY_MULTIPLIERS, **told(BY_ROLE))

    def step(run: Oracle, number: int) -> None:
        hyper.lr = lr_at(number)
        run.step({name: PLAN.share(name, shape, number, 0) for name, shape in SHAPES.items()})

    run = oracle(start, source == "mini", classes)
    for number in range(STEPS_BEFORE):
        step(run, number)
    if target != source or value_tensor:
        new_classes = regroup(regroup(classes, "value", ROLE), "norm", ROLE) if value_tensor else classes
        after = oracle(run.weights(), target == "mini", new_classes)
        after.take_over(run.state)
        run = after
    steps = []
    for number in range(STEPS_BEFORE, STEPS_BEFORE + STEPS_AFTER):
        before = run.weights()
        step(run, number)
        steps.append((hyper.lr, before, run.weights()))
    return steps


def check_steps(run: SimpleNamespace, cell: Cell) -> float:
    """Two more steps against the uninterrupted unsharded run; the largest difference of updates divided by lr."""
    source, target = TOPOLOGIES[cell.save], TOPOLOGIES[cell.load]
    states = train(run, STEPS_BEFORE, STEPS_AFTER)
    expected = reference(source.optimizer, target.optimizer, "granularity" in target.params)
    worst = 0.0
    for number, (lr, before, after) in enumerate(expected):
        actual = (states[number]["weights"], states[number + 1]["weights"])
        assert_same_update(actual, (before, after), lr, what=f"{cell.name}, step {number} after loading")
        worst = max(worst, *update_errors(actual, (before, after), lr).values())
    return worst


def largest_difference(one: dict[str, dict[str, Tensor]], two: dict[str, dict[str, Tensor]], *kinds: str) -> float:
    """Largest absolute difference of any element of weights and moments; infinite if names differ."""
    differences = [0.0]
    for kind in kinds:
        if set(one[kind]) != set(two[kind]) or not one[kind]:
            return float("inf")
        differences += [float((one[kind][n].double() - two[kind][n].double()).abs().max()) for n in one[kind]]
    return max(differences)


# ------------------------------------------------------------------------------ entries of ranks


def prepare() -> None:
    prepare_deepspeed()
    import ds_blockwise  # noqa: F401 - registers the optimizers
    import megatron_patch

    megatron_patch.cpu_shims()


def save_case(context: RankContext, case: tuple[Path, str]) -> None:
    """Train, save, and write down the whole state at the save and two steps later."""
    prepare()
    root, name = case
    with engine_of(TOPOLOGIES[name]) as run:
        train(run, 0, STEPS_BEFORE)
        run.engine.save_checkpoint(str(root / name), tag="saved", client_state={"words": ["kept", 7]})
        states = train(run, STEPS_BEFORE, STEPS_AFTER)
        if context.rank == 0:
            torch.save([states[0], states[-1]], root / f"{name}.state")


def convert_case(context: RankContext, case: tuple[Path, str]) -> None:
    """One saved checkpoint into the portable form."""
    prepare()
    from ds_blockwise.checkpoint.portable import save_portable
    from ds_blockwise.hosts.deepspeed.checkpoint.read_files import DeepSpeedFiles

    root, name = case
    source = DeepSpeedFiles(root / name / "saved")
    assert not source.notes, source.notes
    save_portable(source, root / f"{name}.portable", shard_bytes=4000)


def universal_case(context: RankContext, case: tuple[Path, str]) -> None:
    """One saved checkpoint through DeepSpeed's own converter; a reason why it cannot be is written down."""
    prepare()
    from deepspeed.checkpoint import ds_to_universal

    root, name = case
    arguments = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    folders = {"input_folder": str(root / name / "saved"), "output_folder": str(root / f"{name}.universal" / "saved")}
    try:
        ds_to_universal.main(SimpleNamespace(**folders, **arguments, inject_missing_state=False))
    except Exception as error:  # whatever it is, cells that expect it look for their reason in it
        (root / f"{name}.universal.refused").write_text(f"{type(error).__name__}: {error}")
    else:
        (root / f"{name}.universal" / "latest_universal").write_text("saved")


def load_case(context: RankContext, case: tuple[Path, str]) -> None:
    """One cell: load, compare the state with the saved one, train on; rank 0 writes down what was measured."""
    prepare()
    root, name = case
    cell = CELLS[name]
    result = _refused(root, cell) if cell.refused else _loaded(root, cell)
    if context.rank == 0:
        (root / f"{name}.json").write_text(json.dumps(result))


def _folder(root: Path, cell: Cell) -> str:
    return str(root / (cell.save + {"convert": ".portable", "universal": ".universal"}.get(cell.way, "")))


def _loaded(root: Path, cell: Cell) -> dict[str, Any]:
    saved, later = torch.load(root / f"{cell.save}.state")
    refused = root / f"{cell.save}.universal.refused"
    assert cell.way != "universal" or not refused.exists(), refused.read_text()
    source, target = TOPOLOGIES[cell.save], TOPOLOGIES[cell.load]
    with engine_of(target, universal_load=cell.way == "universal") as run:
        if cell.way == "convert":
            train(run, 0, 1)  # state of its own, which must not survive
        path, client_state = run.engine.load_checkpoint(_folder(root, cell))
        assert path is not None and client_state["words"] == ["kept", 7], (path, client_state)
        assert run.engine.global_steps == STEPS_BEFORE
        kinds = ["weights", "exp_avg"]
        if (source.optimizer, source.params.get("granularity")) == (target.optimizer, target.params.get("granularity")):
            kinds.append("exp_avg_sq")
        loaded = whole_state(run)
        difference = largest_difference(loaded, saved, *kinds)
        assert difference == 0.0, f"{cell.name}: loaded state differs from the saved one by {difference:.2e}"
        for name, weight in model_weights(run).items():  # what the next forward computes with
            whole = loaded["weights"][name]
            expected = whole if run.tp == 1 else gpt_shards.cut(name, whole, run.tp_rank)
            assert torch.equal(weight, expected.to(weight.dtype)), f"{cell.name}: the model's {name} was not refreshed"
        update = check_steps(run, cell)
        if cell.way == "same":
            after = largest_difference(whole_state(run), later, "weights", "exp_avg", "exp_avg_sq")
            assert after == 0.0, f"{cell.name}: not bitwise the uninterrupted run: {after:.2e}"
    return {"state": difference, "update": update}


def _refused(root: Path, cell: Cell) -> dict[str, Any]:
    unconverted = root / f"{cell.save}.universal.refused"
    if cell.way == "universal" and unconverted.exists():
        reason = unconverted.read_text()
        assert cell.refused in reason, f"{cell.name}: {reason}"
        return {"reason": reason}
    with engine_of(TOPOLOGIES[cell.load], universal_load=cell.way == "universal") as run:
        before = whole_state(run)
        try:
            run.engine.load_checkpoint(_folder(root, cell))
        except Exception as error:  # whatever it is, the reason must be in it
            reason = f"{type(error).__name__}: {error}"
            assert cell.refused in reason, f"{cell.name}: {reason}"
        else:
            raise AssertionError(f"{cell.name} was loaded")
        assert largest_difference(before, whole_state(run), "weights") == 0.0, "weights changed by a refused load"
    return {"reason": reason}
