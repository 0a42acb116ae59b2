# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's loss scale: every gradient is multiplied by it, so a wrong one ruins a run that loads it."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("deepspeed", reason="the loss scalers are DeepSpeed's")

from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler

from ds_blockwise.hosts.deepspeed.checkpoint.rehearse import scaler_misfits


def misfits(**entries: Any) -> list[str]:
    return list(scaler_misfits("optim.pt", entries))


def scaler(**values: Any) -> DynamicLossScaler:
    window = {"scale_window": 1000, "min_scale": 1.0, "delayed_shift": 2, "consecutive_hysteresis": False}
    made = DynamicLossScaler(2.0**16, **window)
    vars(made).update(values)
    return made


def test_deepspeeds_own_are_taken() -> None:
    assert misfits() == []
    assert misfits(loss_scaler=None, cur_scale=65536.0) == []
    assert misfits(loss_scaler=scaler(), overflow=False) == []
    assert misfits(loss_scaler=LossScaler(128.0)) == []


@pytest.mark.parametrize("scale", [0, 0.0, -1.0, float("inf"), float("nan"), "65536", None])
def test_a_scale_that_is_no_number_above_0_is_refused(scale: object) -> None:
    """0 makes every gradient NaN in the first step, a negative one turns them round."""
    line = f"optim.pt: its loss scale is {scale!r}, which is not a number above 0"
    assert misfits(cur_scale=scale) == [line]  # of the wrapper without ZeRO
    assert misfits(loss_scaler=scaler(cur_scale=scale)) == [line]


def test_what_is_no_scaler_is_refused() -> None:
    assert misfits(loss_scaler={"cur_scale": 1.0}) == ["optim.pt: its loss_scaler is a dict"]
    assert misfits(loss_scaler=scaler(update_scale=1)) == ["optim.pt: update_scale of its loss_scaler is a int"]
