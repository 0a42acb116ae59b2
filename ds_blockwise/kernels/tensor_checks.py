# SPDX-License-Identifier: Apache-2.0
"""Whether kernels may read and write the tensors of a step through their raw addresses.

Users and hosts replace ``param.data``, ``param.grad.data`` and the tensors in ``state`` between steps, and a wrapper
tensor (a DTensor) has no memory of its own. A kernel that took such an address would read or write somebody else's
memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter, ge

import torch

from ds_blockwise.blocks.plain_tensor import USE_ZERO, wrapper_problem
from ds_blockwise.blocks.ranges import TensorShard
from ds_blockwise.blocks.segment_table import SegmentTable
from ds_blockwise.blocks.spec import BlockSpec
from ds_blockwise.kernels.base import Item, wide_dtype
from ds_blockwise.kernels.close_look import DATA_PTR, OFFSET, STORAGE, STORAGE_NBYTES

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""What parameters and gradients may be."""


def check_plain(tensor: torch.Tensor) -> None:
    """Refuse a tensor that has no memory of its own.

    Raises:
        ValueError: a shard of another library (FSDP), a wrapper class, a sparse or nested tensor.
    """
    problem = wrapper_problem(tensor)
    if problem is not None:
        raise ValueError(f"a parameter of shape {tuple(tensor.shape)} cannot be optimized: {problem}.")


def check_whole(spec: BlockSpec, shard: TensorShard | None, param: torch.Tensor) -> None:
    """Refuse a parameter that is no longer what its tags say.

    Args:
        spec: the blocks of the unsharded parameter.
        shard: what this tensor-parallel rank holds of it; None if it is whole.
        param: what is stepped.

    Raises:
        ValueError: it has another shape: it was replaced, resized or sharded after it was tagged.
    """
    shape = spec.shape if shard is None else shard.local_shape
    if tuple(param.shape) != shape:
        raise ValueError(
            f"parameter {spec.fqn!r} has the shape {tuple(param.shape)} now, and was tagged with the shape {shape}. "
            f"{_ANEW} If another library has sharded it (FSDP): {USE_ZERO}."
        )


def check_bindable(tensor: torch.Tensor, table: SegmentTable) -> None:
    """Refuse a tensor that no kernel can step, before the first step.

    Args:
        tensor: a parameter or a host's flat partition.
        table: its segments.

    Raises:
        ValueError: its class, layout or dtype.
    """
    problem = wrapper_problem(tensor)
    if problem is not None:
        raise ValueError(f"{_names(table)} cannot be optimized: {problem}.")
    if tensor.dtype not in DTYPES:
        raise ValueError(
            f"{_names(table)} has the dtype {tensor.dtype}; only {_DTYPES} can be optimized. "
            f"Keep it in one of these, or freeze it with requires_grad_(False)."
        )


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself if it `is_dense`, else a contiguous copy."""
    return tensor if is_dense(tensor) else tensor.contiguous().resolve_neg()


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether a tensor's memory holds its elements in order."""
    # a contiguous tensor may still be stored with its sign reversed: the imaginary part of a conjugate
    return tensor.is_contiguous() and not tensor.is_neg()


def check_stepped(items: Sequence[Item], shapes: Sequence[torch.Size]) -> None:
    """Refuse parameters and gradients that do not fit their segment tables or each other, before anything reads them.

    Facts are read column by column, and looked at one by one only if one of them does not fit.

    Args:
        items: with gradients, which may still be strided; states are not looked at.
        shapes: of the parameters when they were bound.

    Raises:
        ValueError: another shape, dtype, device, layout or class than a step needs, or freed memory.
    """
    params, grads = [item.param for item in items], [item.grad for item in items if item.grad is not None]
    tensors = params + grads
    fits = (
        _PLAIN.issuperset(map(type, tensors))
        and list(map(_SHAPE, params)) == shapes == list(map(_SHAPE, grads))
        and _DTYPE_SET.issuperset(map(_DTYPE, tensors))
        and _DENSE.issuperset(map(_LAYOUT, grads))
        and (all(map(_IS_CPU, tensors)) or list(map(_DEVICE, params)) == list(map(_DEVICE, grads)))
        and (not any(map(OFFSET, tensors)) or all(map(_has_memory, tensors)))
        and all(map(ge, map(STORAGE_NBYTES, map(STORAGE, tensors)), map(_NBYTES, tensors)))
        and all(map(DATA_PTR, tensors))
    )
    if not fits:
        for item, shape in zip(items, shapes, strict=True):
            _check_stepped(item, shape)


