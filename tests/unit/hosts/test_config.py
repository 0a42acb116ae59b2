# SPDX-License-Identifier: Apache-2.0
"""What DeepSpeed reads in a JSON, asked of the installed version, against the records that serve without it."""

from __future__ import annotations

import copy

import pytest

pytest.importorskip("deepspeed", reason="asks the installed DeepSpeed what it reads")

from deepspeed.runtime import constants, lr_schedules
from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS, DeepSpeedConfig

from ds_blockwise.hosts.deepspeed.config.check import (
    OPTIMIZERS_OF_DEEPSPEED,
    SCHEDULES_OF_DEEPSPEED,
    TOP_LEVEL_KEYS,
    json_mistakes,
)
from ds_blockwise.hosts.deepspeed.config.models import MODELS, known_keys, mistakes, unread


def test_the_records_are_of_the_installed_deepspeed() -> None:
    """A new version shows here what it reads and what it no longer reads."""
    assert sorted(known_keys()[""]) == TOP_LEVEL_KEYS
    assert sorted(DEEPSPEED_OPTIMIZERS) == sorted(OPTIMIZERS_OF_DEEPSPEED)
    assert sorted(lr_schedules.VALID_LR_SCHEDULES) == sorted(SCHEDULES_OF_DEEPSPEED)


def test_keys_of_sections_without_a_model() -> None:
    """Found by the way in which DeepSpeed asks for them: `get`, `in`, `in keys()`, item by item."""
    keys = known_keys()
    assert set(keys["torch_autocast"]) == {"enabled", "dtype", "lower_precision_safe_modules"}
    assert set(keys["checkpoint.parallel_write"]) == {"pipeline_stage"}
    assert {"tag_validation", "load_universal", "use_node_local_storage"} < set(keys["checkpoint"])
    assert {"partition_activations", "cpu_checkpointing"} < set(keys["activation_checkpointing"])
    assert set(keys["scheduler"]) == {"type", "params"}
    assert {name.partition(".")[0] for name in MODELS} <= set(keys[""])


def test_the_schema_that_editors_read_is_no_mistake() -> None:
    """At the top of the file only; DeepSpeed never asks for it."""
    schema = {"$schema": "schema/deepspeed.json"}
    config = {**schema, "train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "BlockwiseAdamMini", "params": {}}}
    assert json_mistakes(config) == []
    assert list(unread(config)) == []
    assert DeepSpeedConfig(copy.deepcopy(config)).optimizer_name == "BlockwiseAdamMini"
    assert [mistake.key for mistake in json_mistakes({"zero_optimization": schema})] == ["zero_optimization.$schema"]
    assert [mistake.key for mistake in json_mistakes({"optimizer": {"type": "Adam", **schema}})] == [
        "optimizer.$schema"
    ]


def test_deepspeed_clips_where_the_json_says_nothing() -> None:
    """What the docs and `ds-blockwise check` say."""
    assert constants.GRADIENT_CLIPPING_DEFAULT == 1.0 == known_keys()[""]["gradient_clipping"]


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "5e8"}}, "zero_optimization.reduce_bucket_size"),
        ({"zero_optimization": {"offload_optimizer": {"device": "gpu"}}}, "zero_optimization.offload_optimizer.device"),
        ({"zero_optimization": {"offload_optimizer": {"devic": "cpu"}}}, "zero_optimization.offload_optimizer.devic"),
        ({"zero_optimization": {"offload_optimizer": "cpu"}}, "zero_optimization.offload_optimizer"),
        ({"fp16": {"loss_scale": float("nan")}}, "fp16.loss_scale"),
        ({"timers": {"throughput": {"enabled": "no"}}}, "timers.throughput.enabled"),
        ({"data_types": {"grad_accum_dtype": "fp33"}}, "data_types.grad_accum_dtype"),
        ({"checkpoint": {"tag_validation": 5}}, "checkpoint.tag_validation"),
        ({"steps_per_print": "ten"}, "steps_per_print"),
        ({"communication_data_type": "fp64"}, "(whole)"),
    ],
)
def test_what_deepspeed_takes_or_fails_on_late(config: dict[str, object], key: str) -> None:
    assert [mistake.key for mistake in mistakes(config)] == [key]


def test_what_is_right_stays_right() -> None:
    config = {
        "zero_optimization": {"stage": 3, "reduce_bucket_size": 5e8, "stage3_max_live_parameters": 1e9},
        "optimizer": {"type": "adamw", "params": {"lr": 1, "betas": [0, 0.5], "torch_adam": True}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": [1e-3, 1e-4]}},
        "fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 8},
        "checkpoint": {"tag_validation": "Fail", "load_universal": False},
        "communication_data_type": "fp32",
        "steps_per_print": 10,
    }
    assert json_mistakes(config) == []
    assert json_mistakes({"train_batch_size": "auto", "fp16": {"enabled": "auto"}}, may_be_auto=True) == []
    assert [m.key for m in json_mistakes({"train_batch_size": "auto"})] == ["train_batch_size"]


def test_keys_without_an_effect() -> None:
    """What an engine warns of: a program may keep keys of its own in the JSON."""
    config = {
        "gradient_cliping": 0.5,
        "optimizer": {"type": "x", "params": {"anything": 1}, "parms": {}},
        "bf16": {"enabled": True},
        "checkpoint": {"parallel_write": {"pipeline_stages": True}},
    }
    found = {mistake.key: mistake.remedy for mistake in unread(config)}
    assert found == {
        "gradient_cliping": "did you mean 'gradient_clipping'?",
        "optimizer.parms": "did you mean 'params'?",
        "checkpoint.parallel_write.pipeline_stages": "did you mean 'pipeline_stage'?",
    }


def test_the_json_stays_as_it_is() -> None:
    """DeepSpeed writes defaults into the sections that it is given; ours go into a run's record."""
    config = {"data_efficiency": {"data_sampling": {}}, "zero_optimization": {"stage": 1}}
    before = copy.deepcopy(config)
    assert json_mistakes(config) == []
    assert config == before


def test_our_own_key_of_checkpoints_is_known() -> None:
    """The error of a load says to write it."""
    assert mistakes({"checkpoint": {"trust": True}}) == []
    (found,) = mistakes({"checkpoint": {"trust": "yes"}})
    assert "checkpoint.trust" in str(found)
    assert mistakes({"checkpoint": {"verify": "own"}}) == []
    (found,) = mistakes({"checkpoint": {"verify": "none"}})
    assert "checkpoint.verify" in str(found) and "one of all, own, size" in str(found)
    (found,) = mistakes({"checkpoint": {"trusted": True}})
    assert "trust" in str(found)
