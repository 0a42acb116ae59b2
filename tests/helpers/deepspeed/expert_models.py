# SPDX-License-Identifier: Apache-2.0
"""A nanoGPT whose FFNs are DeepSpeed's MoE layers, and which rank holds which of its experts."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from tests.helpers import models
from tests.helpers.tables.oracle_names import Classes, Classified, Span, gpt2_classes

EXPERTS, WIDTH, FFN = 4, 15, 61
_EXPERT = re.compile(r"(deepspeed_experts\.)(\d+)")
_SIZES = {"layers": 2, "hidden": WIDTH, "heads": 3, "ffn": FFN, "vocab": 29, "positions": 11, "conv1d": False}


class _Output(nn.Module):
    """DeepSpeed's layer returns its loss and counts as well."""

    def __init__(self, moe: nn.Module) -> None:
        super().__init__()
        self.moe = moe

    def forward(self, x: Tensor) -> Tensor:
        return self.moe(x)[0]


def build(ep_size: int, *, residual: bool = False) -> nn.Module:
    """The model with its experts spread over ``ep_size`` ranks; weights depend on names of the whole model."""
    from deepspeed.moe.layer import MoE

    model = models.NanoGPT()
    for layer in model.transformer["h"]:
        moe = MoE(WIDTH, models.NanoMLP(model.config), EXPERTS, ep_size, use_residual=residual, use_rts=False)
        layer.mlp = _Output(moe)
    return model


@torch.no_grad()
def set_small_weights(model: nn.Module, ep_size: int, ep_rank: int) -> None:
    """Every parameter's starting value, an expert's by its number in the whole model."""
    for name, parameter in model.named_parameters():
        parameter.copy_(models.small_weight(whole_name(name, ep_size, ep_rank), parameter.shape))


def whole_name(name: str, ep_size: int, ep_rank: int) -> str:
    """A parameter's name in the model whose experts are all on one rank."""
    first = ep_rank * (EXPERTS // ep_size)
    return _EXPERT.sub(lambda found: f"{found[1]}{int(found[2]) + first}", name)


def classes_of(*, residual: bool = False) -> Classes:
    """Roles and blocks of all experts, by hand."""
    dense = gpt2_classes(**_SIZES)
    table = {name: found for name, found in dense.items() if ".mlp." not in name}
    for i in range(2):
        at = f"transformer.h.{i}.mlp.moe."
        table[f"{at}deepspeed_moe.gate.wg.weight"] = Classified((Span(0, EXPERTS, "router", 1),))
        prefixes = [f"{at}deepspeed_moe.experts.deepspeed_experts.{n}." for n in range(EXPERTS)]
        if residual:
            prefixes.append(f"{at}mlp.")
            table[f"{at}coefficient.weight"] = Classified((Span(0, 2, "router", 1),))
            table[f"{at}coefficient.bias"] = Classified((Span(0, 2, "router", 0),))
        for prefix in prefixes:
            for leaf in ("c_fc.weight", "c_fc.bias", "c_proj.weight", "c_proj.bias"):
                table[prefix + leaf] = dense[f"transformer.h.{i}.mlp.{leaf}"]
    return table
