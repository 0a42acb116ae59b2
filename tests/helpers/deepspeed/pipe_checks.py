# SPDX-License-Identifier: Apache-2.0
"""Megatron-core's layers in DeepSpeed's engines: on the grid of a pipeline, and experts; checkpoints of a pipeline."""

from __future__ import annotations

import contextlib
import io
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.helpers import models
from tests.helpers.deepspeed.compared import Compared, assert_same, case_config, hyper
from tests.helpers.deepspeed.engine_cases import FULL_NAME, Case
from tests.helpers.deepspeed.engines import engine_config, feed_step, masters, open_engine, prepare_deepspeed
from tests.helpers.deepspeed.guarded import everything, raised
from tests.helpers.deepspeed.pipe_models import VOCAB, PipeFeed, pipe, train_step
from tests.helpers.distributed import RankContext
from tests.helpers.megatron.gpt_shards import cut, parallel
from tests.helpers.models import GradientPlan
from tests.helpers.muon_oracle import oracle_for, tolerance_for
from tests.helpers.tables.oracle_names import Classified, Span

MICRO, HIDDEN, FFN, LAYERS = 2, 15, 14, 4


# ---------------------------------------------------------------------- tensor x pipeline parallelism


def check_grid(context: RankContext, optimizer: str) -> None:
    """Rows of fc2 are split over the two ranks of a stage; the grid's model-parallel group spans all four."""
    prepare_deepspeed()
    import deepspeed
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    import ds_blockwise  # noqa: F401 - registers the optimizers
    import megatron_patch

    megatron_patch.cpu_shims()
    deepspeed.init_distributed("gloo")
    shapes = {f"{i}.linear_fc1.weight": (2 * FFN, HIDDEN) for i in range(LAYERS)}
    shapes |= {f"{i}.linear_fc2.weight": (HIDDEN, FFN) for i in range(LAYERS)}
    rank = context.rank % 2
    config = case_config(Case(optimizer, 1), gas=MICRO)
    config["pipeline"] = {"pipe_partitioned": False, "grad_partitioned": False}
    with (
        parallel(2, 2),
        open_engine(
            config, lambda: _split_pipe(PipeModelDataParallelTopology(2, 2, 1), shapes, rank), feed=False
        ) as run,
    ):
        grid = run.engine.mpu
        assert dist.get_world_size(grid.get_model_parallel_group()) == 4
        feed = PipeFeed(run.engine, GradientPlan(1, MICRO), shapes, partial(cut, rank=rank))
        classes = {n: Classified((Span(0, s[0], "ffn", 1),)) for n, s in shapes.items()}
        start = {n: models.small_weight(n, s) for n, s in shapes.items()}
        own = list(masters(run))
        assert len(own) == len(shapes) // 2
        oracle = oracle_for(optimizer, start, classes, hyper())
        pair = Compared(run, oracle, lambda whole: {n: cut(n, whole[n], rank) for n in own})
        pair.check_start()
        for step in range(3):
            feed.step = step
            pair.set_lr(step)
            train_step(run, [torch.zeros(1, 4)] * MICRO)
            gradients = {n: feed.mean(n, s, step) for n, s in shapes.items()}
            pair.check_step(gradients, what=f"step {step}, rank {context.rank}", tolerance=tolerance_for(optimizer))


