# SPDX-License-Identifier: Apache-2.0
"""What the engine parity tests can vary, and how a case becomes a model, a JSON and an oracle."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import models
from tests.helpers.deepspeed.engines import engine_config
from tests.helpers.muon_oracle import oracle_for
from tests.helpers.optimizers import FULL_NAME
from tests.helpers.oracle import Hyper, Oracle, told
from tests.helpers.tables.oracle_names import ROLE, Classes, gpt2_classes, hf_llama_classes, regroup

LR = 2e-2
# A constant lr would hide an lr that is read too late. Rather rising than falling: a weight that
# grew at a larger lr rounds by more than 1e-6 of a smaller one's update.
LR_FACTORS = (0.7, 1.1, 0.9, 1.4, 1.2, 1.3)
BACKENDS = ("cpp", "reference", "triton")
# Triton's kernels run in its interpreter, half a minute a case: `make test` takes these, `make test-slow` the others.
# What the kernels compute is tested without engines; here each way to hand them tensors is taken once.
QUICK = re.compile(
    r"grid-z[23]-(fp32-mini|bf16-adamw)-dp3-|nano-z1-|gpt2-z3-fp32-mini|momentum_bf16-z2-|value_tensor-z3-.*-dp3-"
    r"|fed-gqa-z1-bf16-mini-tp2-dp2-|value_tensor-gqa-|tied"
)
DECAY_MULTIPLIERS = {"norm": 0.0, "key": 0.5}
BETAS, EPS, WEIGHT_DECAY = (0.9, 0.95), 1e-6, 0.1
# Gradients that are fed in bf16 are small integers times powers of two. Lion takes a sign, so no weighted sum of a few
# of them may be 0, which arithmetic would round to either side: these are thousandths of primes above every integer.
LION_BETAS = (0.937, 0.953)


@dataclass(frozen=True)
class Case:
    """One engine, one model, a few steps; every field is something a user can configure."""

    optimizer: str = "mini"
    stage: int = 0
    dtype: str = "fp32"
    model: str = "qwen3"
    gas: int = 1
    steps: int = 4
    zero: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)
    zero_init: bool = False
    clip: float = 0.0
    poison: tuple[int, ...] = ()  # steps at which rank 1 (or 0, if alone) feeds poison_value
    poison_value: float = float("nan")
    frozen: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    groups: str = ""  # how parameters are split into two groups: a key of SECOND_GROUP
    scheduler: str = ""
    scheduler_params: dict[str, Any] = field(default_factory=dict)
    oracle_multipliers: dict[str, float] = field(default_factory=dict)  # the oracle alone
    oracle: dict[str, Any] = field(default_factory=dict)  # what only this optimizer's oracle is told
    overrides: dict[str, float] = field(default_factory=dict)  # a rule for each parameter
    decay_multipliers: bool = True
    granularity: str = ""
    end_to_end: bool = False
    backend: str = "auto"


HEAD = -2  # stands for the model's rows per head
HEAD_ROWS = {"llama": 6, "qwen3": 6, "slim": 2, "nano": 5, "gpt2": 5}
# name -> the JSON's "granularity", and the same said to the oracle
GRANULARITIES: dict[str, tuple[dict[str, str] | str, list[tuple[str, int]]]] = {
    "": ({}, []),
    "published": ("published", [("norm", ROLE)]),
    "value_tensor": ({"value": "tensor"}, [("value", ROLE)]),
    "mixed": (
        {"bias": "tensor", "vo": "tensor", "value": "head", "query": "row", "ffn": "element", "norm": "tensor"},
        [("norm", ROLE), ("bias", ROLE), ("attn_out", ROLE), ("value", HEAD), ("query", 1), ("ffn", 0)],
    ),
}


MODELS: dict[str, tuple[Callable[[], nn.Module], Classes]] = {
    "llama": (
        models.llama,
        hf_llama_classes(
            layers=2, hidden=12, heads=2, kv_heads=1, head_dim=6, ffn=21, vocab=37
        ),
    ),
    "qwen3": (
        models.qwen3,
        hf_llama_classes(
            layers=2, hidden=15, heads=4, kv_heads=2, head_dim=6, ffn=21, vocab=37,
            biases=True, qk_norms=True,
        ),
    ),
    "slim": (
        models.slim,
        hf_llama_classes(
            layers=1, hidden=9, heads=4, kv_heads=1, head_dim=2, ffn=21, vocab=37, qk_norms=True
        ),
    ),
    "nano": (
        models.NanoGPT,
        gpt2_classes(
            layers=2, hidden=15, heads=3, ffn=61, vocab=29, positions=11, conv1d=False
        ),
    ),
    "gpt2": (
        models.gpt2_conv1d,
        gpt2_classes(
            layers=1, hidden=10, heads=2, ffn=40, vocab=23, positions=7, conv1d=True
        ),
    ),
}  # fmt: skip


def takes_long(name: str) -> bool:
    """Whether a case is left to ``make test-slow``."""
    return name.endswith("triton") and not QUICK.match(name)


def named(names: Iterable[str]) -> list[Any]:
    """Names as parameters of a test, those that take long marked so."""
    return [pytest.param(n, marks=pytest.mark.slow if takes_long(n) else ()) for n in names]


# ------------------------------------------------------------------------------------ construction


def settings_of(case: Case) -> dict[str, Any]:
    """What the case sets beside AdamW's own parameters, as the JSON and the constructor take it."""
    return {
        "lr_multipliers": case.params.get("lr_multipliers", {}),
        "weight_decay_multipliers": DECAY_MULTIPLIERS if case.decay_multipliers else {},
        "granularity": GRANULARITIES[case.granularity][0],
        "rules": [
            {"match": f"^{re.escape(name)}$", "lr_multiplier": multiplier}
            for name, multiplier in case.overrides.items()
        ],
        "transfer": case.params.get("transfer"),
        "momentum_dtype": case.params.get("momentum_dtype", "fp32"),
        "backend": case.backend,
        **{key: case.params[key] for key in ("betas_by_type", "cautious_weight_decay") if key in case.params},
    }


