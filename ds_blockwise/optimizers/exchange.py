# SPDX-License-Identifier: Apache-2.0
"""What ranks send each other in a step, as named phases between the gradients and the new weights.

An optimizer lists its phases (`BlockwiseOptimizer.exchanges`); a step runs them in that order on every rank. A phase
sees every tensor that has a gradient here or may have one on another rank.
"""

from __future__ import annotations

from typing import Protocol

import torch

from ds_blockwise.kernels.bindings import Bindings, Work, by_kernels
from ds_blockwise.kernels.step_sets import StepSet
from ds_blockwise.optimizers.second_moment import (
    States,
    are_settled,
    is_per_block,
    is_unsettled,
    mark_settled,
    to_blocks,
)
from ds_blockwise.parallel.agree import any_rank
from ds_blockwise.parallel.reduce import reduce_block_sums_


class Exchange(Protocol):
    """One phase of a step; may communicate, and then every rank of the groups in the step's work calls it."""

    def __call__(self, now: StepSet, bindings: Bindings, states: States) -> None:
        """Run the phase.

        Args:
            now: the tensors of this step.
            bindings: all tensors that the optimizer knows.
            states: of the tensors.
        """
        ...


def settle_loaded_second_moments(now: StepSet, bindings: Bindings, states: States) -> None:
    """Turn second moments that somebody else wrote into one value per block.

    A load is noticed here and not only in ``load_state_dict``, because universal checkpoints write per-element values
    straight into ``state``. After `BlockwiseOptimizer.settle` nothing is left to do.
    """
    if are_settled([w.item.state for w in now.work]):
        return
    found = [w.binding for w in now.work if is_unsettled(w.item.state)]  # a look-up by tensor calls Python for its hash
    if not found:
        return
    groups = [b.groups for b in found]
    device = groups[0].device or found[0].tensor.device
    if any_rank(not all(is_per_block(states[b.tensor]["exp_avg_sq"], b) for b in found), groups, device):
        to_blocks(states, found)
    mark_settled(states, found)


def sum_split_blocks(now: StepSet, bindings: Bindings, states: States) -> None:
    """Complete the sums of squares of blocks that lie on several ranks."""
    split = now.split
    if not split:
        return
    if bindings.absent:  # ranks then hold different tensors, and only the order of binding is common to all
        split = bindings.in_order_of_binding(split)
    for kernels, items in by_kernels(split):
        kernels.sum_split_blocks(items)
    # one call for all, so that every rank's collectives come in the same order
    reduce_block_sums_([(_sums_of(w), w.item.table, w.binding.groups) for w in split])


def _sums_of(work: Work) -> torch.Tensor:
    assert work.item.sums is not None, "kernels set the sums of every item that they are given"
    return work.item.sums
