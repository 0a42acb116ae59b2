# SPDX-License-Identifier: Apache-2.0
"""The launcher for Megatron-LM's training scripts, against a module with the names of ``megatron.training``.

Megatron-LM itself is not on PyPI; names and signatures are those of core_v0.16.1.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.helpers.distributed import RankContext, run_distributed
from tests.helpers.megatron.stack import Stack, open_stack, stack_shims

pytestmark = pytest.mark.skipif(find_spec("megatron") is None, reason="needs megatron")

SCRIPT = """
from functools import partial
from megatron.training import get_args, pretrain

def add_own_args(parser):
    parser.add_argument("--own", type=int)
    return parser

if __name__ == "__main__":
    pretrain("datasets", partial(print), "type", "step", args_defaults={}, extra_args_provider=add_own_args)
"""


def fake_training(built: list[Any], chunk: Any, config: Any) -> dict[str, ModuleType]:
    """``megatron.training`` and ``megatron.training.training`` as far as a stock script and our wrapper see them."""
    from megatron.core import optimizer as core

    package, training = ModuleType("megatron.training"), ModuleType("megatron.training.training")
    state: dict[str, argparse.Namespace] = {}

    def get_args() -> argparse.Namespace:
        return state["args"]

    def pretrain(
        train_valid_test_dataset_provider: Any,
        model_provider: Any,
        model_type: Any,
        forward_step_func: Any,
        process_non_loss_data_func: Any = None,
        extra_args_provider: Any = None,
        args_defaults: Any = None,
        get_embedding_ranks: Any = None,
        get_position_embedding_ranks: Any = None,
        non_loss_data_func: Any = None,
        store: Any = None,
        inprocess_call_wrapper: Any = None,
    ) -> None:
        parser = argparse.ArgumentParser()
        parser.add_argument("--optimizer", default="adam")
        state["args"] = extra_args_provider(parser).parse_args(sys.argv[1:])
        name = "get_megatron_muon_optimizer" if "muon" in get_args().optimizer else "get_megatron_optimizer"
        optimizer = getattr(training, name)(config, [chunk], config_overrides=None, use_gloo_process_groups=True)
        built.append((get_args(), optimizer))

    training.get_args, training.pretrain = get_args, pretrain  # type: ignore[attr-defined]
    training.get_megatron_optimizer = core.get_megatron_optimizer  # type: ignore[attr-defined]
    training.get_megatron_muon_optimizer = lambda *args, **kwargs: "muon"  # type: ignore[attr-defined]
    package.training, package.pretrain, package.get_args = training, pretrain, get_args  # type: ignore[attr-defined]
    return {"megatron.training": package, "megatron.training.training": training}


def run_scripts(context: RankContext) -> None:
    from megatron_patch import pretrain

    stack_shims()
    script, rules = context.tmp_path / "pretrain_gpt.py", context.tmp_path / "rules.json"
    script.write_text(SCRIPT)
    rules.write_text(json.dumps([{"match": "linear_fc1", "lr_multiplier": 3}]))
    built: list[Any] = []
    with open_stack(Stack(stock=True, wrapper="plain")) as run:
        sys.modules.update(fake_training(built, run.chunk, run.wrapper.config))
        ours = ["--blockwise-optimizer", "BlockwiseAdamW"]
        pretrain.main([str(script), "--own", "3"])
        pretrain.main([str(script), *ours, "--blockwise-lr-multipliers", '{"emb": 2}', "--blockwise-rules", str(rules)])
        (stock_args, stock), (_, converted) = built
        assert stock_args.own == 3, "the script's own arguments are gone"
        assert type(stock.optimizer).__name__ == "AdamW"
        inner = converted.optimizer
        assert type(inner).__name__ == "BlockwiseAdamW"
        assert inner.block_settings.lr_multipliers == {"emb": 2.0}
        assert [(r.match, r.lr_multiplier) for r in inner.block_settings.rules] == [("linear_fc1", 3.0)]
        pretrain.main(
            [
                str(script),
                "--blockwise-optimizer",
                "BlockwiseMuon",
                "--blockwise-own",
                '{"momentum": 0.8, "scale": "mup"}',
            ]
        )
        muon = built.pop()[1].optimizer
        assert (type(muon).__name__, muon.momentum, muon.scale, muon.nesterov) == ("BlockwiseMuon", 0.8, "mup", True)
        with pytest.raises(ValueError, match=r"--blockwise-own must be a JSON object .*got \['momentum'\]"):
            pretrain.main([str(script), "--blockwise-optimizer", "BlockwiseMuon", "--blockwise-own", '["momentum"]'])
        with pytest.raises(ValueError, match="--optimizer adam"):
            pretrain.main([str(script), *ours, "--optimizer", "muon"])
        pretrain.main([str(script), "--optimizer", "muon"])
        assert built[-1][1] == "muon"


def test_a_stock_script_trains_with_our_optimizer() -> None:
    """Megatron-LM users would have to edit its training loop, or get Adam without being told."""
    run_distributed(run_scripts, 1)


def _parsed(*arguments: str) -> dict[str, Any] | None:
    from megatron_patch.pretrain import add_blockwise_args, settings_in

    return settings_in(add_blockwise_args(argparse.ArgumentParser()).parse_args(arguments))


def test_arguments_become_settings(tmp_path: Path) -> None:
    """Settings would be lost on their way from the command line."""
    assert _parsed() is None
    parsed = _parsed("--blockwise-optimizer", "BlockwiseAdamMini", "--blockwise-granularity", '{"value": "tensor"}')
    assert parsed is not None
    assert (parsed["kind"], parsed["granularity"]) == ("BlockwiseAdamMini", {"value": "tensor"})
    assert (parsed["momentum_dtype"], parsed["backend"], parsed["rules"]) == ("fp32", "auto", None)
    assert not parsed["fused_step"]
    fused = _parsed("--blockwise-optimizer", "BlockwiseAdamMini", "--blockwise-fused-step")
    assert fused is not None and fused["fused_step"]
    published = _parsed("--blockwise-optimizer", "BlockwiseAdamMini", "--blockwise-granularity", "published")
    assert published is not None and published["granularity"] == "published"
    for preset in ("paper", "auto"):
        named = _parsed("--blockwise-optimizer", "BlockwiseAdamW", "--blockwise-lr-multipliers", preset)
        assert named is not None and named["lr_multipliers"] == preset


def test_settings_without_the_optimizer_are_an_error() -> None:
    """Someone who sets multipliers would train with plain Adam."""
    for name in ("lr-multipliers", "own"):
        with pytest.raises(ValueError, match=f"--blockwise-{name} was given without --blockwise-optimizer"):
            _parsed(f"--blockwise-{name}", '{"emb": 2}')
    for name in ("cautious-weight-decay", "fused-step"):
        with pytest.raises(ValueError, match=f"--blockwise-{name} was given without --blockwise-optimizer"):
            _parsed(f"--blockwise-{name}")


@pytest.mark.parametrize("text", ["{emb: 2}", "no/such/file.json", "3"])
def test_bad_json_is_an_error(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A typing mistake would be found after the model is built, or never."""
    with pytest.raises(SystemExit):
        _parsed("--blockwise-optimizer", "BlockwiseAdamW", "--blockwise-lr-multipliers", text)
    assert text in capsys.readouterr().err


def test_without_megatron_lm_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error would blame a missing module and not say where it comes from."""
    from megatron_patch.pretrain import patch_training

    monkeypatch.setitem(sys.modules, "megatron.training", None)
    with pytest.raises(ImportError, match="Megatron-LM repository"):
        patch_training()


def test_another_version_of_megatron_lm_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    """A renamed factory would leave the stock optimizer in place."""
    from megatron_patch.pretrain import patch_training

    for name in ("megatron.training", "megatron.training.training"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    with pytest.raises(ImportError, match="has no function"):
        patch_training()