def _split_pipe(topology: Any, shapes: dict[str, tuple[int, ...]], rank: int) -> nn.Module:
    from deepspeed.pipe import LayerSpec, PipelineModule
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.mlp import MLP, MLPSubmodules

    from tests.helpers.megatron.models import LLAMA, SIZES

    sizes = {**SIZES, **LLAMA, "hidden_size": HIDDEN, "ffn_hidden_size": FFN, "num_attention_heads": 2}
    sizes |= {"num_query_groups": 2, "kv_channels": 5}
    config = TransformerConfig(tensor_model_parallel_size=2, **sizes)
    spec = LayerSpec(MLP, config, MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear))
    model = PipelineModule(
        [spec] * LAYERS, topology=topology, partition_method="uniform", loss_fn=lambda carry, _: carry.sum()
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(cut(name, models.small_weight(name, shapes[name]), rank))
    return model


# -------------------------------------------------------------------------------------------- experts


def check_experts(context: RankContext, optimizer: str) -> None:
    """Experts that every rank holds are stepped exactly; expert parallelism is refused."""
    prepare_deepspeed()
    import ds_blockwise  # noqa: F401 - registers the optimizers
    import megatron_patch
    from tests.helpers.megatron.parallel import Topology, chunks_of, classes_of, parallel_of, whole_shapes

    megatron_patch.cpu_shims()
    config = case_config(Case(optimizer, 1))
    topology = Topology(experts=True)
    shapes = whole_shapes(topology)
    with parallel_of(topology):
        mpu = megatron_patch.mpu_adapter()
        with open_engine(config, lambda: models.set_small_weights(chunks_of(topology)[0]), mpu=mpu) as run:
            plan = GradientPlan(context.world_size)
            now = masters(run)
            assert any("local_experts.5" in name for name in now)
            pair = Compared(run, oracle_for(optimizer, now, classes_of(shapes, topology.groups), hyper()))
            for step in range(3):
                pair.set_lr(step)
                feed_step(run, plan, step, context.rank)
                gradients = {n: plan.mean(n, s, step) for n, s in shapes.items()}
                pair.check_step(gradients, what=f"step {step}", tolerance=tolerance_for(optimizer))
    split = Topology(ep=2, experts=True)
    for topology, word in (
        (split, "expert_model_parallel_size = 2"),
        (Topology(tp=2), "expert_tensor_parallel_size = 1"),
    ):
        with parallel_of(topology):
            text = raised(megatron_patch.mpu_adapter, ValueError)
            assert word in text, text
            assert "convert_" in text, text
    with parallel_of(split):
        text = raised(lambda: _opened(config, chunks_of(split)[0]), ValueError)
        assert "expert parallelism of Megatron-core" in text, text
        stock = engine_config("AdamW", stage=1, params={"torch_adam": True})
        raised(lambda: _opened(stock, chunks_of(split)[0]), AttributeError)  # so upstream fails with any optimizer


def _opened(config: dict[str, Any], model: nn.Module) -> None:
    with open_engine(config, lambda: model):
        pass


# -------------------------------------------------------------------------------------- checkpoints


def check_checkpoint(context: RankContext, what: tuple[str, dict[str, Any]]) -> None:
    """Resumed bitwise; a damaged layer file is named on every rank; `convert` refuses, `check` looks at all files."""
    from ds_blockwise.checkpoint.manifest import CheckpointError, read_manifest
    from ds_blockwise.cli.main import main

    prepare_deepspeed()
    import ds_blockwise  # noqa: F401 - registers the optimizers

    optimizer, changes = what
    config = engine_config(FULL_NAME[optimizer], gas=MICRO, **changes)
    folder = context.tmp_path / "_".join(("pipe", optimizer, *map(str, changes.values()))).replace("/", "-")
    with open_engine(config, pipe, feed=False) as run:
        _train(run, 0, 1)
        run.engine.save_checkpoint(str(folder), "two", client_state={"note": context.rank})
        saved = everything(run)
        _train(run, 2)
        wanted = everything(run)
    manifest = read_manifest(folder / "two")
    assert manifest is not None
    assert manifest["topology"]["pp"] == 2
    layers = sorted(name for name in manifest["files"] if name.startswith("layer_"))
    assert len(layers) == 5, layers  # the tied output layer is in the embedding's file
    # "own": DeepSpeed's lists of an engine's files leave out those of layers
    with open_engine({**config, "checkpoint": {"verify": "own"}}, pipe, feed=False) as run:
        for name in layers[:1] + layers[-1:]:
            _check_damage(context, run, folder, name, CheckpointError)
        path, client_state = run.engine.load_checkpoint(str(folder))
        assert path is not None
        assert client_state is not None
        assert "note" in client_state
        assert_same(everything(run), saved)
        _train(run, 2)
        assert_same(everything(run), wanted)
    if context.rank == 0:
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            assert main(["convert", str(folder), str(folder) + "-portable"]) != 0
        assert "pipeline-parallel run (PipelineModule)" in out.getvalue(), out.getvalue()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            assert main(["check", str(folder)]) == 0, out.getvalue()
        assert "no problem found" in out.getvalue()
    context.barrier()


def _check_damage(context: RankContext, run: Any, folder: Any, name: str, kind: type[Exception]) -> None:
    path = folder / "two" / name
    whole, before = path.read_bytes(), everything(run)
    context.barrier()
    if context.rank == 0:
        spoilt = bytearray(whole)
        spoilt[len(whole) // 2] ^= 0x40
        path.write_bytes(spoilt)
    context.barrier()
    text = raised(lambda: run.engine.load_checkpoint(str(folder)), kind)
    assert name in text, text
    assert_same(everything(run), before)
    context.barrier()
    if context.rank == 0:
        path.write_bytes(whole)
    context.barrier()


def _train(run: Any, *steps: int) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        batches: list[Tensor] = [torch.randint(VOCAB, (2, 9), generator=generator) for _ in range(MICRO)]
        train_step(run, batches)
