# SPDX-License-Identifier: Apache-2.0
"""From a model to a `BlockSpec` on each of its parameters.

Joins the name (what a weight does) with the owning module (how many heads, which way it is stored, how it is sharded).
Head counts come from the module or its config, never from ``dim / num_heads``. Hosts add a `ModuleReader` for
modules whose attributes mean something else, such as tensor-parallel layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import nn

from ds_blockwise.blocks import (
    BlockSpec,
    HeadGeometry,
    TensorStructure,
    apply_policy,
    fused_qkv,
    whole_tensor,
)
from ds_blockwise.layout import TensorShard
from ds_blockwise.naming import NameMatch, Role, canonical_fqn, match_name, merge_tied
from ds_blockwise.policy import BlockPolicy, Rule
from ds_blockwise.report import BlockReport, block_report

_NUM_HEADS = ("num_attention_heads", "num_heads", "n_head", "n_heads")
_NUM_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_head", "n_kv_heads")
_HEAD_DIM = ("head_dim", "head_size")


@dataclass(frozen=True, slots=True)
class TensorSplit:
    """How tensor parallelism of any size cuts a parameter: ``parts`` equal parts of ``dim``, each split by itself."""

    dim: int
    parts: int = 1


class ModuleReader(Protocol):
    """Reads facts off the modules of one framework; registered with `register_reader`."""

    def heads(self, attention: nn.Module) -> HeadGeometry | None:
        """Unsharded head counts of an attention module; None if this reader does not know the module."""

    def shard(self, owner: nn.Module, param: nn.Parameter, leaf: str) -> TensorShard | None:
        """The tensor-parallel split of ``owner.<leaf>``; None if it is whole or the module is unknown."""

    def split(self, owner: nn.Module, param: nn.Parameter, leaf: str) -> TensorSplit | None:
        """How ``owner.<leaf>`` would be cut over any number of ranks; None if never or the module is unknown."""


_READERS: list[ModuleReader] = []


def register_reader(reader: ModuleReader) -> None:
    """Add a reader; it is asked before the built-in one. A second one of the same class is ignored."""
    if not any(type(known) is type(reader) for known in _READERS):
        _READERS.append(reader)


def tensor_splits(model: nn.Module) -> dict[nn.Parameter, TensorSplit]:
    """How the registered readers would cut each parameter over tensor-parallel ranks; whole ones are left out."""
    return {
        param: split
        for owner in model.modules()
        for leaf, param in owner.named_parameters(recurse=False)
        for reader in _READERS
        if (split := reader.split(owner, param, leaf)) is not None
    }


@dataclass(frozen=True)
class _Named:
    """One parameter with every place that registers it."""

    param: nn.Parameter
    fqns: tuple[str, ...]
    owners: tuple[nn.Module, ...]
    parents: tuple[nn.Module | None, ...]

    @property
    def leaf(self) -> str:
        return self.fqns[0].rpartition(".")[2]


def tag_parameters(
    model: nn.Module,
    lr_multipliers: Mapping[str, float] | None = None,
    rules: Iterable[Mapping[str, Any]] | None = None,
    granularity: Mapping[str, str] | None = None,
    weight_decay_multipliers: Mapping[str, float] | None = None,
) -> BlockReport:
    """Find out what each trainable parameter is and set ``param.block_spec`` (and ``param.block_shard``) on it.

    Args:
        model: any module; its trainable parameters may be on the meta device or ZeRO-3 placeholders.
        lr_multipliers: per block type or role; see `BlockwiseAdamW`.
        rules: list of ``{"match": regex, ...}`` for single parameters.
        granularity: per block type, role or ``"bias"``.
        weight_decay_multipliers: per block type or role.

    Returns:
        A report: per parameter its roles, multipliers, blocks and state bytes; ``print`` it.

    Raises:
        ValueError: a parameter that no rule or several rules match, rows that do not divide into heads, a rule that
            matches nothing, a setting outside its range.
    """
    tag_with_policy(model, BlockPolicy.parse(lr_multipliers, weight_decay_multipliers, granularity, rules))
    return block_report(model)


def tag_with_policy(
    model: nn.Module,
    policy: BlockPolicy,
    names: Mapping[torch.Tensor, str] | None = None,
) -> None:
    """`tag_parameters` with parsed settings.

    Args:
        model: the module.
        policy: settings.
        names: a host's own names; parameters without one keep the module tree's.

    Raises:
        ValueError: as `tag_parameters`; every problem of the model in one message.
    """
    problems: list[str] = []
    tagged: list[tuple[nn.Parameter, BlockSpec, TensorShard | None]] = []
    every = _named_parameters(model, names)
    for rule in policy.rules:
        if not any(rule.matches(fqn) for named in every for fqn in named.fqns):
            problems.append(f"rule {rule.match!r} matches no parameter of the model")
    for named in every:
        if not named.param.requires_grad:
            continue  # a frozen parameter is never stepped, so its role does not matter
        try:
            structure, shard = _structure_of(named, policy)
            tagged.append((named.param, apply_policy(structure, policy), shard))
        except ValueError as error:
            problems.append(str(error))
    if problems:
        listed = "\n".join(f"  - {p}" for p in problems[:20])
        more = f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise ValueError(f"cannot cut the model into blocks:\n{listed}{more}")
    for param, spec, shard in tagged:
        cast("Any", param).block_spec = spec
        cast("Any", param).block_shard = shard


def _named_parameters(model: nn.Module, names: Mapping[torch.Tensor, str] | None) -> list[_Named]:
    modules = dict(model.named_modules(remove_duplicate=False))
    places: dict[int, list[tuple[str, nn.Module, nn.Module | None]]] = {}
    params: dict[int, nn.Parameter] = {}
    for path, module in modules.items():
        parent = modules.get(path.rpartition(".")[0]) if path else None
        for leaf, param in module.named_parameters(recurse=False):
            params[id(param)] = param
            fqn = canonical_fqn(f"{path}.{leaf}" if path else leaf)
            places.setdefault(id(param), []).append((fqn, module, parent))
    found: list[_Named] = []
    for key, param in params.items():
        fqns, owners, parents = zip(*places[key], strict=True)
        own = names.get(param) if names is not None else None
        if own is not None and canonical_fqn(own) not in fqns:
            fqns = (canonical_fqn(own), *fqns)
            owners, parents = (owners[0], *owners), (parents[0], *parents)
        found.append(_Named(param, tuple(dict.fromkeys(fqns)), owners, parents))
    return found


def _structure_of(named: _Named, policy: BlockPolicy) -> tuple[TensorStructure, TensorShard | None]:
    fqn, owner = named.fqns[0], named.owners[0]
    rule = next((r for f in named.fqns if (r := policy.rule_for(f)) is not None), None)
    match = _match(named, rule)
    shard = next((s for r in _READERS if (s := r.shard(owner, named.param, named.leaf)) is not None), None)
    local = tuple(getattr(named.param, "ds_shape", named.param.shape))
    if shard is not None and shard.local_shape != local:
        raise ValueError(
            f"parameter {fqn!r} has shape {local} on this rank, but its module says that it holds "
            f"{shard.local_shape} of {shard.global_shape}"
        )
    shape = local if shard is None else shard.global_shape
    axis = 1 if _is_transposed(owner) and len(shape) == 2 else 0
    if match.qkv_layout is not None:
        heads = _heads(named, match, rule)
        return (
            fused_qkv(fqn, shape, match.qkv_layout, heads, is_bias=match.is_bias, axis=axis),
            shard,
        )
    assert match.role is not None
    _check_dims(fqn, shape, match)
    num_heads, head_dim, source = _own_heads(named, match, rule)
    structure = whole_tensor(
        fqn,
        shape,
        match.role,
        is_bias=match.is_bias,
        axis=axis,
        num_heads=num_heads,
        head_dim=head_dim,
        source=source,
    )
    return structure, shard


def _check_dims(fqn: str, shape: tuple[int, ...], match: NameMatch) -> None:
    if match.role in (Role.NORM, Role.OTHER, Role.ROUTER) or match.dialect == "rule":
        return
    expected = 1 if match.is_bias else 2
    if len(shape) != expected:
        raise ValueError(
            f"parameter {fqn!r} matches role {cast('Role', match.role).value!r} by name but has shape {shape}; a "
            f"{'bias' if match.is_bias else 'weight'} of that role has {expected} dimension(s). Declare it: "
            f'"rules": [{{"match": "{fqn}", "role": "..."}}]'
        )


def _match(named: _Named, rule: Rule | None) -> NameMatch:
    is_bias = named.leaf == "bias"
    if rule is not None and (rule.role is not None or rule.qkv_layout is not None):
        bias = is_bias and rule.role is not Role.NORM
        return NameMatch(rule.role, rule.qkv_layout, bias, "rule")
    matches = [m for fqn in named.fqns if (m := match_name(fqn)) is not None]
    if not matches:
        shape = tuple(getattr(named.param, "ds_shape", named.param.shape))
        raise ValueError(
            f"no naming rule matches parameter {named.fqns[0]!r} of shape {shape} in a "
            f"{type(named.owners[0]).__name__}. Declare its role in the optimizer's JSON: "
            f'"rules": [{{"match": "{named.fqns[0]}", "role": "ffn"}}] (roles: '
            f"{', '.join(r.value for r in Role)}, qkv)"
        )
    if matches[0].role is None:
        return matches[0]
    role = merge_tied(named.fqns, {m.role for m in matches if m.role is not None})
    return NameMatch(role, None, matches[0].is_bias, matches[0].dialect)


def _is_transposed(owner: nn.Module) -> bool:
    # Hugging Face's Conv1D (GPT-2) stores [in, out]; every other linear stores [out, in]
    return type(owner).__name__ == "Conv1D" and hasattr(owner, "nf")


def _own_heads(named: _Named, match: NameMatch, rule: Rule | None) -> tuple[int | None, int | None, str]:
    if match.role not in (Role.QUERY, Role.KEY, Role.VALUE) or match.is_bias:
        return None, None, ""
    if rule is not None and rule.num_heads is not None:
        return rule.num_heads, None, f"rule {rule.match!r}"
    heads = _find_heads(named)
    if heads is None:
        if match.role is Role.VALUE:
            return None, None, ""  # value rows need no head count
        raise ValueError(_no_heads(named, match.role.value))
    count = heads.num_heads if match.role is Role.QUERY else heads.num_kv_heads
    return count, heads.head_dim, heads.source


def _heads(named: _Named, match: NameMatch, rule: Rule | None) -> HeadGeometry:
    if rule is not None and rule.num_heads is not None:
        return HeadGeometry(rule.num_heads, rule.num_kv_heads or rule.num_heads, None, f"rule {rule.match!r}")
    # Megatron's modules call key and value heads query groups and hold tensor-parallel shards: only its reader knows
    heads = _ask_readers(named) if match.dialect == "megatron" else _find_heads(named)
    if heads is None:
        raise ValueError(_no_heads(named, "qkv"))
    return heads


def _no_heads(named: _Named, role: str) -> str:
    layout = ', "layout": "concat"' if role == "qkv" else ""
    return (
        f"parameter {named.fqns[0]!r} has heads, but neither {type(named.parents[0]).__name__} nor its config says how "
        f"many (looked for {', '.join(_NUM_HEADS)}). For a Megatron-core model import megatron_patch; otherwise give "
        f'it: "rules": [{{"match": "{named.fqns[0]}", "role": "{role}"{layout}, "num_heads": N}}]'
    )


def _find_heads(named: _Named) -> HeadGeometry | None:
    attention = named.parents[0]
    if attention is None:
        return None
    return _ask_readers(named) or _generic_heads(attention)


def _ask_readers(named: _Named) -> HeadGeometry | None:
    attention = named.parents[0]
    if attention is None:
        return None
    return next((heads for reader in _READERS if (heads := reader.heads(attention)) is not None), None)


def _generic_heads(attention: nn.Module) -> HeadGeometry | None:
    config = getattr(attention, "config", None)
    num_heads, said_by = _count(attention, config, _NUM_HEADS)
    if num_heads is None:
        return None
    num_kv_heads, _ = _count(attention, config, _NUM_KV_HEADS)
    head_dim, _ = _count(attention, config, _HEAD_DIM)
    return HeadGeometry(num_heads, num_heads if num_kv_heads is None else num_kv_heads, head_dim, said_by)


def _count(module: nn.Module, config: object, names: tuple[str, ...]) -> tuple[int | None, str]:
    # the module first: tensor-parallel wrappers keep the config's counts but change the module's
    for source, where in ((module, type(module).__name__), (config, type(config).__name__)):
        for name in names:
            value = getattr(source, name, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value, f"{where}.{name}={value}"
    return None, ""
