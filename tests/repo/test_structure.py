# SPDX-License-Identifier: Apache-2.0
"""The shape of the code: imports go one way, files stay short, public names are documented and typed."""

import ast
import subprocess
import sys

import pytest

from tests.helpers import ROOT

PACKAGE = sorted((ROOT / "ds_blockwise").glob("*.py"))
SOURCES = sorted(
    p for folder in ("ds_blockwise", "megatron_patch", "launch", "tests") for p in (ROOT / folder).glob("*.py")
)

# lower lines may import from the ones above, never the other way round
ORDER = [
    "roles",
    "name_rules",
    "naming",
    "ratios",
    "policy",
    "layout",
    "blocks",
    "table",
    "reduce",
    "update",
    "kernels",
    "self_check",
    "cpp_build",
    "cpp_kernels",
    "triton_plan",
    "triton_batch",
    "triton_update",
    "triton_sums",
    "triton_kernels",
    "fused_kernels",
    "backends",
    "settings",
    "work",
    "role_sums",
    "label_draws",
    "checkpoint_manifest",
    "sharpness_report",
    "sharpness",
    "telemetry",
    "auto_multipliers",
    "state_record",
    "foreign_state",
    "stored_state",
    "type_sums",
    "measuring",
    "optimizer",
    "adamw",
    "adam_mini",
    "hosting",
    "sharpness_engine",
    "stages",
    "schedules",
    "report",
    "shard_roles",
    "module_facts",
    "readers",
    "tagging",
    "verify",
    "checkpoint_files",
    "portable",
    "deepspeed_folder",
    "deepspeed_files",
    "deepspeed_portable",
    "deepspeed_universal",
    "refusals",
    "deepspeed_checks",
    "deepspeed_save",
    "deepspeed_checkpoint",
    "deepspeed_pipeline",
    "deepspeed_autotp",
    "deepspeed_telemetry",
    "deepspeed_host",
    "import_hook",
    "__init__",
    "config_files",
    "model_shape",
    "run_config",
    "engine_config",
    "run_check",
    "plan_memory",
    "plan",
    "model_source",
    "cli_checkpoint",
    "plan_plot",
    "sharpness_plot",
    "measure_files",
    "cli_sharpness",
    "cli_plan",
    "cli",
]
ALLOWED = {
    "torch.distributed": {
        "reduce",
        "hosting",
        "deepspeed_autotp",
        "deepspeed_checks",
        "deepspeed_host",
        "deepspeed_portable",
        "deepspeed_save",
    },
    "deepspeed": {
        "deepspeed_files",
        "deepspeed_portable",
        "deepspeed_folder",
        "deepspeed_universal",
        "deepspeed_save",
        "deepspeed_checkpoint",
        "deepspeed_host",
    },
    "megatron": set(),
    "megatron_patch": set(),
    "transformers": set(),
    "apex": set(),  # by importlib in fused_kernels: optional packages without types
    "transformer_engine": set(),
    "yaml": {"config_files", "run_config"},  # an extra: only the command line and the launchers read YAML
    "triton": {"triton_update", "triton_sums", "triton_kernels"},
}


def imports(path):
    """Every module that a file imports, at any depth of its code."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_file_has_its_place_in_the_picture():
    """A new file must be put somewhere, or the direction of imports means nothing."""
    assert {p.stem for p in PACKAGE} == set(ORDER)


@pytest.mark.parametrize("path", PACKAGE, ids=lambda p: p.name)
def test_imports_only_go_up_the_picture(path):
    """Layout that knew tensors, or mathematics that knew ranks, could not be tested by themselves any more."""
    own = ORDER.index(path.stem)
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "ds_blockwise" and len(parts) > 1 and parts[1] in ORDER:
            assert ORDER.index(parts[1]) < own, f"{path.name} imports {name}"


@pytest.mark.parametrize("path", PACKAGE, ids=lambda p: p.name)
def test_hosts_and_communication_stay_in_their_files(path):
    """`pip install ds_blockwise` needs torch alone, and only reduce.py decides what travels."""
    for name in imports(path):
        for package, files in ALLOWED.items():
            if name == package or name.startswith(package + "."):
                assert path.stem in files, f"{path.name} imports {name}"


def test_megatron_core_is_imported_by_its_own_folders_only():
    """Everything that knows Megatron lives in megatron_patch/ and launch/."""
    for path in SOURCES:
        if path.parent.name == "ds_blockwise":
            assert not any(n == "megatron" or n.startswith("megatron.") for n in imports(path)), path


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_files_are_short_and_licensed(path):
    """At most 400 lines: a file that one person can hold in mind."""
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 400, f"{len(lines)} lines"
    assert any("SPDX-License-Identifier: Apache-2.0" in line for line in lines[:2])


@pytest.mark.parametrize("path", PACKAGE, ids=lambda p: p.name)
def test_public_names_are_documented(path):
    """Users read docstrings; a public name without one is not finished."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path.name}: {node.name}"


def test_no_path_of_a_machine_is_in_the_sources():
    """Someone else's home folder in a file fails on every other machine."""
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        for word in ("/home" + "/", "/root" + "/", "/work" + "/"):
            assert word not in text, f"{path}: {word}"


def test_any_module_may_be_imported_first():
    """Importing DeepSpeed imports our host file; a module that brings DeepSpeed in must not be needed by it."""
    pytest.importorskip("deepspeed", reason="needs DeepSpeed")
    script = """
import importlib, os, sys, torch
for name in sys.argv[1:]:
    if (child := os.fork()) == 0:
        importlib.import_module("ds_blockwise." + name)
        os._exit(0 if hasattr(torch.optim, "BlockwiseAdamW") else 1)
    assert os.waitpid(child, 0)[1] == 0, name
"""
    names = sorted(ALLOWED["deepspeed"])
    command = [sys.executable, "-c", script, *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
