# SPDX-License-Identifier: Apache-2.0
"""What a step and its set-up cost in Python, counted in calls; milliseconds are the benchmarks' business."""

import copy
import gc
import weakref
from dataclasses import replace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ds_blockwise import tag_parameters
from ds_blockwise.blocks.segment_table import Placement
from ds_blockwise.kernels import close_look, step_sets
from ds_blockwise.kernels.cpp import backend
from ds_blockwise.kernels.select import kernels_for
from ds_blockwise.optimizers import base
from ds_blockwise.optimizers.registry import OPTIMIZERS
from ds_blockwise.parallel.reduce import LOCAL
from tests.helpers.counting import count_calls
from tests.helpers.kernel_cases import LOOKS, use_look
from tests.helpers.optimizers import SHORT_NAMES

WITH_LION = [OPTIMIZERS[name] for name in (*SHORT_NAMES, "BlockwiseLion")]


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


def calls_of_a_step(optimizer, monkeypatch):
    """Calls of Python and C functions in a step whose arithmetic is left out."""
    for name in ("_step", "_step_by_sign"):
        monkeypatch.setattr(kernels_for("cpp", torch.device("cpu")), name, lambda *arguments: None)
    optimizer.step()  # the first one makes state and bindings
    return count_calls(optimizer.step)


@pytest.mark.parametrize("cls", WITH_LION)
def test_a_step_of_llama_2b_makes_few_python_calls_per_parameter(cls, monkeypatch):
    """Whole tensors are the worst case: one entry per parameter. About 2 calls each were counted."""
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
        optimizer.state[param] = {"step": 0, "exp_avg": param.detach()}
        if cls.second_moment != "none":
            second = torch.zeros(table.num_blocks) if table.shares_second_moment else param.detach()
            optimizer.state[param]["exp_avg_sq"] = second
    assert calls_of_a_step(optimizer, monkeypatch) < 6 * len(params)


