# SPDX-License-Identifier: Apache-2.0
"""The planned bytes are those of engines that run, and of what autograd keeps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ds_blockwise.cli.models import load_model
from ds_blockwise.runs.model_shape import GPTShape
from ds_blockwise.runs.plan_memory import Arrangement, RankCounts, activations, count_rank, memory_of
from tests.helpers import ROOT
from tests.helpers.deepspeed.engines import DTYPES, engine_config, open_engine, prepare_deepspeed
from tests.helpers.distributed import Outcome, RankContext, fleet_outcome, passes
from tests.helpers.megatron.groups import megatron_groups

pytestmark = pytest.mark.usefixtures("ends_process_groups")

pytest.importorskip("deepspeed", reason="bytes are measured on DeepSpeed's engines")
pytest.importorskip("megatron.core", reason="bytes are measured on Megatron-core's model")

SHAPE = GPTShape(
    num_layers=3,
    hidden_size=64,
    ffn_hidden_size=160,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=512,
    sequence_length=32,
)
GPT2 = replace(SHAPE, architecture="gpt2", num_kv_heads=4, tied_embeddings=True)


@dataclass(frozen=True)
class Case:
    """One engine whose bytes are counted on every rank."""

    stage: int
    dtype: str
    optimizer: str
    tp: int = 1
    shape: GPTShape = SHAPE
    gas: int = 1


OPTIMIZERS = {"adamw": "BlockwiseAdamW", "mini": "BlockwiseAdamMini"}
CASES = {
    f"z{stage}-{dtype}-{short}": Case(stage, dtype, name)
    for stage in range(4)
    for dtype in ("fp32", "bf16")
    for short, name in OPTIMIZERS.items()
} | {
    "z1-bf16-mini-tp2": Case(1, "bf16", "BlockwiseAdamMini", tp=2),
    "z1-bf16-adamw-gas2": Case(1, "bf16", "BlockwiseAdamW", gas=2),
    "z2-bf16-mini-gas2": Case(2, "bf16", "BlockwiseAdamMini", gas=2),
    "z2-bf16-lion": Case(2, "bf16", "BlockwiseLion"),
    "z2-bf16-mini-gpt2": Case(2, "bf16", "BlockwiseAdamMini", shape=GPT2),
}


def storages(tensors: Iterator[torch.Tensor]) -> int:
    """Bytes of the distinct elements that tensors show: views of one buffer count once."""
    seen: dict[tuple[int, int], int] = {}
    for tensor in tensors:
        start = tensor.data_ptr()
        seen[start, tensor.numel()] = tensor.numel() * tensor.element_size()
    return sum(seen.values())


def masters_of(wrapper: Any) -> Iterator[torch.Tensor]:
    for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
        yield from getattr(wrapper, name, ())
    for group in getattr(wrapper, "fp32_groups", ()):
        yield from group


def measure(run: SimpleNamespace) -> dict[str, int]:
    """Bytes of weights, gradients before a step, master weights and both moments, on this rank."""
    engine, module = run.engine, run.engine.module
    weights = [getattr(p, "ds_tensor", p).data for p in module.parameters()]
    found = {"weights": storages(iter(weights))}
    own = {w.untyped_storage().data_ptr() for w in weights}
    tokens = torch.randint(run.vocab, (2, 33), generator=torch.Generator().manual_seed(1))
    loss = engine(tokens[:, :-1], torch.arange(32).expand(2, 32), None, labels=tokens[:, 1:]).mean()
    engine.backward(loss)
    # at the last micro batch of a step, and between micro batches
    kept = (getattr(engine.optimizer, name, None) or {} for name in ("averaged_gradients", "all_grad_tensors"))
    pieces = [g for groups in kept for group in groups.values() for g in (group or ())]
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    found["gradients"] = storages(iter([*grads, *pieces]))
    engine.step()
    if engine.gradient_accumulation_steps() == 2:
        engine.backward(engine(tokens[:, :-1], torch.arange(32).expand(2, 32), None, labels=tokens[:, 1:]).mean())
        engine.step()
    found["masters"] = storages(m for m in masters_of(engine.optimizer) if m.untyped_storage().data_ptr() not in own)
    states = engine.basic_optimizer.state.values()
    for key in ("exp_avg", "exp_avg_sq"):
        found[key] = storages(state[key] for state in states if key in state)
    return found


def check_bytes(context: RankContext, case: Case) -> None:
    """Model states within 5% of the plan, on every rank."""
    prepare_deepspeed()
    import megatron_patch

    megatron_patch.cpu_shims()
    # the planner counts on the whole model
    with megatron_groups(), torch.device("meta"):
        held = count_rank(megatron_patch.build_gpt(case.shape), case.tp, {})
    zero = {"stage3_param_persistence_threshold": 0} if case.stage == 3 else {}
    config = engine_config(case.optimizer, stage=case.stage, dtype=case.dtype, zero=zero, gas=case.gas)

    def build() -> torch.nn.Module:
        return megatron_patch.build_gpt(case.shape, dtype=DTYPES[case.dtype])

    with (
        megatron_groups(tensor_model_parallel_size=case.tp),
        open_engine(config, build, mpu=megatron_patch.mpu_adapter(), feed=False) as run,
    ):
        run.vocab = case.shape.vocab_size
        found = measure(run)
    width = {"fp32": 4, "bf16": 2}[case.dtype]
    arrangement = Arrangement(
        tp=case.tp, dp=context.world_size // case.tp, zero_stage=case.stage, bytes_per_weight=width
    )
    planned = memory_of(case.shape, held, arrangement, case.optimizer, 2, "none", case.gas)
    # ZeRO cuts by elements, so blocks are not shared out evenly: the plan means the average
    seconds = torch.tensor(float(found["exp_avg_sq"]))
    torch.distributed.all_reduce(seconds)
    found["exp_avg_sq"] = int(seconds) // context.world_size
    total = sum(found.values())
    assert abs(planned.model_states - total) <= 0.05 * total, (found, planned)
    # between micro batches ZeRO-2 keeps parameters at the edges of a partition whole
    edge = width * case.shape.vocab_size * case.shape.hidden_size if case.stage == 2 and case.gas > 1 else 0
    for name, size in found.items():
        more = edge if name == "gradients" else 0
        assert abs(getattr(planned, name) - size) <= 0.05 * size + more, (name, found, planned)


@pytest.fixture(scope="module")
def outcome(request: pytest.FixtureRequest) -> Outcome:
    """Every engine on two ranks of one spawn."""
    return fleet_outcome(request, check_bytes, {name: (2, case) for name, case in CASES.items()})


@pytest.mark.parametrize("name", CASES)
def test_model_states_are_those_of_a_real_engine(outcome: Outcome, name: str) -> None:
    """A plan that is wrong by a copy of the model sends a job to GPUs that cannot hold it."""
    passes(outcome, name)


# -------------------------------------------------------------------------------------- activations


def kept_bytes(shape: GPTShape, dtype: torch.dtype, micro_batch: int, checkpointing: str) -> int:
    """What autograd keeps of one forward pass, the model's own parameters left out."""
    from megatron_patch import build_gpt, build_meta_gpt

    build_meta_gpt(ROOT / "configs" / "model" / "tiny.yaml")  # process groups
    torch.manual_seed(0)
    model = build_gpt(shape, dtype=dtype, activation_checkpointing=checkpointing)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor: its address must not be used again
        return tensor

    length = shape.sequence_length
    tokens = torch.randint(shape.vocab_size, (micro_batch, length + 1))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        positions = torch.arange(length).expand(micro_batch, length)
        loss = model(tokens[:, :-1], positions, None, labels=tokens[:, 1:]).mean()
    assert loss.requires_grad
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize(
    ("changes", "micro_batch"),
    [({}, 2), ({"sequence_length": 128}, 1), ({"hidden_size": 128, "ffn_hidden_size": 512, "num_kv_heads": 4}, 3)],
    ids=["small", "long", "wide"],
)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_activations_are_what_autograd_keeps(
    dtype: str, changes: dict[str, int], micro_batch: int, checkpointing: str
) -> None:
    """Counted on the very layers that the main job builds."""
    shape = replace(SHAPE, **changes)
    arrangement = Arrangement(bytes_per_weight={"bf16": 2, "fp32": 4}[dtype])
    planned, _ = activations(shape, arrangement, micro_batch, checkpointing)
    found = kept_bytes(shape, DTYPES[dtype], micro_batch, checkpointing)
    assert abs(planned - found) <= 0.05 * found, (planned, found)


