# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel that counts a step and computes the scalars of every row of settings; see `backend`."""
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from ds_blockwise.kernels.triton.device_functions import constants
from ds_blockwise.kernels.triton.tables import Address, Multiplier, Scalar, Setting

ADDRESS_STEP, ADDRESS_LR, ADDRESS_COLUMNS = constants(Address.STEP, Address.LR, len(Address))
SETTING_LR, SETTING_LR_FLOOR, SETTING_LR_BITS = constants(Setting.LR, Setting.LR_FLOOR, Setting.LR_BITS)
SETTING_BETA1, SETTING_BETA2, SETTING_EPS = constants(Setting.BETA1, Setting.BETA2, Setting.EPS)
SETTING_WEIGHT_DECAY, SETTING_PROGRESS = constants(Setting.WEIGHT_DECAY, Setting.PROGRESS)
MULTIPLIER_LR, MULTIPLIER_WEIGHT_DECAY = constants(Multiplier.LR, Multiplier.WEIGHT_DECAY)
MULTIPLIER_LR_CHANGE, MULTIPLIER_BETA1 = constants(Multiplier.LR_CHANGE, Multiplier.BETA1)
MULTIPLIER_BETA2, SETTING_COLUMNS = constants(Multiplier.BETA2, len(Setting))
SCALAR_DECAY, SCALAR_STEP_SIZE, SCALAR_EPS = constants(Scalar.DECAY, Scalar.STEP_SIZE, Scalar.EPS)
SCALAR_ROOT_CORRECTION, SCALAR_GRAD_WEIGHT = constants(Scalar.ROOT_CORRECTION, Scalar.GRAD_WEIGHT)
SCALAR_BETA2, SCALAR_SQUARE_WEIGHT = constants(Scalar.BETA2, Scalar.SQUARE_WEIGHT)
MULTIPLIER_COLUMNS, SCALAR_COLUMNS = constants(len(Multiplier), len(Scalar))


@triton.jit
def _power(base, exponent):
    result = base * 0.0 + 1.0
    while exponent > 0:
        if exponent & 1:
            result = result * base
        base = base * base
        exponent = exponent >> 1
    return result


@triton.jit
def prepare_kernel(addresses, settings, row_ends, multipliers, scalars, BY_SIGN: tl.constexpr, VERSION: tl.constexpr):
    """One program per tensor: count the step, then compute the scalars of each of its rows of settings.

    ``row_ends`` has one more entry than there are tensors: a tensor's rows are those from its entry to the next.
    ``BY_SIGN``: the step size is the learning rate, without Adam's correction.
    """
    item = tl.program_id(0).to(tl.int64)
    step_ptr = tl.load(addresses + item * ADDRESS_COLUMNS + ADDRESS_STEP).to(tl.pointer_type(tl.int64))
    step = tl.load(step_ptr) + 1
    # every thread loads the count; none may load what another one has already stored
    tl.debug_barrier()
    tl.store(step_ptr, step)
    mine = settings + item * SETTING_COLUMNS
    lr, lr_floor = tl.load(mine + SETTING_LR), tl.load(mine + SETTING_LR_FLOOR)
    beta1, beta2 = tl.load(mine + SETTING_BETA1), tl.load(mine + SETTING_BETA2)
    eps, weight_decay = tl.load(mine + SETTING_EPS), tl.load(mine + SETTING_WEIGHT_DECAY)
    progress, lr_bits = tl.load(mine + SETTING_PROGRESS), tl.load(mine + SETTING_LR_BITS)
    lr_address = tl.load(addresses + item * ADDRESS_COLUMNS + ADDRESS_LR)
    if lr_bits == 32.0:
        lr = tl.load(lr_address.to(tl.pointer_type(tl.float32))).to(tl.float64)
    elif lr_bits == 64.0:
        lr = tl.load(lr_address.to(tl.pointer_type(tl.float64)))
    correction1 = 1.0 - _power(beta1, step)
    root_correction = 1.0 / tl.sqrt(1.0 - _power(beta2, step))
    row = tl.load(row_ends + item)
    last = tl.load(row_ends + item + 1)
    while row < last:
        own = multipliers + MULTIPLIER_COLUMNS * row
        multiplier = tl.load(own + MULTIPLIER_LR) + tl.load(own + MULTIPLIER_LR_CHANGE) * progress
        block_lr = multiplier * (lr - lr_floor) + lr_floor
        out = scalars + row * SCALAR_COLUMNS
        decay = weight_decay * tl.load(own + MULTIPLIER_WEIGHT_DECAY)
        own_beta1, own_beta2 = tl.load(own + MULTIPLIER_BETA1), tl.load(own + MULTIPLIER_BETA2)
        row_beta1, row_correction1 = beta1, correction1
        row_beta2, row_root_correction = beta2, root_correction
        if own_beta1 == own_beta1:  # not NaN
            row_beta1 = own_beta1
            row_correction1 = 1.0 - _power(own_beta1, step)
        if own_beta2 == own_beta2:
            row_beta2 = own_beta2
            row_root_correction = 1.0 / tl.sqrt(1.0 - _power(own_beta2, step))
        tl.store(out + SCALAR_DECAY, 1.0 - block_lr * decay)
        if BY_SIGN:
            tl.store(out + SCALAR_STEP_SIZE, block_lr)
        else:
            tl.store(out + SCALAR_STEP_SIZE, block_lr / row_correction1)
        tl.store(out + SCALAR_ROOT_CORRECTION, row_root_correction)
        tl.store(out + SCALAR_EPS, eps)
        tl.store(out + SCALAR_GRAD_WEIGHT, 1.0 - row_beta1)
        tl.store(out + SCALAR_BETA2, row_beta2)
        tl.store(out + SCALAR_SQUARE_WEIGHT, 1.0 - row_beta2)
        row += 1
