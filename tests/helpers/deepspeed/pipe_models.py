# SPDX-License-Identifier: Apache-2.0
"""A small transformer as DeepSpeed's PipelineModule, the same one unpiped, and a way to feed both known gradients.

Layers are numbered by PipelineModule, the embedding is tied to the output layer over two stages, the final norm is a
layer by itself. Names of the unpiped model are those of PipelineModule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tests.helpers import models
from tests.helpers.models import GradientPlan, NanoConfig, NanoLayer
from tests.helpers.tables.oracle_names import Classes, gpt2_classes

# With dp 2, ZeRO cuts a row of the embedding on the last stage and none on the first
LAYERS, HIDDEN, HEADS, VOCAB = 3, 15, 3, 229
CONFIG = NanoConfig(n_layer=LAYERS, n_head=HEADS, n_embd=HIDDEN, vocab_size=VOCAB)
TIED = "tied_modules.embed.word_embeddings.weight"


class Embedding(nn.Module):
    """Tokens to hidden states, and back where it is the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(VOCAB, HIDDEN)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.word_embeddings(tokens)


class OutputLayer(nn.Module):
    """An output layer of another class than the embedding that it is tied to."""

    def __init__(self) -> None:
        super().__init__()
        self.lm_head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden)


def logits(embedding: nn.Module, hidden: Tensor) -> Tensor:
    """The tied output layer."""
    return hidden @ embedding.word_embeddings.weight.T


def loss_of(scores: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross entropy."""
    return nn.functional.cross_entropy(scores.flatten(0, 1).float(), tokens.flatten())


def pipe(*, own_head: bool = False) -> nn.Module:
    """The model over two pipeline stages with the weights of `models.small_weight`.

    Args:
        own_head: the last stage's copy of the embedding is the ``lm_head`` of an `OutputLayer`.
    """
    import deepspeed
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec

    deepspeed.init_distributed("gloo")  # PipelineModule makes process groups while it is built
    layers = [
        TiedLayerSpec("embed", Embedding, tied_weight_attr="word_embeddings.weight"),
        *(LayerSpec(NanoLayer, CONFIG) for _ in range(LAYERS)),
        LayerSpec(nn.LayerNorm, HIDDEN),
        TiedLayerSpec("embed", OutputLayer, tied_weight_attr="lm_head.weight")
        if own_head
        else TiedLayerSpec("embed", Embedding, forward_fn=logits, tied_weight_attr="word_embeddings.weight"),
    ]
    module = PipelineModule(layers, num_stages=2, loss_fn=loss_of, partition_method="uniform")
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(models.small_weight(TIED if "tied" in name else name, parameter.shape))
    return module


class Unpiped(nn.Module):
    """The same layers in one process."""

    def __init__(self) -> None:
        super().__init__()
        self.tied_modules = nn.ModuleDict({"embed": Embedding()})
        for index in range(LAYERS):
            self.add_module(str(index + 1), NanoLayer(CONFIG))
        self.add_module(str(LAYERS + 1), nn.LayerNorm(HIDDEN))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.tied_modules["embed"](tokens)
        for index in range(LAYERS + 1):
            hidden = self.get_submodule(str(index + 1))(hidden)
        return logits(self.tied_modules["embed"], hidden)


def pipe_classes() -> Classes:
    """Roles and blocks under PipelineModule's names, for the oracle."""
    known = gpt2_classes(
        layers=LAYERS, hidden=HIDDEN, heads=HEADS, ffn=4 * HIDDEN + 1, vocab=VOCAB, positions=1, conv1d=False
    )
    classes = {TIED: known["transformer.wte.weight"]}
    for name, classified in known.items():
        if name.startswith("transformer.h."):
            index, _, rest = name.removeprefix("transformer.h.").partition(".")
            classes[f"{int(index) + 1}.{rest}"] = classified
        elif name.startswith("transformer.ln_f."):
            classes[f"{LAYERS + 1}.{name.removeprefix('transformer.ln_f.')}"] = classified
    return classes


class PipeFeed:
    """Lets a pipeline's backward give every parameter its share of the planned gradients, exactly.

    Each layer adds ``sum(parameter * G)`` to what it receives. The two uses of the tied embedding have gradients of
    their own, whose sum is that of a plan for twice as many shares.
    """

    def __init__(
        self,
        engine: Any,
        plan: GradientPlan,
        shapes: dict[str, tuple[int, ...]] | None = None,
        cut: Callable[[str, Tensor], Tensor] = lambda name, whole: whole,
    ) -> None:
        """Replace the layers' forward; ``shapes`` are unsharded ones and ``cut`` takes this rank's part of a tensor."""
        self.plan, self.step, self.poison = plan, 0, False
        self.shapes, self.cut = shapes or {}, cut
        self.dp_rank = engine.grid.get_data_parallel_id()
        self.tied = GradientPlan(2 * plan.dp_size, plan.micro_batches, plan.dtype)
        module, first = engine.module, engine.module._local_start
        module.loss_fn = lambda carry, tokens: carry.sum()
        names = {id(p): name for name, p in module.named_parameters()}
        for index, layer in enumerate(module.forward_funcs):
            owner = layer.args[0] if isinstance(layer, partial) else layer
            owned = {names[id(p)]: p for p in owner.parameters()}
            module.forward_funcs[index] = self._layer(owned, is_first=first + index == 0)

    def _layer(self, owned: dict[str, nn.Parameter], *, is_first: bool) -> Callable[[Tensor], Tensor]:
        calls = iter(self._calls())

        def layer(carry: Tensor) -> Tensor:
            step, micro = next(calls)
            carry = torch.zeros(1, 1, device=carry.device) if is_first else carry
            for name, parameter in owned.items():
                shape = self.shapes.get(name, tuple(parameter.shape))
                gradient = self.cut(name, self.share(name, shape, step, micro, is_first=is_first))
                if self.poison and name != TIED:  # whose gradient would carry it to the other stage
                    gradient.view(-1)[3] = float("nan")
                carry = carry + (parameter * gradient.to(parameter)).sum().float()
            return carry

        return layer

    def _calls(self) -> Iterator[tuple[int, int]]:
        while True:
            for micro in range(self.plan.micro_batches):
                yield self.step, micro

    def share(self, name: str, shape: tuple[int, ...], step: int, micro: int, *, is_first: bool) -> Tensor:
        """What one layer adds to a parameter's gradient in one micro-batch on this data-parallel rank."""
        index = self.dp_rank * self.plan.micro_batches + micro
        if name != TIED:
            return self.plan.share(name, shape, step, index)
        return self.tied.share(name, shape, step, index + (0 if is_first else self.plan.total)) / 2

    def mean(self, name: str, shape: tuple[int, ...], step: int) -> Tensor:
        """The gradient that the optimizer must see."""
        return (self.tied if name == TIED else self.plan).mean(name, shape, step)


def train_step(run: SimpleNamespace, batches: list[Tensor]) -> Tensor:
    """One ``train_batch`` on micro-batches of tokens [batch, length]; each token is to be predicted from itself."""
    loss: Tensor = run.engine.train_batch(iter([(tokens, tokens) for tokens in batches]))
    return loss
