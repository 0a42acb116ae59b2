# SPDX-License-Identifier: Apache-2.0
"""Blockwise Muon: hidden matrices orthogonalised per role or head, Blockwise Adam-mini for the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch.optim.optimizer import ParamsT

from ds_blockwise.blocks.settings.block_settings import PRESET, BlockSettings
from ds_blockwise.blocks.settings.defaults import DEFAULT_PRESET, LR_PRESETS, MUON_PRESET
from ds_blockwise.checkpoint.record_types import SecondMomentOf
from ds_blockwise.kernels.base import Item, Kernels
from ds_blockwise.kernels.bindings import Binding, Work
from ds_blockwise.kernels.newton_schulz import (
    COEFFICIENTS,
    NEWTON_SCHULZ_DTYPES,
    SCALES,
    newton_schulz,
    normalized_rows,
)
from ds_blockwise.optimizers.base import BlockwiseOptimizer
from ds_blockwise.optimizers.exchange import Exchange, settle_loaded_second_moments, sum_split_blocks
from ds_blockwise.optimizers.muon.buckets import Plan
from ds_blockwise.optimizers.muon.elements import Elements
from ds_blockwise.optimizers.muon.plan import make_plan
from ds_blockwise.optimizers.muon.rounds import step_matrices_
from ds_blockwise.optimizers.settings import CheckpointFormat, MomentumDtype, check_switch
from ds_blockwise.values import as_count, number, one_of

BUCKET_BYTES = 1 << 28
"""Default of ``bucket_bytes``."""

_EPS = 1e-8  # added to the roots of rows' second moments


class BlockwiseMuon(BlockwiseOptimizer):
    """Muon per role or head of the hidden matrices, Blockwise Adam-mini on the rest: about 4 state bytes a parameter.

    For a matrix of m rows (outputs) and n columns with multiplier r, with ``lr_b = r * lr``:

        M  = momentum * M + (1 - momentum) * g
        O  = NewtonSchulz((1 - momentum) * g + momentum * M)      (of M itself without nesterov)
        v  = normuon_beta2 * v + (1 - normuon_beta2) * mean of each row's squares of O
        P  = O / (sqrt(v) + 1e-8), times ||O|| / ||P||            (P = O without normuon)
        p -= lr_b * (0.2 sqrt(max(m, n)) * P + weight_decay * p)

    A matrix is what ``orthogonalize`` says: by default each head of queries, keys and values, and the rows of one role
    of any other weight (gate and up of a fused FFN are apart, and so is each expert). Orthogonalised are weights of the
    roles query, key, value, attn_out and ffn that have two dimensions. Embeddings (also tied ones), the output layer,
    norms, biases, routers, convolutions, factors of adapters and everything else are stepped by `BlockwiseAdamMini`.

    A matrix that several ranks hold is brought to one of them, multiplied there as a whole, and brought back.

    Args:
        params: parameters or param groups (each may have its own ``lr``, ``betas``, ``eps``, ``weight_decay``).
        lr: base learning rate; with ``scale="rms"`` comparable to AdamW's.
        betas: of what is stepped by Adam-mini.
        eps: of what is stepped by Adam-mini.
        weight_decay: decoupled, multiplied by the block's learning rate.
        lr_multipliers: per block type (``emb head qk ffn vo norm other``) or role, or a preset; default ``"muon"``:
            3 for ``emb`` and ``norm``, 1 for the rest. The ratios of arXiv 2502.19002 are of Adam's updates.
            ``"auto"`` is refused.
        weight_decay_multipliers: likewise; default 1.
        granularity: as for `BlockwiseAdamMini`, of what is not orthogonalised. A matrix has one value for each row.
        betas_by_type: pairs of betas per block type or role, null for the one of ``betas``, of what is stepped by
            Adam-mini; matrices have ``momentum``.
        cautious_weight_decay: decay only those elements that the update does not move away from zero (arXiv
            2510.12402, algorithm 1). Default: false.
        rules: list of ``{"match": regex, "role" | "lr_multiplier" | "orthogonalize" | ...}`` for single parameters.
        transfer: refused: its exponents are those of Adam's updates. ``scale="mup"`` moves matrices over widths.
        momentum_dtype: ``"fp32"`` or ``"bf16"``: storage of ``exp_avg``. Arithmetic is fp32 (fp64 for fp64 parameters).
        backend: see `BlockwiseAdamMini`. Of matrices ``"triton"`` does momentum and weights, torch everything else.
        checkpoint_format: see `BlockwiseAdamMini`.
        telemetry: see `BlockwiseAdamMini`; second moments are not read: those of matrices are of updates.
        fused_step: of `BlockwiseAdamW` and `BlockwiseAdamMini`; true is refused.
        orthogonalize: per block type or role ``"matrix"`` (the whole weight), ``"role"``, ``"head"`` (query, key,
            value) or ``"none"``; default ``"head"`` for query, key and value, ``"role"`` for the rest.
        momentum: decay rate of the momentum of matrices.
        nesterov: look one step ahead.
        normuon: keep a second moment per row (arXiv 2510.05491).
        normuon_beta2: its decay rate.
        scale: ``"rms"`` (0.2 sqrt(max(m, n)): a root mean square of 0.2, AdamW's), ``"keller"`` (sqrt(max(1, m/n))) or
            ``"mup"`` (sqrt(m/n)).
        coefficients: of Newton-Schulz: ``"quintic"``, ``"polar_express"`` or ``"simple"``, each of five iterations.
        newton_schulz_dtype: ``"fp32"`` or ``"bf16"``: products of Newton-Schulz, for GPUs, where those in bf16 are much
            faster. What travels, momentum and weights stay fp32.
        bucket_bytes: of matrices that a rank gets from others at a time; at least one matrix. Less of it needs less
            memory and more exchanges; results are the same.

    State on each rank: per stepped tensor ``step`` (int), ``exp_avg`` in the tensor's shape, and ``exp_avg_sq`` of
    shape ``(num_blocks,)``: a value for each row of a matrix, the mean square of its orthogonalised rows; of other
    parts as for `BlockwiseAdamMini`.

    Raises:
        ValueError, TypeError: a setting outside its range, an unknown key, a group that does not fit.

    Source: Jordan et al., Muon, 2024; NorMuon, arXiv 2510.05491; arXiv 2502.16982, section 2.2 (scale).
    """

    second_moment = "block"
    can_be_measured = False
    supports_fused_step = False
    own_settings = (
        "orthogonalize",
        "momentum",
        "nesterov",
        "normuon",
        "normuon_beta2",
        "scale",
        "coefficients",
        "newton_schulz_dtype",
        "bucket_bytes",
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        lr_multipliers: object = None,
        weight_decay_multipliers: object = None,
        granularity: object = None,
        rules: object = None,
        betas_by_type: object = None,
        cautious_weight_decay: bool = False,
        transfer: object = None,
        momentum_dtype: MomentumDtype = "fp32",
        backend: str = "auto",
        checkpoint_format: CheckpointFormat = "expanded",
        telemetry: object = None,
        fused_step: bool = False,
        orthogonalize: object = None,
        momentum: float = 0.95,
        nesterov: bool = True,
        normuon: bool = True,
        normuon_beta2: float = 0.95,
        scale: Literal["rms", "keller", "mup"] = "rms",
        coefficients: Literal["quintic", "polar_express", "simple"] = "quintic",
        newton_schulz_dtype: Literal["fp32", "bf16"] = "fp32",
        bucket_bytes: int = BUCKET_BYTES,
        **extra: object,
    ) -> None:
        self.orthogonalize = BlockSettings().with_orthogonalize(orthogonalize).orthogonalize
        self.momentum = number("momentum", momentum, low=0.0, below=1.0)
        self.normuon_beta2 = number("normuon_beta2", normuon_beta2, low=0.0, below=1.0)
        self.nesterov, self.normuon = check_switch("nesterov", nesterov), check_switch("normuon", normuon)
        self.scale = one_of("scale", scale, tuple(SCALES))
        self.coefficients = one_of("coefficients", coefficients, tuple(COEFFICIENTS))
        self.newton_schulz_dtype = one_of("newton_schulz_dtype", newton_schulz_dtype, tuple(NEWTON_SCHULZ_DTYPES))
        self.bucket_bytes = as_count("bucket_bytes", bucket_bytes)
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            lr_multipliers=_spelt_out(lr_multipliers),
            weight_decay_multipliers=weight_decay_multipliers,
            granularity=granularity,
            rules=rules,
            betas_by_type=betas_by_type,
            cautious_weight_decay=cautious_weight_decay,
            transfer=transfer,
            momentum_dtype=momentum_dtype,
            backend=backend,
            checkpoint_format=checkpoint_format,
            telemetry=telemetry,
            fused_step=fused_step,
            **extra,
        )

    def _forget_tensors(self) -> None:
        super()._forget_tensors()
        self._plans: dict[tuple[int, ...], Plan] = {}
        self._plans_version = -1

    @property
    def second_moment_of(self) -> SecondMomentOf:
        """Of matrices it is that of orthogonalised updates."""
        return "updates"

    @property
    def exchanges(self) -> tuple[Exchange, ...]:
        """Adam-mini's; those of matrices are part of the update."""
        return settle_loaded_second_moments, sum_split_blocks

    def completed(self, settings: BlockSettings) -> BlockSettings:
        """Settings with what this optimizer orthogonalises, and its own preset of multipliers where none is given."""
        if settings.transfer is not None:
            raise ValueError(
                "BlockwiseMuon does not take transfer: its exponents are those of Adam's updates. Remove it; "
                '"scale": "mup" moves the rates of matrices over widths.'
            )
        preset = MUON_PRESET if settings.preset == DEFAULT_PRESET else settings.preset
        return replace(settings, preset=preset, orthogonalize=self.orthogonalize)

    @classmethod
    def block_arguments(cls, params: Mapping[str, Any]) -> dict[str, Any]:
        """See `BlockwiseOptimizer.block_arguments`."""
        found = {**super().block_arguments(params), "orthogonalize": params.get("orthogonalize") or {}}
        given = found.get("lr_multipliers")
        if given is None or (isinstance(given, Mapping) and PRESET not in given):
            found["lr_multipliers"] = {PRESET: MUON_PRESET, **(given or {})}
        return found

    # ------------------------------------------------------------------- step

    def _is_shared(self, binding: Binding) -> bool:
        several = binding.groups.dp_group is not None or binding.groups.tp_group is not None
        return super()._is_shared(binding) or (several and binding.kernel_table is not binding.table)

    def update_together_(self, work: Sequence[Work]) -> None:
        """The matrices: momentum, orthogonalisation, weights; see `BlockwiseOptimizer.update_together_`."""
        bindings = self.bindings()
        concerned = bindings.in_order_of_binding([w for w in work if w.binding.kernel_table is not w.binding.table])
        if not concerned:
            return
        elements = [
            Elements(
                w.item,
                w.binding.kernels,
                w.binding.table.num_blocks,
                momentum=self.momentum,
                nesterov=self.nesterov,
            )
            for w in concerned
        ]
        step_matrices_(self._plan_of([w.binding for w in concerned], bindings.version), elements, self._direct)

    def _plan_of(self, bindings: Sequence[Binding], version: int) -> Plan:
        if self._plans_version != version:
            self._plans, self._plans_version = {}, version
        key = tuple(id(binding.tensor) for binding in bindings)
        if key not in self._plans:
            self._plans[key] = make_plan(bindings, self.bucket_bytes)
        return self._plans[key]

    def _direct(self, matrix: torch.Tensor, second_moment: torch.Tensor, row_dim: int) -> None:
        update = newton_schulz(matrix, self.coefficients, self.newton_schulz_dtype)
        if self.normuon:
            update = normalized_rows(update, second_moment, beta2=self.normuon_beta2, eps=_EPS, row_dim=row_dim)
        torch.mul(update, SCALES[self.scale](matrix.size(row_dim), matrix.size(1 - row_dim)), out=matrix)

    def update_(self, kernels: Kernels, items: Sequence[Item]) -> None:
        """Adam-mini's update by the kernels; a tensor of matrices alone has only its steps counted."""
        by_kernels = [item for item in items if item.table.runs]
        if by_kernels:
            kernels.step_(by_kernels)
        for item in items:
            if not item.table.runs:
                item.state["step"] += 1


def _spelt_out(lr_multipliers: object) -> object:
    """Adam's default preset in numbers, where the user wrote its name: without a name the default here is another."""
    given = {PRESET: lr_multipliers} if lr_multipliers == DEFAULT_PRESET else lr_multipliers
    if not isinstance(given, Mapping) or given.get(PRESET) != DEFAULT_PRESET:
        return lr_multipliers
    return {**LR_PRESETS[DEFAULT_PRESET], **{key: value for key, value in given.items() if key != PRESET}}
