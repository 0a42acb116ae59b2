# SPDX-License-Identifier: Apache-2.0
"""What the cases of `hf_cases` share: small models, data, Hugging Face's Trainer, and a record of what it did."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tests.helpers.deepspeed.engines import forget_groups, masters
from tests.helpers.distributed import RankContext
from tests.helpers.models import small_weight
from tests.helpers.tables.oracle_names import Classes, Classified, Span

STEPS, SAVED = 6, 3
LR, EPS, CLIP, MICRO = 1e-3, 1e-4, 0.3, 2
MULTIPLIERS = {"emb": 5}
SIZES = {"layers": 2, "hidden": 12, "heads": 2, "kv_heads": 1, "head_dim": 6, "ffn": 21, "vocab": 37}

Batch = dict[str, Tensor]


class Tokens(torch.utils.data.Dataset[Batch]):
    """Fixed random sequences: the same run every time."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> Batch:
        tokens = torch.randint(37, (9,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens}


def trainer_json(optimizer: str) -> dict[str, Any]:
    """What Hugging Face's documentation recommends, with our optimizer's name and one setting of ours."""
    names = ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps")
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": 2},
        "optimizer": {
            "type": optimizer,
            "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}
            | {"lr_multipliers": MULTIPLIERS},
        },
        "scheduler": {"type": "WarmupDecayLR", "params": dict.fromkeys(names, "auto")},
    }


def lora_model() -> nn.Module:
    """The same LLaMA, frozen, with PEFT's adapters, one of them on a linear that PEFT trains whole."""
    import peft

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]
    return start_model(
        lambda model: peft.get_peft_model(
            model, peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets, modules_to_save=["lm_head"])
        )
    )


def lora_classes() -> Classes:
    """By hand: B has the rows of the linear that it adapts, heads included, A rows of a rank that belong to no head."""
    at = "base_model.model.model.layers"

    def rows(count: int, role: str, block: int = 1) -> Classified:
        return Classified((Span(0, count, role, block),))

    table = {"base_model.model.lm_head.modules_to_save.default.weight": rows(37, "output")}
    for layer in range(SIZES["layers"]):
        for linear, role, outputs, block in (
            ("self_attn.q_proj", "query", 12, 6),
            ("self_attn.k_proj", "key", 6, 6),
            ("self_attn.v_proj", "value", 6, 1),
            ("self_attn.o_proj", "attn_out", 12, 1),
            ("mlp.down_proj", "ffn", 12, 1),
        ):
            table[f"{at}.{layer}.{linear}.lora_A.default.weight"] = rows(3, role)
            table[f"{at}.{layer}.{linear}.lora_B.default.weight"] = rows(outputs, role, block)
    return table


def start_model(change: Callable[[nn.Module], nn.Module] = lambda model: model) -> nn.Module:
    """HF LLaMA with the same weights on every rank and in every process; matrices are random, norms 1."""
    from tests.helpers import models

    model = change(models.llama())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.copy_(5 * small_weight(name, parameter.shape))
    return model


@dataclass
class Recorder:
    """What a run did, seen from outside: its batches, and its weights and rate at every step."""

    engine: Callable[[], Any]
    batches: list[Batch] = field(default_factory=list)
    weights: list[dict[str, Tensor]] = field(default_factory=list)
    lrs: list[float] = field(default_factory=list)

    def collate(self, samples: list[Batch]) -> Batch:
        batch = {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}
        self.batches.append(batch)
        return dict(batch)

    def before_step(self) -> None:
        self.weights.append(self.now())
        self.lrs.append(float(self.engine().basic_optimizer.param_groups[0]["lr"]))

    def now(self) -> dict[str, Tensor]:
        return weights_of(self.engine())


def weights_of(engine: Any) -> dict[str, Tensor]:
    """{name: full fp32 weight} of what an engine trains."""
    names = {id(p): name for name, p in engine.module.named_parameters()}
    return {
        name: w.clone() for name, w in masters(SimpleNamespace(engine=engine, model=engine.module, names=names)).items()
    }


def all_batches(context: RankContext, mine: list[Batch], count: int) -> list[Batch]:
    """The first ``count`` batches of all ranks, joined step by step."""
    gathered: list[Any] = [None] * context.world_size
    torch.distributed.all_gather_object(gathered, mine[:count])
    return [{key: torch.cat([batch[key] for batch in step]) for key in step[0]} for step in zip(*gathered, strict=True)]


def gradients_of(model: nn.Module, weights: Mapping[str, Tensor], batch: Batch) -> dict[str, Tensor]:
    """Gradients of the mean loss of a batch at given weights, fp64; {} entries for frozen parameters are left out."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in weights:
                parameter.copy_(weights[name])
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# ----------------------------------------------------------------------------------------- Trainer


def train_with_trainer(
    context: RankContext,
    optimizer: str,
    model: nn.Module,
    more: Mapping[str, Any] = MappingProxyType({}),
    *,
    resume: bool = False,
    folder: Path | None = None,
) -> tuple[Any, Recorder]:
    """Trainer from a JSON with ``more`` in it; returns it after its last step, and what it did.

    With ``resume`` it begins from its own checkpoint, or from the one in ``folder``.
    """
    import transformers

    join_accelerate(context)
    output = context.tmp_path / "-".join((optimizer, type(model).__name__, *more))
    recorder = Recorder(lambda: trainer.model_wrapped)

    class Watch(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            recorder.before_step()

    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(output),
            deepspeed=trainer_json(optimizer) | dict(more),
            max_steps=STEPS,
            save_steps=SAVED,
            per_device_train_batch_size=MICRO,
            learning_rate=LR,
            weight_decay=0.1,
            adam_beta2=0.95,
            adam_epsilon=EPS,
            max_grad_norm=CLIP,
            warmup_steps=2,
            report_to=[],
            accelerator_config={"use_configured_state": True},
            disable_tqdm=True,
            logging_steps=1,
        ),
        train_dataset=Tokens(),
        data_collator=recorder.collate,
        callbacks=[Watch()],
    )
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    trainer.train(resume_from_checkpoint=str(folder or output / f"checkpoint-{SAVED}") if resume else None)
    recorder.weights.append(recorder.now())
    assert all(torch.equal(model.get_parameter(name), value) for name, value in frozen.items())
    return trainer, recorder


def join_accelerate(context: RankContext) -> None:
    """Accelerate's view of the processes; without a GPU and a backend it would count one, and share the samples."""
    from accelerate import PartialState
    from accelerate.state import AcceleratorState

    # it insists on an address, though the process group is there
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "ACCELERATE_USE_DEEPSPEED": "true"}
    AcceleratorState._reset_state(reset_partial_state=True)
    assert PartialState(backend="gloo").num_processes == context.world_size


def close(engine: Any) -> None:
    """Remove an engine that was not opened by `open_engine`."""
    engine.destroy()
    forget_groups()
    gc.collect()
