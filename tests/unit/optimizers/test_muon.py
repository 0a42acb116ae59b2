# SPDX-License-Identifier: Apache-2.0
"""Blockwise Muon on whole tensors: its mathematics, what it orthogonalises, its state."""

from __future__ import annotations

import copy
import itertools
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from ds_blockwise import BlockwiseAdamMini, BlockwiseAdamW, BlockwiseLion, BlockwiseMuon, tag_parameters
from ds_blockwise.blocks.ranges import TensorShard
from ds_blockwise.blocks.roles import Role
from ds_blockwise.blocks.segment_table import Placement
from ds_blockwise.blocks.settings.block_settings import BlockSettings
from ds_blockwise.blocks.spec import apply_settings
from ds_blockwise.blocks.structure import HeadGeometry, fused_qkv, whole_tensor
from ds_blockwise.kernels.newton_schulz import COEFFICIENTS, newton_schulz
from ds_blockwise.optimizers.muon.matrices import local_matrix, matrices_of
from ds_blockwise.parallel.reduce import LOCAL
from tests.helpers.deepspeed.engine_cases import HEAD_ROWS, MODELS
from tests.helpers.muon_oracle import ONES, MuonOracle, polynomial_of
from tests.helpers.oracle import Hyper, Oracle, assert_same_update

LR, DECAY = 2e-2, 0.1
HYPER = Hyper(LR, (0.9, 0.95), 1e-8, DECAY)
MULTIPLIERS = {"emb": 3.0, "qk": 2.0, "key": 5.0, "ffn": 0.5, "vo": 0.25}


def made(kind: str = "nano", **settings: Any) -> tuple[nn.Module, BlockwiseMuon]:
    torch.manual_seed(0)
    model = MODELS[kind][0]()
    tag_parameters(model)
    return model, BlockwiseMuon(model.parameters(), lr=LR, weight_decay=DECAY, **settings)


def feed(model: nn.Module, step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
    return {name: param.grad for name, param in model.named_parameters() if param.grad is not None}


@pytest.mark.parametrize("coefficients", COEFFICIENTS)
def test_newton_schulz_is_its_polynomial_on_singular_values(coefficients: str) -> None:
    generator = torch.Generator().manual_seed(1)
    for rows, columns in ((7, 7), (5, 31), (40, 12), (1, 9)):
        matrix = torch.randn(rows, columns, generator=generator)
        wanted = polynomial_of(matrix, coefficients)
        for size in (1.0, 1e-30, 1e30):  # it sees the direction alone
            found = newton_schulz(matrix * size, coefficients)
            torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-5)
    assert torch.equal(newton_schulz(torch.zeros(3, 4), coefficients), torch.zeros(3, 4))


BF16_TOLERANCES = {"quintic": 0.05, "simple": 0.15, "polar_express": 0.3}  # the docstring's


@pytest.mark.parametrize("coefficients", COEFFICIENTS)
@pytest.mark.parametrize("spectrum", ["random", "steep"])
def test_bf16_brings_singular_values_to_about_the_same_place(coefficients: str, spectrum: str) -> None:
    generator = torch.Generator().manual_seed(2)
    for rows, columns in ((16, 16), (96, 33), (64, 256), (1, 9)):
        matrix = torch.randn(rows, columns, generator=generator)
        if spectrum == "steep":
            left, values, right = torch.linalg.svd(matrix, full_matrices=False)
            matrix = left * torch.arange(1.0, len(values) + 1) ** -1.5 @ right
        wide, narrow = (newton_schulz(matrix, coefficients, dtype) for dtype in ("fp32", "bf16"))
        assert narrow.dtype == torch.float32 and not torch.equal(narrow, wide)
        left, values, right = torch.linalg.svd(wide.double(), full_matrices=False)
        found = torch.diagonal(left.mT @ narrow.double() @ right.mT)
        torch.testing.assert_close(found, values, rtol=0, atol=BF16_TOLERANCES[coefficients])
    assert torch.equal(newton_schulz(torch.zeros(3, 4), coefficients, "bf16"), torch.zeros(3, 4))


