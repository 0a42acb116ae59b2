# SPDX-License-Identifier: Apache-2.0
"""State dicts on whole tensors: what they say about themselves, compact ones, and those of other optimizers."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_blockwise import BlockwiseAdamMini, BlockwiseAdamW, tag_parameters
from ds_blockwise.checkpoint import record as state_record
from ds_blockwise.optimizers.registry import OPTIMIZERS
from tests.helpers import models
from tests.helpers.optimizers import SHORT_NAMES
from tests.helpers.oracle import Hyper, Oracle, State, assert_same_update
from tests.helpers.tables.oracle_names import Classes, gpt2_classes, hf_llama_classes

pytest.importorskip("transformers", reason="the models of these tests need the extra 'hf'")

LR, BETAS, EPS, DECAY = 1e-2, (0.9, 0.95), 1e-6, 0.1
ADAMW = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY}
FAMILIES: dict[str, tuple[Callable[[], nn.Module], Classes]] = {
    "qwen3": (
        models.qwen3,
        hf_llama_classes(
            layers=2, hidden=15, heads=4, kv_heads=2, head_dim=6, ffn=21, vocab=37, biases=True, qk_norms=True
        ),
    ),
    # transposed and fused: blocks are columns, several of a head
    "gpt2": (
        models.gpt2_conv1d,
        gpt2_classes(layers=1, hidden=10, heads=2, ffn=40, vocab=23, positions=7, conv1d=True),
    ),
}
BOTH_FAMILIES = pytest.mark.parametrize("family", FAMILIES)
BOTH = pytest.mark.parametrize("cls", [OPTIMIZERS[name] for name in SHORT_NAMES])


def build(family: str) -> nn.Module:
    model = models.set_small_weights(FAMILIES[family][0]())
    tag_parameters(model)
    return model


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def gradients(model: nn.Module, step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return {n: torch.randn(p.shape, generator=generator) * 2.0 ** (step - 3) for n, p in model.named_parameters()}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        grads = gradients(model, step)
        for name, p in model.named_parameters():
            p.grad = grads[name].clone()
        optimizer.step()


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def assert_same_models(one: nn.Module, two: nn.Module) -> None:
    for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(p, q), name


def oracle_going_on(
    family: str, mini: bool, model: nn.Module, saved: dict[str, tuple[Tensor, Tensor]], step: int, **settings: Any
) -> Oracle:
    """The oracle with AdamW's moments (name -> (m, v)); for Adam-mini v is averaged by its own labels."""
    oracle = Oracle(weights(model), FAMILIES[family][1], mini, Hyper(LR, BETAS, EPS, DECAY), **settings)
    oracle.take_over({name: State(m, v, step) for name, (m, v) in saved.items()})
    return oracle


def assert_follows(model: nn.Module, optimizer: torch.optim.Optimizer, oracle: Oracle, steps: range) -> None:
    for step in steps:
        before, expected_before = weights(model), oracle.weights()
        train(model, optimizer, range(step, step + 1))
        oracle.step(gradients(model, step))
        both = (before, weights(model)), (expected_before, oracle.weights())
        assert_same_update(*both, LR, weight_roundings=2, what=f"step {step}")


# -------------------------------------------------------------------------------- the record


@BOTH_FAMILIES
@BOTH
def test_record_rebuilds_the_segment_table(family: str, cls: Any) -> None:
    """A converter that misreads where blocks lie would write another model's moments."""
    model = build(family)
    optimizer = cls(model.parameters(), granularity={"value": "tensor"} if family == "gpt2" else None, **ADAMW)
    train(model, optimizer, range(1))
    record = through_a_file(optimizer.state_dict())[state_record.KEY]
    json.dumps(record)
    for index, p in enumerate(model.parameters()):
        own, read = optimizer.binding_of(p).table, state_record.table_of(record, index)
        assert (own.runs, own.multiplier_runs, own.num_blocks) == (read.runs, read.multiplier_runs, read.num_blocks)
        assert torch.equal(own.slot_numel, read.slot_numel)
        assert state_record.same_ranges(own.placements, read.placements)
        assert state_record.same_blocks(own.placements, read.placements)


