# SPDX-License-Identifier: Apache-2.0
"""``ds-blockwise plan``: its bytes are those of engines that run, its arithmetic is checked by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ds_blockwise.cli.main import main
from ds_blockwise.runs.check import check_run_file
from ds_blockwise.runs.model_shape import GPTShape
from ds_blockwise.runs.plan import GPUS, computed_again, flops_per_token, make_plan, traffic
from ds_blockwise.runs.plan_memory import Layout, activations, local_blocks, local_parameters, memory_of
from tests.helpers import ROOT
from tests.helpers.deepspeed.engines import DTYPES, engine_config, open_engine, prepare_deepspeed
from tests.helpers.distributed import Outcome, RankContext, fleet_outcome, passes
from tests.helpers.optimizers import FULL_NAME

pytestmark = pytest.mark.usefixtures("ends_process_groups")

pytest.importorskip("deepspeed", reason="bytes are measured on DeepSpeed's engines")
pytest.importorskip("megatron.core", reason="bytes are measured on Megatron-core's model")

FOLDER = ROOT / "configs" / "run" / "llama_2b"
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


CASES = {
    f"z{stage}-{dtype}-{short}": Case(stage, dtype, name)
    for stage in range(4)
    for dtype in ("fp32", "bf16")
    for short, name in FULL_NAME.items()
} | {
    "z1-bf16-mini-tp2": Case(1, "bf16", "BlockwiseAdamMini", tp=2),
    "z1-bf16-adamw-gas2": Case(1, "bf16", "BlockwiseAdamW", gas=2),
    "z2-bf16-mini-gas2": Case(2, "bf16", "BlockwiseAdamMini", gas=2),
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
    from megatron.core import parallel_state

    import megatron_patch

    megatron_patch.cpu_shims()
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=case.tp)
    zero = {"stage3_param_persistence_threshold": 0} if case.stage == 3 else {}
    config = engine_config(case.optimizer, stage=case.stage, dtype=case.dtype, zero=zero, gas=case.gas)

    def build() -> torch.nn.Module:
        return megatron_patch.build_gpt(case.shape, dtype=DTYPES[case.dtype])

    with open_engine(config, build, mpu=megatron_patch.mpu_adapter(), feed=False) as run:
        run.vocab = case.shape.vocab_size
        found = measure(run)
    width = {"fp32": 4, "bf16": 2}[case.dtype]
    layout = Layout(tp=case.tp, dp=context.world_size // case.tp, zero_stage=case.stage, bytes_per_weight=width)
    planned = memory_of(case.shape, layout, case.optimizer, 2, "none", case.gas)
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
    layout = Layout(bytes_per_weight={"bf16": 2, "fp32": 4}[dtype])
    planned, _ = activations(shape, layout, micro_batch, checkpointing)
    found = kept_bytes(shape, DTYPES[dtype], micro_batch, checkpointing)
    assert abs(planned - found) <= 0.05 * found, (planned, found)


# --------------------------------------------------------------------------------------- arithmetic


def test_counts_of_the_2b_model() -> None:
    """`ds-blockwise blocks` prints the same two numbers from the real module."""
    shape = GPTShape.load(ROOT / "configs" / "model" / "llama_2b.yaml")
    assert local_parameters(shape, 1) == 1_935_362_560
    assert local_blocks(shape, 1) == 636_288


def test_flops_by_hand() -> None:
    """6 per multiplying parameter and 12 L h s; an untied embedding multiplies nothing."""
    shape = GPTShape.load(ROOT / "configs" / "model" / "llama_2b.yaml")
    multiplying = 1_935_362_560 - 50_304 * 2560
    attention = 12 * 16 * 2560 * shape.sequence_length
    assert flops_per_token(shape) == 6 * multiplying + attention
    assert computed_again(shape, "none") == 0
    assert computed_again(shape, "selective") == attention / 3
    assert computed_again(shape, "full") == pytest.approx(flops_per_token(shape) / 3)


def test_traffic_by_hand() -> None:
    """A ring sends (N-1)/N of the weights' bytes for a reduction and again for a gathering."""
    weights = local_parameters(SHAPE, 1) * 2
    for stage, times in ((0, 2), (1, 2), (2, 4 + 1), (3, 4 + 8)):
        data, tensor = traffic(SHAPE, Layout(dp=8, zero_stage=stage), 2, 4)
        assert data == pytest.approx(weights * 7 / 8 * times)
        assert tensor == 0
    _, tensor = traffic(SHAPE, Layout(tp=2, dp=4, zero_stage=1), 2, 4)
    assert tensor == 4 * 3 * 4 * (2 * 32 * 64 * 2) * 2 * 1 / 2


