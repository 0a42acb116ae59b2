# SPDX-License-Identifier: Apache-2.0
"""Blockwise Muon against what others published: torch.optim.Muon and NVIDIA's emerging-optimizers, in fp32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_blockwise.kernels.newton_schulz import newton_schulz
from tests.helpers.muon_oracle import POLYNOMIALS
from tests.helpers.oracle import assert_same_update
from tests.unit.optimizers.test_muon import DECAY, LR, feed, made

Optimizer = torch.optim.Optimizer
Theirs = Callable[[list[nn.Parameter]], Optimizer]
STEPS = 4
MATRICES = {"llama": 14, "nano": 8}  # hidden weights of the model
SCALES = {"rms": ("spectral", 0.2), "keller": ("shape_scaling", 1.0), "mup": ("unit_rms_norm", 1.0)}


@pytest.fixture
def nvidias() -> Any:
    """NVIDIA's package; it is for Python 3.12 and later, where `make test-pythons` installs it."""
    pytest.importorskip("emerging_optimizers", reason="needs Python 3.12 and emerging-optimizers")
    from emerging_optimizers import orthogonalized_optimizers

    return orthogonalized_optimizers


def hidden(model: nn.Module) -> dict[str, nn.Parameter]:
    found = model.named_parameters()
    return {name: p for name, p in found if p.dim() == 2 and ("_proj." in name or "c_attn" in name or "c_fc" in name)}


def compare(kind: str, theirs: Theirs, *, tall: bool = False, **settings: Any) -> None:
    """Step a model and its twin on the same gradients, and compare what happens to the hidden matrices."""
    (model, optimizer), (twin, _) = made(kind, **settings), made(kind)
    ours, others = hidden(model), hidden(twin)
    assert len(ours) == MATRICES[kind]
    names = [name for name, param in ours.items() if not tall or param.size(0) >= param.size(1)]
    published = theirs([others[name] for name in names])
    for step in range(STEPS):
        feed(model, step)
        feed(twin, step)
        was, before = ({name: each[name].detach().clone() for name in names} for each in (ours, others))
        optimizer.step()
        published.step()
        now, after = ({name: each[name] for name in names} for each in (ours, others))
        assert_same_update((was, now), (before, after), LR, tolerance=1e-5, weight_roundings=4, what=f"step {step}")


WHOLE = {"orthogonalize": {"qk": "matrix", "vo": "matrix"}}
ROLES = {"orthogonalize": {"query": "role", "key": "role", "value": "role"}}


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
def test_with_torchs_constants_it_is_torchs_muon(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.optim.Muon casts to bf16 by one call, which is left out here."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self.clone())

    def theirs(params: list[nn.Parameter]) -> Optimizer:
        return torch.optim.Muon(params, lr=LR, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw")

    compare("llama", theirs, normuon=False, coefficients="simple", **WHOLE)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("coefficients", ["quintic", "simple"])
@pytest.mark.parametrize("nesterov", [True, False], ids=["nesterov", "plain"])
def test_its_matrices_are_those_of_nvidias_muon(nvidias: Any, nesterov: bool, coefficients: str, scale: str) -> None:
    mode, extra = SCALES[scale]

    def theirs(params: list[nn.Parameter]) -> Optimizer:
        return nvidias.Muon(
            params, LR, 0.9, DECAY, nesterov=nesterov, fp32_matmul_prec="highest", coefficient_type=coefficients,
            scale_mode=mode, extra_scale_factor=extra,
        )  # fmt: skip

    settings = {"momentum": 0.9, "nesterov": nesterov, "coefficients": coefficients, "scale": scale}
    compare("llama", theirs, normuon=False, **WHOLE, **settings)


def test_roles_of_a_fused_weight_are_those_of_nvidias_muon_that_splits_it(nvidias: Any) -> None:
    class Split(nvidias.Muon):
        def orthogonalize(self, p: Tensor, grad: Tensor, **_: Any) -> Tensor:
            parts = grad.chunk(3) if p.size(0) == 3 * p.size(1) else (grad,)
            return torch.cat([self.scaled_orthogonalize_fn(part) for part in parts])

    def theirs(params: list[nn.Parameter]) -> Optimizer:
        return Split(params, LR, 0.95, DECAY, nesterov=True, fp32_matmul_prec="highest", extra_scale_factor=0.2)

    compare("nano", theirs, normuon=False, **ROLES)


@pytest.mark.parametrize("beta2", [0.95, 0.5])
def test_second_moments_of_rows_are_those_of_nvidias_normuon(nvidias: Any, beta2: float) -> None:
    """Of matrices with at least as many rows as columns: theirs takes the columns of others."""

    def theirs(params: list[nn.Parameter]) -> Optimizer:
        return nvidias.AdaptiveMuon(
            params, LR, 0.95, DECAY, nesterov=True, fp32_matmul_prec="highest", extra_scale_factor=0.2,
            moment2_method="normuon", beta2=beta2, eps=1e-16,
        )  # fmt: skip

    compare("llama", theirs, tall=True, normuon_beta2=beta2, **WHOLE)


@pytest.mark.parametrize("coefficients", POLYNOMIALS)
def test_newton_schulz_is_nvidias_with_the_same_polynomials(nvidias: Any, coefficients: str) -> None:
    """Their own ``polar_express`` is another one, of eight iterations."""
    safety, steps = POLYNOMIALS[coefficients]
    (a, b, c), *rest = steps
    steps = [(a / safety, b / safety**3, c / safety**5), *rest]
    generator = torch.Generator().manual_seed(1)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        for shape in ((7, 7), (5, 31), (40, 12), (1, 9)):
            matrix = torch.randn(shape, generator=generator)
            wanted = nvidias.muon.muon_utils.newton_schulz(
                matrix, 5, coefficient_type="custom", custom_coefficient_sets=steps
            )
            torch.testing.assert_close(newton_schulz(matrix, coefficients), wanted, rtol=0, atol=1e-5)
    finally:
        torch.set_float32_matmul_precision(before)