def test_a_record_may_hold_the_settings_alone(caplog: pytest.LogCaptureFixture) -> None:
    """Megatron-core's distributed checkpoints do; one that lacks half of the rest is damaged."""
    model = build("qwen3")
    state = BlockwiseAdamMini(model.parameters(), **ADAMW).state_dict()
    own = BlockwiseAdamMini(model.parameters(), **ADAMW | {"lr_multipliers": {"head": 3.0}})
    del state[state_record.KEY]["tensors"]
    with pytest.raises(ValueError, match="damaged: record lacks tensors"):
        own.load_state_dict(state)
    del state[state_record.KEY]["parameters"]
    own.load_state_dict(state)
    assert "lr_multipliers" in caplog.text


def test_record_of_a_later_format_is_refused() -> None:
    model = build("qwen3")
    optimizer = BlockwiseAdamMini(model.parameters(), **ADAMW)
    state = optimizer.state_dict()
    state[state_record.KEY] |= {"format": 2, "version": "9.9"}
    with pytest.raises(ValueError, match=r"format 2 by ds_blockwise '9\.9'.*reads format 1"):
        optimizer.load_state_dict(state)


def test_load_under_other_settings_says_what_changed_and_keeps_its_own(caplog: pytest.LogCaptureFixture) -> None:
    """The checkpoint's multipliers must not overrule a changed JSON, nor must the change pass unseen."""
    one, two = build("qwen3"), build("qwen3")
    first = BlockwiseAdamMini(one.parameters(), lr_multipliers={"emb": 10}, **ADAMW)
    train(one, first, range(2))
    second = BlockwiseAdamMini(
        two.parameters(),
        lr_multipliers={"emb": 8.0},
        granularity={"value": "tensor"},
        rules=[{"match": "lm_head", "lr_multiplier": 3}],
        momentum_dtype="bf16",
        **ADAMW,
    )
    with caplog.at_level(logging.WARNING):
        second.load_state_dict(through_a_file(first.state_dict()))
    for line in (
        "lr_multipliers.emb was 10, is 8",
        "granularity.value was row, is tensor",
        "rules was [], is [{'match': 'lm_head', 'lr_multiplier': 3.0}]",
        "momentum_dtype was fp32, is bf16",
    ):
        assert line in caplog.text
    assert "layout" not in caplog.text  # follows from the granularity
    train(two, second, range(2, 3))
    part = next(p for p in second.placements_in(two.get_parameter("model.embed_tokens.weight")))
    assert part.spec.parts[0].update.lr_multiplier == 8.0


def test_load_under_the_same_settings_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    one, two = build("qwen3"), build("qwen3")
    first = BlockwiseAdamMini(one.parameters(), **ADAMW)
    train(one, first, range(1))
    with caplog.at_level(logging.WARNING):
        BlockwiseAdamMini(two.parameters(), **ADAMW).load_state_dict(first.state_dict())
    assert not caplog.records


# ------------------------------------------------------------------------------ compact state


@BOTH_FAMILIES
def test_compact_state_is_a_third_smaller_and_goes_on_bitwise(family: str) -> None:
    one = build(family)
    first = BlockwiseAdamMini(one.parameters(), checkpoint_format="compact", **ADAMW)
    train(one, first, range(3))
    state, weights_then = through_a_file(first.state_dict()), weights(one)
    numel = sum(p.numel() for p in one.parameters())
    held = sum(t.numel() for s in state["state"].values() for t in s.values() if isinstance(t, Tensor))
    blocks = sum(optimizer_table.num_blocks for optimizer_table in (b.table for b in first.bindings()))
    assert held == numel + blocks
    assert all("exp_avg_sq" not in s for s in state["state"].values())
    two = build(family)
    two.load_state_dict(weights_then, strict=False)
    second = BlockwiseAdamMini(two.parameters(), checkpoint_format="compact", **ADAMW)
    second.load_state_dict(state)
    for model, optimizer in ((one, first), (two, second)):
        train(model, optimizer, range(3, 5))
    assert_same_models(one, two)


@BOTH_FAMILIES
@pytest.mark.parametrize("saved", [None, "published"])
def test_compact_state_under_another_granularity_or_optimizer(family: str, saved: str | None) -> None:
    """It is expanded by the blocks that it was saved with, then averaged over the new ones.

    "published" was the default once: such checkpoints load under the present one.
    """
    one = build(family)
    first = BlockwiseAdamMini(one.parameters(), checkpoint_format="compact", granularity=saved, **ADAMW)
    train(one, first, range(2))
    compact = through_a_file(first.state_dict())
    first.checkpoint_format = "expanded"
    expanded = through_a_file(first.state_dict())
    for make in (
        lambda model: BlockwiseAdamMini(model.parameters(), granularity={"qk": "row", "ffn": "tensor"}, **ADAMW),
        lambda model: BlockwiseAdamMini(model.parameters(), **ADAMW),
        lambda model: BlockwiseAdamW(model.parameters(), **ADAMW),
    ):
        runs = []
        for state in (compact, expanded):
            model = build(family)
            optimizer = make(model)
            optimizer.load_state_dict(state)
            train(model, optimizer, range(2, 4))
            runs.append(model)
        assert_same_models(*runs)