def _check_stepped(item: Item, shape: torch.Size) -> None:
    table, param, grad = item.table, item.param, item.grad
    assert grad is not None
    for what, tensor in (("", param), ("the gradient of ", grad)):
        problem = wrapper_problem(tensor)
        if problem is not None:
            raise ValueError(f"{what}{_names(table)} cannot be used: {problem}.")
    if param.shape != shape:
        raise ValueError(
            f"{_names(table)} has the shape {tuple(param.shape)} now, and had {tuple(shape)} when the optimizer first "
            f"saw it. Blocks and state belong to the old shape. {_ANEW}"
        )
    if grad.shape != param.shape:
        raise ValueError(
            f"the gradient of {_names(table)} has the shape {tuple(grad.shape)}, but the parameter "
            f"{tuple(param.shape)}. Whoever set .grad or .grad.data must give it the parameter's shape."
        )
    if param.dtype not in DTYPES or grad.dtype not in DTYPES:
        raise ValueError(
            f"{_names(table)} is {param.dtype} and its gradient {grad.dtype}; both must be one of {_DTYPES}."
        )
    if grad.device != param.device:
        raise ValueError(
            f"the gradient of {_names(table)} is on {grad.device}, the parameter on {param.device}. Move the gradient "
            f"to the parameter's device before optimizer.step()."
        )
    if not (_has_memory(param) and _has_memory(grad)):
        raise ValueError(
            f"{_names(table)} or its gradient has no memory, or less than its elements need: it was freed, or never "
            f"made. Whoever frees parameters between uses must bring them back before optimizer.step()."
        )


def check_states(items: Sequence[Item]) -> None:
    """Refuse states that do not fit their parameters, and 16-bit copies that do not.

    Args:
        items: with their states; their parameters fit their tables.

    Raises:
        ValueError: another number of values, dtype, device or layout than `StepState` says.
    """
    params, states, tables = [i.param for i in items], [i.state for i in items], [i.table for i in items]
    first = [state["exp_avg"] for state in states]
    second = [state["exp_avg_sq"] for state in states if "exp_avg_sq" in state]
    values = [table.num_blocks if table.shares_second_moment else table.numel for table in tables]
    tensors = params + first + second
    fits = (
        _PLAIN.issuperset(map(type, first + second))
        and list(map(_NUMEL, first)) == [table.numel for table in tables]
        and list(map(_NUMEL, second)) == (values if second else [])
        and _FITTING.issuperset(zip(map(_DTYPE, params), map(_DTYPE, first), strict=True))
        and _FITTING_SECOND.issuperset(zip(map(_DTYPE, params), map(_DTYPE, second), strict=False))
        and all(map(_CONTIGUOUS, first + second))
        and all(map(_has_memory, first + second))
        and (all(map(_IS_CPU, tensors)) or _on_one_device(params, first, second))
        and not any(item.param_copy is not None for item in items)
    )
    if not fits:
        for item in items:
            _check_state(item)


def _on_one_device(*columns: Sequence[torch.Tensor]) -> bool:
    """Whether the tensors of each row of the columns are on one device; an empty column is left out."""
    rows = zip(*(map(_DEVICE, column) for column in columns if column), strict=True)
    return all(len(set(row)) == 1 for row in rows)


def _values(item: Item) -> int:
    """Number of second moments of a tensor."""
    return item.table.num_blocks if item.table.shares_second_moment else item.table.numel


