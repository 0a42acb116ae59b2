# SPDX-License-Identifier: Apache-2.0
"""One test for each known trap of this problem (those that the optimizers, the hosts and the layout touch).

Each engine case feeds known gradients through a real DeepSpeed engine and compares the updates, divided by the
learning rate, with the same optimizer on whole tensors (which `test_oracle` ties to the independent oracle). The traps
of kernels (autotuning in place) and of resharded checkpoints come with those features.
"""

from dataclasses import dataclass, field

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ds_blockwise import BlockwiseAdamMini, tag_parameters
from ds_blockwise.optimizers.registry import OPTIMIZERS
from tests.helpers.deepspeed.engines import engine_config, feed_step, masters, open_engine, prepare_deepspeed
from tests.helpers.distributed import passes
from tests.helpers.models import GradientPlan, small_weight
from tests.helpers.oracle import assert_same_update
from tests.helpers.suites import Suite

pytest.importorskip("deepspeed", reason="needs DeepSpeed")

LR, STEPS = 1e-2, 3


class Attention(nn.Module):
    """Two query heads of five rows and one key head: nothing here is a power of two."""

    def __init__(self, columns=7):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = 2, 1, 5
        self.q_proj = nn.Linear(columns, 10, bias=False)
        self.k_proj = nn.Linear(columns, 5, bias=False)


class Norm(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))


def nearly_empty():
    """Four elements, padded to six, for three ranks: the last rank owns nothing at all."""
    return nn.ModuleDict({"norm": Norm(2), "lm_head": nn.Linear(2, 1, bias=False)})


def one_huge_block():
    """A row longer than two ranks' share: one block on three ranks."""
    return nn.ModuleDict({"norm": Norm(2), "lm_head": nn.Linear(50, 1, bias=False)})


def heads():
    return nn.ModuleDict({"self_attn": Attention(), "lm_head": nn.Linear(7, 4, bias=False)})


def tied():
    model = nn.ModuleDict({"embed_tokens": nn.Embedding(5, 7), "lm_head": nn.Linear(7, 5, bias=False), "norm": Norm(7)})
    model["lm_head"].weight = model["embed_tokens"].weight
    return model


@dataclass(frozen=True)
class Trap:
    build: object
    stage: int
    optimizer: str = "BlockwiseAdamMini"
    gas: int = 1
    zero: dict = field(default_factory=dict)
    zero_init: bool = False
    absent_on_rank_1: tuple = ()
    check: object = None


def whole_tensor_run(trap, start, plan):
    """Yield the weights after each step of the same optimizer on whole tensors."""
    model = trap.build()
    names = dict(model.named_parameters())
    with torch.no_grad():
        for name, p in names.items():
            p.copy_(start[name])
    tag_parameters(model)
    optimizer = OPTIMIZERS[trap.optimizer](model.parameters(), lr=LR, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1)
    for step in range(STEPS):
        for name, p in names.items():
            p.grad = mean_gradient(trap, plan, name, tuple(p.shape), step)
        optimizer.step()
        yield {name: p.detach().clone() for name, p in names.items()}


