# SPDX-License-Identifier: Apache-2.0
"""Models of which not all is trained, or not all has elements, and models that change between two steps."""

import pytest
import torch
from torch import nn

from ds_blockwise import BlockwiseAdamMini, BlockwiseAdamW, tag_parameters

BOTH = pytest.mark.parametrize("cls", [BlockwiseAdamW, BlockwiseAdamMini])


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Embedding(11, 4)
        self.mlp = nn.ModuleDict({"up_proj": nn.Linear(4, 6, bias=False)})
        self.norm = nn.LayerNorm(4)
        self.lm_head = nn.Linear(4, 11, bias=False)


def tiny():
    model = Tiny()
    tag_parameters(model)
    return model


def feed(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        grad = torch.randn(p.shape, generator=generator)
        p.grad = grad if p.requires_grad else None


def train(model, optimizer, steps):
    for step in range(steps):
        feed(model, step)
        optimizer.step()


def unfrozen_midway(model, optimizer):
    model.norm.requires_grad_(True)


def group_added_midway(model, optimizer):
    model.extra = nn.Linear(4, 3)
    optimizer.add_param_group({"params": list(model.extra.parameters())})


def parameter_replaced_midway(model, optimizer):
    model.embed_tokens.weight = nn.Parameter(torch.ones_like(model.embed_tokens.weight))
    optimizer.param_groups[0]["params"][0] = model.embed_tokens.weight


MIDWAY = {
    unfrozen_midway: "param_groups[0]['params']",
    group_added_midway: "param_groups[1]['params'][0]",
    parameter_replaced_midway: "param_groups[0]['params'][0]",
}


@BOTH
@pytest.mark.parametrize("change", MIDWAY)
def test_a_model_that_changes_midway_is_told_so_and_can_go_on(cls, change):
    """ "Before the first step" is no help to someone who did that; tagging again must not lose what was learned."""
    model = Tiny()
    model.norm.requires_grad_(False)
    tag_parameters(model)
    optimizer = cls(model.parameters(), lr=1e-3)
    train(model, optimizer, 1)
    change(model, optimizer)
    feed(model, 1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="was frozen, or not in the model, when they were tagged") as caught:
        optimizer.step()
    assert MIDWAY[change] in str(caught.value) and "before the first step" not in str(caught.value)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters()), "half a step"
    tag_parameters(model, rules=[{"match": "^extra", "role": "ffn", "optional": True}])
    optimizer.step()
    assert int(optimizer.state[model.mlp["up_proj"].weight]["step"]) == 2
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if p.grad is not None)


@BOTH
def test_parameters_without_elements_are_stepped_over(cls):
    """They have a gradient, and nothing to update."""
    model = tiny()
    model.placeholder = nn.Parameter(torch.empty(4, 0))
    model.norm.requires_grad_(False)
    optimizer = cls(model.parameters(), lr=1e-3)
    tag_parameters(model)
    other = tiny()
    train(other, cls([p for n, p in other.named_parameters() if "norm" not in n], lr=1e-3), 2)
    for step in range(2):
        feed(model, step)
        model.placeholder.grad = torch.empty(4, 0)
        optimizer.step()
    for name, p in other.named_parameters():
        assert "norm" in name or torch.equal(p, dict(model.named_parameters())[name]), name
    saved = optimizer.state_dict()
    again = cls(model.parameters(), lr=1e-3)
    again.load_state_dict(saved)
    assert again.state_dict()["ds_blockwise"] == saved["ds_blockwise"]
