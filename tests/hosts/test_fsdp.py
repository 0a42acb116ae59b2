# SPDX-License-Identifier: Apache-2.0
"""Parameters that PyTorch's FSDP has sharded: refused by name on every rank, whatever was called first."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from ds_blockwise import tag_parameters
from ds_blockwise.optimizers.registry import OPTIMIZERS
from tests.helpers.distributed import RankContext, run_distributed


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(8, 32)
        self.lm_head = nn.Linear(32, 8, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.embed_tokens(tokens))


def _fsdp2(model: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    return model


def _fsdp1(model: nn.Module, *, use_orig_params: bool) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=use_orig_params)


SHARD: dict[str, Callable[[nn.Module], nn.Module]] = {
    "FSDP2": _fsdp2,
    "FSDP1": lambda model: _fsdp1(model, use_orig_params=False),
    "FSDP1 with its parameters": lambda model: _fsdp1(model, use_orig_params=True),
}


def _tag_then_shard(shard: Callable[[nn.Module], nn.Module], cls: type[torch.optim.Optimizer]) -> None:
    model = _Model()
    tag_parameters(model)
    _step(shard(model), cls)


def _shard_then_tag(shard: Callable[[nn.Module], nn.Module], cls: type[torch.optim.Optimizer]) -> None:
    model = shard(_Model())
    tag_parameters(model)
    _step(model, cls)


def _copy_tags(shard: Callable[[nn.Module], nn.Module], cls: type[torch.optim.Optimizer]) -> None:
    """Somebody who sets the tags by hand gets no further."""
    model, tagged = shard(_Model()), _Model()
    tag_parameters(tagged)
    for param, like in zip(model.parameters(), tagged.parameters(), strict=False):
        param.block_spec, param.block_shard = like.block_spec, like.block_shard
    _step(model, cls)


def _step(model: nn.Module, cls: type[torch.optim.Optimizer]) -> None:
    optimizer = cls(model.parameters(), lr=1e-2)
    model(torch.arange(8)[None]).square().mean().backward()
    optimizer.step()


ORDERS = {"tag, shard": _tag_then_shard, "shard, tag": _shard_then_tag, "shard, copy tags": _copy_tags}


def _said(context: RankContext) -> dict[str, str]:
    said = {}
    for library, shard in SHARD.items():
        for order, run in ORDERS.items():
            for name, cls in OPTIMIZERS.items():
                torch.manual_seed(0)
                try:
                    run(shard, cls)
                    said[f"{library}; {order}; {name}"] = "no error"
                except ValueError as error:
                    said[f"{library}; {order}; {name}"] = str(error)
                context.barrier()
    return said


@pytest.fixture(scope="module")
def said() -> list[dict[str, str]]:
    return run_distributed(_said, 2)


@pytest.mark.parametrize("library", SHARD)
@pytest.mark.parametrize("order", ORDERS)
def test_sharded_parameters_are_refused_on_every_rank(said: list[dict[str, str]], library: str, order: str) -> None:
    """A DTensor's address was a segmentation fault in the C++ kernels; a flat parameter has no name and no blocks."""
    for of_rank in said:
        for name in OPTIMIZERS:
            message = of_rank[f"{library}; {order}; {name}"]
            assert "FSDP" in message, message
            assert "DeepSpeed" in message, message