def mean_gradient(trap, plan, name, shape, step):
    if name in trap.absent_on_rank_1:  # what rank 1 lacks counts as zero in the mean
        held = [i for i in range(plan.total) if i // plan.micro_batches != 1]
        return sum(plan.share(name, shape, step, i) for i in held) / plan.total
    return plan.mean(name, shape, step)


def spring(context, trap):
    """Every rank: run the engine of one trap and compare it, step by step, with whole tensors."""
    prepare_deepspeed()
    config = engine_config(trap.optimizer, stage=trap.stage, gas=trap.gas, zero=dict(trap.zero))

    def build():
        if not trap.zero_init:
            model = trap.build()
        else:
            import deepspeed

            with deepspeed.zero.Init(config_dict_or_path=config):
                model = trap.build()
            assert all(tuple(p.shape) in ((0,), (1,)) for p in model.parameters()), "not a placeholder"
        for name, p in model.named_parameters():
            if trap.zero_init:
                with deepspeed.zero.GatheredParameters([p], modifier_rank=0), torch.no_grad():
                    p.copy_(small_weight(name, p.ds_shape))
            else:
                p.data.copy_(small_weight(name, p.shape))
        return model

    plan = GradientPlan(context.world_size, trap.gas)
    absent = trap.absent_on_rank_1 if context.rank == 1 else ()
    with open_engine(config, build) as run:
        before = was = start = masters(run)
        for step, expected in enumerate(whole_tensor_run(trap, start, plan)):
            feed_step(run, plan, step, context.rank, absent=absent)
            now = masters(run)
            assert_same_update((before, now), (was, expected), LR, what=f"step {step}")
            before, was = now, expected
        if trap.check is not None:
            trap.check(context, run)


def tables(run):
    return [binding.table for binding in run.engine.basic_optimizer.bindings()]


def some_rank_owns_nothing(context, run):
    owned = torch.tensor([float(sum(t.num_blocks for t in tables(run)))])
    counts = [torch.zeros(1) for _ in range(context.world_size)]
    dist.all_gather(counts, owned)
    assert min(counts) == 0, counts


def a_head_and_a_row_are_cut(context, run):
    (table,) = tables(run)
    cuts = {(p.spec.fqn, cut) for p in table.placements for cut in p.cuts}
    assert any(name.endswith("q_proj.weight") and cut % 35 and cut % 7 for name, cut in cuts), cuts
    assert table.dp_slots.numel() > 0


def tensors_are_flat(context, run):
    for group in run.engine.basic_optimizer.param_groups:
        assert all(p.ndim == 1 for p in group["params"])
    a_head_and_a_row_are_cut(context, run)


def the_block_is_on_every_rank(context, run):
    assert sum(t.dp_slots.numel() for t in tables(run)) >= 1


def blocks_come_from_the_unsharded_shapes(context, run):
    shapes = {p.block_spec.fqn: p.block_spec.num_blocks for p in run.model.parameters()}
    assert shapes == {"self_attn.q_proj.weight": 2, "self_attn.k_proj.weight": 1, "lm_head.weight": 4}


def state_advanced_once_per_step(context, run):
    base = run.engine.basic_optimizer
    assert {state["step"] for state in base.state.values() if state} == {STEPS} and base.step_calls == STEPS


def state_keys_agree(context, run):
    base = run.engine.basic_optimizer
    mine = sorted(str((i, sorted(s))) for i, s in base.state_dict()["state"].items())
    peers = [None] * context.world_size
    dist.all_gather_object(peers, mine)
    assert all(peer == mine for peer in peers)


def one_role_for_the_tied_weight(context, run):
    roles = {p.block_spec.fqn: p.block_spec.parts[0].block_type for p in run.model.parameters()}
    assert roles == {"embed_tokens.weight": "emb", "norm.weight": "norm"}


ABSENT = ("self_attn.k_proj.weight",)
CASES = {
    "1-empty-z1": (3, Trap(nearly_empty, 1, check=some_rank_owns_nothing)),
    "1-empty-z2": (3, Trap(nearly_empty, 2, check=some_rank_owns_nothing)),
    "1-empty-z3": (3, Trap(nearly_empty, 3)),
    "1-huge-z1": (3, Trap(one_huge_block, 1, check=the_block_is_on_every_rank)),
    "1-huge-z3": (3, Trap(one_huge_block, 3, check=the_block_is_on_every_rank)),
    "2-cut-z2": (3, Trap(heads, 2, check=a_head_and_a_row_are_cut)),
    "2-cut-z3": (3, Trap(heads, 3, check=a_head_and_a_row_are_cut)),
    "3-flat-z1": (3, Trap(heads, 1, check=tensors_are_flat)),
    "4-placeholder": (2, Trap(heads, 3, zero_init=True, check=blocks_come_from_the_unsharded_shapes)),
    "5-reduce-scatter-on": (2, Trap(heads, 2, zero={"reduce_scatter": True})),
    "5-reduce-scatter-off": (2, Trap(heads, 2, zero={"reduce_scatter": False})),
    "5-small-buckets": (2, Trap(heads, 2, zero={"reduce_bucket_size": 20, "allgather_bucket_size": 20})),
    "6-micro-z2": (2, Trap(heads, 2, gas=3, check=state_advanced_once_per_step)),
    "6-micro-z3": (2, Trap(heads, 3, gas=3, check=state_advanced_once_per_step)),
    "8-missing-z0": (2, Trap(heads, 0, absent_on_rank_1=ABSENT, check=state_keys_agree)),
    "14-tied-z2": (2, Trap(tied, 2, check=one_role_for_the_tied_weight)),
    "14-tied-z0-adamw": (2, Trap(tied, 0, "BlockwiseAdamW", check=one_role_for_the_tied_weight)),
}


SUITE = Suite(spring, CASES)
outcome = SUITE.outcome()


@SUITE.cases("1-")
def test_trap_1_a_shard_is_empty_or_smaller_than_a_block(outcome, name):
    """With more ranks than rows some rank holds only padding. Others have hung there: the empty rank skipped the
    collective. Ours takes part in every reduction with zeros, and a block may lie on three ranks."""
    passes(outcome, name)


@SUITE.cases("2-")
def test_trap_2_a_boundary_inside_a_head_and_inside_a_row(outcome, name):
    """ZeRO cuts flat buffers anywhere. Adam-mini's reshape to heads fails on such a shard (its issue 25: Qwen2-0.5B on
    four shards), and a sum over the local part alone is silently another second moment."""
    passes(outcome, name)


@SUITE.cases("3-")
def test_trap_3_the_optimizer_receives_a_flat_partition(outcome, name):
    """ZeRO hands over one 1-D tensor per group. Code that asks for rows of a 2-D gradient raises IndexError
    (LlamaFactory 6680) or treats the whole model as one vector."""
    passes(outcome, name)


@SUITE.cases("4-")
def test_trap_4_shapes_of_zero_3_placeholders(outcome, name):
    """Under zero.Init every weight has shape (0,). DeepSpeed's own Muon took them for vectors and trained plain Adam
    (its issue 8438); our structure comes from ds_shape and the modules."""
    passes(outcome, name)


@SUITE.cases("5-")
def test_trap_5_gradients_are_read_when_they_are_fully_reduced(outcome, name):
    """With reduce-scatter a rank only has its own piece of the mean gradient; statistics taken too early differ between
    ranks (DeepSpeed 8090). Gradients here differ per rank, so an unreduced one cannot pass."""
    passes(outcome, name)


@SUITE.cases("6-")
def test_trap_6_state_advances_once_per_optimizer_step(outcome, name):
    """With gradient accumulation Muon's momentum advanced at every micro-batch (DeepSpeed 8600)."""
    passes(outcome, name)


@SUITE.cases("8-")
def test_trap_8_a_gradient_is_missing_on_some_ranks(outcome, name):
    """A layer that one rank's batch does not use: our collectives must still match, and state must have the same
    keys on
    all ranks, or the next save fails. (At ZeRO 1 to 3 DeepSpeed's own reductions then no longer match, whatever the
    optimizer.)"""
    passes(outcome, name)


@SUITE.cases("14-")
def test_trap_14_tied_weights_are_updated_once_everywhere(outcome, name):
    """A weight with two names must not be reduced or stepped twice, and must be an embedding on every rank."""
    passes(outcome, name)


def unhooked(context, _):
    """An engine whose hook was lost (a wrapper that replaces the method, an exotic fork)."""
    prepare_deepspeed()
    from deepspeed.runtime.engine import DeepSpeedEngine

    import ds_blockwise

    hooked = DeepSpeedEngine._configure_optimizer
    plan = GradientPlan(context.world_size)
    DeepSpeedEngine._configure_optimizer = hooked.__wrapped__
    try:
        with open_engine(engine_config("BlockwiseAdamMini", stage=1), heads) as run:
            with pytest.raises(ValueError, match=r"ds_blockwise\.attach\(engine\)"):
                feed_step(run, plan, 0, context.rank)
        with open_engine(engine_config("BlockwiseAdamMini", stage=1), heads) as run:
            ds_blockwise.attach(run.engine)
            feed_step(run, plan, 0, context.rank)
            assert run.engine.basic_optimizer.step_calls == 1
    finally:
        DeepSpeedEngine._configure_optimizer = hooked


def test_trap_7_training_never_goes_on_without_our_code():
    """Muon was plain SGD at ZeRO-0 for months because a host's wrapper never called it (DeepSpeed 8441). If our hook is
    lost the first step says so, and attach(engine) mends it."""
    from tests.helpers.distributed import run_distributed

    run_distributed(unhooked, 2, None)


def test_trap_9_a_fused_qkv_mixes_roles_and_head_counts_in_one_tensor():
    """Grouped-query attention stores [q q k v] per group in one weight. Reading it as one role trains V at Q's rate;
    reading it as equal thirds cuts heads in the middle. Both multipliers must reach inside."""
    rules = [{"match": "qkv", "role": "qkv", "layout": "grouped", "num_heads": 4, "num_kv_heads": 2}]
    model = nn.ModuleDict({"qkv": nn.Linear(3, 4 * 2 + 2 * 2 + 2 * 2, bias=False)})
    tag_parameters(model, rules=rules)
    optimizer = BlockwiseAdamMini(model.parameters(), lr=1.0, betas=(0.0, 0.0), eps=0.0, weight_decay=0.0)
    weight = model["qkv"].weight
    weight.data.zero_()
    gradient = torch.arange(1.0, 49.0).view(16, 3)
    weight.grad = gradient.clone()
    optimizer.step()
    expected = torch.empty(16, 3)
    for group in (0, 8):
        for start, size, rate in ((0, 2, 1), (2, 2, 1), (4, 2, 1), (6, 1, 0.5), (7, 1, 0.5)):
            rows = slice(group + start, group + start + size)
            expected[rows] = -rate * gradient[rows] / gradient[rows].square().mean().sqrt()
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-6, atol=0)