# ------------------------------------------------------------------------------------------- counts


def meta_gpt(shape: GPTShape) -> torch.nn.Module:
    from megatron_patch import build_gpt, build_meta_gpt

    build_meta_gpt(ROOT / "configs" / "model" / "tiny.yaml")  # process groups
    with torch.device("meta"):
        return build_gpt(shape)


def by_hand(shape: GPTShape, tp: int) -> RankCounts:
    """Every kind of parameter: its elements, its blocks, along what it is split, how often it occurs."""
    h, f, layers, rows = shape.hidden_size, shape.ffn_hidden_size, shape.num_layers, "rows"
    width, kv_width = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    gpt2 = shape.architecture == "gpt2"
    up = f if gpt2 else 2 * f
    kinds: list[tuple[int, int, str | None, int]] = [
        (shape.vocab_size * h, shape.vocab_size, rows, 1 if shape.tied_embeddings else 2),
        ((width + 2 * kv_width) * h, shape.num_heads + shape.num_kv_heads + kv_width, rows, layers),
        (width * h, h, "columns", layers),
        (up * h, up, rows, layers),
        (f * h, h, "columns", layers),
        (h, h, None, (2 * layers + 1) * (2 if gpt2 else 1)),
    ]
    if gpt2:
        kinds += [(shape.sequence_length * h, shape.sequence_length, None, 1), (h, h, None, 2 * layers)]
        kinds += [(n, n, rows, layers) for n in (width + 2 * kv_width, up)]  # biases: one value per element
    return RankCounts(
        sum(count * (numel // tp if split else numel) for numel, _, split, count in kinds),
        sum(count * (blocks // tp if split == rows else blocks) for _, blocks, split, count in kinds),
    )


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("shape", [SHAPE, GPT2], ids=["llama", "gpt2"])
def test_counts_are_those_by_hand(shape: GPTShape, tp: int) -> None:
    assert count_rank(meta_gpt(shape), tp, {}) == by_hand(shape, tp)


def test_counts_of_the_2b_model() -> None:
    """`ds-blockwise blocks` prints the same two numbers."""
    model = load_model(str(ROOT / "configs" / "model" / "llama_2b.yaml"))
    assert count_rank(model, 1, {}) == RankCounts(1_935_362_560, 636_288)


def test_a_rank_without_a_head_of_its_own_holds_a_part_of_one() -> None:
    """Two query groups on four ranks: two ranks have two query heads each, two a key head and 16 value rows."""
    qkv = 1 + 16
    whole = 3 * (64 + 64) + 7 * 64  # attention's output and the FFN's are cut into columns; norms are whole
    assert count_rank(meta_gpt(SHAPE), 4, {}).blocks == 2 * 128 + 3 * (qkv + 80) + whole


def test_settings_of_the_blocks_count() -> None:
    """With one block for each matrix Adam-mini keeps fewer second moments."""
    model = meta_gpt(SHAPE)
    by_row = count_rank(model, 1, {}).blocks
    assert count_rank(model, 1, {"granularity": {"ffn": "tensor"}}).blocks == by_row - 3 * (320 + 64) + 3 * 2


def test_offload_and_bf16_momentum() -> None:
    """Offloaded states leave the GPU; half the momentum is half the bytes."""
    held = RankCounts(1_000_000, 5_000)
    base = Arrangement(dp=2, zero_stage=2)
    kept = memory_of(SHAPE, held, base, "BlockwiseAdamMini", 1, "none")
    moved = memory_of(SHAPE, held, replace(base, offload=True), "BlockwiseAdamMini", 1, "none")
    assert kept.on_gpu - moved.on_gpu == kept.masters + kept.exp_avg + kept.exp_avg_sq == moved.offloaded
    half = memory_of(SHAPE, held, replace(base, momentum_bytes=2), "BlockwiseAdamMini", 1, "none")
    assert 2 * half.exp_avg == kept.exp_avg