SETTINGS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "fused": ("nano", {}, {}),
    "grouped queries": ("qwen3", {}, {}),
    "transposed": ("gpt2", {}, {}),
    "by Triton": ("gpt2", {"backend": "triton"}, {}),
    "heads by name": (
        "nano",
        {"orthogonalize": {"qk": "head", "vo": "head"}},
        {"how": {"query": "head", "key": "head", "value": "head"}, "head_rows": HEAD_ROWS["nano"]},
    ),
    "roles": (
        "nano",
        {"orthogonalize": {"qk": "role", "value": "role"}},
        {"how": {"query": "role", "key": "role", "value": "role"}},
    ),
    "roles of transposed": ("gpt2", {"orthogonalize": {"key": "role"}}, {"how": {"key": "role"}}),
    "whole weights": (
        "gpt2",
        {"orthogonalize": {"qk": "matrix", "vo": "matrix", "ffn": "none"}},
        {"how": {"query": "matrix", "key": "matrix", "value": "matrix", "attn_out": "matrix", "ffn": "none"}},
    ),
    "without rows": ("llama", {"normuon": False, "scale": "keller"}, {"row_beta": None, "scale": "keller"}),
    "other constants": (
        "llama",
        {"momentum": 0.8, "nesterov": False, "normuon_beta2": 0.7, "scale": "mup", "coefficients": "polar_express"},
        {
            "momentum_beta": 0.8, "nesterov": False, "row_beta": 0.7, "scale": "mup", "coefficients": "polar_express",
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_its_update_is_that_of_the_definition(name: str) -> None:
    kind, settings, said = SETTINGS[name]
    model, optimizer = made(kind, lr_multipliers=MULTIPLIERS, weight_decay_multipliers={"norm": 0.0}, **settings)
    params = dict(model.named_parameters())
    others = {"lr_multipliers": MULTIPLIERS, "weight_decay_multipliers": {"norm": 0.0}}
    oracle = MuonOracle(params, MODELS[kind][1], True, HYPER, **others, **said)
    for step in range(4):
        before, was = oracle.weights(), {name: param.detach().clone() for name, param in params.items()}
        oracle.step(feed(model, step))
        optimizer.step()
        assert_same_update(
            (was, params), (before, oracle.weights()), LR, tolerance=1e-5, weight_roundings=3, what=f"step {step}"
        )
        oracle.set_weights(params)


def test_windows_of_shards_make_up_each_matrix() -> None:
    """All splits by tensor and data parallelism, of fused, transposed and stacked weights, against plain indexing."""
    draw = random.Random(3)
    heads = HeadGeometry(4, 2, 3, "test")
    structures = [
        fused_qkv("grouped", (24, 8), "grouped", heads, is_bias=False),
        fused_qkv("columns", (8, 24), "concat", heads, is_bias=False, axis=1),
        replace(whole_tensor("fused", (16, 4), Role.FFN, is_bias=False), fused_parts=2),
        whole_tensor("experts", (3, 4, 8), Role.FFN, is_bias=False, axis=2, matrices=(3, 4, 8)),
    ]
    for structure, how in itertools.product(structures, ("role", "head", "matrix")):
        settings = BlockSettings.parse(orthogonalize={"qk": how, "vo": how, "ffn": "role" if how == "head" else how})
        spec = apply_settings(structure, settings)
        values = torch.arange(spec.numel).view(spec.structure.stored_shape)
        for dim, tp in itertools.product((None, -2, -1), (2, 4)):
            split = None if dim is None else values.dim() + dim
            shards = [None if split is None else TensorShard.even(values.shape, split, rank, tp) for rank in range(tp)]
            for matrix in matrices_of(spec):
                one = values[matrix.number] if values.dim() == 3 else values
                rows = torch.cat([torch.arange(start, end) for start, end in matrix.ranges])
                wanted = one.index_select(spec.axis - (values.dim() - 2), rows)
                whole = torch.full_like(wanted, -1)
                for shard in shards[: 1 if split is None else tp]:
                    local = local_matrix(spec, shard, matrix)
                    held = values
                    if shard is not None:
                        ((first, _),) = shard.chunks[shard.rank]
                        held = values.narrow(shard.dim, first, shard.local_shape[shard.dim])
                    flat = held.contiguous().view(-1)
                    cuts = sorted({0, flat.numel(), *(draw.randrange(flat.numel()) for _ in range(4))})
                    together = torch.full((local.shape[0] * local.shape[1],), -1)
                    for start, end in itertools.pairwise(cuts):
                        for r in local.window(start, end):
                            r.of_other(together).copy_(r.of(flat[start:end]))
                    for r in local.in_whole():
                        r.of_other(whole.view(-1)).copy_(r.of(together))
                assert torch.equal(whole, wanted), (structure.fqn, how, dim, tp, matrix)


class Mixed(nn.Module):
    """What roles and shapes must tell apart: experts, a router, a convolution, a vector in two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(11, 6)
        self.mlp = nn.ModuleDict({"gate_up_proj": nn.Linear(6, 8, bias=True), "down_proj": nn.Linear(4, 6, bias=False)})
        self.conv = nn.Conv1d(6, 6, 3)
        self.thin = nn.ModuleDict({"mlp": nn.ModuleDict({"up_proj": nn.Linear(6, 1, bias=False)})})
        self.lm_head = nn.Linear(6, 11, bias=False)


def test_roles_and_shapes_decide_what_is_orthogonalised() -> None:
    torch.manual_seed(0)
    model = Mixed()
    tag_parameters(model, rules=[{"match": "conv", "role": "other"}])
    optimizer = BlockwiseMuon(model.parameters(), lr=LR)
    feed(model, 0)
    optimizer.step()
    found = {
        name: [(m.number, m.ranges) for m in matrices_of(placement.spec)]
        for name, param in model.named_parameters()
        for placement in optimizer.placements_in(param) or ()
    }
    assert found == {
        "embed_tokens.weight": [],
        "mlp.gate_up_proj.weight": [(0, ((0, 4),)), (0, ((4, 8),))],
        "mlp.gate_up_proj.bias": [],
        "mlp.down_proj.weight": [(0, ((0, 6),))],
        "conv.weight": [],
        "conv.bias": [],
        "thin.mlp.up_proj.weight": [],
        "lm_head.weight": [],
    }
    tied = MODELS["gpt2"][0]()
    tag_parameters(tied)
    muon = BlockwiseMuon(tied.parameters(), lr=LR)
    assert not matrices_of((muon.placements_in(tied.lm_head.weight) or ())[0].spec)


def test_a_zero_matrix_stays_as_it_is_and_its_rows_go_on() -> None:
    model, optimizer = made("llama", lr_multipliers="uniform")
    name, param = next((n, p) for n, p in model.named_parameters() if n.endswith("mlp.up_proj.weight"))
    for step in range(3):
        before = param.detach().clone()
        feed(model, step)
        param.grad = torch.zeros_like(param)
        optimizer.step()
        assert torch.equal(param, before * (1 - LR * DECAY)), name
    feed(model, 3)
    optimizer.step()
    assert bool(torch.isfinite(param).all())


def test_it_keeps_four_bytes_and_goes_on_bit_for_bit() -> None:
    model, optimizer = made("qwen3", orthogonalize={"qk": "head"}, checkpoint_format="compact")
    for step in range(2):
        feed(model, step)
        optimizer.step()
    numel = sum(param.numel() for param in model.parameters())
    rows = sum(param.shape[0] if param.dim() == 2 else param.numel() for param in model.parameters())
    assert optimizer.state_bytes() == 4 * (numel + rows)
    (twin, other), (copied, third) = made("qwen3", orthogonalize={"qk": "head"}), copy.deepcopy((model, optimizer))
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    tag_parameters(copied)
    for step in range(2, 4):
        for each, stepped in ((model, optimizer), (twin, other), (copied, third)):
            feed(each, step)
            stepped.step()
    for one, two, three in zip(model.parameters(), twin.parameters(), copied.parameters(), strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)


@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_kernels_step_the_rest_of_a_flat_partition_and_leave_matrices_alone(backend: str) -> None:
    """A kernel that takes for granted that its runs cover the tensor would step matrices a second time."""
    model, whole = made("slim", orthogonalize={"value": "head"})
    specs = [whole.placements_in(param)[0].spec for param in model.parameters()]  # type: ignore[index]
    numel = sum(spec.numel for spec in specs)
    results = []
    for name in ("reference", backend):
        flat = torch.cat([param.detach().reshape(-1) for param in model.parameters()] + [torch.zeros(3)])
        optimizer = BlockwiseMuon([flat], lr=LR, weight_decay=DECAY, backend=name, orthogonalize={"value": "head"})
        at = itertools.accumulate((spec.numel for spec in specs), initial=0)
        optimizer.bind(
            flat, [Placement(s, None, start, 0, s.numel) for s, start in zip(specs, at, strict=False)], LOCAL
        )
        for step in range(2):
            flat.grad = torch.randn(numel + 3, generator=torch.Generator().manual_seed(step))
            flat.grad[numel:] = 0.0
            optimizer.step()
        results.append((flat, optimizer.state[flat]["exp_avg"], optimizer.state[flat]["exp_avg_sq"]))
    for ours, reference in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-7)
    assert not torch.equal(results[0][0][:numel], torch.cat([p.detach().reshape(-1) for p in model.parameters()]))


@pytest.mark.parametrize("writer", ["torch", "BlockwiseAdamW", "BlockwiseAdamMini", "compact", "published"])
@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
def test_it_goes_on_with_the_moments_of_adam(kind: str, writer: str, caplog: pytest.LogCaptureFixture) -> None:
    """The rows of matrices begin without a second moment, the rest has means over its blocks; the oracle does both."""
    model, optimizer = made(kind, orthogonalize={"ffn": "none"})
    params, classes = dict(model.named_parameters()), MODELS[kind][1]
    adam = Oracle(params, classes, writer != "torch", HYPER, lr_multipliers=ONES)
    by_compact = {"checkpoint_format": "compact" if writer == "compact" else "expanded", "lr_multipliers": "uniform"}
    before: Any = {
        "torch": lambda: torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=DECAY),
        "BlockwiseAdamW": lambda: BlockwiseAdamW(model.parameters(), lr=LR, weight_decay=DECAY, **by_compact),
    }.get(writer, lambda: BlockwiseAdamMini(model.parameters(), lr=LR, weight_decay=DECAY, **by_compact))()
    adam.mini = "Mini" in type(before).__name__
    for step in range(3):
        adam.step(feed(model, step))
        before.step()
    saved = copy.deepcopy(before.state_dict())
    if writer == "published":
        saved = as_published(model, saved)
    optimizer.load_state_dict(saved)
    assert "takes its exp_avg over as momentum. The second moments of the rows of matrices start anew" in caplog.text
    follower = MuonOracle(params, classes, True, HYPER, how={"ffn": "none"})
    follower.take_over(adam.state)
    for step in range(3, 5):
        was, held = follower.weights(), {name: param.detach().clone() for name, param in params.items()}
        follower.step(feed(model, step))
        optimizer.step()
        assert_same_update(
            (held, params), (was, follower.weights()), LR, tolerance=1e-5, weight_roundings=3, what=f"step {step}"
        )
        follower.set_weights(params)


def as_published(model: nn.Module, saved: dict[str, Any]) -> dict[str, Any]:
    """A state of ours as the published Adam-mini writes one: each parameter in a group of its own, under its name."""
    names = [name for name, _ in model.named_parameters()]
    state = {i: {"step": s["step"], "m": s["exp_avg"], "v": s["exp_avg_sq"]} for i, s in saved["state"].items()}
    return {"state": state, "param_groups": [{"params": [i], "name": name} for i, name in enumerate(names)]}


def test_what_it_cannot_go_on_with_is_refused_by_name() -> None:
    model, optimizer = made()
    feed(model, 0)
    optimizer.step()
    for cls in (BlockwiseAdamMini, BlockwiseAdamW):
        with pytest.raises(ValueError, match="written by BlockwiseMuon, which keeps a second moment of updates; Block"):
            cls(model.parameters(), lr=LR).load_state_dict(optimizer.state_dict())
    lion = BlockwiseLion(model.parameters(), lr=LR)
    lion.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="written by BlockwiseLion, which keeps no second moment"):
        optimizer.load_state_dict(lion.state_dict())
    untagged = nn.Linear(3, 3)
    other = torch.optim.AdamW(untagged.parameters(), lr=LR)
    untagged(torch.ones(1, 3)).sum().backward()
    other.step()
    with pytest.raises(ValueError, match=r"what lies in tensor 0 is not known.*tag_parameters"):
        BlockwiseMuon(untagged.parameters(), lr=LR).load_state_dict(other.state_dict())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"orthogonalize": {"qk": "haed"}}, "one of matrix, role, head, none.*head"),
        ({"orthogonalize": {"ffn": "head"}}, '"head" is for query, key and value weights'),
        ({"orthogonalize": {"ff": "role"}}, "ffn"),
        ({"scale": "rsm"}, "rms"),
        ({"transfer": {"base_width": 8}}, "BlockwiseMuon does not take transfer"),
        ({"coefficients": "cubic"}, "quintic"),
        ({"newton_schulz_dtype": "fp16"}, "newton_schulz_dtype must be one of fp32, bf16"),
        ({"momentum": 1.0}, "momentum"),
        ({"lr_multipliers": "auto"}, 'BlockwiseMuon does not support "lr_multipliers": "auto": it is measured on'),
        ({"rules": [{"match": "wte", "orthogonalize": "rol"}]}, "orthogonalize must be one of"),
        ({"normuon_beta": 0.9}, "normuon_beta2"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(**settings)
    with pytest.raises(TypeError, match="nesterov must be true or false"):
        made(nesterov=1)
