# SPDX-License-Identifier: Apache-2.0
"""`ds-blockwise blocks`: what a user sees before training."""

import json

import pytest

from ds_blockwise.cli.main import main
from tests.helpers import ROOT

transformers = pytest.importorskip("transformers", reason="models are built from Hugging Face configs")
pytestmark = pytest.mark.usefixtures("ends_process_groups")


@pytest.fixture
def llama(tmp_path):
    transformers.LlamaConfig(
        hidden_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=80,
        vocab_size=101,
        num_hidden_layers=1,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path)
    return tmp_path


def test_the_table_of_a_hugging_face_config(llama, capsys):
    """A folder with a config.json is enough; no weights are loaded."""
    assert main(["blocks", str(llama)]) == 0
    out = capsys.readouterr().out
    (query,) = [line.split() for line in out.splitlines() if "q_proj" in line]
    assert query == ["model.layers.0.self_attn.q_proj.weight", "48x48", "query", "qk", "1", "1", "head", "4", "9,232"]
    assert "total: 28,272 parameters, 632 blocks" in out


def test_equal_layers_share_lines_unless_all_are_asked_for(llama, capsys):
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    assert main(["blocks", str(llama)]) == 0
    short = capsys.readouterr().out.splitlines()
    assert main(["blocks", str(llama), "--full"]) == 0
    full = capsys.readouterr().out.splitlines()
    assert len(full) - len(short) == 2 * 9
    assert sum("model.layers.0-2." in line for line in short) == sum("model.layers.2." in line for line in full) == 9
    assert short[-1] == full[-1]


def test_json_has_every_column_and_the_totals(llama, capsys):
    """For scripts; stdout must be JSON and nothing else."""
    assert main(["blocks", str(llama / "config.json"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    row = next(r for r in report["parameters"] if "k_proj" in r["fqn"])
    assert row == {
        "fqn": "model.layers.0.self_attn.k_proj.weight",
        "shape": [24, 48],
        "role": "key",
        "block_type": "qk",
        "lr_multiplier": 1.0,
        "weight_decay_multiplier": 1.0,
        "granularity": "head",
        "num_blocks": 2,
        "numel": 24 * 48,
        "state_bytes": 4 * (24 * 48 + 2),
        "is_measured": False,
        "transfer": 1.0,
        "lr_multiplier_end": None,
        "betas": [None, None],
        "norm_place": None,
    }
    assert report["totals"]["adam_mini_state_bytes"] == 4 * (28272 + 632)


def test_settings_come_from_a_deepspeed_json(llama, tmp_path, capsys):
    """The table must show what the training run will do."""
    config = tmp_path / "ds.json"
    config.write_text(
        json.dumps({"optimizer": {"type": "BlockwiseAdamW", "params": {"lr": 1, "lr_multipliers": {"value": 2.5}}}})
    )
    assert main(["blocks", str(llama), "--ds-config", str(config), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["parameters"]
    assert {r["role"]: r["lr_multiplier"] for r in rows}["value"] == 2.5


def test_the_main_jobs_own_model(capsys):
    """The fused QKV weight has three rows: query and key per head, value per row."""
    pytest.importorskip("megatron.core", reason="needs Megatron-core")
    path = str(ROOT / "configs/model/tiny.yaml")
    settings = str(ROOT / "configs/deepspeed/blockwise_adam_mini.json")
    assert main(["blocks", path, "--ds-config", settings, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["parameters"]
    fused = {r["role"]: r["num_blocks"] for r in rows if "layers.0.self_attention.linear_qkv" in r["fqn"]}
    assert fused == {"query": 4, "key": 2, "value": 64}


def test_verify_runs_a_small_model_of_the_same_attention(llama, capsys):
    """The table says what was read; --verify whether the model computes it that way."""
    assert main(["blocks", str(llama), "--verify"]) == 0
    assert "verified: the model computes attention as its 3 query, key and value tensors" in capsys.readouterr().out
    assert main(["blocks", str(llama), "--verify", "--json"]) == 0
    verified = json.loads(capsys.readouterr().out)["verified"]
    assert verified["checks"] == 4 and "model.layers.0.self_attn.k_proj.weight" in verified["parameters"]


def test_verify_needs_no_memory_for_a_large_model(tmp_path, capsys):
    """Layers, vocabulary and FFN are cut down; a full model of this config has 60 layers and three billion weights."""
    transformers.Qwen3MoeConfig(
        hidden_size=256,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        num_hidden_layers=60,
        num_experts=32,
        moe_intermediate_size=2048,
        vocab_size=100_000,
        pad_token_id=99_999,
        architectures=["Qwen3MoeForCausalLM"],
    ).save_pretrained(tmp_path)
    rules = [{"match": r"layers\.59\.mlp\.gate", "role": "other"}]
    config = tmp_path / "ds.json"
    config.write_text(json.dumps({"optimizer": {"type": "BlockwiseAdamW", "params": {"rules": rules}}}))
    assert main(["blocks", str(tmp_path), "--verify", "--ds-config", str(config)]) == 0
    assert "its 12 query, key and value tensors" in capsys.readouterr().out


def test_verify_finds_a_wrong_rule(tmp_path, capsys):
    """A layout that fits the shape and is wrong: exit status 2, the weight and the rule to write."""
    transformers.Phi3Config(
        hidden_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=80,
        vocab_size=101,
        pad_token_id=0,
        num_hidden_layers=1,
        architectures=["Phi3ForCausalLM"],
    ).save_pretrained(tmp_path)
    rules = [{"match": "qkv_proj", "role": "qkv", "layout": "grouped", "num_heads": 4, "num_kv_heads": 2}]
    config = tmp_path / "ds.json"
    config.write_text(json.dumps({"optimizer": {"type": "BlockwiseAdamW", "params": {"rules": rules}}}))
    arguments = ["blocks", str(tmp_path), "--ds-config", str(config)]
    assert main(arguments) == 0, "the shape alone does not tell"
    assert main([*arguments, "--verify"]) == 2
    error = capsys.readouterr().err
    assert "qkv_proj.weight" in error and '"layout": "..."' in error and "Traceback" not in error


def test_verify_of_the_main_jobs_own_model(capsys):
    """Megatron-core's linear_qkv, on the CPU, with the file's heads."""
    pytest.importorskip("megatron.core", reason="needs Megatron-core")
    assert main(["blocks", str(ROOT / "configs/model/tiny.yaml"), "--verify"]) == 0
    assert "its 1 query, key and value tensors" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["MODEL", "--ds-config", "absent.json"], "absent.json"),
        (["MODEL", "--ds-config", "BROKEN"], "a readable JSON file"),
        (["MODEL", "--ds-config", "ADAMW"], "is not one of BlockwiseAdamW, BlockwiseAdamMini"),
        (["MODEL", "--ds-config", "MISSPELT"], "did you mean 'granularity'?"),
    ],
)
def test_mistakes_are_one_line_and_exit_status_2(llama, tmp_path, capsys, arguments, words):
    """No traceback for a user's mistake."""
    files = {"BROKEN": "{", "ADAMW": '{"optimizer": {"type": "AdamW"}}'}
    files["MISSPELT"] = '{"optimizer": {"type": "BlockwiseAdamW", "params": {"granularty": {}}}}'
    for name, text in files.items():
        (tmp_path / f"{name}.json").write_text(text)
    arguments = [str(llama) if a == "MODEL" else str(tmp_path / f"{a}.json") if a in files else a for a in arguments]
    assert main(["blocks", *arguments]) == 2
    captured = capsys.readouterr()
    assert words in captured.err and not captured.out and "Traceback" not in captured.err