@pytest.mark.parametrize("cls", WITH_LION)
def test_python_of_one_rank_of_64_does_not_grow_with_elements_or_blocks(cls, monkeypatch):
    """Set-up of every rank of a large job, and the Python of a step, must not grow with the model."""
    model = Llama2B()
    tag_parameters(model)
    params = list(model.parameters())
    total = sum(p.numel() for p in params)
    size = -(-total // 64)
    low, high = 31 * size, 32 * size
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
    made = []

    def set_up():
        made.append(cls([flat], backend="cpp"))
        made[-1].bind(flat, placements, LOCAL)

    assert count_calls(set_up) < 1000 * len(params)
    table = made[-1].binding_of(flat).table
    assert table.shares_second_moment == (table.num_blocks > 0)
    assert calls_of_a_step(made[-1], monkeypatch) < 500


def small_model():
    model = torch.nn.ModuleList([torch.nn.Linear(3, 3) for _ in range(8)])
    tag_parameters(model, rules=[{"match": ".", "role": "ffn"}])
    return list(model.parameters())


def give_new_gradients(params):
    for param in params:
        param.grad = torch.randn(param.shape)


@pytest.fixture
def close_looks(monkeypatch):
    """Names of the close looks taken, one after the other."""
    taken = []

    def counted(name):
        look = getattr(step_sets, name)
        monkeypatch.setattr(step_sets, name, lambda *arguments: taken.append(name) or look(*arguments))

    counted("check_stepped")
    counted("check_states")
    return taken


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("cls", WITH_LION)
def test_tensors_are_looked_at_closely_only_when_one_was_replaced(cls, backend, look, close_looks, monkeypatch):
    """Twelve facts of four tensors per parameter cost 3.5 us in every step."""
    use_look(look, monkeypatch)
    params = small_model()
    optimizer = cls(params, backend=backend)

    def looks_of_a_step(change=lambda: None):
        close_looks.clear()
        give_new_gradients(params)
        change()
        optimizer.step()
        return list(close_looks)

    def replace_data():
        params[3].data = params[3].data.clone()

    def replace_state():
        state = optimizer.state[params[3]]
        state["exp_avg"] = state["exp_avg"].clone()

    def replace_gradient():
        params[2].grad.data = params[2].grad.data.t().contiguous().t()

    def leave_one_out():
        params[5].grad = None

    both = ["check_stepped", "check_states"]
    assert looks_of_a_step() == both
    for _ in range(3):
        assert looks_of_a_step() == []
    assert looks_of_a_step(replace_data) == both
    assert looks_of_a_step() == []
    assert looks_of_a_step(lambda: optimizer.set_lr_multipliers({"ffn": 2.0})) == both  # new segment tables
    assert looks_of_a_step() == []
    assert looks_of_a_step(replace_state) == ["check_states"]
    assert looks_of_a_step() == []
    assert looks_of_a_step(replace_gradient) == both
    assert looks_of_a_step() == both  # strides as they were
    assert looks_of_a_step(leave_one_out) == both
    assert looks_of_a_step() == []


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("cls", WITH_LION)
def test_sets_of_tensors_that_take_turns_are_looked_at_closely_once_each(cls, backend, close_looks):
    """Sub-groups of ZeRO-3, groups of layers, experts without a token: each step had another set, and a full check."""
    params = small_model()
    optimizer = cls(params, backend=backend)
    sets = [params[:4], params[4:], params[2:6], params[:1]]

    def looks_of_a_round():
        close_looks.clear()
        looks = []
        for chosen in sets:
            give_new_gradients(params)
            for param in params:
                if not any(param is each for each in chosen):
                    param.grad = None
            optimizer.step()
            looks.append(list(close_looks))
            close_looks.clear()
        return looks

    both = ["check_stepped", "check_states"]
    assert looks_of_a_round() == [both] * 4
    for _ in range(2):
        assert looks_of_a_round() == [[]] * 4
    params[2].data = params[2].data.clone()  # it is in two of the sets
    assert looks_of_a_round() == [both, [], both, []]
    state = optimizer.state[params[0]]
    state["exp_avg"] = state["exp_avg"].clone()
    assert looks_of_a_round() == [["check_states"], [], [], ["check_states"]]
    optimizer.set_lr_multipliers({"ffn": 2.0})  # new segment tables
    assert looks_of_a_round() == [both] * 4
    assert looks_of_a_round() == [[]] * 4
    params[5].data = torch.zeros(7)
    with pytest.raises(ValueError, match=r"has the shape \(7,\) now"):
        looks_of_a_round()


def _counted(module, name, monkeypatch, calls):
    function = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *arguments: calls.append(name) or function(*arguments))


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("cls", WITH_LION)
def test_an_address_is_read_once_and_work_and_rows_are_kept(cls, look, monkeypatch):
    """They were made anew in every step: 1000 tensors of 100 elements took three times as long as their update."""
    calls = []
    use_look(look, monkeypatch)
    _counted(close_look, "DATA_PTR", monkeypatch, calls)
    _counted(backend, "DATA_PTR", monkeypatch, calls)
    _counted(backend, "_new_row", monkeypatch, calls)
    _counted(base, "Work", monkeypatch, calls)
    params = small_model()
    optimizer = cls(params, backend="cpp")

    def calls_of_a_step(change=lambda: None):
        give_new_gradients(params)
        change()
        calls.clear()
        optimizer.step()
        return [calls.count(name) // len(params) for name in ("DATA_PTR", "_new_row", "Work")]

    def replace_state():
        state = optimizer.state[params[3]]
        state["exp_avg"] = state["exp_avg"].clone()

    # of parameter, gradient and one moment or two; the library reads all but the gradient's, which its kernels get
    tensors = 3 if cls.second_moment == "none" else 4
    addresses = {"python": tensors, "compiled": 1}[look]
    assert calls_of_a_step() == [addresses, 1, 1]
    assert calls_of_a_step() == calls_of_a_step() == [addresses, 0, 0]
    assert calls_of_a_step(replace_state)[1:] == [1, 0]
    optimizer.param_groups[0]["lr"] = 0.5
    assert calls_of_a_step() == [addresses, 0, 0]
    assert calls_of_a_step(lambda: optimizer.set_lr_multipliers({"ffn": 2.0})) == [addresses, 1, 1]


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("cls", WITH_LION)
def test_kept_rows_are_those_that_would_be_made_anew(cls, look, monkeypatch):
    """A kernel that is given the address of a tensor that was replaced writes into somebody else's memory."""
    use_look(look, monkeypatch)
    compared, made = [], backend.CppKernels._rows

    def rows_of(kernels, items, **form):
        rows = made(kernels, items, **form)
        assert rows == made(kernels, [replace(item, kept=None) for item in items], **form)
        compared.append(len(items))
        return rows

    monkeypatch.setattr(backend.CppKernels, "_rows", rows_of)
    params = small_model()
    optimizer = cls([{"params": params[:9]}, {"params": params[9:], "lr": 0.1}], backend="cpp")

    def replace_data(new):
        params[3].data = new(params[3].data)

    def other_dtype():
        for param in params:
            param.grad.data = param.grad.data.double()

    def other_group():
        first, second = optimizer.param_groups
        second["params"].insert(0, first["params"].pop())

    changes = [
        lambda: replace_data(torch.clone),
        lambda: replace_data(lambda data: data.t().contiguous().t()),  # its elements are no longer in order
        lambda: replace_data(torch.Tensor.contiguous),
        lambda: setattr(params[2].grad, "data", params[2].grad.data.t().contiguous().t()),
        other_dtype,
        lambda: setattr(params[5], "grad", None),
        other_group,
        lambda: optimizer.write_copy(params[1], torch.empty_like(params[1], dtype=torch.bfloat16)),
        lambda: optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict())),
        lambda: optimizer.state[params[0]].clear(),
    ]
    for change in (lambda: None, *changes):
        for turn in range(3):
            give_new_gradients(params)
            if turn == 0:
                change()
            optimizer.step()
    assert compared == [16] * 18 + [15] + [16] * 14


