# SPDX-License-Identifier: Apache-2.0
"""The optimizers as ordinary torch optimizers on whole tensors: groups, state, closures, dtypes, ties."""

import copy
import io
import subprocess
import sys

import pytest
import torch
from torch import nn

from ds_blockwise import BlockwiseAdamMini, BlockwiseAdamW, tag_parameters
from ds_blockwise.blocks.settings.block_settings import BlockSettings
from ds_blockwise.optimizers import adam_mini
from ds_blockwise.optimizers.registry import OPTIMIZERS
from ds_blockwise.tagging.tag import tag_with_settings
from tests.helpers.optimizers import SHORT_NAMES

BOTH = pytest.mark.parametrize("cls", [OPTIMIZERS[name] for name in SHORT_NAMES])


class Attention(nn.Module):
    def __init__(self, dim=12, heads=3):
        super().__init__()
        self.num_heads = heads
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            self.add_module(name, nn.Linear(dim, dim, bias=name == "q_proj"))


class Tiny(nn.Module):
    """Names of a LLaMA layer, with one bias and a norm."""

    def __init__(self, dim=12, vocab=11):
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab, dim)
        self.self_attn = Attention(dim)
        self.norm = nn.LayerNorm(dim)
        self.lm_head = nn.Linear(dim, vocab, bias=False)


def tiny(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    model = Tiny()
    for p in model.parameters():
        nn.init.normal_(p, std=0.02)
    model.to(dtype)
    tag_parameters(model)
    return model


def feed(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def train(model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        feed(model, step)
        optimizer.step()


def assert_same(a, b):
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q), name


@BOTH
def test_state_dict_round_trip_continues_bitwise(cls):
    """An interrupted run must not differ from one that was not, in a single bit."""
    model, other = tiny(), tiny()
    optimizer = cls(model.parameters(), lr=1e-3)
    train(model, optimizer, 3)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other.load_state_dict(saved["model"])
    resumed = cls(other.parameters(), lr=99.0)
    resumed.load_state_dict(saved["optimizer"])
    train(model, optimizer, 3, first=3)
    train(other, resumed, 3, first=3)
    assert_same(model, other)
    assert resumed.state[other.norm.weight]["step"] == 6


def test_state_on_disk_has_adamws_form():
    """Every tool that reads AdamW's state reads ours; torch.optim.AdamW itself loads it."""
    model = tiny()
    optimizer = BlockwiseAdamMini(model.parameters(), lr=1e-3)
    train(model, optimizer, 2)
    saved = optimizer.state_dict()
    for state, p in zip(saved["state"].values(), model.parameters(), strict=True):
        assert set(state) == {"step", "exp_avg", "exp_avg_sq"} and state["step"] == 2
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == p.shape
    heads = saved["state"][1]["exp_avg_sq"].view(3, 4 * 12)
    assert all(len(set(head.tolist())) == 1 for head in heads), "one value per head"
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-3)
    adamw.load_state_dict(saved)
    feed(model, 9)
    adamw.step()


def test_state_dict_does_not_change_the_optimizer():
    """Saving in the middle of a run must not swap the compact state for the expanded one."""
    model, other = tiny(), tiny()
    optimizer, control = (BlockwiseAdamMini(m.parameters(), lr=1e-3) for m in (model, other))
    for step in range(4):
        train(model, optimizer, 1, first=step)
        train(other, control, 1, first=step)
        optimizer.state_dict()
    assert_same(model, other)
    assert optimizer.state[model.lm_head.weight]["exp_avg_sq"].shape == (11,)


def test_adamws_state_loads_into_adam_mini_as_block_means():
    """Switching a running AdamW job to Adam-mini keeps its momentum and the mean second moment of each block."""
    model = tiny()
    source = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
    train(model, source, 2)
    mini = BlockwiseAdamMini(model.parameters(), lr=1e-3)
    mini.load_state_dict(source.state_dict())
    weight = model.self_attn.q_proj.weight
    before, grad = source.state[weight]["exp_avg_sq"].double(), torch.full_like(weight, 0.5)
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.5)
    mini.step()
    expected = 0.95 * before.view(3, -1).mean(1) + 0.05 * grad.double().square().view(3, -1).mean(1)
    torch.testing.assert_close(mini.state[weight]["exp_avg_sq"].double(), expected, rtol=1e-6, atol=0)


