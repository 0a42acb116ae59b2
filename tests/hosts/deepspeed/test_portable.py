# SPDX-License-Identifier: Apache-2.0
"""Converting and loading with real engines: param groups, frozen parameters, buffers, schedules, refusals."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers import models
from tests.helpers.deepspeed.engines import engine_config, feed_step, open_engine, prepare_deepspeed, true_shape
from tests.helpers.deepspeed.reshard import largest_difference, whole_state
from tests.helpers.deepspeed.reshard_cells import Topology
from tests.helpers.distributed import RankContext, run_cases
from tests.helpers.models import GradientPlan

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")

FROZEN = ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight")
# DeepSpeed would take its compiled AdamW
FOREIGN = {"stage": 2, "zero_force_ds_cpu_optimizer": False, "params": {"torch_adam": True}}
KINDS = ("weights", "exp_avg", "exp_avg_sq")


def qwen(*, frozen: tuple[str, ...] = (), value: float = 0.0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A Qwen3 with two buffers that are saved; ``value`` tells a model's own values from loaded ones."""
    model = models.set_small_weights(models.qwen3())
    model.register_buffer("counts", torch.arange(3) + int(value))
    model.model.register_buffer("scale", torch.full((2,), 0.5 + value))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(value)
            parameter.requires_grad_(name not in frozen)
    return model.to(dtype)


def two_groups(model: nn.Module) -> list[dict[str, Any]]:
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() > 1], "lr": 0.01, "weight_decay": 0.3},
        {"params": [p for p in trained if p.dim() == 1], "lr": 0.002, "weight_decay": 0.0},
    ]


@contextmanager
def engine(build: Callable[[], nn.Module], optimizer: str = "BlockwiseAdamMini", **options: Any) -> Iterator[Any]:
    prepare_deepspeed()
    import ds_blockwise  # noqa: F401 - registers the optimizers

    groups = options.pop("groups", None)
    with open_engine(engine_config(optimizer, **options), build, groups=groups) as run:
        run.tp, run.tp_rank = 1, 0
        run.shapes = {name: true_shape(p) for name, p in run.model.named_parameters()}
        yield run


def train(run: SimpleNamespace, context: RankContext, steps: int) -> None:
    plan = GradientPlan(context.world_size)
    for step in range(steps):
        feed_step(run, plan, step, context.rank)


def convert(context: RankContext, folder: Path, *, trust: bool = False) -> tuple[Path, list[str]]:
    """Rank 0 converts; every rank gets the folder."""
    from ds_blockwise.hosts.deepspeed.checkpoint.inspect import convert_checkpoint

    output, notes = folder.with_name(folder.name + ".portable"), []
    if context.rank == 0:
        _, notes = convert_checkpoint(folder, output, trust=trust)
    context.barrier()
    return output, notes


def saved(context: RankContext, name: str, steps: int = 2, **options: Any) -> tuple[Path, Any]:
    """A checkpoint of a run, and its whole state."""
    folder = context.tmp_path / name
    build = options.pop("build", qwen)
    client_state = options.pop("client_state", {"mine": 3})
    with engine(build, **options) as run:
        train(run, context, steps)
        run.engine.save_checkpoint(str(folder), tag="t", client_state=client_state)
        return folder, whole_state(run)


def saved_by_adamw(context: RankContext, name: str) -> Path:
    """A checkpoint of a run with torch's AdamW."""
    with engine(qwen, "AdamW", **FOREIGN) as run:
        train(run, context, 1)
        run.engine.save_checkpoint(str(context.tmp_path / name), tag="t")
    return context.tmp_path / name


# -------------------------------------------------------------------------------------- cases


