# SPDX-License-Identifier: Apache-2.0
"""What the kernel benchmark steps: LLaMA shapes from 1M to 1B parameters, as whole tensors and as one ZeRO shard.

All contenders of a case step the same memory: one flat parameter buffer and one flat gradient buffer, of which whole
tensors are views. Only their states differ, so 24 GiB hold every contender at 200M parameters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import nn

from ds_blockwise import tag_parameters
from ds_blockwise.blocks.segment_table import Placement

LAYOUTS = ("whole", "flat")
RANKS = 3  # a flat case is what the middle rank of three holds: its shard begins and ends inside a block


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of one LLaMA: RMSNorm, SwiGLU, grouped queries, untied embeddings, no biases."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int

    def tensors(self, *, fused: bool) -> list[tuple[str, tuple[int, ...]]]:
        """Names and shapes in storage order.

        Args:
            fused: Megatron-core's names with one QKV and one gate-and-up weight, else Hugging Face's with each apart;
                both fill the same memory.
        """
        hidden, ffn = self.hidden_size, self.ffn_hidden_size
        query, key = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        if not fused:
            names = ("model.embed_tokens", "model.layers.{}.", "model.norm", "lm_head")
            layer = [
                ("input_layernorm", (hidden,)),
                ("self_attn.q_proj", (query, hidden)),
                ("self_attn.k_proj", (key, hidden)),
                ("self_attn.v_proj", (key, hidden)),
                ("self_attn.o_proj", (hidden, query)),
                ("post_attention_layernorm", (hidden,)),
                ("mlp.gate_proj", (ffn, hidden)),
                ("mlp.up_proj", (ffn, hidden)),
                ("mlp.down_proj", (hidden, ffn)),
            ]
        else:
            names = ("embedding.word_embeddings", "decoder.layers.{}.", "decoder.final_layernorm", "output_layer")
            layer = [
                ("input_layernorm", (hidden,)),
                ("self_attention.linear_qkv", (query + 2 * key, hidden)),
                ("self_attention.linear_proj", (hidden, query)),
                ("pre_mlp_layernorm", (hidden,)),
                ("mlp.linear_fc1", (2 * ffn, hidden)),
                ("mlp.linear_fc2", (hidden, ffn)),
            ]
        found = [(names[0], (self.vocab_size, hidden))]
        for index in range(self.num_layers):
            found += [(names[1].format(index) + name, shape) for name, shape in layer]
        found += [(names[2], (hidden,)), (names[3], (self.vocab_size, hidden))]
        return [(f"{name}.weight", shape) for name, shape in found]

    def count_parameters(self) -> int:
        """Number of parameters."""
        return sum(math.prod(shape) for _, shape in self.tensors(fused=True))


SIZES = {
    "1M": Shape(4, 128, 352, 4, 2, 32, 2048),  # configs/model/tiny.yaml
    "5M": Shape(4, 256, 688, 4, 2, 64, 4096),
    "25M": Shape(6, 512, 1376, 8, 4, 64, 8192),
    "67M": Shape(6, 640, 1664, 10, 5, 64, 32000),
    "200M": Shape(11, 1024, 2816, 16, 8, 64, 32000),
    "1B": Shape(22, 2048, 5632, 32, 4, 64, 32000),  # TinyLlama
}


@dataclass
class Case:
    """The memory that all contenders of one size and layout step.

    Attributes:
        size: key of `SIZES`.
        layout: ``whole`` or ``flat``.
        shape: the model that is stepped, or that the shard was cut from.
        param: every parameter, fp32, 1-D.
        grad: fixed random gradients, like ``param``.
        params: what our optimizers and the AdamWs step: the model's tensors with fused QKV and ``block_spec``, or the
            one flat tensor.
        placements: what lies in the flat tensor; empty if whole.
        named: the same memory as Hugging Face's tensors, for the published Adam-mini; empty if flat.
    """

    size: str
    layout: str
    shape: Shape
    param: torch.Tensor
    grad: torch.Tensor
    params: list[nn.Parameter]
    placements: tuple[Placement, ...]
    named: list[tuple[str, nn.Parameter]]

    @property
    def numel(self) -> int:
        """Elements that a step updates."""
        return self.param.numel()


def make_case(size: str, layout: str, device: torch.device, *, fused: bool = True, **settings: object) -> Case:
    """Allocate one case, filled with random numbers from a fixed seed.

    Args:
        size: key of `SIZES`.
        layout: ``whole``: every tensor of the model; ``flat``: the shard of the middle rank of three, cut from a model
            with as many more layers as it takes for the shard to have the size's number of parameters.
        device: where the tensors lie.
        fused: whether query, key and value are one weight in ``params`` (whole layout only).
        settings: of `tag_parameters`: multipliers, if not the defaults.
    """
    shape = SIZES[size]
    placements: tuple[Placement, ...] = ()
    numel = shape.count_parameters()
    if layout == "flat":
        shape, placements, numel = zero_shard(shape, 1, RANKS, **settings)
    generator = torch.Generator(device).manual_seed(1)
    param = torch.randn(numel, generator=generator, device=device).mul_(0.02)
    grad = torch.randn(numel, generator=generator, device=device).mul_(1e-2)
    if layout == "flat":
        flat = nn.Parameter(param)
        flat.grad = grad
        return Case(size, layout, shape, param, grad, [flat], placements, [])
    params = [view for _, view in _views(shape, param, grad, fused=fused)]
    for tagged, view in zip(tag(shape, fused=fused, **settings), params, strict=True):
        view.block_spec, view.block_shard = tagged.block_spec, None
    return Case(size, layout, shape, param, grad, params, (), _views(shape, param, grad, fused=False))


def tag(shape: Shape, *, fused: bool, **settings: object) -> list[nn.Parameter]:
    """The model's parameters on the meta device, tagged by `tag_parameters`, in storage order."""
    model = nn.Module()
    for name, size in shape.tensors(fused=fused):
        *path, leaf = name.split(".")
        owner = model
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner._modules[part]
        owner.register_parameter(leaf, nn.Parameter(torch.empty(size, device="meta")))
    heads = {"num_heads": shape.num_heads}
    kv_heads = {"num_kv_heads": shape.num_kv_heads}
    if fused:
        rules = [{"match": r"linear_qkv\.weight", "role": "qkv", "layout": "grouped", **heads, **kv_heads}]
    else:
        rules = [{"match": r"q_proj\.weight", "role": "query", **heads}]
        rules += [{"match": r"k_proj\.weight", "role": "key", "num_heads": shape.num_kv_heads}]
    tag_parameters(model, rules=rules, **settings)
    named = dict(model.named_parameters())
    return [named[name] for name, _ in shape.tensors(fused=fused)]