def test_fp32_moments_of_bf16_parameters_survive_a_reload():
    """torch's own load_state_dict rounds floating state to the parameter's dtype: a silent loss of 16 bits."""
    model = tiny(dtype=torch.bfloat16)
    optimizer = BlockwiseAdamW(model.parameters(), lr=1e-3)
    train(model, optimizer, 2)
    resumed = BlockwiseAdamW(model.parameters(), lr=1e-3)
    resumed.load_state_dict(optimizer.state_dict())
    for p in model.parameters():
        for key in ("exp_avg", "exp_avg_sq"):
            assert resumed.state[p][key].dtype == torch.float32
            assert torch.equal(resumed.state[p][key], optimizer.state[p][key])


@BOTH
def test_bf16_momentum_halves_its_bytes_and_is_rounded_once(cls):
    """Storage is bf16, arithmetic is not: the first update is exactly the one with fp32 momentum."""
    model, other = tiny(), tiny()
    narrow = cls(model.parameters(), lr=1e-3, momentum_dtype="bf16")
    wide = cls(other.parameters(), lr=1e-3)
    train(model, narrow, 1)
    train(other, wide, 1)
    assert_same(model, other)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert narrow.state[p]["exp_avg"].dtype == torch.bfloat16
        assert torch.equal(narrow.state[p]["exp_avg"], wide.state[q]["exp_avg"].bfloat16())
    assert narrow.state_bytes() == wide.state_bytes() - 2 * sum(p.numel() for p in model.parameters())


def test_adam_mini_keeps_about_half_of_adamws_state():
    """The reason to use it: 4 bytes a parameter and a value per block."""
    model = tiny()
    mini = BlockwiseAdamMini(model.parameters(), lr=1e-3)
    adamw = BlockwiseAdamW(model.parameters(), lr=1e-3)
    train(model, mini, 1)
    train(model, adamw, 1)
    numel = sum(p.numel() for p in model.parameters())
    blocks = 11 + 3 + 12 + 3 + 12 + 12 + 12 + 12 + 11
    assert mini.state_bytes() == 4 * (numel + blocks)
    assert adamw.state_bytes() == 8 * numel


@BOTH
def test_a_parameter_without_gradient_is_left_alone(cls):
    """No decay, no state, no step count: as torch.optim does."""
    model = tiny()
    optimizer = cls(model.parameters(), lr=1e-3, weight_decay=0.5)
    feed(model, 0)
    model.norm.weight.grad = None
    before = model.norm.weight.detach().clone()
    optimizer.step()
    assert torch.equal(model.norm.weight, before) and model.norm.weight not in optimizer.state


@BOTH
def test_groups_added_later_have_their_own_settings(cls):
    """add_param_group: unfreezing a part of a model half-way."""
    model, other = tiny(), tiny()
    late = list(model.self_attn.parameters())
    early = [p for p in model.parameters() if all(p is not q for q in late)]
    optimizer = cls(early, lr=1e-3)
    optimizer.add_param_group({"params": late, "lr": 5e-4, "weight_decay": 0.3})
    train(model, optimizer, 2)
    ref_late = list(other.self_attn.parameters())
    ref = cls(
        [
            {"params": [p for p in other.parameters() if all(p is not q for q in ref_late)]},
            {"params": ref_late, "lr": 5e-4, "weight_decay": 0.3},
        ],
        lr=1e-3,
    )
    train(other, ref, 2)
    assert_same(model, other)


@BOTH
def test_a_closure_is_evaluated_with_gradients_and_its_loss_returned(cls):
    """The contract of torch.optim.Optimizer.step."""
    model = tiny()
    optimizer = cls(model.parameters(), lr=1e-3)

    def closure():
        optimizer.zero_grad()
        loss = sum((p**2).sum() for p in model.parameters())
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert first.requires_grad and optimizer.step(closure) < first


