# SPDX-License-Identifier: Apache-2.0
"""What `megatron_patch.convert_` refuses: on every rank, with the name of the setting, and changing nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers.distributed import Outcome, RankContext, passes
from tests.helpers.megatron.stack import Run, Stack, open_stack, stack_shims
from tests.helpers.optimizers import ALL_NAMES

pytestmark = pytest.mark.skipif(find_spec("megatron") is None, reason="needs megatron")

Spoil = Callable[[Run, dict[str, Any]], None]


@dataclass(frozen=True)
class Case:
    """One way to spoil a conversion, on the last rank only unless ``everywhere``."""

    spoil: str
    error: str  # name of the class on the spoilt rank; elsewhere it is ValueError
    words: tuple[str, ...]
    everywhere: bool = False
    kind: str = "BlockwiseAdamMini"
    stack: Stack = field(default_factory=lambda: Stack(stock=True))


def run_case(context: RankContext, case: Case) -> None:
    """Entry of every rank."""
    stack_shims()
    with open_stack(case.stack) as run:
        arguments: dict[str, Any] = {"optimizer": run.optimizer, "model_chunks": [run.chunk], "kind": case.kind}
        spoilt = case.everywhere or context.rank == context.world_size - 1
        if spoilt:
            SPOILS[case.spoil](run, arguments)
        wrapper, inner, kind = run.wrapper, run.wrapper.optimizer, type(run.wrapper)
        error = _error_of(arguments)
        assert error is not None, "it was converted"
        assert type(error).__name__ == (case.error if spoilt else "ValueError"), repr(error)
        for word in case.words:
            assert word in str(error), f"{word!r} is not in: {error}"
        assert wrapper.optimizer is inner, "half converted"
        assert type(wrapper) is kind


def _error_of(arguments: dict[str, Any]) -> Exception | None:
    from megatron_patch import convert_

    try:
        convert_(**arguments)
    except Exception as error:  # the test looks at every error
        return error
    return None


# ---------------------------------------------------------------------------------- the ways


def _setting(name: str, value: Any) -> Spoil:
    return lambda run, arguments: setattr(run.wrapper.config, name, value)


def _argument(name: str, value: Any) -> Spoil:
    return lambda run, arguments: arguments.update({name: value})


def _fused(*more: Spoil, kind: str = "BlockwiseAdamMini", **settings: Any) -> Spoil:
    """Ask for the fused step, of a run that has ``settings`` or was changed by ``more``."""

    def spoil(run: Run, arguments: dict[str, Any]) -> None:
        arguments.update(fused_step=True, kind=kind)
        for name, value in settings.items():
            setattr(run.wrapper.config, name, value)
        for change in more:
            change(run, arguments)

    return spoil


def _fp8_weights(run: Run, arguments: dict[str, Any]) -> None:
    class Float8(nn.Parameter):
        """Stands for a class of Transformer Engine's."""

    next(iter(run.wrapper.buffers[0].param_index_map)).__class__ = Float8


def _other_norm(run: Run, arguments: dict[str, Any]) -> None:
    next(iter(run.wrapper.buffers[0].param_index_map)).grad_norm_group = "mtp"


def _two_instances(run: Run, arguments: dict[str, Any]) -> None:
    run.wrapper.ddp_config = replace(run.wrapper.ddp_config, num_distributed_optimizer_instances=2)


def _double_gradients(run: Run, arguments: dict[str, Any]) -> None:
    run.wrapper.buffers[0].grad_dtype = torch.float64


def _fsdp(run: Run, arguments: dict[str, Any]) -> None:
    run.wrapper.ddp_config = replace(run.wrapper.ddp_config, use_megatron_fsdp=True)
    del run.wrapper.buffers  # upstream makes none


def _unknown_class(run: Run, arguments: dict[str, Any]) -> None:
    arguments["optimizer"] = SimpleNamespace(optimizer=run.wrapper.optimizer)


def _twice(run: Run, arguments: dict[str, Any]) -> None:
    run.convert()


