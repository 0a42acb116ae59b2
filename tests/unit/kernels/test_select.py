# SPDX-License-Identifier: Apache-2.0
"""Which backend steps which tensors, what is said about it, and what a step costs in Python."""

import os
import shutil
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from ds_blockwise import BlockwiseAdamMini, BlockwiseAdamW, tag_parameters
from ds_blockwise.blocks.segment_table import Placement
from ds_blockwise.kernels import select as backends
from ds_blockwise.kernels.base import ReferenceKernels
from ds_blockwise.kernels.select import kernels_for
from ds_blockwise.kernels.self_check import disagreement
from ds_blockwise.optimizers.registry import OPTIMIZERS
from ds_blockwise.optimizers.second_moment import per_block
from ds_blockwise.parallel.reduce import LOCAL
from tests.unit.optimizers.test_base import feed, tiny

BOTH = list(OPTIMIZERS.values())
CPU = torch.device("cpu")
USER = """
    import torch
    from ds_blockwise import BlockwiseAdamMini, tag_parameters

    model = torch.nn.ModuleDict({"embedding": torch.nn.Embedding(8, 4), "mlp": torch.nn.Linear(4, 4)})
    tag_parameters(model, rules=[{"match": "mlp", "role": "ffn"}, {"match": "emb", "role": "embedding"}])
    for _ in range(2):
        optimizer = BlockwiseAdamMini(model.parameters(), lr=0.1, backend=BACKEND)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    print("stepped by", optimizer.backend_of(next(model.parameters())))
"""


def as_user(tmp_path, backend, *, timeout=240, **environment):
    """A user's script in a process of its own, with its own cache of compiled kernels."""
    code = f"BACKEND = {backend!r}\n" + textwrap.dedent(USER)
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"TORCH_EXTENSIONS_DIR": str(tmp_path)} | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def test_cpu_tensors_are_stepped_by_compiled_kernels():
    """A user with a compiler would get the slow reference and never know."""
    model = tiny()
    optimizer = BlockwiseAdamMini(model.parameters())
    assert optimizer.backend_of(next(model.parameters())) == "cpp"


