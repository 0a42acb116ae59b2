# SPDX-License-Identifier: Apache-2.0
"""``ds-blockwise check RUN``: passes on every run file that is shipped, and names the cause on broken ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ds_blockwise.cli.main import main
from ds_blockwise.runs.check import check_run_file
from tests.helpers import ROOT
from tests.helpers.run_files import MISSING, project, put, sound

RUNS = sorted((ROOT / "configs" / "run").rglob("*.yaml"))
LLAMA_2B = {n: ROOT / "configs" / "run" / "llama_2b" / f"nodes_{n}.yaml" for n in (1, 2, 4, 8, 16, 32, 64)}


@pytest.mark.parametrize("path", RUNS, ids=lambda p: str(p.relative_to(ROOT / "configs" / "run")))
def test_every_shipped_run_is_in_order(path: Path) -> None:
    """A team starts from these files."""
    run, problems = check_run_file(path)
    assert problems.lines == []
    assert run is not None
    assert run.model_file.is_file() and run.deepspeed_file.is_file()


def test_the_recipes_are_the_papers() -> None:
    """OpenWebText 50k x 300 x 1024, MiniPile 30k x 300 x 512, C4 30k x 512 x 256, and their warm-ups and floors."""
    found = {}
    for path in RUNS:
        run, _ = check_run_file(path)
        if run is not None and path.parent.name == "run" and not path.stem.startswith(("tiny", "compare")):
            t = run.training
            facts = (t.steps, t.global_batch_size, run.shape.sequence_length, t.warmup_steps)
            found.setdefault(path.stem.rsplit("_", 1)[1], set()).add(facts)
            params = run.deepspeed["optimizer"]["params"]
            fraction = 10 if path.stem.endswith("c4") else 20
            assert run.deepspeed["scheduler"]["params"]["min_lr"] == pytest.approx(params["lr"] / fraction)
            assert (params["betas"], params["weight_decay"], params["eps"]) == ([0.9, 0.95], 0.1, 1e-8)
            assert run.deepspeed["gradient_clipping"] == 1.0
    assert found == {
        "openwebtext": {(50_000, 300, 1024, 1000)},
        "minipile": {(30_000, 300, 512, 600)},
        "c4": {(30_000, 512, 256, 1000)},
    }


def test_2b_is_the_same_training_at_every_number_of_nodes() -> None:
    """Only the arrangement differs: model, data, batch, length, rate and seed are those of one node."""
    trainings = {}
    for nodes, path in LLAMA_2B.items():
        run, problems = check_run_file(path)
        assert run is not None and not problems
        assert (run.cluster.nodes, run.cluster.gpus_per_node) == (nodes, 8)
        t = run.training
        same = (run.shape, run.data, run.deepspeed_file, t.steps, t.global_batch_size, t.warmup_steps, t.seed)
        trainings[nodes] = same
        assert path.read_text(encoding="utf-8").count("#") >= 2, "the reason stands in the file"
    assert all(value == trainings[1] for value in trainings.values())


# ------------------------------------------------------------------------------------- broken ones


def test_the_sound_one_passes(tmp_path: Path) -> None:
    _, problems = check_run_file(project(tmp_path, *sound()))
    assert problems.lines == []


# which file, dotted key, wrong value -> words of the message; MISSING removes the key
BROKEN: dict[str, tuple[str, str, Any, tuple[str, ...]]] = {
    "batch arithmetic": (
        "run",
        "training.global_batch_size",
        30,
        ("run.yaml", "global_batch_size = 30", "multiple of 16", "4 data-parallel ranks"),
    ),
    "tensor size and processes": (
        "run",
        "parallel.tensor",
        3,
        ("parallel.tensor = 3", "divisor of the number of processes, 8"),
    ),
    "heads by tensor size": ("model", "num_heads", 5, ("num_heads = 5", "multiple of the tensor")),
    "FFN by tensor size": ("model", "ffn_hidden_size", 129, ("ffn_hidden_size = 129", "multiple of the tensor")),
    "vocabulary by tensor size": ("model", "vocab_size", 257, ("vocab_size = 257", "multiple of the tensor")),
    "query groups": ("model", "num_kv_heads", 3, ("num_kv_heads = 3", "divisor of num_heads")),
    "stated size": (
        "model",
        "num_parameters",
        5,
        ("num_parameters = 5", "what the sizes amount to", "state that number"),
    ),
    "unknown architecture": ("model", "architecture", "llama3", ("architecture = 'llama3'", "llama or gpt2")),
    "pipeline": (
        "run",
        "parallel.pipeline",
        2,
        ("pipeline = 2", "not supported by this launcher", "parallel.tensor"),
    ),
    "warm-up longer than the run": ("run", "training.warmup_steps", 100, ("warmup_steps = 100", "fewer than")),
    "misspelt key": ("run", "training.warmup_step", 10, ("training.warmup_step", "did you mean 'warmup_steps'")),
    "missing key": ("run", "training.steps", MISSING, ("training.steps", "add this required key")),
    "wrong type": ("run", "training.micro_batch_size", "4 or 5", ("micro_batch_size = '4 or 5'", "a whole number")),
    "share of a blend": ("run", "data.blend", ["data/a 0.7", "data/b none"], ("data.blend = 'data/b none'",)),
    "no nodes": ("run", "cluster.nodes", 0, ("cluster.nodes = 0", "at least 1")),
    "checkpointing": ("run", "training.activation_checkpointing", "ful", ("activation_checkpointing = 'ful'", "full")),
    "class of the model": ("run", "model_class", "hybird", ("model_class = 'hybird'", "gpt, hybrid", "mean 'hybrid'")),
    "model file": ("run", "model", "modell.yaml", ("modell.yaml", "readable YAML file")),
    "JSON file": ("run", "deepspeed", "dss.json", ("dss.json", "readable JSON file")),
    "batch in the JSON": (
        "engine",
        "train_batch_size",
        32,
        ("train_batch_size = 32", "training.global_batch_size in", "run.yaml"),
    ),
    "misspelt key of the JSON": ("engine", "zero_optimisation", {}, ("zero_optimisation", "'zero_optimization'")),
    "ZeRO-3 with tensor parallelism": (
        "engine",
        "zero_optimization.stage",
        3,
        ("stage = 3", "0, 1 or 2"),
    ),
    "unknown optimizer": (
        "engine",
        "optimizer.type",
        "BlockwiseAdamMinni",
        ("optimizer.type = 'BlockwiseAdamMinni'", "did you mean 'BlockwiseAdamMini'?"),
    ),
    "unknown schedule": (
        "engine",
        "scheduler.type",
        "BlockwiseCosinLR",
        ("scheduler.type = 'BlockwiseCosinLR'", "did you mean 'BlockwiseCosineLR'?"),
    ),
    "key of ZeRO": ("engine", "zero_optimization.stge", 2, ("zero_optimization.stge = 2", "did you mean 'stage'?")),
    "key of bf16": ("engine", "bf16.enaled", True, ("bf16.enaled = True", "did you mean 'enabled'?")),
    "key of the optimizer": ("engine", "optimizer.parms", {}, ("optimizer.parms = {}", "did you mean 'params'?")),
    "key of the schedule": ("engine", "scheduler.params.min_lrr", 0, ("params.min_lrr = 0", "did you mean 'min_lr'?")),
    "key of a section by hand": (
        "engine",
        "checkpoint",
        {"tag_validatoin": "Fail"},
        ("checkpoint.tag_validatoin", "did you mean 'tag_validation'?"),
    ),
    "unknown key": ("engine", "qqqqq", 1, ("qqqqq = 1", "DeepSpeed's keys", "remove it")),
    "misspelt clipping": ("engine", "gradient_cliping", 1.0, ("did you mean 'gradient_clipping'?",)),
    "negative clipping": ("engine", "gradient_clipping", -1, ("gradient_clipping = -1", "a finite number, at least 0")),
    "clipping to NaN": ("engine", "gradient_clipping", float("nan"), ("gradient_clipping = nan", "a finite number")),
    "clipping to text": ("engine", "gradient_clipping", "x", ("gradient_clipping = 'x'", "a finite number")),
    "no section": ("engine", "zero_optimization", None, ("zero_optimization = None", "an object")),
    "removed from DeepSpeed": ("engine", "sparse_gradients", True, ("sparse_gradients = True", "removed")),
    "text for a flag": ("engine", "bf16.enabled", "true", ("bf16.enabled = 'true'", "true or false")),
    "wrong kind": ("engine", "prescale_gradients", 1, ("prescale_gradients = 1", "true or false")),
    "ZeRO stage": ("engine", "zero_optimization.stage", 4, ("zero_optimization.stage = 4", "0, 1, 2 or 3")),
    "two precisions": ("engine", "fp16", {"enabled": True}, ("bf16, fp16", "one precision")),
    "no optimizer": ("engine", "optimizer", MISSING, ("optimizer", "BlockwiseAdamMini", "add it")),
    "unknown setting": ("engine", "optimizer.params.lr_mult", {}, ("lr_mult", "did you mean")),
    "unknown block type": ("engine", "optimizer.params.lr_multipliers", {"embd": 1}, ("embd", "emb")),
    "betas": ("engine", "optimizer.params.betas", [0.9, 1.0], ("betas[1]", "< 1")),
    "floor above the peak": ("engine", "scheduler.params.min_lr", 1e-2, ("min_lr (0.01) is above the peak",)),
    "shape of a schedule": (
        "engine",
        "scheduler",
        {"type": "BlockwiseLR", "params": {"shape": "cosin"}},
        ("scheduler.params", "unknown shape 'cosin'", "did you mean 'cosine'"),
    ),
    "phases of a schedule": (
        "engine",
        "scheduler",
        {"type": "BlockwiseWSDLR", "params": {"decay_num_steps": 10**6}},
        ("decay_num_steps (1000000) do not fit into total_num_steps",),
    ),
    "table of a schedule": (
        "engine",
        "scheduler",
        {"type": "BlockwiseLR", "params": {"shape": "table", "table": "nowhere.csv"}},
        ("table 'nowhere.csv' cannot be read from", "No such file"),
    ),
    "key of a shape": (
        "engine",
        "scheduler",
        {"type": "BlockwiseLR", "params": {"shape": "wsd", "decay_shpe": "linear"}},
        ("scheduler.params.decay_shpe", "did you mean 'decay_shape'"),
    ),
    "schedule's warm-up": (
        "engine",
        "scheduler",
        {"type": "BlockwiseLR", "params": {"shape": "cosine", "warmup_fraction": 0.1}},
        ("params.warmup_fraction = 0.1", "training.warmup_steps"),
    ),
    "schedule's length": (
        "engine",
        "scheduler.params.total_num_steps",
        5,
        ("params.total_num_steps = 5", "training.steps"),
    ),
    "NVMe offload": (
        "engine",
        "zero_optimization.offload_optimizer",
        {"device": "nvme", "nvme_path": "."},
        ('"device": "nvme"', '"device": "cpu"'),
    ),
    "offload ratio": (
        "engine",
        "zero_optimization.offload_optimizer",
        {"device": "cpu", "ratio": 0.5},
        ('"ratio": 0.5', "partial offload"),
    ),
    "16-bit masters": ("engine", "bf16.bf16_master_weights_and_grads", True, ("bf16_master_weights_and_grads",)),
    "elastic checkpoints": ("engine", "zero_optimization.elastic_checkpoint", True, ("elastic_checkpoint",)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_run_is_named(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """File, key, value, what is allowed, what to do; exit status 1."""
    which, key, value, words = BROKEN[name]
    parts = dict(zip(("run", "model", "engine"), sound(), strict=True))
    put(parts[which], key, value)
    path = project(tmp_path, **parts)
    assert main(["check", str(path)]) == 1
    printed = capsys.readouterr().out
    assert all(word in printed for word in words), printed
    assert "Traceback" not in printed


@pytest.mark.parametrize("schedule", [{"type": "WarmupLR", "params": {}}, None], ids=["DeepSpeed's", "none"])
def test_a_moving_multiplier_needs_a_schedule_of_ours(
    tmp_path: Path, schedule: dict[str, object] | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """The job's first step would refuse it, after the queue and the start."""

    def folder(name: str) -> Path:
        (tmp_path / name).mkdir()
        return tmp_path / name

    run, model, engine = sound()
    put(engine, "optimizer.params.lr_multipliers", {"norm": {"start": 1.0, "end": 0.25}})
    assert main(["check", str(project(folder("ours"), run, model, engine))]) == 0
    capsys.readouterr()
    put(engine, "scheduler", MISSING if schedule is None else schedule)
    assert main(["check", str(project(folder("other"), run, model, engine))]) == 1
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("1 problem", "no schedule of ds_blockwise", '"BlockwiseCosineLR"')), printed


