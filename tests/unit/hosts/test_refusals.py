# SPDX-License-Identifier: Apache-2.0
"""Which settings of a DeepSpeed JSON are refused, for which optimizer, and what the user is told to write."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping

import pytest

from ds_blockwise.hosts.deepspeed.refusals import EngineFacts, facts_of_json, refusals

OFFLOAD = {"device": "cpu"}
AUTOCAST = {"enabled": True, "dtype": "float16"}


def refused(config: Mapping[str, object], optimizer: str = "BlockwiseAdamMini") -> list[str]:
    return list(refusals(facts_of_json({"optimizer": {"type": optimizer}, **config})))


ALL_OPTIMIZERS = {
    "zenflow": ({"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}, 'Remove "zenflow"'),
    "super_offload": (
        {"zero_optimization": {"stage": 3, "offload_optimizer": {**OFFLOAD, "super_offload": True}}},
        'Set "super_offload": false',
    ),
    "ratio": (
        {"zero_optimization": {"stage": 3, "offload_optimizer": {**OFFLOAD, "ratio": 0.3}}},
        '{"ratio": 0.3}: partial offload works with DeepSpeedCPUAdam only. Set "ratio": 1.0',
    ),
    "bf16_master": (
        {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}},
        '"bf16_master_weights_and_grads": the master weights are updated in fp32. Set it to false',
    ),
    "fp16_master": (
        {"fp16": {"enabled": True, "fp16_master_weights_and_grads": True}},
        '"fp16_master_weights_and_grads": the master weights are updated in fp32. Set it to false',
    ),
    "elastic": ({"zero_optimization": {"stage": 1, "elastic_checkpoint": True}}, "use universal checkpoints"),
}
ADAM_MINI_ALONE = {
    "nvme": ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, 'Use "device": "cpu"'),
    "skips_alone": (
        {"torch_autocast": AUTOCAST, "zero_optimization": {"stage": 1, "compute_grad_norm": False}},
        "the others would wait for ever",
    ),
}


ZERO_2, BF16 = {"zero_optimization": {"stage": 2}}, {"bf16": {"enabled": True}}
NOT_FUSED = {
    "no stage": ({}, '"stage": 0'),
    "stage 3": ({"zero_optimization": {"stage": 3}}, '"stage": 1 or 2'),
    "fp16": ({**ZERO_2, "fp16": {"enabled": True}}, '"fp16": its scale'),
    "autocast": ({**ZERO_2, "torch_autocast": {"enabled": True}}, '"torch_autocast": its scale'),
    "offload": ({"zero_optimization": {"stage": 2, "offload_optimizer": OFFLOAD}}, "remove the offload"),
    "BF16_Optimizer": (
        {"zero_optimization": {"stage": 1}, **BF16, "data_types": {"grad_accum_dtype": "float32"}},
        'BF16_Optimizer. Write "fused_step": false, or "stage": 2',
    ),
    "fp16 gradients": ({**ZERO_2, **BF16, "data_types": {"grad_accum_dtype": "fp16"}}, '"grad_accum_dtype": "fp16"'),
    "bf16 gradients": ({**ZERO_2, "data_types": {"grad_accum_dtype": "bf16"}}, '"grad_accum_dtype": "bf16"'),
    "deepcompile": ({**ZERO_2, "compile": {"deepcompile": True}}, '"deepcompile": false'),
    "unmanaged": ({**ZERO_2, "managed_gradient_accumulation": False}, '"managed_gradient_accumulation": true'),
}


@pytest.mark.parametrize("name", NOT_FUSED)
def test_settings_with_which_steps_are_not_fused(name: str) -> None:
    """Each would have its gradients scaled twice, not at all, or in a dtype that no kernel reads; or nobody knows."""
    config, words = NOT_FUSED[name]
    (refusal,) = refused({**config, "optimizer": {"type": "BlockwiseAdamW", "params": {"fused_step": True}}})
    assert words in refusal and 'rite "fused_step": false' in refusal
    assert not refused({**config, "optimizer": {"type": "BlockwiseAdamW", "params": {"fused_step": False}}})


def test_steps_are_fused_where_they_were_compared() -> None:
    params = {"optimizer": {"type": "BlockwiseAdamMini", "params": {"fused_step": True}}}
    fp32_gradients = {"data_types": {"grad_accum_dtype": "fp32"}}
    for config in ({**ZERO_2, **BF16}, {**ZERO_2, **BF16, **fp32_gradients}, {**ZERO_2, **fp32_gradients}):
        assert not refused({**config, **params})
    for facts in ({"is_pipeline": True}, {"has_experts": True}):
        (refusal,) = refusals(EngineFacts("BlockwiseAdamW", 1, fused_step=True, **facts))
        assert 'Write "fused_step": false' in refusal


@pytest.mark.parametrize("optimizer", ["BlockwiseAdamW", "BlockwiseAdamMini"])
@pytest.mark.parametrize("name", ALL_OPTIMIZERS)
def test_settings_that_no_optimizer_of_ours_survives(name: str, optimizer: str) -> None:
    """Each would silently train something else, or fail in the first step or the first load."""
    config, words = ALL_OPTIMIZERS[name]
    (refusal,) = refused(config, optimizer)
    assert words in refusal


@pytest.mark.parametrize("name", ADAM_MINI_ALONE)
def test_settings_that_one_second_moment_per_block_does_not_survive(name: str) -> None:
    """BlockwiseAdamW has state in the shape of the parameters and reduces nothing: it must not be refused."""
    config, words = ADAM_MINI_ALONE[name]
    (refusal,) = refused(config)
    assert words in refusal
    assert refused(config, "BlockwiseAdamW") == []


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "none", "ratio": 0.3}}},
        {"zero_optimization": {"stage": 2, "offload_optimizer": OFFLOAD, "elastic_checkpoint": False}},
        {"torch_autocast": AUTOCAST, "zero_optimization": {"stage": 1}},
        {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}, "zero_optimization": {"compute_grad_norm": False}},
        {"torch_autocast": {"enabled": False, "dtype": "float16"}, "zero_optimization": {"compute_grad_norm": False}},
        {"bf16": {"enabled": True, "bf16_master_weights_and_grads": False}, "fp16": {"enabled": False}},
    ],
)
def test_sound_settings_are_not_refused(config: Mapping[str, object]) -> None:
    """A refusal too many keeps somebody from training."""
    assert refused(config) == []


@pytest.mark.parametrize("section", [None, True, 3, "auto", []])
def test_a_section_that_is_no_object_counts_as_absent(section: object) -> None:
    """Its shape is another check's business; this one must not fail on it."""
    config = {"zero_optimization": section, "bf16": section, "torch_autocast": section, "optimizer": section}
    assert list(refusals(facts_of_json(config))) == []


def test_everything_wrong_is_said_at_once() -> None:
    """Nobody wants to start a job eight times to hear eight reasons."""
    offload = {"device": "nvme", "ratio": 0.5}
    wrong = {"zenflow": {"topk_ratio": 0.1}, "elastic_checkpoint": True, "offload_optimizer": offload}
    assert len(refused({"zero_optimization": wrong})) == 4


def test_a_pipeline_engine_takes_zero_stage_1_at_most() -> None:
    """DeepSpeed only asserts it, without a word about what to write."""
    (refusal,) = refusals(EngineFacts("BlockwiseAdamW", zero_stage=2, is_pipeline=True))
    assert 'Set "stage": 1' in refusal
    assert not list(refusals(EngineFacts("BlockwiseAdamW", zero_stage=1, is_pipeline=True)))


def test_files_that_say_so_import_without_deepspeed() -> None:
    """``ds-blockwise check`` serves people whose own machine has no DeepSpeed."""
    modules = ("refusals", "checks", "engine", "autotp", "monitor", "pipeline", "sharpness")
    imports = ", ".join(f"ds_blockwise.hosts.deepspeed.{name}" for name in modules)
    code = f"import sys, {imports}; print('deepspeed' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