def test_without_a_compiler_the_reference_steps_and_says_so_once(tmp_path):
    """An image without g++ is common; training must go on, and its owner must learn why it is slow."""
    done = as_user(tmp_path, "auto", CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    assert "stepped by reference" in done.stdout
    assert done.stderr.count("reference backend, which is several times slower") == 1
    assert "no C++ compiler 'no-such-compiler'" in done.stderr


def test_asking_for_cpp_without_a_compiler_is_an_error(tmp_path):
    """Someone who asked for the fast kernels would train with the slow ones."""
    done = as_user(tmp_path, "cpp", CXX="no-such-compiler")
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError")
    assert "'no-such-compiler'" in last
    assert "install g++" in last


def test_a_compiler_that_fails_is_reported_with_its_own_words(tmp_path):
    """An old or broken compiler is as common as none."""
    broken = tmp_path / "broken-c++"
    broken.write_text("#!/bin/sh\necho 'fatal error: this compiler is too old' >&2\nexit 1\n")
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    done = as_user(tmp_path / "cache", "auto", CXX=str(broken))
    assert done.returncode == 0, done.stderr
    assert "stepped by reference" in done.stdout
    assert "this compiler is too old" in done.stderr
    assert "this compiler is too old" in as_user(tmp_path / "cache", "cpp", CXX=str(broken)).stderr


def test_a_killed_build_does_not_hang_the_next_start(tmp_path):
    """torch's own lock file stays behind when a job is killed, and every later start waits for it for ever."""
    from ds_blockwise.kernels.cpp.build import _cache_key

    folder = tmp_path / f"ds_blockwise_cpu_{_cache_key()}" / "build"
    folder.mkdir(parents=True)
    (folder / "lock").touch()
    done = as_user(tmp_path, "cpp")
    assert "stepped by cpp" in done.stdout, done.stderr
    assert done.stderr.count("compiling the CPU kernels") == 1


def test_another_environment_uses_what_is_built(tmp_path):
    """Two environments in one home would build the same sources in turn, at each start, waiting for each other."""
    from ds_blockwise.kernels.cpp.build import library, library_path

    library()
    built = library_path()
    cache = tmp_path / "cache"
    (cache / built.parent.name).mkdir(parents=True)
    copy = shutil.copy(built, cache / built.parent.name / built.name)
    before = copy.stat()
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(Path(backends.__file__).parent, elsewhere / "ds_blockwise")
    bare = f"{elsewhere / 'nothing'}"  # no compiler and no ninja there
    done = as_user(cache, "cpp", PYTHONPATH=str(elsewhere), PATH=bare)
    assert "stepped by cpp" in done.stdout, done.stderr
    assert "compiling" not in done.stderr
    assert copy.stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize("backend", ["cuda", "c++", 1, None])
def test_unknown_backends_are_refused(backend):
    """A misspelt backend would be ignored."""
    with pytest.raises(ValueError, match=r"backend must be one of auto, cpp, triton, apex, te, reference, got"):
        BlockwiseAdamW(tiny().parameters(), backend=backend)


def test_triton_is_refused_where_it_cannot_run(monkeypatch):
    """Asking for a GPU kernel on a CPU tensor must not end in another backend."""
    monkeypatch.setattr(backends, "_triton_unavailable", lambda device: f"no kernels for {device}")
    model = tiny()
    optimizer = BlockwiseAdamW(model.parameters(), backend="triton")
    feed(model, 0)
    with pytest.raises(ValueError, match=r'backend "triton" cannot be had: no kernels for cpu'):
        optimizer.step()


@pytest.mark.parametrize("backend", ["cpp", "triton", "reference"])
def test_working_backends_pass_their_check(backend):
    """A check that good kernels fail would put every GPU on the slow reference."""
    assert disagreement(kernels_for(backend, CPU), CPU) is None


class WrongKernels(ReferenceKernels):
    """Off by a thousandth, as after a wrong reduction."""

    name = "wrong"

    def step_(self, items):
        for item in items:
            item.grad = item.grad * 1.001
        super().step_(items)


def test_wrong_kernels_are_found_before_they_step_anything(monkeypatch, caplog):
    """A driver or compiler that nobody has tested must not train with wrong updates."""
    assert "differ from the reference by" in disagreement(WrongKernels(), CPU)
    monkeypatch.setattr(backends, "_triton_unavailable", lambda device: None)
    monkeypatch.setattr(backends, "_triton", WrongKernels)
    # a device that is neither known nor cached yet, so that "auto" asks for Triton; the check itself runs on the CPU
    monkeypatch.setattr(backends, "disagreement", lambda kernels, device: disagreement(kernels, CPU))
    assert kernels_for("auto", torch.device("meta")).name == "reference"
    assert "the wrong kernels differ from the reference" in caplog.text
    backends._chosen.cache_clear()


def test_kernels_that_do_not_compile_are_replaced_and_said(monkeypatch, caplog):
    """Machines with a GPU and no C compiler are common; Triton needs one."""

    def broken(kernels, device):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(backends, "_triton_unavailable", lambda device: None)
    monkeypatch.setattr(backends, "_triton", WrongKernels)
    monkeypatch.setattr(backends, "disagreement", broken)
    assert kernels_for("auto", torch.device("meta")).name == "reference"
    assert "RuntimeError: Failed to find C compiler" in caplog.text
    backends._chosen.cache_clear()


def test_cpp_refuses_tensors_that_are_not_on_the_cpu():
    """Raw addresses of another device would be a crash without a word."""
    model = tiny().to("meta")
    tag_parameters(model)
    optimizer = BlockwiseAdamMini(model.parameters(), backend="cpp")
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with pytest.raises(ValueError, match='backend "cpp" steps CPU tensors, but this one is on meta'):
        optimizer.step()


@pytest.mark.parametrize("cls", BOTH)
def test_state_on_another_device_is_noticed(cls):
    """A state that was moved by hand would be read through a wrong address."""
    model = tiny()
    optimizer = cls(model.parameters(), backend="cpp")
    feed(model, 0)
    optimizer.step()
    first = next(model.parameters())
    optimizer.state[first]["exp_avg"] = optimizer.state[first]["exp_avg"].to("meta")
    with pytest.raises(ValueError, match="its state on meta"):
        optimizer.step()


@pytest.mark.parametrize(
    "change", [lambda t: t.bfloat16(), lambda t: torch.cat([t.flatten()] * 2), lambda t: t.flatten()[:1]]
)
@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("cls", BOTH)
def test_state_that_does_not_fit_is_refused(cls, key, change):
    """Checkpoint tools write into ``state``; other dtypes or sizes would be read as garbage or beyond the end."""
    model = tiny()
    optimizer = cls(model.parameters(), backend="cpp")
    feed(model, 0)
    optimizer.step()
    largest = max(model.parameters(), key=torch.numel)
    value = optimizer.state[largest][key]
    changed = change(value)
    optimizer.state[largest][key] = changed
    per_block(optimizer.state[largest]["exp_avg_sq"])  # or it would be taken for a loaded one
    if key == "exp_avg" and changed.dtype == torch.bfloat16:
        optimizer.step()  # what momentum_dtype allows
        return
    with pytest.raises(ValueError, match=r"the state of a torch.float32 parameter .* exp_avg_sq torch.float32"):
        optimizer.step()


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_autograd_notices_the_update(backend):
    """A backward through values that a step has replaced must fail, as with every torch optimizer."""
    model = tiny()
    optimizer = BlockwiseAdamW(model.parameters(), backend=backend)
    loss = sum((p * p).sum() for p in model.parameters())
    feed(model, 0)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("cls", BOTH)
def test_the_number_of_threads_does_not_change_a_bit(cls):
    """A resume on a machine with another number of cores would not be bitwise."""
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            model = torch.nn.ModuleDict({"embedding": torch.nn.Embedding(3000, 120), "mlp": torch.nn.Linear(700, 900)})
            feed(model, 1)
            for p in model.parameters():
                torch.nn.init.constant_(p, 0.5)
            rules = [{"match": "emb", "role": "embedding"}, {"match": "mlp", "role": "ffn", "granularity": "tensor"}]
            tag_parameters(model, rules=rules)
            optimizer = cls(model.parameters(), backend="cpp")
            optimizer.step()
            optimizer.step()
            results.append([p.detach().clone() for p in model.parameters()])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cls", BOTH)
def test_a_16_bit_copy_is_written_in_the_same_pass(cls, dtype, backend):
    """Master weights and model would drift apart."""
    model = tiny()
    optimizer = cls(model.parameters(), backend=backend)
    copies = {p: torch.full_like(p, 7.0, dtype=dtype) for p in model.parameters()}
    for p, copy in copies.items():
        optimizer.write_copy(p, copy)
    feed(model, 0)
    optimizer.step()
    for p, copy in copies.items():
        assert torch.equal(copy, p.to(dtype))


def test_a_copy_that_does_not_fit_is_refused():
    """Raw writes into a smaller tensor would corrupt memory."""
    param = next(tiny().parameters())
    optimizer = BlockwiseAdamW([param])
    for wrong in (torch.empty(3, dtype=torch.bfloat16), torch.empty_like(param)):
        with pytest.raises(ValueError, match="must be a contiguous bf16 or fp16 tensor of that shape"):
            optimizer.write_copy(param, wrong)


# ------------------------------------------------------------------------------- Python per step


class Llama2B(torch.nn.Module):
    """Names and shapes of a LLaMA of 2.0B parameters."""

    HIDDEN, FFN, LAYERS, VOCAB = 2560, 6912, 24, 32000

    def __init__(self):
        from transformers import LlamaConfig, LlamaForCausalLM

        super().__init__()
        config = LlamaConfig(
            hidden_size=self.HIDDEN,
            intermediate_size=self.FFN,
            num_hidden_layers=self.LAYERS,
            num_attention_heads=20,
            vocab_size=self.VOCAB,
        )
        with torch.device("meta"):
            self.model = LlamaForCausalLM(config)


def milliseconds(optimizer, monkeypatch):
    """Shortest of 100 steps whose arithmetic is left out; the machine may be busy."""
    kernels = kernels_for("cpp", torch.device("cpu"))
    monkeypatch.setattr(kernels, "_step", lambda *arguments: None)
    times = []
    for _ in range(100):
        start = time.perf_counter()
        optimizer.step()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


@pytest.mark.parametrize("cls", BOTH)
def test_a_step_of_llama_2b_costs_less_than_a_millisecond_of_python(cls, monkeypatch):
    """Whole tensors are the worst case: one entry per parameter."""
    model = Llama2B()
    assert 1.9e9 < sum(p.numel() for p in model.parameters()) < 2.2e9
    tag_parameters(model)
    memory = torch.empty(max(p.numel() for p in model.parameters()))  # shared by all: nothing reads it
    params = []
    for meta in model.parameters():
        param = torch.nn.Parameter(memory[: meta.numel()].view(meta.shape))
        param.block_spec, param.block_shard = meta.block_spec, meta.block_shard
        param.grad = param.detach()
        params.append(param)
    optimizer = cls(params, backend="cpp")
    for param in params:
        table = optimizer.binding_of(param).table
        second = torch.zeros(table.num_blocks) if table.shares_second_moment else param.detach()
        optimizer.state[param] = {"step": 0, "exp_avg": param.detach(), "exp_avg_sq": second}
    assert milliseconds(optimizer, monkeypatch) < 1.0


@pytest.mark.parametrize("cls", BOTH)
def test_one_rank_of_64_builds_its_tables_quickly_and_steps_in_no_time(cls, monkeypatch):
    """Set-up of every rank of a large job, and the Python of a step, must not grow with the model."""
    model = Llama2B()
    tag_parameters(model)
    params = list(model.parameters())
    total = sum(p.numel() for p in params)
    size = -(-total // 64)
    low, high = 31 * size, 32 * size
    start = time.perf_counter()
    placements, offset = [], 0
    for p in params:
        end = offset + p.numel()
        first, last = max(offset, low), min(end, high)
        cuts = tuple(k * size - offset for k in range(1, 64) if offset < k * size < end)
        at, held = (first - low, last - first) if first < last else (min(max(offset - low, 0), size), 0)
        placements.append(Placement(p.block_spec, None, at, max(first - offset, 0) if held else 0, held, cuts))
        offset = end
    flat = torch.nn.Parameter(torch.empty(size))
    flat.grad = torch.empty(size)
    optimizer = cls([flat], backend="cpp")
    table = optimizer.bind(flat, placements, LOCAL)
    assert time.perf_counter() - start < 2.0
    assert table.shares_second_moment == (table.num_blocks > 0)
    assert milliseconds(optimizer, monkeypatch) < 1.0