def groups_frozen_buffers(context: RankContext, save: dict[str, Any], load: dict[str, Any]) -> None:
    """Everything that is not a trained weight: it must come back too, and settings must stay the new run's own."""
    schedule = {"type": "BlockwiseCosineLR", "params": {"warmup_num_steps": 1, "total_num_steps": 9, "min_lr": 1e-4}}
    build = partial(qwen, frozen=FROZEN)
    options = {"scheduler": schedule, "groups": two_groups, "build": build}
    name = f"groups-{save['stage']}-{load['stage']}"
    folder, state = saved(context, name, **options, **save)
    output, notes = convert(context, folder)
    assert not notes
    changed = partial(qwen, frozen=FROZEN, value=1.0)
    with engine(changed, scheduler=schedule, groups=two_groups, **load) as run:
        _, client_state = run.engine.load_checkpoint(str(output))
        assert client_state == {"mine": 3}
        assert largest_difference(whole_state(run), state, *KINDS) == 0.0
        assert (run.engine.global_steps, run.engine.lr_scheduler.last_batch_iteration) == (2, 1)
        lrs = [group["lr"] for group in run.engine.basic_optimizer.param_groups]
        assert lrs == run.engine.lr_scheduler.get_lr() and lrs[0] > 4 * lrs[1], lrs
        assert [g["weight_decay"] for g in run.engine.basic_optimizer.param_groups] == [0.3, 0.0]
        import deepspeed

        expected = dict(qwen().named_parameters())
        named = dict(run.model.named_parameters())
        for frozen in FROZEN:
            with deepspeed.zero.GatheredParameters([named[frozen]], enabled=hasattr(named[frozen], "ds_id")):
                value = named[frozen].detach().clone()
            assert torch.equal(value, expected[frozen].to(value.dtype)), frozen
        assert run.model.counts.tolist() == [0, 1, 2] and run.model.model.scale.tolist() == [0.5, 0.5]
        train(run, context, 1)


def tied_weights(context: RankContext) -> None:
    """A tied weight is one parameter under two names, of which only one is trained."""
    build = partial(_small_nano)
    folder, state = saved(context, "tied", build=build, stage=0)
    output, _ = convert(context, folder)
    with engine(build, stage=3) as run:
        run.engine.load_checkpoint(str(output))
        assert largest_difference(whole_state(run), state, *KINDS) == 0.0


def _small_nano() -> nn.Module:
    return models.set_small_weights(models.NanoGPT())


def before_the_first_step(context: RankContext) -> None:
    """A checkpoint without moments must give a run that starts as a new one does."""
    folder, state = saved(context, "fresh", steps=0, stage=2)
    output, _ = convert(context, folder)
    with engine(qwen, stage=2) as run:
        train(run, context, 2)
        expected = whole_state(run)
    with engine(partial(qwen, value=1.0), stage=3) as run:
        train(run, context, 1)
        run.engine.load_checkpoint(str(output))
        assert largest_difference(whole_state(run), state, "weights") == 0.0
        train(run, context, 2)
        assert largest_difference(whole_state(run), expected, *KINDS) == 0.0


def parts_of_it(context: RankContext) -> None:
    """``load_module_only`` and ``load_optimizer_states=False`` must leave moments and counters alone."""
    folder, state = saved(context, "parts", stage=1)
    output, _ = convert(context, folder)
    for options, steps in (({"load_module_only": True}, 0), ({"load_optimizer_states": False}, 2)):
        with engine(partial(qwen, value=1.0), stage=3) as run:
            run.engine.load_checkpoint(str(output), **options)
            now = whole_state(run)
            assert largest_difference(now, state, "weights") == 0.0
            assert not now["exp_avg"] and run.engine.global_steps == steps


def unfrozen_since(context: RankContext) -> None:
    """Parameters that were frozen have no moments: said by name, and the weights alone can be loaded."""
    folder, state = saved(context, "unfrozen", build=partial(qwen, frozen=FROZEN), stage=2)
    output, _ = convert(context, folder)
    with engine(partial(qwen, value=1.0), stage=3) as run:
        with pytest.raises(ValueError, match=f"were frozen, so that there are no moments of them: .*{FROZEN[0]}"):
            run.engine.load_checkpoint(str(output))
        run.engine.load_checkpoint(str(output), load_optimizer_states=False)
        now = whole_state(run)["weights"]
        start = {name: p.detach() for name, p in qwen().named_parameters()}
        assert all(torch.equal(now[n], state["weights"].get(n, start[n])) for n in start)


