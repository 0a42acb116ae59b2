# SPDX-License-Identifier: Apache-2.0
"""What a comparison trains: optimizers, learning rates, seeds and lengths, as data.

A trial is one complete run with its own decay to the minimum learning rate; its name says everything that differs, so
finished trials are found again and never trained twice.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ds_blockwise.blocks.settings.defaults import ADAMW_RATE
from ds_blockwise.runs.model_shape import GPTShape

WARMUP_SHARE = 0.05
MIN_LR_SHARE = 0.05  # the paper's: every block decays to one twentieth of the base learning rate
COMMON = {"betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}
UNIFORM = {"lr_multipliers": {"emb": 1, "head": 1, "qk": 1, "ffn": 1, "vo": 1, "norm": 1, "other": 1}}
PAPER = {"preset": "paper"}  # the unit of the blockwise arms' rates: that of the norms
# said in full, so that a result never changes its meaning with the package's defaults
PUBLISHED_CUTS = {"norm": "tensor"}  # Adam-mini's own partition
OUR_CUTS = {"norm": "element"}


@dataclass(frozen=True)
class Arm:
    """One optimizer with its settings, and the learning rates to sweep.

    Attributes:
        label: For tables and figures.
        type: DeepSpeed's name of the optimizer.
        params: Its parameters but the learning rate.
        grid: Base learning rates, ascending by factors of 2.
        is_blockwise: Whether the multipliers are the paper's, and the rates in the unit of its norms.
        are_roles_apart: Whether Muon's companion is told where the roles of fused weights lie.
    """

    label: str
    type: str
    params: Mapping[str, Any]
    grid: tuple[float, ...]
    is_blockwise: bool = False
    are_roles_apart: bool = False

    def adamw_rate(self, lr: float) -> float:
        """A base learning rate in the unit of AdamW's, for tables and figures."""
        return ADAMW_RATE * lr if self.is_blockwise else lr


_HIGH = (2e-3, 4e-3, 8e-3, 1.6e-2)
_LOW = (2.5e-4, 5e-4, 1e-3, 2e-3)
ARMS = {
    "adamw": Arm("AdamW (torch)", "AdamW", {"torch_adam": True}, _HIGH),
    "blockwise_adamw": Arm("Blockwise AdamW", "BlockwiseAdamW", {}, _LOW, is_blockwise=True),
    "adam_mini": Arm(
        "Adam-mini (published partition)", "BlockwiseAdamMini", {**UNIFORM, "granularity": PUBLISHED_CUTS}, _HIGH
    ),
    "blockwise_adam_mini": Arm(
        "Blockwise Adam-mini", "BlockwiseAdamMini", {"granularity": OUR_CUTS}, _LOW, is_blockwise=True
    ),
    "muon": Arm("Muon + AdamW (torch), fused weights whole", "MuonAndAdamW", {}, _HIGH),
    "adamw_8bit": Arm("8-bit AdamW (torchao)", "AdamW8bit", {}, _HIGH),
}
_HIDDEN = ("query", "key", "value")
_ROLES, _HEADS = ({"orthogonalize": dict.fromkeys(_HIDDEN, how)} for how in ("role", "head"))
_AUXILIARY = {"emb": 3, "norm": 3}  # what public recipes give them, in the unit of the matrices' rate
_TWICE_THAT = {"emb": 6, "norm": 6}
_EQUAL, _THREE_TIMES, _SIX_TIMES = (
    {"lr_multipliers": {"preset": "uniform", **rates}} for rates in ({}, _AUXILIARY, _TWICE_THAT)
)


def _muon(label: str, **params: Any) -> Arm:
    return Arm(f"Blockwise Muon{label}", "BlockwiseMuon", params, _HIGH)


def _muon_and_adamw(label: str, ratios: Mapping[str, float] | None = None) -> Arm:
    """The roles of fused weights apart: as anyone has it whose model has separate weights for them."""
    params = {} if ratios is None else {"ratios": ratios}
    return Arm(f"Muon + AdamW (torch){label}", "MuonAndAdamW", params, _HIGH, are_roles_apart=True)


