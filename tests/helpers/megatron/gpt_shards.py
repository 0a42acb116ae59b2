# SPDX-License-Identifier: Apache-2.0
"""Small Megatron-core GPT models and how tensor parallelism cuts their weights, written by hand.

Weights and gradients are drawn for the unsharded tensors and cut by the code in this file, so a
wrong idea of Megatron's layout in the library can't be repeated by a test.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from tests.helpers import models
from tests.helpers.megatron.groups import megatron_groups

# Odd hidden size: flat ZeRO partitions end inside heads and rows. "mqa": with one KV head the
# first of two ranks holds query heads only, the second one a query head, K and V.
SHAPES: dict[str, dict[str, int]] = {
    "gqa": {"heads": 4, "groups": 2, "head_dim": 6, "hidden": 15, "ffn": 14, "vocab": 22},
    "mqa": {"heads": 4, "groups": 1, "head_dim": 4, "hidden": 13, "ffn": 10, "vocab": 18},
    # for three ranks: a KV head each; one KV head, with query heads that end inside a rank
    "gqa3": {"heads": 6, "groups": 3, "head_dim": 4, "hidden": 15, "ffn": 12, "vocab": 21},
    "mqa3": {"heads": 3, "groups": 1, "head_dim": 6, "hidden": 13, "ffn": 9, "vocab": 18},
}
LAYERS = 2


def cut(name: str, full: Tensor, rank: int, size: int = 2) -> Tensor:
    """What tensor-parallel rank ``rank`` of ``size`` holds of an unsharded tensor."""
    if "layernorm" in name:
        return full
    if "linear_proj" in name or "linear_fc2" in name:  # inputs are split
        part = full.shape[1] // size
        return full[:, rank * part : (rank + 1) * part].contiguous()
    if "linear_fc1" in name:  # each rank has its part of gate, then its part of up
        gate, up = full[: full.shape[0] // 2], full[full.shape[0] // 2 :]
        part = gate.shape[0] // size
        return torch.cat([half[rank * part : (rank + 1) * part] for half in (gate, up)])
    part = full.shape[0] // size
    return full[rank * part : (rank + 1) * part].contiguous()


def cut_all(weights: dict[str, Tensor], rank: int, size: int = 2) -> dict[str, Tensor]:
    """``cut`` of every tensor."""
    return {name: cut(name, full, rank, size) for name, full in weights.items()}


def join(name: str, parts: list[Tensor]) -> Tensor:
    """The unsharded tensor of which the tensor-parallel ranks hold ``parts``; undoes ``cut``."""
    if "layernorm" in name:
        return parts[0]
    if "linear_proj" in name or "linear_fc2" in name:
        return torch.cat(parts, 1)
    if "linear_fc1" in name:
        halves = [part.chunk(2) for part in parts]
        return torch.cat([half[i] for i in (0, 1) for half in halves])
    return torch.cat(parts)


def full_shapes(shape: str, *, tied: bool = False, layers: int = LAYERS) -> dict[str, tuple[int, ...]]:
    """Unsharded shapes, from the sizes alone."""
    s = SHAPES[shape]
    shapes: dict[str, tuple[int, ...]] = {
        "embedding.word_embeddings.weight": (s["vocab"], s["hidden"]),
        "decoder.final_layernorm.weight": (s["hidden"],),
    }
    if not tied:
        shapes["output_layer.weight"] = (s["vocab"], s["hidden"])
    for i in range(layers):
        at = f"decoder.layers.{i}."
        qkv = (s["heads"] + 2 * s["groups"]) * s["head_dim"]
        shapes[at + "input_layernorm.weight"] = (s["hidden"],)
        shapes[at + "pre_mlp_layernorm.weight"] = (s["hidden"],)
        shapes[at + "self_attention.linear_qkv.weight"] = (qkv, s["hidden"])
        width = s["heads"] * s["head_dim"]
        shapes[at + "self_attention.linear_proj.weight"] = (s["hidden"], width)
        shapes[at + "mlp.linear_fc1.weight"] = (2 * s["ffn"], s["hidden"])
        shapes[at + "mlp.linear_fc2.weight"] = (s["hidden"], s["ffn"])
    return shapes


def whole_name(model: nn.Module, name: str) -> str:
    """A parameter's name with the number that its layer has in the whole model; stages count from 0."""
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        parts[2] = str(model.decoder.layers[int(parts[2])].layer_number - 1)
    return ".".join(parts)


def parallel(tp: int, pp: int = 1) -> AbstractContextManager[None]:
    """Megatron-core's process groups for these sizes; the rest of the world is data-parallel."""
    return megatron_groups(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)


def gpt(shape: str, dtype: torch.dtype, *, tied: bool = False) -> nn.Module:
    """This stage's part of a GPTModel in Megatron-core's own initial weights."""
    from megatron_patch import GPTShape, build_gpt

    s = SHAPES[shape]
    sizes = GPTShape(
        num_layers=LAYERS,
        hidden_size=s["hidden"],
        ffn_hidden_size=s["ffn"],
        num_heads=s["heads"],
        num_kv_heads=s["groups"],
        head_dim=s["head_dim"],
        vocab_size=s["vocab"],
        sequence_length=16,
        tied_embeddings=tied,
    )
    torch.manual_seed(11)
    return build_gpt(sizes, dtype=dtype)


def small_gpt(shape: str, dtype: torch.dtype, tp_rank: int | None, *, tied: bool = False, tp: int = 2) -> nn.Module:
    """``gpt`` with the weights of ``models.small_weight``, cut for a rank of ``tp`` (None: whole)."""
    model = gpt(shape, dtype, tied=tied)
    shapes = full_shapes(shape, tied=tied)
    named = dict(model.named_parameters())
    assert set(named) == set(shapes), set(named) ^ set(shapes)
    with torch.no_grad():
        for name, parameter in named.items():
            whole = models.small_weight(name, shapes[name])
            parameter.copy_(whole if tp_rank is None else cut(name, whole, tp_rank, tp))
    return model