@BOTH
def test_storage_order_does_not_matter(cls):
    """A transposed weight (a view, channels_last) has the same values and must get the same update."""
    model, other = tiny(), tiny()
    weight = other.self_attn.v_proj.weight
    weight.data = weight.data.t().contiguous().t()
    assert not weight.is_contiguous()
    for m in (model, other):
        train(m, cls(m.parameters(), lr=1e-3), 2)
    assert_same(model, other)


@BOTH
def test_tied_weights_are_updated_once(cls):
    """A weight that is embedding and output must not be stepped twice or with the head's multiplier."""
    torch.manual_seed(0)
    tied, plain = Tiny(), Tiny()
    tied.lm_head.weight = tied.embed_tokens.weight
    plain.embed_tokens.weight.data.copy_(tied.embed_tokens.weight)
    for m in (tied, plain):
        tag_parameters(m, lr_multipliers={"emb": 10, "head": 1})
        optimizer = cls([m.embed_tokens.weight] if m is plain else m.parameters(), lr=1e-3)
        m.embed_tokens.weight.grad = torch.ones_like(m.embed_tokens.weight)
        optimizer.step()
    assert torch.equal(tied.embed_tokens.weight, plain.embed_tokens.weight)
    assert optimizer.step_calls == 1


@BOTH
def test_models_with_different_tags_keep_their_own_settings_under_one_optimizer(cls):
    """The settings of one model must not reach the blocks of another that was tagged without any."""
    ruled, plain = tiny(), tiny()
    tag_parameters(ruled, lr_multipliers={"head": 3})
    optimizer = cls([*ruled.parameters(), *plain.parameters()], lr=1e-3)
    for param in (*ruled.parameters(), *plain.parameters()):
        (placement,) = optimizer.placements_in(param)
        assert placement.spec is param.block_spec


@BOTH
def test_settings_of_an_earlier_optimizer_in_a_hosts_tags_are_not_taken_over(cls):
    """A host tags with its optimizer's settings; the next optimizer of that model has its own, or the defaults."""
    model = tiny()
    tag_with_settings(model, BlockSettings.parse({"head": 3}), by_host=True)
    assert cls(model.parameters()).block_settings.is_default
    tag_parameters(model, lr_multipliers={"head": 3})
    assert cls(model.parameters()).block_settings.lr_multipliers == {"head": 3.0}


@BOTH
def test_a_copied_block_spec_is_enough_for_a_whole_tensor(cls):
    """Whoever replaces a parameter copies its tags; ``block_shard`` says something under tensor parallelism only."""
    tagged = tiny().lm_head.weight
    copy = nn.Parameter(tagged.detach().clone())
    copy.block_spec = tagged.block_spec
    optimizers = [cls([param], lr=1e-3) for param in (tagged, copy)]
    for param, optimizer in zip((tagged, copy), optimizers, strict=True):
        param.grad = torch.ones_like(param)
        optimizer.step()
    assert torch.equal(tagged, copy)
    assert optimizers[0].state_dict()["ds_blockwise"] == optimizers[1].state_dict()["ds_blockwise"]


@BOTH
def test_two_runs_are_bitwise_equal(cls):
    """Determinism: no atomics, no order that depends on timing."""
    model, other = tiny(), tiny()
    for m in (model, other):
        train(m, cls(m.parameters(), lr=1e-3), 5)
    assert_same(model, other)