def _check_state(item: Item) -> None:
    param, state, table, copy = item.param, item.state, item.table, item.param_copy
    numel, device, wide = table.numel, param.device, wide_dtype(param.dtype)
    exp_avg, exp_avg_sq = state["exp_avg"], state.get("exp_avg_sq")
    kept = [exp_avg] if exp_avg_sq is None else [exp_avg, exp_avg_sq]
    for problem in filter(None, map(wrapper_problem, kept)):
        raise ValueError(f"the state of {_names(table)} cannot be used: {problem}.")
    if exp_avg.device != device or (exp_avg_sq is not None and exp_avg_sq.device != device):
        raise ValueError(
            f"{_names(table)} is on {device} and its state on {exp_avg.device}"
            f"{'' if exp_avg_sq is None else f' and {exp_avg_sq.device}'}. Move the model before the first step, or "
            f"make a new optimizer."
        )
    fits = exp_avg.numel() == numel and exp_avg.dtype in (wide, torch.bfloat16) and exp_avg.is_contiguous()
    if exp_avg_sq is not None:
        fits &= exp_avg_sq.numel() == _values(item) and exp_avg_sq.dtype == wide and exp_avg_sq.is_contiguous()
    if not fits:
        raise ValueError(_misfit(item))
    if not all(map(_has_memory, kept)):
        raise ValueError(
            f"the memory of the state of {_names(table)} was freed: its storage is smaller than its elements. Whoever "
            f"frees states between steps must bring them back before optimizer.step()."
        )
    if copy is not None and (copy.numel() != numel or copy.device != device or not copy.is_contiguous()):
        raise ValueError(
            f"the 16-bit copy of {_names(table)} has {copy.numel()} elements on {copy.device}, the parameter {numel} "
            f"on {device}. Give a new copy by write_copy(param, copy)."
        )


_ANEW = "After a change of shape call tag_parameters(model) and make a new optimizer."
_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))
_DTYPE_SET = frozenset(DTYPES)
_DENSE = frozenset((torch.strided,))
_DTYPES = ", ".join(map(str, DTYPES))
_FITTING = frozenset((dtype, moment) for dtype in DTYPES for moment in (wide_dtype(dtype), torch.bfloat16))
_FITTING_SECOND = frozenset((dtype, wide_dtype(dtype)) for dtype in DTYPES)
_SHAPE, _DTYPE, _LAYOUT = attrgetter("shape"), attrgetter("dtype"), attrgetter("layout")
_DEVICE, _IS_CPU = attrgetter("device"), attrgetter("is_cpu")
_NBYTES = attrgetter("nbytes")
_NUMEL, _CONTIGUOUS = torch.Tensor.numel, torch.Tensor.is_contiguous


def _has_memory(tensor: torch.Tensor) -> bool:
    end = tensor.nbytes + tensor.storage_offset() * tensor.element_size()
    if not tensor.numel() or tensor.is_meta:
        return True
    return tensor.untyped_storage().nbytes() >= end and tensor.data_ptr() != 0  # torch's own zeros have no address


def _names(table: SegmentTable) -> str:
    fqns = [placement.spec.fqn for placement in table.placements if placement.numel]
    if not fqns:
        return "a partition without parameters"
    if len(fqns) == 1:
        return f"parameter {fqns[0]!r}"
    return f"the partition of parameter {fqns[0]!r} and {len(fqns) - 1} more"


def _misfit(item: Item) -> str:
    wide, table = wide_dtype(item.param.dtype), item.table
    found = "; ".join(
        f"{key}: {value.dtype}, {value.numel()} values{'' if value.is_contiguous() else ', not contiguous'}"
        for key in ("exp_avg", "exp_avg_sq")
        if isinstance(value := item.state.get(key), torch.Tensor)
    )
    return (
        f"the state of {_names(table)} ({item.param.dtype}, shape {tuple(item.param.shape)}) does not fit: {found}. "
        f"exp_avg must have {table.numel} values of {wide} or torch.bfloat16, exp_avg_sq {_values(item)} values of "
        f"{wide}, both contiguous. Load a checkpoint with load_state_dict instead of writing into optimizer.state."
    )
