# SPDX-License-Identifier: Apache-2.0
"""From a model to a `BlockSpec` on each of its parameters.

The user's rule decides first, then a host's reader of its own modules, then the owner's class, then the name. Head
counts come from a rule, the module or its config; ``head_dim`` is never computed from the hidden size. Hosts register a
`ModuleReader` for modules whose attributes have another meaning, such as tensor-parallel layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from ds_blockwise.blocks.ranges import TensorShard
from ds_blockwise.blocks.roles import LAYOUT_CHOICES, QKV_LAYOUT_MEANING, STORAGE_MEANING, QKVLayout, Role, Storage
from ds_blockwise.blocks.rule_needed import CHOOSE, ROLE_CHOICES, RuleNeeded
from ds_blockwise.blocks.settings.block_settings import BlockSettings
from ds_blockwise.blocks.settings.rules import Rule
from ds_blockwise.blocks.settings.transfer import stream_widths, width_of
from ds_blockwise.blocks.spec import BlockSpec, apply_settings
from ds_blockwise.blocks.structure import TensorStructure, fused_qkv, whole_tensor
from ds_blockwise.blocks.tagged_parameter import set_tags
from ds_blockwise.tagging.facts.head_counts import find_heads, fused_heads, own_heads
from ds_blockwise.tagging.facts.norm_places import norm_place_of
from ds_blockwise.tagging.module_facts import fused_qkv_layout, num_experts_in, storage_of
from ds_blockwise.tagging.module_reader import READERS
from ds_blockwise.tagging.names import NameMatch, is_bias_name, merge_tied
from ds_blockwise.tagging.owner_class import (
    check_dims,
    is_convolution,
    is_matrix,
    proposed_role,
    read_class_and_name,
)
from ds_blockwise.tagging.registered import (
    RegisteredParameter,
    Registration,
    check_plain,
    check_plain_parameter,
    registered_parameters,
    with_matrices,
)
from ds_blockwise.tagging.report import BlockReport, block_report
from ds_blockwise.tagging.rule_hints import Place, refusal
from ds_blockwise.tagging.tensor_parallel_cuts import check_cut, cut_by_role

ParameterTags = tuple[nn.Parameter, BlockSpec, TensorShard | None]
"""A parameter, its blocks, and what this tensor-parallel rank holds of it."""


def tag_parameters(
    model: nn.Module,
    lr_multipliers: Mapping[str, object] | str | None = None,
    rules: Iterable[Mapping[str, object]] | None = None,
    granularity: Mapping[str, str] | str | None = None,
    weight_decay_multipliers: Mapping[str, float] | None = None,
    transfer: Mapping[str, object] | None = None,
    betas_by_type: Mapping[str, Sequence[float | None]] | None = None,
) -> BlockReport:
    """Find out what each trainable parameter is and set ``param.block_spec`` (and ``param.block_shard``) on it.

    These tags are yours: every optimizer and every engine over these parameters takes them, until you call this again.
    Call it after the last change to the model. An engine does the same for itself where you did not, and its tags are
    its own: the next engine, also over a wrapper of the model, makes them anew, and no other optimizer takes them.
    Frozen parameters and those without elements get no tags.

    Args:
        model: any module; its trainable parameters may be on the meta device or ZeRO-3 placeholders.
        lr_multipliers: a preset, numbers per block type or role, or ``"auto"``; see `BlockwiseAdamW`. An optimizer that
            is built later and has no settings of its own takes these over, and so all below.
        rules: list of ``{"match": regex, ...}`` for single parameters; each must match one, unless it has
            ``"optional": True``.
        granularity: per block type, role or ``"bias"``; or ``"published"``, see `BlockwiseAdamMini`.
        weight_decay_multipliers: per block type or role.
        transfer: ``{"base_width": 256}``: see `ds_blockwise.blocks.settings.transfer.Transfer`.
        betas_by_type: per block type or role, pairs of betas; see `BlockwiseAdamW`.

    Returns:
        A report: per parameter its roles, multipliers, blocks and state bytes; ``print`` it.

    Raises:
        ValueError: a parameter that no rule or several rules match, rows that do not divide into heads, a rule that
            matches nothing, a setting outside its range.
    """
    settings = BlockSettings.parse(
        lr_multipliers, weight_decay_multipliers, granularity, rules, transfer, betas_by_type
    )
    tag_with_settings(model, settings, place="python")
    return block_report(model)


def tag_with_settings(
    model: nn.Module,
    block_settings: BlockSettings,
    names: Mapping[torch.Tensor, str] | None = None,
    *,
    is_stage: bool = False,
    by_host: bool = False,
    place: Place = "json",
) -> None:
    """Set the tags that `read_tags` finds, which has the same arguments and errors; ``by_host``: see `set_tags`."""
    for param, spec, shard in read_tags(model, block_settings, names, is_stage=is_stage, place=place):
        set_tags(param, spec, shard, by_host=by_host)


def read_tags(
    model: nn.Module,
    block_settings: BlockSettings,
    names: Mapping[torch.Tensor, str] | None = None,
    *,
    is_stage: bool = False,
    place: Place = "python",
) -> list[ParameterTags]:
    """Find out what each trainable parameter is; the model is not changed.

    Args:
        model: the module.
        block_settings: multipliers, granularity and rules.
        names: a host's own names; parameters without one keep the module tree's.
        is_stage: the module is one pipeline stage: a rule may match nothing in it (`pipeline_stages.check_rules`
            checks the rules over all stages).
        place: where the user writes rules; the message shows those to add in the form for it.

    Raises:
        ValueError: as `tag_parameters`; every problem of the model in one message.
    """
    check_plain(model)
    problems: list[ValueError] = []
    read: list[tuple[nn.Parameter, TensorStructure, TensorShard | None]] = []
    every = registered_parameters(model, names)
    if not is_stage:
        problems += [
            ValueError(
                f"rule {rule.match!r} matches no parameter of the model. Correct its pattern, or give it "
                f'"optional": true if models that lack such a parameter share these settings'
            )
            for rule in block_settings.unmatched_rules(fqn for named in every for fqn in named.fqns)
        ]
    for named in every:
        try:
            if not is_stepped(named):
                continue  # its role does not matter
            structure, shard = _structure_of(named, block_settings)
            read.append((named.param, with_matrices(structure, named), shard))
        except ValueError as error:
            problems.append(error)
    widths = stream_widths(structure for _, structure, _ in read)
    found: list[ParameterTags] = []
    for param, structure, shard in read:
        try:
            structure = replace(structure, width=width_of(structure, widths))
            found.append((param, apply_settings(structure, block_settings), shard))
        except ValueError as error:
            problems.append(error)
    if problems:
        raise ValueError(refusal(problems, every, block_settings, place, is_stage=is_stage))
    return found


def is_stepped(named: RegisteredParameter) -> bool:
    """Whether a parameter is trained and has elements, on this tensor-parallel rank or on another one.

    Raises:
        ValueError: as `check_plain_parameter`.
    """
    if not named.param.requires_grad:
        return False
    check_plain_parameter(named.fqn, named.param)
    if math.prod(named.shape):
        return True
    shard, _ = _shard(named)
    return shard is not None and math.prod(shard.global_shape) > 0


def _structure_of(named: RegisteredParameter, settings: BlockSettings) -> tuple[TensorStructure, TensorShard | None]:
    fqn, owner = named.fqn, named.first.owner
    rule = settings.rule_for(*named.fqns)
    match = _match(named, rule)
    shard, exact = _shard(named)
    local = named.shape
    if shard is not None and shard.local_shape != local:
        raise ValueError(
            f"parameter {fqn!r} has shape {local} on this rank, but its {type(owner).__name__} says that this rank "
            f"holds {shard.local_shape} of {shard.global_shape}. Build the layer anew for its tensor-parallel group "
            f"instead of replacing or resizing its parameter."
        )
    shape = local if shard is None else shard.global_shape
    if rule is not None and rule.storage is not None:
        match = replace(match, storage=rule.storage)
    elif match.storage is None:
        match = replace(match, storage=storage_of(owner))
    axis = 1 if match.storage == "in_out" and len(shape) == 2 and not match.is_bias else 0
    if match.qkv_layout is not None:
        heads = fused_heads(named, match, rule)
        structure = fused_qkv(fqn, shape, match.qkv_layout, heads, is_bias=match.is_bias, axis=axis)
        if exact:
            check_cut(structure, shard, match.qkv_layout)
            return structure, shard
        return structure, cut_by_role(structure, shard, match.qkv_layout)
    assert match.role is not None
    check_dims(named, shape, match)
    matrices = _matrices(named, shape, match)
    num_heads, head_dim, source = own_heads(named, match, rule)
    structure = whole_tensor(
        fqn,
        shape,
        match.role,
        is_bias=match.is_bias,
        axis=axis if matrices is None else 1 if match.storage == "out_in" else 2,
        num_heads=num_heads,
        head_dim=head_dim,
        source=source,
        headless=match.headless,
        matrices=matrices,
    )
    if exact:
        check_cut(structure, shard, None)
    if match.role is Role.NORM:
        structure = replace(structure, norm_place=match.norm_place or norm_place_of(named.first))
    return structure, shard


def _shard(named: RegisteredParameter) -> tuple[TensorShard | None, bool]:
    """What this tensor-parallel rank holds of a parameter, and whether these are exact rows; see `ModuleReader`."""
    owner = named.first.owner
    try:
        found = ((r.shard(owner, named.param, named.leaf), r.exact_shards) for r in READERS)
        return next((said for said in found if said[0] is not None), (None, False))
    except ValueError as error:  # a reader knows the module but not the parameter's name in the model
        raise ValueError(f"parameter {named.fqn!r}: {error}") from error


def _matrices(named: RegisteredParameter, shape: tuple[int, ...], match: NameMatch) -> tuple[int, int, int] | None:
    """Number, rows and columns of the matrices in a weight of several experts; None for a single matrix."""
    if match.is_bias or match.role is Role.NORM or is_convolution(named.first.owner):
        return None  # a convolution: one row per output channel
    if match.storage == "grouped_in_out":
        count = num_experts_in(named.first.owner)
        if count is None or len(shape) != 2 or shape[1 if named.leaf == "weight1" else 0] % count:
            raise ValueError(
                f"parameter {named.fqn!r} of shape {shape} holds [inputs, outputs] matrices of several experts, but "
                f"its {type(named.first.owner).__name__} does not say how many (num_local_experts: {count}). "
                f"Use Megatron-core's SequentialMLP or TEGroupedMLP."
            )
        outputs = shape[1] // count if named.leaf == "weight1" else shape[1]
        return count, shape[0] * shape[1] // (count * outputs), outputs
    if len(shape) != 3 or (match.storage is None and match.role is not Role.FFN):
        return None  # one matrix
    if match.storage is None:
        raise RuleNeeded(
            "{parameter} holds a matrix per expert, and its module does not say which dimension is the outputs.",
            named.fqn,
            shape,
            {"role": Role.FFN.value, "storage": CHOOSE},
            {"storage": STORAGE_MEANING},
        )
    return shape


def _match(named: RegisteredParameter, rule: Rule | None) -> NameMatch:
    if rule is not None and (rule.role is not None or rule.qkv_layout is not None):
        bias = is_bias_name(named.leaf) and rule.role is not Role.NORM
        if rule.role is Role.NORM and is_matrix(named.first.owner):
            raise ValueError(
                f"rule {rule.match!r} gives the role norm to parameter {named.fqn!r} of shape {named.shape}, a matrix "
                f'of a {type(named.first.owner).__name__}. Narrow its "match", or give the matrix the role "other", '
                f"which has the multiplier of norms by default."
            )
        # rows of a low rank belong to no head, whatever role the rule gives them
        headless = named.first.is_low_rank_input and rule.num_heads is None
        storage = None if bias else _said_storage(named)
        return NameMatch(rule.role, rule.qkv_layout, bias, "rule", headless, storage, rule.norm_place)
    said = (_match_as_registered(named, registration) for registration in named.registrations)
    matches = [match for match in said if match is not None]
    if not matches:
        owner = named.first.owner
        role = proposed_role(owner, named.shape, named.leaf)
        raise RuleNeeded(
            f"no naming rule matches {{parameter}} in a {type(owner).__name__}.",
            named.fqn,
            named.shape,
            {"role": CHOOSE if role is None else role.value},
            {"role": ROLE_CHOICES},
        )
    if matches[0].role is None:
        return matches[0]
    role = merge_tied(named.fqns, {m.role for m in matches if m.role is not None})
    return replace(matches[0], role=role)


def _said_storage(named: RegisteredParameter) -> Storage | None:
    # The rule gives the role only. How the matrix is stored is still read from the module or the name.
    try:
        said = _read(named, named.first)
    except ValueError:  # two naming rules match; the user's rule decides
        return None
    return None if said is None else said.storage


def _read(named: RegisteredParameter, registration: Registration) -> NameMatch | None:
    """What a host's reader says, else what the owner's class says, else what the name says."""
    name = f"{registration.linear}.{registration.fqn.rpartition('.')[2]}"
    said = (r.match(registration.owner, registration.parent, named.param, name) for r in READERS)
    match = next((m for m in said if m is not None), None)
    return match or read_class_and_name(registration, named.shape)


def _match_as_registered(named: RegisteredParameter, registration: Registration) -> NameMatch | None:
    match = _read(named, registration)
    if match is None:
        return None
    if match.dialect == "hf" and match.role is Role.ROUTER and not hasattr(registration.parent, "experts"):
        return None  # without experts beside it, ``mlp.gate`` is half of a gated FFN, not a router
    if match.dialect not in ("megatron", "class") and registration.parent is not None:
        layout = fused_qkv_layout(registration.parent, registration.linear)
        if layout is not None:
            match = replace(match, role=None, qkv_layout=layout)
    if match.qkv_layout in LAYOUT_CHOICES:
        raise _unknown_layout(named, registration, match.qkv_layout, match.dialect)
    if registration.is_low_rank_input:
        if match.role is None:
            raise RuleNeeded(
                "{parameter} is the low-rank input of a fused weight: its rows serve query, key and value together. "
                'Give their role: "value" has the smallest multiplier of the three, "other" a smaller one still.',
                named.fqn,
                named.shape,
                {"role": Role.VALUE.value},
            )
        match = replace(match, headless=True)
    return match


def _unknown_layout(
    named: RegisteredParameter, registration: Registration, layout: QKVLayout, dialect: str
) -> RuleNeeded:
    heads = {} if find_heads(named) is not None else {"num_heads": CHOOSE, "num_kv_heads": CHOOSE}
    megatron = " For a Megatron-core model import megatron_patch." if dialect == "megatron" else ""
    return RuleNeeded(
        f"{{parameter}} is a fused query, key and value weight, and neither its name nor "
        f"{type(registration.parent).__name__} tells the order of its rows.{megatron} A wrong order trains values at "
        f"the learning rate of queries, and no error or loss curve shows it. Choose the order by a rule, and check the "
        f"choice with ds_blockwise.verify_layout(model, rules=[...]).",
        named.fqn,
        named.shape,
        {"role": "qkv", "layout": CHOOSE, **heads},
        {"layout": {choice: QKV_LAYOUT_MEANING[choice] for choice in LAYOUT_CHOICES[layout]}},
    )