def _stepped(run: Run, arguments: dict[str, Any]) -> None:
    (param,) = [t for g in run.wrapper.optimizer.param_groups for t in g["params"]][:1]
    run.wrapper.optimizer.state[param]["exp_avg"] = torch.zeros_like(param)


def _other_inner(run: Run, arguments: dict[str, Any]) -> None:
    run.wrapper.optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)


def _other_version(run: Run, arguments: dict[str, Any]) -> None:
    del run.wrapper.model_float16_groups


def _wrapped(run: Run, arguments: dict[str, Any]) -> None:
    class Stranger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = run.chunk

    arguments["model_chunks"] = [Stranger()]


def _unknown_parameter(run: Run, arguments: dict[str, Any]) -> None:
    run.model.strange = nn.Linear(2, 2)


def _other_shards(run: Run, arguments: dict[str, Any]) -> None:
    buffer = run.wrapper.buffers[0]
    for param, (start, end, bucket) in buffer.param_index_map.items():
        buffer.param_index_map[param] = (start + 64, end + 64, bucket)


def _other_copy(run: Run, arguments: dict[str, Any]) -> None:
    from ds_blockwise import tag_parameters

    tag_parameters(run.model, lr_multipliers={"emb": 4})


SPOILS: dict[str, Spoil] = {
    "precision_aware": _setting("use_precision_aware_optimizer", True),
    "cpu_offload": _setting("optimizer_cpu_offload", True),
    "l2": _setting("decoupled_weight_decay", False),
    "sgd": _setting("optimizer", "sgd"),
    "fsdp": _fsdp,
    "other_copy": _other_copy,
    "unknown_class": _unknown_class,
    "twice": _twice,
    "stepped": _stepped,
    "other_inner": _other_inner,
    "other_version": _other_version,
    "wrapped": _wrapped,
    "unknown_parameter": _unknown_parameter,
    "other_shards": _other_shards,
    "kind": _argument("kind", "BlockwiseAdamMinni"),
    "multiplier": _argument("lr_multipliers", {"emd": 3}),
    "foreign_setting": _argument("momentum", 0.9),
    "own_rate": _argument("lr", 1e-3),
    "own_format": _argument("checkpoint_format", "compact"),
    "fused_lion": _fused(kind="BlockwiseLion"),
    "fused_plain": _fused(),
    "fused_sent": _fused(overlap_param_gather_with_optimizer_step=True),
    "fused_graph": _fused(optimizer_cuda_graph=True),
    "fused_mxfp8": _fused(reuse_grad_buf_for_mxfp8_param_ag=True),
    "fused_fp8": _fused(_fp8_weights),
    "fused_other_norm": _fused(_other_norm),
    "fused_gradients": _fused(_double_gradients),
    "fused_instances": _fused(_two_instances),
    "unused_rule": _argument("rules", [{"match": "no such layer", "role": "ffn"}]),
    "disagree": _argument("lr_multipliers", {"ffn": 5}),
}

WITH_ANY: dict[str, tuple[str, ...]] = {
    "precision_aware": ("use_precision_aware_optimizer=True", "False"),
    "cpu_offload": ("optimizer_cpu_offload=True", "Set it to False"),
    "fsdp": ("use_megatron_fsdp", "use_distributed_optimizer"),
}