def bf16_momentum(context: RankContext) -> None:
    """First moments in bf16 are bf16 in the file, and exact in a run that keeps them in fp32."""
    folder, state = saved(context, "bf16", params={"momentum_dtype": "bf16"}, stage=2)
    output, _ = convert(context, folder)
    for momentum in ("fp32", "bf16"):
        with engine(qwen, params={"momentum_dtype": momentum}, stage=3) as run:
            run.engine.load_checkpoint(str(output))
            assert largest_difference(whole_state(run), state, *KINDS) == 0.0
            (tensor,) = {s["exp_avg"].dtype for s in run.engine.basic_optimizer.state.values()}
            assert str(tensor) == {"fp32": "torch.float32", "bf16": "torch.bfloat16"}[momentum]


def state_is_shown_by_deepspeed(context: RankContext) -> None:
    """``safe_get_full_optimizer_state`` must show the loaded run's moments, not those of before the load."""
    from deepspeed.utils import safe_get_full_optimizer_state

    folder, _ = saved(context, "shown", stage=1, optimizer="BlockwiseAdamW")
    output, _ = convert(context, folder)
    with engine(qwen, stage=2, optimizer="BlockwiseAdamW") as run:
        train(run, context, 1)
        run.engine.load_checkpoint(str(output))
        train(run, context, 1)
        state = whole_state(run)
        for name, parameter in run.model.named_parameters():
            shown = safe_get_full_optimizer_state(parameter, "exp_avg")
            assert torch.equal(shown.view(-1), state["exp_avg"][name].view(-1)), name


def misfits(context: RankContext) -> None:
    """Another model must be refused on every rank with names, and nothing may have changed."""
    folder, _ = saved(context, "misfits", build=partial(qwen, frozen=FROZEN), stage=2)
    output, _ = convert(context, folder)

    def wider() -> nn.Module:
        from transformers import Qwen3Config, Qwen3ForCausalLM

        sizes = models.hf_sizes(hidden_size=15, num_attention_heads=4, num_key_value_heads=2, head_dim=6)
        config = Qwen3Config(**{**sizes, "vocab_size": 41, "num_hidden_layers": 3}, attention_bias=True)
        return models.set_small_weights(Qwen3ForCausalLM(config))

    from ds_blockwise.hosts.deepspeed.checkpoint.load import load_checkpoint

    expectations: list[tuple[Callable[[], nn.Module], str, list[str]]] = [
        (wider, "BlockwiseAdamW", ["lm_head.weight has shape (41, 15), in the checkpoint (37, 15)", "layers.2."]),
        (_small_nano, "BlockwiseAdamMini", ["transformer.wte.weight", "parameters that the model lacks"]),
        (partial(qwen, frozen=FROZEN), "AdamW", ["this engine's optimizer is", "Name one of ours"]),
    ]
    for build, optimizer, words in expectations:
        with engine(build, optimizer, **FOREIGN if optimizer == "AdamW" else {"stage": 2}) as run:
            before = [p.detach().clone() for p in run.model.parameters()]
            with pytest.raises(ValueError) as found:
                load_checkpoint(run.engine, str(output))
            assert all(word in str(found.value) for word in words), str(found.value)
            after = list(run.model.parameters())
            assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))


def frozen_shards(context: RankContext) -> None:
    """A frozen weight that tensor parallelism splits cannot be made whole, which must be said; a whole one can."""
    from megatron.core import parallel_state

    from ds_blockwise.checkpoint.portable import Portable
    from tests.helpers.deepspeed import reshard

    reshard.prepare()
    assert not parallel_state.model_parallel_is_initialized()
    for name, fits in (("decoder.final_layernorm.weight", True), ("decoder.layers.0.mlp.linear_fc1.weight", False)):
        folder = context.tmp_path / f"frozen-{fits}"
        with reshard.engine_of(Topology(2, 1, 2), frozen=name) as run:
            reshard.train(run, 0, 1)
            run.engine.save_checkpoint(str(folder), tag="t")
        if not fits:
            if context.rank == 0:
                with pytest.raises(ValueError, match=f"'{name}' is not trained and differs between tensor-parallel"):
                    convert(SimpleNamespace(rank=0, barrier=lambda: None), folder)
            continue
        output, _ = convert(context, folder)
        assert torch.equal(Portable(output / "t").tensor("frozen", name), reshard.start_weight(name))
        with reshard.engine_of(Topology(3, 2), frozen=name) as run:
            run.engine.load_checkpoint(str(output))
            train_once = reshard.train(run, 1, 1)
            assert name not in train_once[-1]["weights"]