def test_trap_12_a_changed_learning_rate_is_used_at_once():
    """A rate frozen at capture or construction trains on for ever at the warm-up's value."""
    model = heads()
    tag_parameters(model)
    optimizer = BlockwiseAdamMini(model.parameters(), lr=1.0, betas=(0.0, 0.0), eps=0.0, weight_decay=0.0)
    weight = model["lm_head"].weight
    for lr in (1e-3, 5e-4, 0.0, 2e-3):
        optimizer.param_groups[0]["lr"] = lr
        weight.data.zero_()
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        torch.testing.assert_close(weight.detach(), torch.full_like(weight, -1.25 * lr), rtol=1e-6, atol=0)


def test_trap_15_the_comparison_sees_errors_that_parameters_hide():
    """At lr 1e-4 the default tolerance on parameters forgives a tenth of the update; updates divided by lr do not."""
    lr = 1e-4
    before = {"w": torch.full((4,), 0.02)}
    right, wrong = {"w": before["w"] - lr}, {"w": before["w"] - 1.09 * lr}
    torch.testing.assert_close(wrong["w"], right["w"], rtol=1.3e-6, atol=1e-5)  # passes: the trap
    with pytest.raises(AssertionError, match="off by more than"):
        assert_same_update((before, wrong), (before, right), lr)