CASES: dict[str, tuple[int, Case]] = {
    **{
        f"{spoil}-{short}": (2, Case(spoil, "ValueError", words, kind=kind))
        for spoil, words in WITH_ANY.items()
        for kind, short in ALL_NAMES.items()
    },
    "l2": (2, Case("l2", "ValueError", ("decoupled_weight_decay=False", "Set it to True"))),
    "sgd": (2, Case("sgd", "ValueError", ("optimizer='sgd'", "--optimizer adam"))),
    "unknown_class": (2, Case("unknown_class", "TypeError", ("SimpleNamespace", "DistributedOptimizer"))),
    "twice": (2, Case("twice", "TypeError", ("cannot convert a BlockwiseDistributedOptimizer", "once"), True)),
    "stepped": (2, Case("stepped", "ValueError", ("already holds optimizer state", "right after"))),
    "other_inner": (2, Case("other_inner", "ValueError", ("SGD", "AdamW"))),
    "other_version": (2, Case("other_version", "ImportError", ("model_float16_groups", ">=0.16,<0.20"))),
    "wrapped": (2, Case("wrapped", "ValueError", ("Stranger", "DistributedDataParallel"))),
    "unknown_parameter": (2, Case("unknown_parameter", "ValueError", ("strange.weight", "rules"))),
    "other_shards": (2, Case("other_shards", "ValueError", ("where its buffers say", ">=0.16,<0.20"))),
    "kind": (2, Case("kind", "ValueError", ("BlockwiseAdamMinni", "did you mean 'BlockwiseAdamMini'"))),
    "multiplier": (2, Case("multiplier", "ValueError", ("emd", "emb"))),
    "foreign_setting": (2, Case("foreign_setting", "ValueError", ("BlockwiseAdamMini got an unknown key 'momentum'",))),
    "own_rate": (2, Case("own_rate", "ValueError", ("convert_ does not take lr", "OptimizerConfig"))),
    "own_format": (2, Case("own_format", "ValueError", ("convert_ does not take checkpoint_format",))),
    "fused_lion": (2, Case("fused_lion", "ValueError", ("BlockwiseLion does not support fused_step=True",))),
    "fused_plain": (
        2,
        Case(
            "fused_plain",
            "ValueError",
            ("fused_step=True with Float16OptimizerWithFloat16Params", "Set use_distributed_optimizer=True"),
            stack=Stack(stock=True, wrapper="plain", dtype="bf16"),
        ),
    ),
    "fused_layerwise": (
        2,
        Case(
            "fused_plain",
            "ValueError",
            ("fused_step=True with FP32Optimizer", "without layer-wise optimizers"),
            stack=Stack(stock=True, wrapper="layerwise"),
        ),
    ),
    "fused_sent": (
        2,
        Case("fused_sent", "ValueError", ("with overlap_param_gather_with_optimizer_step=True", "to False")),
    ),
    "fused_graph": (2, Case("fused_graph", "ValueError", ("optimizer_cuda_graph=True", "clipping factor"))),
    "fused_mxfp8": (2, Case("fused_mxfp8", "ValueError", ("reuse_grad_buf_for_mxfp8_param_ag=True", "FP8"))),
    "fused_fp8": (2, Case("fused_fp8", "ValueError", ("with a Float8 among the parameters", "Leave fused_step out"))),
    "fused_other_norm": (2, Case("fused_other_norm", "ValueError", ("grad_norm_group='mtp'", "another norm"))),
    "fused_gradients": (2, Case("fused_gradients", "ValueError", ("gradients in torch.float64", "fp32 and bf16"))),
    "fused_instances": (
        2,
        Case("fused_instances", "ValueError", ("num_distributed_optimizer_instances=2", "Set it to 1")),
    ),
    "unused_rule": (2, Case("unused_rule", "ValueError", ("no such layer", "any pipeline stage"), True)),
    "other_copy": (
        2,
        Case(
            "other_copy",
            "ValueError",
            ("tied weight 'embedding.word_embeddings.weight'", "lr x1.25", "'output_layer.weight' as embedding (lr x4"),
            stack=Stack(stock=True, pp=2, tied=True),
        ),
    ),
    "disagree-data": (2, Case("disagree", "ValueError", ("data-parallel ranks [1]", "settings"))),
    "disagree-tensor": (
        2,
        Case("disagree", "ValueError", ("tensor-parallel ranks [1]", "settings"), stack=Stack(stock=True, tp=2)),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_refused_on_every_rank(outcome: Outcome, name: str) -> None:
    """A run would train with another optimizer than it says, or hang because one rank stopped."""
    passes(outcome, name)
