# SPDX-License-Identifier: Apache-2.0
"""An optimizer and a schedule given to Trainer as objects, without DeepSpeed."""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_blockwise import BlockwiseAdamMini, BlockwiseLR, tag_parameters
from ds_blockwise.kernels.param_groups import progress_of

pytestmark = pytest.mark.skipif(
    find_spec("transformers") is None or find_spec("accelerate") is None, reason="needs transformers and accelerate"
)
STEPS, SAVED, PEAK, FLOOR = 8, 3, 1e-3, 1e-4


def trained(output: Path, *, resume: bool = False) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Rate and progress at each update, and the weights at the end."""
    import transformers
    from accelerate.state import AcceleratorState

    from tests.helpers.huggingface.runs import Tokens, start_model

    AcceleratorState._reset_state(reset_partial_state=True)
    model = start_model()
    tag_parameters(model)
    optimizer = BlockwiseAdamMini(model.parameters(), lr=PEAK, weight_decay=0.1)
    schedule = BlockwiseLR(
        optimizer, STEPS, warmup_fraction=0.25, min_lr=FLOOR, shape="wsd", decay_shape="1-sqrt", decay_num_steps=4
    )
    rates: list[float] = []
    progress: list[float] = []

    class Watch(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            (group,) = optimizer.param_groups
            rates.append(group["lr"])
            progress.append(progress_of(group) or 0.0)

    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(output),
            use_cpu=True,
            max_steps=STEPS,
            save_steps=SAVED,
            per_device_train_batch_size=2,
            report_to=[],
            disable_tqdm=True,
            logging_steps=1,
        ),
        train_dataset=Tokens(),
        optimizers=(optimizer, schedule),
        callbacks=[Watch()],
    )
    trainer.train(resume_from_checkpoint=str(output / f"checkpoint-{SAVED}") if resume else None)
    return rates, progress, {name: p.detach().clone() for name, p in model.named_parameters()}


def test_trainer_steps_and_resumes_a_schedule_object(tmp_path: Path) -> None:
    """A schedule that is not stepped, or begins anew after a resume, would train another model without a word."""
    rates, progress, weights = trained(tmp_path)
    heights = [1 - math.sqrt(x / 4) for x in range(4)]
    assert rates == pytest.approx([0.0, PEAK / 2, PEAK, PEAK, *(FLOOR + h * (PEAK - FLOOR) for h in heights)])
    assert progress == [0.0, 0.0, 0.0, 0.0, 0.0, 0.25, 0.5, 0.75]
    again = trained(tmp_path, resume=True)
    assert (again[0], again[1]) == (rates[SAVED:], progress[SAVED:])
    assert all(torch.equal(again[2][name], weight) for name, weight in weights.items())
