# SPDX-License-Identifier: Apache-2.0
"""Other libraries' optimizers in the comparison do what their libraries do."""

from __future__ import annotations

import copy

import pytest
import torch

from benchmarks.compare import peers


@pytest.mark.parametrize("ratios", [{}, {"emb": 3, "norm": 2, "head": 0.5}])
def test_muon_steps_hidden_matrices_and_adamw_the_rest(ratios):
    """Against both of torch's optimizers, each with its own parameters and rates."""
    torch.manual_seed(3)
    shapes = [(20, 8), (8, 8), (24, 8), (8,), (20, 8)]
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    both = peers.MuonAndAdamW(ours, lr=1e-2, vocab_size=20, ratios=ratios)
    muon = torch.optim.Muon(theirs[1:3], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    rest = {"emb": theirs[0], "norm": theirs[3], "head": theirs[4]}
    groups = [{"params": [p], "ratio": ratios.get(name, 1)} for name, p in rest.items()]
    adamw = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for group in (*both.param_groups, *muon.param_groups, *adamw.param_groups):
            group["lr"] = 1e-2 / (step + 1) * group.get("ratio", 1)
        both.step()
        muon.step()
        adamw.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    with pytest.raises(ValueError, match="vocab_size = 21"):
        peers.MuonAndAdamW(ours, lr=1e-2, vocab_size=21)


def test_a_fused_weight_is_stepped_like_separate_ones():
    """A peer that orthogonalises queries, keys and values as one matrix is weaker than anyone would run it."""
    torch.manual_seed(4)
    heads, groups, size, ffn, width = 4, 2, 2, 5, 8
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in [(20, 8), (16, 8), (10, 8), (8, 5), (20, 8)]]
    both = peers.MuonAndAdamW(ours, lr=1e-2, vocab_size=20, heads=(heads, groups, size), ffn_rows=ffn)

    def separate(qkv, fc1):
        """By hand: each group has two query heads, a key and a value of two rows each."""
        q, k, v = (
            torch.cat([qkv[8 * g + start : 8 * g + end] for g in range(groups)])
            for start, end in ((0, 4), (4, 6), (6, 8))
        )
        return [q, k, v, fc1[:ffn], fc1[ffn:]]

    theirs = [torch.nn.Parameter(p.clone()) for p in [*separate(*(p.detach() for p in ours[1:3])), ours[3].detach()]]
    assert [tuple(p.shape) for p in theirs] == [(8, 8), (4, 8), (4, 8), (5, 8), (5, 8), (8, 5)] and width == 8
    muon = torch.optim.Muon(theirs, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(4):
        for p in ours:
            p.grad = torch.randn_like(p)
        for p, grad in zip(theirs, [*separate(ours[1].grad, ours[2].grad), ours[3].grad], strict=True):
            p.grad = grad.clone()
        if step == 2:  # as after a stop: the state of a file, in another optimizer
            saved = copy.deepcopy(both.state_dict())
            both = peers.MuonAndAdamW(ours, lr=1e-2, vocab_size=20, heads=(heads, groups, size), ffn_rows=ffn)
            both.load_state_dict(saved)
        both.step()
        muon.step()
        for a, b in zip([*separate(*(p.detach() for p in ours[1:3])), ours[3]], theirs, strict=True):
            assert torch.equal(a, b), step
    assert sum(t.numel() for t in both.state[ours[1]].values()) == ours[1].numel()
    for heads, ffn in (((4, 2, 3), 0), (None, 6), ((4, 2, 2), 8)):
        with pytest.raises(ValueError, match="rows"):
            peers.MuonAndAdamW(ours, lr=1e-2, vocab_size=20, heads=heads, ffn_rows=ffn)


def test_flat_copies_are_stepped_like_whole_weights():
    """ZeRO-1 puts a flat fp32 copy in the place of each group's bf16 weights, and steps one group after the other."""
    torch.manual_seed(5)
    shapes = [(20, 8), (16, 8), (10, 8), (8, 5), (8,), (20, 8)]
    given = {"vocab_size": 20, "heads": (4, 2, 2), "ffn_rows": 5, "ratios": {"emb": 3, "norm": 2}}
    whole = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    of_model = [torch.nn.Parameter(p.detach().bfloat16()) for p in whole]
    ours, theirs = peers.MuonAndAdamW(of_model, lr=1e-2, **given), peers.MuonAndAdamW(whole, lr=1e-2, **given)
    flat = [torch.nn.Parameter(p.detach().clone().flatten()) for p in whole]
    for group, p in zip(ours.param_groups, flat, strict=True):
        group["params"] = [p]
    for step in range(4):
        for a, b in zip(flat, whole, strict=True):
            b.grad = torch.randn_like(b)
            a.grad = b.grad.clone().flatten()
        if step == 2:
            saved = copy.deepcopy(ours.state_dict())
            ours = peers.MuonAndAdamW(of_model, lr=1e-2, **given)
            for group, p in zip(ours.param_groups, flat, strict=True):
                group["params"] = [p]
            ours.load_state_dict(saved)
        groups = ours.param_groups
        for group in groups:
            ours.param_groups = [group]
            ours.step()
            group["params"][0].grad = None
        ours.param_groups = groups
        theirs.step()
        assert all(torch.equal(a.view_as(b), b) for a, b in zip(flat, whole, strict=True)), step
    ours.param_groups[1]["params"] = [torch.nn.Parameter(torch.zeros(64))]
    with pytest.raises(ValueError, match="whole"):
        ours.step()