def test_compact_state_of_other_tensors_is_refused() -> None:
    one = build("qwen3")
    first = BlockwiseAdamMini(one.parameters(), checkpoint_format="compact", **ADAMW)
    train(one, first, range(1))
    wrapped = nn.ModuleDict({"policy": FAMILIES["qwen3"][0]()})  # all names are others
    tag_parameters(wrapped)
    second = BlockwiseAdamMini(wrapped.parameters(), **ADAMW)
    with pytest.raises(ValueError, match="ds-blockwise convert"):
        second.load_state_dict(first.state_dict())
    assert not second.state


@BOTH
def test_unknown_checkpoint_format_is_an_error(cls: Any) -> None:
    with pytest.raises(ValueError, match="checkpoint_format must be one of expanded, compact, got 'small'"):
        cls(build("qwen3").parameters(), checkpoint_format="small")


# ------------------------------------------------------------------------------ AdamW, both ways


def torch_adamw_run(family: str, steps: int) -> tuple[nn.Module, torch.optim.AdamW]:
    model = build(family)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    train(model, optimizer, range(steps))
    return model, optimizer


def moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, tuple[Tensor, Tensor]]:
    return {n: (optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"]) for n, p in model.named_parameters()}


@BOTH_FAMILIES
@BOTH
def test_state_of_torch_adamw_goes_on(family: str, cls: Any) -> None:
    """Unchanged into BlockwiseAdamW, as the mean over each block into BlockwiseAdamMini."""
    model, adamw = torch_adamw_run(family, 3)
    oracle = oracle_going_on(family, cls is BlockwiseAdamMini, model, moments(model, adamw), 3)
    ours = cls(model.parameters(), **ADAMW)
    ours.load_state_dict(through_a_file(adamw.state_dict()))
    assert {"foreach", "amsgrad", "maximize", "fused"}.isdisjoint(ours.param_groups[0])
    assert_follows(model, ours, oracle, range(3, 5))


@BOTH_FAMILIES
@BOTH
def test_our_state_goes_on_in_torch_adamw(family: str, cls: Any) -> None:
    model = build(family)
    ones = dict.fromkeys(("emb", "head", "qk", "ffn", "vo", "norm", "other"), 1.0)
    ours = cls(model.parameters(), lr_multipliers=ones, **ADAMW)
    train(model, ours, range(3))
    saved = through_a_file(ours.state_dict())
    states = zip(model.named_parameters(), saved["state"].values(), strict=True)
    flat = {name: (state["exp_avg"], state["exp_avg_sq"]) for (name, _), state in states}
    oracle = oracle_going_on(family, False, model, flat, 3, lr_multipliers=ones)
    adamw = torch.optim.AdamW(model.parameters(), **ADAMW)
    adamw.load_state_dict(saved)
    assert_follows(model, adamw, oracle, range(3, 5))


def test_step_count_in_the_group_as_fused_adam_keeps_it() -> None:
    model, adamw = torch_adamw_run("qwen3", 3)
    state = adamw.state_dict()
    for held in state["state"].values():
        del held["step"]
    ours = BlockwiseAdamMini(model.parameters(), **ADAMW)
    with pytest.raises(ValueError, match='neither state\\["step"\\] nor param_groups'):
        ours.load_state_dict(state)
    assert not ours.state
    state["param_groups"][0] |= {"step": 3, "bias_correction": True}
    ours.load_state_dict(state)
    assert {int(s["step"]) for s in ours.state.values()} == {3}
    assert "step" not in ours.param_groups[0]


def test_state_of_a_maximizing_optimizer_is_refused() -> None:
    model = build("qwen3")
    adamw = torch.optim.AdamW(model.parameters(), maximize=True, **ADAMW)
    train(model, adamw, range(1))
    with pytest.raises(ValueError, match="maximize=True"):
        BlockwiseAdamW(model.parameters(), **ADAMW).load_state_dict(adamw.state_dict())


@BOTH
def test_state_of_another_model_changes_nothing(cls: Any) -> None:
    """A half-loaded optimizer would train on with a mixture of two runs."""
    one = build("qwen3")
    first = cls(one.parameters(), **ADAMW)
    train(one, first, range(2))
    before = through_a_file(first.state_dict())
    other = nn.ParameterList([nn.Parameter(torch.zeros(p.numel() + (i == 5))) for i, p in enumerate(one.parameters())])
    adamw = torch.optim.AdamW(other, lr=0.5)
    for p in other:
        p.grad = torch.ones_like(p)
    adamw.step()
    with pytest.raises(ValueError, match=r"'exp_avg(_sq)?' has \d+ elements but its parameter has \d+"):
        first.load_state_dict(adamw.state_dict())
    with pytest.raises(ValueError, match=r"param groups of \[1\] tensors, this optimizer of \[\d+\]"):
        first.load_state_dict(torch.optim.AdamW([nn.Parameter(torch.zeros(2))]).state_dict())
    after = first.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for index, held in before["state"].items():
        for key, value in held.items():
            assert torch.equal(torch.as_tensor(after["state"][index][key]), torch.as_tensor(value)), (index, key)


# ------------------------------------------------------------------------------ published Adam-mini


def published(model: nn.Module, **settings: Any) -> Any:
    adam_mini = pytest.importorskip("adam_mini", reason="needs the published package adam-mini")
    return adam_mini.Adam_mini(
        model.named_parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0, verbose=False, **settings
    )


@pytest.fixture
def llama() -> Iterator[nn.Module]:
    model = models.set_small_weights(models.llama())
    tag_parameters(model)
    yield model


def test_published_adam_mini_state_goes_on(llama: nn.Module) -> None:
    """Its next updates and ours from its state are the same where its partition and ours are: this model."""
    theirs = published(llama, dim=12, n_heads=2, n_kv_heads=1)
    train(llama, theirs, range(3))
    state, then = through_a_file(theirs.state_dict()), weights(llama)
    twin = models.llama()
    twin.load_state_dict(then)
    tag_parameters(twin)
    ones = dict.fromkeys(("emb", "head", "qk", "ffn", "vo", "norm", "other"), 1.0)
    same = {"lr_multipliers": ones, "granularity": "published"}
    ours = BlockwiseAdamMini(twin.parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0, **same)
    ours.load_state_dict(state)
    assert {int(s["step"]) for s in ours.state.values()} == {3}
    for step in range(3, 5):
        before = weights(twin)
        for model, optimizer in ((llama, theirs), (twin, ours)):
            train(model, optimizer, range(step, step + 1))
        # it works in fp32 throughout: a few roundings of the update more than ours
        assert_same_update((before, weights(twin)), (then, weights(llama)), LR, tolerance=1e-5, what=f"step {step}")
        then = weights(llama)


def test_published_adam_mini_state_goes_on_in_our_own_partition(llama: nn.Module) -> None:
    """Every element of a norm begins with the second moment that the whole vector had."""
    theirs = published(llama, dim=12, n_heads=2, n_kv_heads=1)
    train(llama, theirs, range(2))
    twin = models.llama()
    tag_parameters(twin)
    ours = BlockwiseAdamMini(twin.parameters(), **ADAMW)
    ours.load_state_dict(through_a_file(theirs.state_dict()))
    name = "model.layers.0.input_layernorm.weight"
    (group,) = [group for group in theirs.state_dict()["param_groups"] if group["name"] == name]
    expected = theirs.state_dict()["state"][group["params"][0]]["vmean"]
    own = ours.state_dict()["state"][[n for n, _ in twin.named_parameters()].index(name)]["exp_avg_sq"]
    assert own.shape == (12,) and expected.numel() == 1 and expected > 0
    torch.testing.assert_close(own, expected.reshape(1).expand(12), rtol=0, atol=0)


def test_published_adam_mini_state_of_another_model_is_refused(llama: nn.Module) -> None:
    theirs = published(llama, dim=12, n_heads=2, n_kv_heads=1)
    train(llama, theirs, range(1))
    other = build("gpt2")
    with pytest.raises(ValueError, match=r"parameters that this optimizer does not step, such as 'lm_head\.weight'"):
        BlockwiseAdamMini(other.parameters(), **ADAMW).load_state_dict(theirs.state_dict())