def _views(shape: Shape, param: torch.Tensor, grad: torch.Tensor, *, fused: bool) -> list[tuple[str, nn.Parameter]]:
    found, at = [], 0
    for name, size in shape.tensors(fused=fused):
        end = at + math.prod(size)
        view = nn.Parameter(param[at:end].view(size))
        view.grad = grad[at:end].view(size)
        found.append((name, view))
        at = end
    assert at == param.numel()
    return found


def zero_shard(shape: Shape, rank: int, ranks: int, **settings: object) -> tuple[Shape, tuple[Placement, ...], int]:
    """What a rank holds of a deeper model under ZeRO 1 or 2, cut by the host's own function.

    Args:
        shape: the model gets as many more layers as it takes for one rank to hold this many parameters.
        rank: which rank.
        ranks: size of the data-parallel group.
        settings: of `tag_parameters`.

    Returns:
        The deeper model, the rank's placements and the elements of its flat tensor. Cuts lie inside rows.
    """
    import deepspeed  # noqa: F401 - before the host, which is registered while this is imported

    from ds_blockwise.hosts.deepspeed.partitions import offsets_of, zero_window

    layer = replace(shape, num_layers=1).count_parameters() - replace(shape, num_layers=0).count_parameters()
    missing = (ranks - 1) * shape.count_parameters()
    shape = replace(shape, num_layers=shape.num_layers + round(missing / layer))
    params = tag(shape, fused=True, **settings)
    offsets, at = offsets_of(params), sum(param.numel() for param in params)
    size = 2 * -(-at // (2 * ranks))  # DeepSpeed pads partitions to an even size
    while _cuts_at_row_edge(params, offsets, [k * size for k in range(1, ranks)]):
        size += 2
    return shape, zero_window(params, offsets, rank, ranks, size), size


def _cuts_at_row_edge(params: list[nn.Parameter], offsets: list[int], cuts: list[int]) -> bool:
    """Whether a cut falls between two rows, and so maybe between two blocks."""
    for cut in cuts:
        param, offset = next((p, o) for p, o in zip(params, offsets, strict=True) if o <= cut < o + p.numel())
        if (cut - offset) % param.shape[-1] == 0:
            return True
    return False