def test_every_problem_is_listed_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One correction per start of a job on 64 nodes would take a day."""
    run, model, engine = sound()
    put(run, "training.global_batch_size", 30)
    put(model, "vocab_size", 257)
    put(engine, "train_batch_size", 32)
    put(run, "training.activation_checkpointing", "all")
    assert main(["check", str(project(tmp_path, run, model, engine))]) == 1
    printed = capsys.readouterr().out
    assert "4 problem(s)" in printed
    assert all(word in printed for word in ("global_batch_size", "vocab_size", "train_batch_size", "activation_"))


def test_the_command_says_what_a_run_is(capsys: pytest.CaptureFixture[str]) -> None:
    """Sizes and arithmetic that a person can check; also as JSON."""
    assert main(["check", str(LLAMA_2B[8])]) == 0
    printed = capsys.readouterr().out
    assert "1,935,362,560 parameters" in printed
    assert "64 = 8 x 8 h100-80g = tensor 1 x pipeline 1 x data 64" in printed
    assert "512 sequences of 1024 tokens = micro batch 8 x 64 x 1 accumulated" in printed
    assert main(["check", str(LLAMA_2B[8]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == []


def test_no_megatron_and_no_deepspeed_is_needed() -> None:
    """A laptop can check a run for a cluster, and says what it could not look at."""
    code = (
        "import sys\n"
        "from ds_blockwise.cli.main import main\n"
        "sys.modules['deepspeed'] = sys.modules['megatron'] = None\n"
        f"raise SystemExit(main(['check', {str(LLAMA_2B[64])!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "DeepSpeed is not installed here" in done.stdout and "no problems" in done.stdout, done.stdout