ARMS |= {
    "blockwise_muon_heads_3x": _muon("", **_THREE_TIMES, **_HEADS),
    "muon_roles_3x": _muon_and_adamw(", embedding and norms at 3x", _AUXILIARY),
    "blockwise_muon_heads_3x_no_rows": _muon(", no second moment of rows", **_THREE_TIMES, **_HEADS, normuon=False),
    "blockwise_muon_heads_6x": _muon(", embedding and norms at 6x", **_SIX_TIMES, **_HEADS),
    "blockwise_muon_heads": _muon(", embedding and norms at 1x", **_EQUAL, **_HEADS),
    "blockwise_muon_3x": _muon(", heads of a role together", **_THREE_TIMES, **_ROLES),
    "blockwise_muon": _muon(", heads of a role together, embedding and norms at 1x", **_EQUAL, **_ROLES),
    "muon_roles_6x": _muon_and_adamw(", embedding and norms at 6x", _TWICE_THAT),
    "muon_roles": _muon_and_adamw(""),
}
# beside a matrix of SOAP's preconditioner a larger side than this would cost more than the model's step: the
# embedding and the output layer are preconditioned on one side, as in its paper (arXiv 2409.11321, section 4)
_SOAP = {"betas": [0.95, 0.95], "precondition_frequency": 10, "max_precondition_dim": 1024}
# a rate for Lion is 3 to 10 times below AdamW's, its decay as much above (arXiv 2302.06675, section 5)
_LION = {"betas": [0.9, 0.99], "weight_decay": 0.5}
ARMS |= {
    "blockwise_adamw_tuned": Arm(
        "Blockwise AdamW, preset tuned", "BlockwiseAdamW", {"lr_multipliers": {"preset": "tuned"}}, _HIGH
    ),
    "blockwise_lion": Arm(
        "Blockwise Lion", "BlockwiseLion", {**_LION, "lr_multipliers": {"preset": "adamw_scale"}}, _LOW
    ),
    "lion": Arm("Lion (all multipliers 1)", "BlockwiseLion", {**_LION, **UNIFORM}, _LOW),
    "soap": Arm("SOAP (pytorch-optimizer)", "SOAP", _SOAP, _HIGH),
}
COMPARED = (
    "adamw",
    "blockwise_adamw",
    "adam_mini",
    "blockwise_adam_mini",
    "muon",
    "adamw_8bit",
    "muon_roles_3x",
    "blockwise_muon_heads_3x",
)
"""By `make compare`; the rest by questions/half_steps.py and more_arms.py."""
BASELINE = "adamw"


@dataclass(frozen=True)
class Trial:
    """One run.

    Attributes:
        arm: Key of `ARMS`.
        lr: Base learning rate.
        seed: Of weights and data order.
        steps: Length, with a complete decay.
        change: Name of an ablation's change; empty for the arm as it is.
        params: What the change sets in the optimizer's parameters.
        scheduler: What it sets in the scheduler's section, whole.
        warmup: Share of the steps, if not the usual.
    """

    arm: str
    lr: float
    seed: int
    steps: int
    change: str = ""
    params: Mapping[str, Any] = field(default_factory=dict, hash=False)
    scheduler: Mapping[str, Any] | None = field(default=None, hash=False)
    warmup: float = WARMUP_SHARE

    @property
    def name(self) -> str:
        """Folder of its results; no other trial's."""
        change = f"_{self.change}" if self.change else ""
        warmup = "" if self.warmup == WARMUP_SHARE else f"_warmup{self.warmup:g}"
        return f"{self.arm}{change}_lr{self.lr:g}_steps{self.steps}{warmup}_seed{self.seed}"

    def settings(self, shape: GPTShape, *, bf16: bool = False) -> dict[str, Any]:
        """The DeepSpeed JSON.

        Args:
            shape: Of the model, by which Muon's companion knows its parameters.
            bf16: Whether weights and gradients are in bf16, with fp32 master weights.
        """
        arm = ARMS[self.arm]
        params = {**copy.deepcopy(COMMON), **copy.deepcopy(dict(arm.params)), **copy.deepcopy(dict(self.params))}
        if arm.is_blockwise:
            params["lr_multipliers"] = PAPER | params.get("lr_multipliers", {})
        if arm.type == "MuonAndAdamW":
            params["vocab_size"] = shape.vocab_size
        if arm.are_roles_apart:
            params["heads"] = [shape.num_heads, shape.num_kv_heads, shape.head_dim]
            params["ffn_rows"] = shape.ffn_hidden_size
        scheduler = self.scheduler or {"type": "BlockwiseCosineLR", "params": {"min_lr": MIN_LR_SHARE * self.lr}}
        precision: dict[str, Any] = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}
        if arm.type == "MuonAndAdamW":  # DeepSpeed knows AdamW and ours
            precision["zero_allow_untested_optimizer"] = True
        return {
            "optimizer": {"type": arm.type, "params": {"lr": self.lr, **params}},
            "scheduler": copy.deepcopy(dict(scheduler)),
            "gradient_clipping": 1.0,
            "csv_monitor": {"enabled": True},
            **(precision if bf16 else {"zero_optimization": {"stage": 0}}),
        }