def config_of(case: Case) -> dict[str, Any]:
    """The DeepSpeed JSON of a case."""
    params = case.params | settings_of(case)
    extra = dict(case.config)
    if case.scheduler:
        extra["scheduler"] = {"type": case.scheduler, "params": dict(case.scheduler_params)}
    if case.clip:
        extra["gradient_clipping"] = case.clip
    return engine_config(
        FULL_NAME[case.optimizer],
        stage=case.stage,
        dtype=case.dtype,
        gas=case.gas,
        params={"lr": LR, "betas": list(betas_of(case.optimizer)), "eps": EPS, "weight_decay": WEIGHT_DECAY} | params,
        zero=dict(case.zero),
        **extra,
    )


def build(case: Case, config: dict[str, Any]) -> nn.Module:
    """The case's model with small weights; inside zero.Init if the case says so."""
    make, _ = MODELS[case.model]
    if case.zero_init:
        import deepspeed
        from torch import _dynamo  # noqa: F401 - cannot be imported while zero.Init replaces tensor constructors

        with deepspeed.zero.Init(config_dict_or_path=config):
            model = make()
        for name, parameter in model.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
                parameter.copy_(models.small_weight(name, parameter.ds_shape))
    elif case.end_to_end:
        torch.manual_seed(7)
        model = make()
    else:
        model = models.set_small_weights(make())
    for name, parameter in model.named_parameters():
        if any(part in name for part in case.frozen):
            parameter.requires_grad_(False)
    return model


GROUP_2 = {"lr": 0.3 * LR, "weight_decay": 0.02, "betas": (0.8, 0.9), "eps": 1e-5}
SECOND_GROUP: dict[str, Callable[[str], bool]] = {
    "": lambda name: False,
    # leaves both groups with several kinds of weights
    "mixed": lambda name: "norm" in name or "v_proj" in name or name.endswith("bias"),
    # the embedding, which is the output layer too: its second use is in no group
    "tied": lambda name: name.endswith("wte.weight"),
    # a group of one vector, of which some ranks hold nothing
    "vector": lambda name: name.endswith("layers.0.self_attn.q_norm.weight"),
}


def groups_of(case: Case) -> Callable[[nn.Module], list[dict[str, Any]]] | None:
    """Splits a model's parameters into the case's groups; None for a single one."""
    if not case.groups:
        return None

    def split(model: nn.Module) -> list[dict[str, Any]]:
        parts: tuple[list[nn.Parameter], ...] = ([], [])
        for name, parameter in model.named_parameters():
            parts[SECOND_GROUP[case.groups](name)].append(parameter)
        return [{"params": parts[0]}, {"params": parts[1]} | GROUP_2]

    return split


def betas_of(optimizer: str) -> tuple[float, float]:
    """Betas with which an optimizer, by its short name, is compared with the oracle on planned gradients."""
    return LION_BETAS if optimizer == "lion" else BETAS


def hyper_of(case: Case, names: list[str]) -> dict[str, Hyper]:
    """The groups' settings by parameter name."""
    betas = tuple(case.params.get("betas", betas_of(case.optimizer)))
    first = Hyper(LR, betas, case.params.get("eps", EPS), WEIGHT_DECAY)
    second = Hyper(GROUP_2["lr"], GROUP_2["betas"], GROUP_2["eps"], GROUP_2["weight_decay"])
    return {n: second if SECOND_GROUP[case.groups](n) else first for n in names}


def oracle_of(case: Case, weights: dict[str, Tensor], hyper: dict[str, Hyper]) -> Oracle:
    """The oracle that starts from ``weights`` with the case's settings."""
    classes = MODELS[case.model][1]
    for role, size in GRANULARITIES[case.granularity][1]:
        classes = regroup(classes, role, HEAD_ROWS[case.model] if size == HEAD else size)
    return oracle_for(
        case.optimizer,
        weights,
        classes,
        hyper,
        **told(case.params, case.oracle_multipliers),
        weight_decay_multipliers=DECAY_MULTIPLIERS if case.decay_multipliers else {},
        overrides=case.overrides,
        momentum=torch.bfloat16 if case.params.get("momentum_dtype") == "bf16" else None,
        **case.oracle,
    )


def whole_tensor_reference(case: Case, start: dict[str, Tensor]) -> SimpleNamespace:
    """Our own optimizer on whole fp32 tensors in this process: only the cut differs from the engine."""
    from ds_blockwise import tag_parameters
    from ds_blockwise.optimizers.registry import OPTIMIZERS

    model = MODELS[case.model][0]()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in start:
                parameter.copy_(start[name])
            parameter.requires_grad_(name in start)
    tag_parameters(model)
    split = groups_of(case)
    chosen = split(model) if split else [p for p in model.parameters() if p.requires_grad]
    hyper = {"lr": LR, "betas": betas_of(case.optimizer), "eps": EPS, "weight_decay": WEIGHT_DECAY}
    of_engine = (*hyper, "fused_step")  # nobody but an engine hands over gradients for that
    settings = {key: value for key, value in case.params.items() if key not in of_engine} | settings_of(case)
    optimizer = OPTIMIZERS[FULL_NAME[case.optimizer]](chosen, **hyper, **settings)
    return SimpleNamespace(optimizer=optimizer, named=dict(model.named_parameters()))