def test_offload_and_bf16_momentum() -> None:
    """Offloaded states leave the GPU; half the momentum is half the bytes."""
    base = Layout(dp=2, zero_stage=2)
    held = memory_of(SHAPE, base, "BlockwiseAdamMini", 1, "none")
    moved = memory_of(SHAPE, replace(base, offload=True), "BlockwiseAdamMini", 1, "none")
    assert held.on_gpu - moved.on_gpu == held.masters + held.exp_avg + held.exp_avg_sq == moved.offloaded
    half = memory_of(SHAPE, replace(base, momentum_bytes=2), "BlockwiseAdamMini", 1, "none")
    assert 2 * half.exp_avg == held.exp_avg


def test_a_larger_micro_batch_is_found_only_if_it_fits() -> None:
    """The largest micro batch divides a rank's share, and the next one would not fit."""
    run, _ = check_run_file(FOLDER / "nodes_1.yaml")
    assert run is not None
    plan = make_plan(run, 1, 8, "h100-80g")
    usable = 0.92 * GPUS["h100-80g"].memory
    layout = Layout(dp=8, zero_stage=1, bucket_elements=100_000_000)
    sizes = {
        m: memory_of(run.shape, layout, "BlockwiseAdamMini", m, "selective").on_gpu for m in (1, 2, 4, 8, 16, 32, 64)
    }
    assert plan.largest_micro_batch == max(m for m, size in sizes.items() if size <= usable)
    small = make_plan(run, 1, 8, "a100-40g")
    assert small.largest_micro_batch < plan.largest_micro_batch


# ------------------------------------------------------------------------------------------ command


def test_the_command_prints_a_table_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both optimizers side by side, every number of nodes, the figure."""
    monkeypatch.chdir(tmp_path)
    assert main(["plan", str(FOLDER), "--nodes", "8"]) == 0
    printed = capsys.readouterr().out
    assert "8 nodes x 8 h100-80g = tensor 1 x data 64" in printed
    assert re.search(r"peak on the GPU +\d+\.\d+ +\d+\.\d+", printed)
    assert re.findall(r"^ +(\d+)   [\d,]+ to", printed, flags=re.MULTILINE) == ["1", "2", "4", "8", "16", "32", "64"]
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    """For scripts; without a figure."""
    assert main(["plan", str(FOLDER / "nodes_4.yaml"), "--json", "--plot", ""]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["plan"]["dp"] == 32
    memory = found["plan"]["memory"]
    assert memory["BlockwiseAdamMini"]["on_gpu"] < memory["AdamW"]["on_gpu"]
    assert [p["nodes"] for p in found["over_nodes"]] == [1, 2, 4, 8, 16, 32, 64]
    assert found["plan"]["mfu"][0] > found["plan"]["mfu"][1] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpu", "b300"], "gpu 'b300' is not known; allowed: a100-40g"),
        (["--nodes", "3"], "cannot be shared by 24 data-parallel ranks"),
        (["--set", "training.global_batch_size=500"], "global_batch_size = 500"),
    ],
)
def test_a_plan_that_cannot_be_is_named(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(FOLDER / "nodes_1.yaml"), "--plot", "", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_a_run_that_does_not_fit_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    """Before the first GPU-hour."""
    settings = ["--set", "training.micro_batch_size=64", "--set", "training.activation_checkpointing=none"]
    assert main(["plan", str(FOLDER / "nodes_1.yaml"), "--plot", "", "--gpu", "a100-40g", *settings]) == 0
    assert "fits in 40 GB with BlockwiseAdamMini: NO" in capsys.readouterr().out


def test_the_page_shows_what_the_command_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`docs/scaling.md` quotes the planner; a change of its model must change the page."""
    monkeypatch.chdir(ROOT)
    assert main(["plan", "configs/run/llama_2b", "--nodes", "8", "--plot", str(tmp_path / "plan.png")]) == 0
    printed = capsys.readouterr().out.replace(str(tmp_path / "plan.png"), "docs/scaling/llama_2b.png")
    assert printed.strip() in (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
