# SPDX-License-Identifier: Apache-2.0
"""What a step and its set-up cost in Python, counted in calls; milliseconds are the benchmarks' business."""

import pytest
import torch

from ds_blockwise import tag_parameters
from ds_blockwise.blocks.segment_table import Placement
from ds_blockwise.kernels.select import kernels_for
from ds_blockwise.optimizers.registry import OPTIMIZERS
from ds_blockwise.parallel.reduce import LOCAL
from tests.helpers.counting import count_calls

BOTH = list(OPTIMIZERS.values())


class Llama2B(torch.nn.Module):
    """Names and shapes of a LLaMA of 2.0B parameters."""

    HIDDEN, FFN, LAYERS, VOCAB = 2560, 6912, 24, 32000

    def __init__(self):
        from transformers import LlamaConfig, LlamaForCausalLM

        super().__init__()
        config = LlamaConfig(
            hidden_size=self.HIDDEN,
            intermediate_size=self.FFN,
            num_hidden_layers=self.LAYERS,
            num_attention_heads=20,
            vocab_size=self.VOCAB,
        )
        with torch.device("meta"):
            self.model = LlamaForCausalLM(config)


def calls_of_a_step(optimizer, monkeypatch):
    """Calls of Python and C functions in a step whose arithmetic is left out."""
    monkeypatch.setattr(kernels_for("cpp", torch.device("cpu")), "_step", lambda *arguments: None)
    optimizer.step()  # the first one makes state and bindings
    return count_calls(optimizer.step)


@pytest.mark.parametrize("cls", BOTH)
def test_a_step_of_llama_2b_makes_few_python_calls_per_parameter(cls, monkeypatch):
    """Whole tensors are the worst case: one entry per parameter. About 22 (AdamW) and 29 calls each were counted."""
    model = Llama2B()
    assert 1.9e9 < sum(p.numel() for p in model.parameters()) < 2.2e9
    tag_parameters(model)
    memory = torch.empty(max(p.numel() for p in model.parameters()))  # shared by all: nothing reads it
    params = []
    for meta in model.parameters():
        param = torch.nn.Parameter(memory[: meta.numel()].view(meta.shape))
        param.block_spec, param.block_shard = meta.block_spec, meta.block_shard
        param.grad = param.detach()
        params.append(param)
    optimizer = cls(params, backend="cpp")
    for param in params:
        table = optimizer.binding_of(param).table
        second = torch.zeros(table.num_blocks) if table.shares_second_moment else param.detach()
        optimizer.state[param] = {"step": 0, "exp_avg": param.detach(), "exp_avg_sq": second}
    assert calls_of_a_step(optimizer, monkeypatch) < 50 * len(params)


@pytest.mark.parametrize("cls", BOTH)
def test_python_of_one_rank_of_64_does_not_grow_with_elements_or_blocks(cls, monkeypatch):
    """Set-up of every rank of a large job, and the Python of a step, must not grow with the model."""
    model = Llama2B()
    tag_parameters(model)
    params = list(model.parameters())
    total = sum(p.numel() for p in params)
    size = -(-total // 64)
    low, high = 31 * size, 32 * size
    placements, offset = [], 0
    for p in params:
        end = offset + p.numel()
        first, last = max(offset, low), min(end, high)
        cuts = tuple(k * size - offset for k in range(1, 64) if offset < k * size < end)
        at, held = (first - low, last - first) if first < last else (min(max(offset - low, 0), size), 0)
        placements.append(Placement(p.block_spec, None, at, max(first - offset, 0) if held else 0, held, cuts))
        offset = end
    flat = torch.nn.Parameter(torch.empty(size))
    flat.grad = torch.empty(size)
    made = []

    def set_up():
        made.append(cls([flat], backend="cpp"))
        made[-1].bind(flat, placements, LOCAL)

    assert count_calls(set_up) < 1000 * len(params)
    table = made[-1].binding_of(flat).table
    assert table.shares_second_moment == (table.num_blocks > 0)
    assert calls_of_a_step(made[-1], monkeypatch) < 500
