# SPDX-License-Identifier: Apache-2.0
"""Models of which a part is frozen, fine-tuned by real engines on real batches and compared with the oracle."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.helpers.deepspeed.engines import engine_config, masters, model_weights, open_engine, prepare_deepspeed
from tests.helpers.distributed import RankContext
from tests.helpers.huggingface.runs import EPS, LR, Batch, gradients_of, lora_classes, start_model
from tests.helpers.models import small_weight
from tests.helpers.optimizers import SHORT_NAMES
from tests.helpers.oracle import Hyper, Oracle, assert_same_update
from tests.helpers.tables.multimodal import LLAVA
from tests.helpers.tables.oracle_names import Classes, Classified, Span
from tests.helpers.tables.spans import classes_of
from tests.helpers.tables.tower_models import build_tower

STEPS = 3
IMAGE = 5  # the token that stands for a patch


def dora_model() -> nn.Module:
    """The LLaMA of `runs`, frozen, with DoRA on what `runs.lora_model` adapts."""
    import peft

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets, modules_to_save=["lm_head"], use_dora=True)
    model: nn.Module = peft.get_peft_model(start_model(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and parameter.dim() > 1:
                parameter.copy_(5 * small_weight(name, parameter.shape))
    return model


def dora_classes(model: nn.Module) -> Classes:
    """LoRA's, and for each adapted linear a magnitude for each output, which is like a norm's scale."""
    table = lora_classes()
    for name, classified in list(table.items()):
        if ".lora_B." in name:
            magnitude = name.replace("lora_B", "lora_magnitude_vector")
            table[magnitude] = Classified((Span(0, classified.spans[-1].end, "norm", 0),))
    return table


def dora_batch(generator: torch.Generator) -> Batch:
    tokens = torch.randint(37, (2, 9), generator=generator)
    return {"input_ids": tokens, "labels": tokens}


def llava_model() -> nn.Module:
    """Tower frozen; projector and language model are trained."""
    model = build_tower("LLaVA")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or "class_embedding" in name:
                parameter.copy_(5 * small_weight(name, parameter.shape))
    model.get_submodule("model.vision_tower").requires_grad_(False)
    return model


def llava_classes(model: nn.Module) -> Classes:
    table = {name: what for name, what in LLAVA.items() if "vision_tower" not in name}
    return classes_of(table, {name: tuple(p.shape) for name, p in model.named_parameters()})


def llava_batch(generator: torch.Generator) -> Batch:
    tokens = torch.randint(IMAGE + 1, 97, (2, 10), generator=generator)
    tokens[:, :4] = IMAGE
    return {"input_ids": tokens, "labels": tokens, "pixel_values": torch.randn(2, 3, 8, 8, generator=generator)}


MODELS: dict[
    str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Classes], Callable[[torch.Generator], Batch]]
] = {
    "dora": (dora_model, dora_classes, dora_batch),
    "llava": (llava_model, llava_classes, llava_batch),
}
CASES = {
    f"{model}-z{stage}-{short}": (model, stage, optimizer)
    for model in MODELS
    for stage in (2, 3)
    for optimizer, short in SHORT_NAMES.items()
}


def run_case(context: RankContext, name: str) -> None:
    """Each update of what is trained is the oracle's, and what is frozen stays."""
    prepare_deepspeed()
    import ds_blockwise  # noqa: F401 - registers the optimizers

    kind, stage, optimizer = CASES[name]
    build, classes, batch = MODELS[kind]
    twin = build()
    frozen = {n: p.detach().clone() for n, p in twin.named_parameters() if not p.requires_grad}
    config = engine_config(optimizer, stage=stage, params={"lr": LR, "eps": EPS})
    with open_engine(config, build, feed=False) as run:
        now = masters(run)
        oracle = Oracle(now, classes(twin), optimizer == "BlockwiseAdamMini", Hyper(LR, eps=EPS))
        for step in range(STEPS):
            batches = [batch(torch.Generator().manual_seed(10 * step + rank)) for rank in range(context.world_size)]
            run.engine.backward(run.engine(**batches[context.rank]).loss)
            run.engine.step()
            before, now, was = now, masters(run), oracle.weights()
            gradients = [gradients_of(twin, before, one) for one in batches]
            oracle.step({n: _mean([one[n] for one in gradients]) for n in gradients[0]})
            # gradients are sums in another order, and half an ulp of a weight is not nothing beside this rate
            assert_same_update(
                (before, now), (was, oracle.weights()), LR, tolerance=1e-4, weight_roundings=8, what=f"step {step}"
            )
        weights = model_weights(run)
        assert all(torch.equal(weights[n], value) for n, value in frozen.items())


def _mean(tensors: list[Tensor]) -> Tensor:
    return torch.stack(tensors).double().mean(0)