@dataclass(frozen=True)
class Plan:
    """How much is trained.

    Attributes:
        steps: Of a whole run.
        grid: How many learning rates of each arm's grid, from its middle.
        seeds: Of the best learning rate of each arm, the sweep's included.
        lengths: Shares of the steps at which arms are trained again with complete decays.
        widen: How often a grid may grow at an edge that turned out best.
        refine: How often the best is then compared with a rate between it and its better neighbour.
        ablations: Names of their changes, or all.
        arms: Keys of `ARMS`.
        shift: Factor on the grids; a wider model's best rates are lower.
        bf16: Whether the model is trained in bf16 with fp32 master weights, instead of fp32.
        warmup: Share of the steps.
    """

    steps: int
    grid: int
    seeds: int
    lengths: tuple[float, ...]
    widen: int
    refine: int
    ablations: tuple[str, ...] | Literal["all"]
    arms: tuple[str, ...] = COMPARED
    shift: float = 1.0
    bf16: bool = False
    warmup: float = WARMUP_SHARE

    def plain(self, arm: str, lr: float, seed: int) -> Trial:
        """A whole run of an arm as it is."""
        return Trial(arm, lr, seed, self.steps, warmup=self.warmup)

    def learning_rates(self, arm: str) -> tuple[float, ...]:
        """The arm's grid; a shorter one loses its ends, the upper one first."""
        grid = ARMS[arm].grid
        surplus = len(grid) - self.grid
        return tuple(self.shift * lr for lr in grid[surplus // 2 : len(grid) - (surplus + 1) // 2])


FULL = Plan(steps=800, grid=3, seeds=3, lengths=(0.5, 0.75), widen=2, refine=1, ablations="all")
# without what is slowest, and what only a model with fused weights has
_QUICK_ARMS = tuple(arm for arm in COMPARED if arm not in ("adamw_8bit", "muon"))
QUICK = Plan(steps=200, grid=3, seeds=2, lengths=(), widen=0, refine=0, ablations=(), arms=_QUICK_ARMS)
_CLAIM = ("adamw", "blockwise_adamw", "blockwise_adam_mini")
# with a short warm-up AdamW cannot bear the rates that would be best for it
PATIENT = replace(FULL, lengths=(0.75,), ablations=("wsd", "uniform-norm"), arms=_CLAIM, shift=2.0, warmup=0.2)
# the claim alone, where our default cuts second moments, and what helped the small model most; about an hour
LARGER = replace(PATIENT, ablations=("published-cuts", "uniform-norm", "wsd"), shift=1.0, bf16=True)
# is AdamW's final loss had in half of its steps? Every arm has as many rates as AdamW
HALF = Plan(
    steps=FULL.steps // 2,
    grid=3,
    seeds=5,
    lengths=(),
    widen=1,
    refine=1,
    ablations=(),
    arms=(
        "blockwise_muon",
        "blockwise_muon_3x",
        "blockwise_muon_heads",
        "blockwise_muon_heads_3x",
        "blockwise_muon_heads_6x",
        "muon_roles",
        "muon_roles_3x",
        "muon_roles_6x",
        "blockwise_muon_heads_3x_no_rows",
    ),
    shift=2.0,
    warmup=0.2,
)
# what was best there of ours and of the peers, each with a sweep of its own
HALF_5M = replace(HALF, arms=("blockwise_muon_heads_3x", "muon_roles_3x"), shift=1.0, bf16=True)
# as long as AdamW's runs; grids are AdamW's and Lion's own
MORE = replace(
    HALF, steps=FULL.steps, seeds=4, arms=("blockwise_lion", "lion", "soap", "blockwise_adamw_tuned"), shift=1.0
)
# by the name of the run file; what is in the repository's pages
PUBLISHED_PLANS = {"compare": FULL, "compare_warmup": PATIENT, "compare_5m": LARGER}


@dataclass(frozen=True)
class Setup:
    """What all trials of one comparison share.

    Attributes:
        shape: Of the model.
        data: `metadata.json` of the prepared text.
        bf16: As `Plan.bf16`.
    """

    shape: GPTShape
    data: Mapping[str, Any]
    bf16: bool

    def settings(self, trial: Trial) -> dict[str, Any]:
        """The trial's DeepSpeed JSON."""
        return trial.settings(self.shape, bf16=self.bf16)

    def digest(self, trial: Trial) -> str:
        """What decides a trial's result, as text: a finished trial is used again only if this is unchanged."""
        settings = self.settings(trial)
        params = settings["optimizer"]["params"]
        if ARMS[trial.arm].is_blockwise:
            # the published runs are from before there were presets: the paper's numbers were the default, and unnamed
            named = {key: value for key, value in params.pop("lr_multipliers").items() if PAPER.get(key) != value}
            params |= {"lr_multipliers": named} if named else {}
        if params.get("orthogonalize") == _ROLES["orthogonalize"]:  # likewise the default of the published runs
            del params["orthogonalize"]
        facts = {
            "settings": settings,
            "seed": trial.seed,
            "steps": trial.steps,
            "warmup": trial.warmup,
            "data": [self.data["tokenizer"]["sha256"], self.data["splits"]],
        }
        return json.dumps(facts, sort_keys=True)

    def fingerprint(self, trial: Trial) -> str:
        """The same for files that go elsewhere: a result with this fingerprint is that of this trial on any machine."""
        return fingerprint(self.digest(trial))


def fingerprint(digest: str) -> str:
    """A digest in 12 characters."""
    return hashlib.sha256(digest.encode()).hexdigest()[:12]
