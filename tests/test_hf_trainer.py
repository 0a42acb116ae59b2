# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's Trainer with nothing but a JSON and the import: ``auto`` values, saving, resuming."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from distributed import RankContext, run_distributed
from engines import forget_groups, masters, prepare_deepspeed
from torch import Tensor

_MISSING = [name for name in ("deepspeed", "transformers", "accelerate") if find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(_MISSING), reason="needs deepspeed, transformers and accelerate")

STEPS, SAVED = 6, 3
JSON: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_optimization": {"stage": 2},
    "optimizer": {
        "type": "BlockwiseAdamMini",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto", "lr_multipliers": {"emb": 5}},
    },
    "scheduler": {"type": "WarmupDecayLR", "params": {k: "auto" for k in ("warmup_min_lr", "warmup_max_lr")}},
}
JSON["scheduler"]["params"] |= {"warmup_num_steps": "auto", "total_num_steps": "auto"}


class Tokens(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Fixed random sequences: the same run every time."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = torch.randint(37, (9,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens}


def run_trainer(context: RankContext, folder: str, resume: bool, more: dict[str, Any]) -> dict[str, Any]:
    """Trains on every rank with ``more`` in the JSON; returns rank-local facts of the end."""
    prepare_deepspeed()
    # Accelerate insists on an address although the process group is there already
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    import accelerate
    import models
    import transformers

    import ds_blockwise  # noqa: F401 - registers the optimizers

    torch.manual_seed(3)
    arguments = transformers.TrainingArguments(
        output_dir=folder,
        deepspeed=JSON | more,
        max_steps=STEPS,
        save_steps=SAVED,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        weight_decay=0.1,
        adam_beta2=0.95,
        warmup_steps=2,
        report_to=[],
        disable_tqdm=True,
        logging_steps=1,
    )
    # Accelerate asks the accelerator's own backend how many processes there are, and a CPU has none
    state = accelerate.PartialState()
    state.num_processes, state.process_index = context.world_size, context.rank
    trainer = transformers.Trainer(model=models.llama(), args=arguments, train_dataset=Tokens())
    checkpoint = f"{folder}/checkpoint-{SAVED}" if resume else None
    trainer.train(resume_from_checkpoint=checkpoint)
    engine = trainer.model_wrapped
    optimizer = engine.basic_optimizer
    names = {id(p): name for name, p in engine.module.named_parameters()}
    weights = masters(SimpleNamespace(engine=engine, model=engine.module, names=names))
    facts = {
        "optimizer": type(optimizer).__name__,
        "weights": {name: value.clone() for name, value in weights.items()},
        "group": {k: v for k, v in optimizer.param_groups[0].items() if k != "params"},
        "steps": sorted({int(state["step"]) for state in optimizer.state.values()}),
        "multiplier": engine.module.model.embed_tokens.weight.block_spec.parts[0].lr_multiplier,
        "is_split": engine.module.model.layers[0].mlp.down_proj.weight.block_shard is not None,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }
    engine.destroy()
    forget_groups()
    return facts


@pytest.mark.parametrize("more", [{}, {"tensor_parallel": {"autotp_size": 2}}], ids=["dp2", "autotp2"])
def test_trainer_uses_the_json_and_resumes_bitwise(tmp_path: Path, more: dict[str, Any]) -> None:
    """``auto`` left in a hyper-parameter, or a resume that starts the moments again, would train another model."""
    whole = run_distributed(run_trainer, 2, str(tmp_path / "run"), False, more)
    again = run_distributed(run_trainer, 2, str(tmp_path / "run"), True, more)
    for one, two in zip(whole, again, strict=True):
        assert one["optimizer"] == two["optimizer"] == "BlockwiseAdamMini"
        assert one["is_split"] == two["is_split"] == bool(more)
        assert one["steps"] == two["steps"] == [STEPS]
        assert one["multiplier"] == 5.0
        assert one["group"] == two["group"]
        assert tuple(one["group"]["betas"]) == (0.9, 0.95)
        assert one["group"]["weight_decay"] == 0.1
        assert one["losses"][SAVED:] == two["losses"][-(STEPS - SAVED) :]
        for name, weight in one["weights"].items():
            assert torch.equal(weight, two["weights"][name]), name