@pytest.mark.parametrize("cls", WITH_LION)
def test_what_was_seen_is_bounded(cls, monkeypatch):
    """Layers that are frozen one after the other make a new set each; a long run must not keep them all."""
    monkeypatch.setattr(step_sets.StepSets, "REMEMBERED", 3)
    params = small_model()
    optimizer = cls(params, backend="cpp")
    for start in range(len(params)):
        give_new_gradients(params)
        for param in params[:start]:
            param.grad = None
        optimizer.step()
    assert len(optimizer._sets) == 3


@pytest.mark.parametrize("cls", WITH_LION)
def test_what_was_seen_keeps_no_tensor_alive(cls):
    params = small_model()
    optimizer = cls(params, backend="cpp")
    give_new_gradients(params)
    optimizer.step()
    state = optimizer.state[params[0]]
    old = [weakref.ref(t) for t in (params[0].grad, state["exp_avg"])]
    memory = StorageWeakRef(params[0].untyped_storage())
    params[0].grad = None
    params[0].data = params[0].data.clone()
    state["exp_avg"] = state["exp_avg"].clone()
    gc.collect()
    assert [ref() for ref in old] == [None, None]
    assert memory.expired()
    old = weakref.ref(state["exp_avg"])
    del state
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    gc.collect()
    assert old() is None


@pytest.mark.parametrize("cls", WITH_LION)
def test_without_torch_guards_every_step_looks_closely(cls, monkeypatch, close_looks):
    """They have no public name. A torch without them must not lose the checks."""
    assert close_look.GUARDS is not None, "torch's guards are of another form now: every step looks closely"
    monkeypatch.setattr("ds_blockwise.kernels.close_look.GUARDS", None)
    use_look("python", monkeypatch)
    params = small_model()
    optimizer = cls(params, backend="cpp")
    for _ in range(2):
        give_new_gradients(params)
        optimizer.step()
    assert close_looks == ["check_stepped", "check_states"] * 2
    params[0].data = torch.zeros(7)
    with pytest.raises(ValueError, match=r"has the shape \(7,\) now"):
        optimizer.step()


class OtherArguments:
    """Guards of a later torch."""

    def __init__(self, tensors):
        pass


@pytest.mark.parametrize("guards", [OtherArguments, None])
def test_guards_of_another_form_are_left_alone(guards, monkeypatch):
    """A keyword that torch drops would be a TypeError in every step of everyone."""
    if guards is None:
        monkeypatch.delattr("torch._C._dynamo.guards.TensorGuards")
    else:
        monkeypatch.setattr("torch._C._dynamo.guards.TensorGuards", guards)
    assert close_look._guards() is None