class Custom:
    """Something that ``weights_only`` does not load."""


def trusted_files(context: RankContext) -> None:
    """A file that can run code must not be loaded unasked; if it is, the copy must be free of it."""
    from ds_blockwise.checkpoint.manifest import CheckpointError
    from ds_blockwise.checkpoint.portable import Portable

    folder, _ = saved(context, "trust", client_state={"object": Custom(), "plain": 5}, stage=2)
    if context.rank == 0:
        with pytest.raises(
            CheckpointError, match=r"mp_rank_00_model_states\.pt holds Python objects .*Custom.*--trust"
        ):
            convert(SimpleNamespace(rank=0, barrier=lambda: None), folder)
    output, notes = convert(context, folder, trust=True)
    if context.rank == 0:
        assert len(notes) == 1 and "'object' is left out" in notes[0] and "Custom" in notes[0], notes
        state = Portable(output / "t").training_state()["client_state"]
        assert state["plain"] == 5 and state["object"] is None


def damaged_sources(context: RankContext) -> None:
    """Files that are missing, cut, or of another step or optimizer must be named."""
    from ds_blockwise.checkpoint.manifest import MANIFEST, CheckpointError
    from ds_blockwise.hosts.deepspeed.checkpoint.read_files import DeepSpeedFiles, NoRecordError

    folder, _ = saved(context, "whole", stage=2)
    later, _ = saved(context, "later", steps=3, stage=2)
    foreign = saved_by_adamw(context, "foreign")
    if context.rank:
        return context.barrier()
    (folder / "t" / MANIFEST).unlink()  # which would notice everything below
    name = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    path = folder / "t" / name
    content = path.read_bytes()

    def refused(kind: type[Exception], words: str, source: Path = folder) -> None:
        with pytest.raises(kind, match=words):
            DeepSpeedFiles(source / "t")

    path.write_bytes((later / "t" / name).read_bytes())
    refused(CheckpointError, f"{name}: parameter .* is at step 3, but at 2 in zero_pp_rank_0")
    path.write_bytes(content[: len(content) // 2])
    refused(CheckpointError, f"{name} cannot be read")
    path.unlink()
    refused(CheckpointError, "lacks the optimizer states of tensor-parallel rank 0, data-parallel rank 1")
    path.write_bytes(content)
    (folder / "t" / "layer_00-model_00-model_states.pt").write_bytes(b"")
    refused(ValueError, "pipeline-parallel run \\(PipelineModule\\)")
    refused(NoRecordError, "no record of ds_blockwise: its optimizer was another one", foreign)
    refused(CheckpointError, "has no \\*_model_states.pt", folder.parent)
    return context.barrier()


STAGES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"stage": 0}, {"stage": 3}),
    ({"stage": 1, "zero": {"parameter_alignment": True}}, {"stage": 0, "dtype": "bf16"}),
    ({"stage": 2}, {"stage": 1}),
    ({"stage": 3}, {"stage": 2}),
]
CASES: dict[str, Any] = {
    **{f"groups-{s['stage']}-{to['stage']}": partial(groups_frozen_buffers, save=s, load=to) for s, to in STAGES},
    **{
        case.__name__: case
        for case in (
            tied_weights,
            before_the_first_step,
            parts_of_it,
            unfrozen_since,
            bf16_momentum,
            state_is_shown_by_deepspeed,
            misfits,
            frozen_shards,
            trusted_files,
            damaged_sources,
        )
    },
}


def run_case(context: RankContext, case: Callable[[RankContext], Any]) -> None:
    case(context)


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> dict[str, str | None]:
    chosen = [i.callspec.params["name"] for i in request.session.items if i.path == request.path]
    return run_cases(run_case, 2, {name: CASES[name] for name in chosen})


@pytest.mark.parametrize("name", CASES)
def test_portable_with_engines(outcomes: dict[str, str | None], name: str) -> None:
    """See the case's own docstring."""
    if outcomes[name] is not None:
        pytest.fail(f"{name}\n{outcomes[name]}", pytrace=False)