@BOTH
def test_it_learns(cls):
    """Convergence on a least-squares problem to a loss far below the start."""
    model = tiny()
    torch.manual_seed(1)
    x, y = torch.randint(0, 11, (64,)), torch.randint(0, 11, (64,))
    y = (x * 3 + 1) % 11
    optimizer = cls(model.parameters(), lr=1.6e-2, weight_decay=0.0)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        hidden = model.norm(model.self_attn.o_proj(model.self_attn.v_proj(model.embed_tokens(x))))
        loss = nn.functional.cross_entropy(model.lm_head(hidden), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 2.2 and losses[-1] < 0.1


def test_scaling_one_blocks_gradient_changes_only_that_block():
    """Property: the second moment of a head is its own; its neighbours' updates stay bitwise the same."""
    moved = {}
    for scale in (1.0, 100.0):
        model = tiny()
        optimizer = BlockwiseAdamMini(model.parameters(), lr=1e-3, eps=1e-3)
        feed(model, 0)
        model.self_attn.k_proj.weight.grad[4:8] *= scale
        optimizer.step()
        moved[scale] = {n: p.detach().clone() for n, p in model.named_parameters()}
    for name, value in moved[1.0].items():
        if name == "self_attn.k_proj.weight":
            same = (value == moved[100.0][name]).all(1).tolist()
            assert same == [True] * 4 + [False] * 4 + [True] * 4
        else:
            assert torch.equal(value, moved[100.0][name]), name


@BOTH
def test_the_optimizer_can_be_copied_and_pickled(cls):
    """Some trainers deep-copy the optimizer with its model."""
    model = tiny()
    optimizer = cls(model.parameters(), lr=1e-3)
    train(model, optimizer, 1)
    pair = copy.deepcopy({"model": model, "optimizer": optimizer})
    tag_parameters(pair["model"])
    states = (o.state_dict()["state"].values() for o in (optimizer, pair["optimizer"]))
    for mine, copied in zip(*states, strict=True):
        assert torch.equal(mine["exp_avg_sq"], copied["exp_avg_sq"])
    train(model, optimizer, 2, first=1)
    train(pair["model"], pair["optimizer"], 2, first=1)
    assert_same(model, pair["model"])


def test_works_with_neither_deepspeed_nor_megatron_installed():
    """`pip install ds_blockwise` needs only torch."""
    code = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("deepspeed", "megatron", "pydantic", "transformers", "yaml"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
import torch, ds_blockwise
model = torch.nn.ModuleDict({"lm_head": torch.nn.Linear(4, 3, bias=False)})
print(ds_blockwise.tag_parameters(model))
opt = ds_blockwise.BlockwiseAdamMini(model.parameters(), lr=1e-3)
model["lm_head"](torch.ones(1, 4)).sum().backward()
opt.step()
assert opt.step_calls == 1
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "lm_head.weight" in done.stdout


def test_a_ruinous_beta2_is_named_once(caplog):
    """HF Trainer fills 0.999 in for "auto", and Adam-mini then trains badly without a word."""
    adam_mini._warn_of_beta2.cache_clear()
    for optimizer in (BlockwiseAdamW, BlockwiseAdamMini, BlockwiseAdamMini):
        optimizer(tiny().parameters(), betas=(0.9, 0.999))
    BlockwiseAdamMini(tiny().parameters())
    (record,) = caplog.records
    assert "betas[1] = 0.999" in record.message and "--adam_beta2 0.95" in record.message


def test_fused_step_is_refused_where_nobody_hands_over_gradients():
    """In plain PyTorch there is no cast and no copy to save; a run would believe that it saves them."""
    model = tiny()
    tag_parameters(model)
    optimizer = BlockwiseAdamMini(model.parameters(), fused_step=True)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(
        ValueError, match=r'and nobody .* DistributedOptimizer \(convert_\) do\. Write "fused_step": false'
    ):
        optimizer.step()
    assert not optimizer.state
    with pytest.raises(TypeError, match="fused_step must be true or false, got 'yes'"):
        BlockwiseAdamMini(model.parameters(), fused_step="yes")


@pytest.mark.parametrize("name", ["BlockwiseMuon", "BlockwiseLion"])
def test_fused_step_is_refused_by_optimizers_of_other_kernels(name):
    with pytest.raises(ValueError, match=rf"{name} does not support fused_step=True"):
        OPTIMIZERS[name](tiny().parameters(), fused_step=True)
