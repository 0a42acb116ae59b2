# SPDX-License-Identifier: Apache-2.0
"""What the class of the module that owns a parameter says of its role.

A norm, an embedding table or PyTorch's own attention is what it is under any name. The class of a user's module is
known by its name only, and counts only where the parameter's shape agrees with it.
"""

from __future__ import annotations

import re

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ds_blockwise.blocks.roles import QKVLayout, Role
from ds_blockwise.blocks.rule_needed import CHOOSE, ROLE_CHOICES, RuleNeeded
from ds_blockwise.tagging.module_facts import class_names, generic_heads
from ds_blockwise.tagging.name_rules import OWN_SHAPES
from ds_blockwise.tagging.names import NameMatch, is_bias_name, match_name, meaning_of
from ds_blockwise.tagging.registered import RegisteredParameter, Registration

DIALECT = "class"

_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, _NormBase)
_MATRICES = (nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag, _ConvNd)
# LlamaRMSNorm, T5LayerNorm, MambaRMSNormGated, NemotronLayerNorm1P, VitDetLayerNorm2d
_NORM_CLASS = re.compile(r"(?:Norm|LayerNormalization)(?:Gated|1P|[123]d)?$")
# T5 and its relatives: one number for each bucket of distances and head, added to the scores of attention
_BIAS_TABLE = re.compile(r"relative_attention_bias|relative_position_bias_table|rel_attn_embed|rel_pos_bias")
_ATTENTION_PARTS: dict[str, Role] = {
    "q_proj_weight": Role.QUERY,
    "k_proj_weight": Role.KEY,
    "v_proj_weight": Role.VALUE,
    "bias_k": Role.OTHER,
    "bias_v": Role.OTHER,
}


# Layers that mix tokens by a recurrence or a short convolution instead of softmax attention. KimiLinearAttention is the
# softmax attention of Kimi Linear.
_RECURRENT = re.compile(
    r"(?:GatedDeltaNet|DeltaAttention|LightningAttention|(?<!^Kimi)LinearAttention|ForgetGate|ShortConv|ShortConvolution"
    r"|Mamba2?Mixer|BambaMixer|FalconH1Mixer|MambaLayer|Rglru|RecurrentBlock|RwkvSelfAttention|xLSTMLayer)$"
)
# BertLMPredictionHead, RobertaLMHead, AlbertMLMHead: they register the bias of their ``decoder`` themselves
_VOCABULARY_HEAD = r"(?:LMHead|LMPredictionHead|MLMHead)$"
# Linears whose names mean something else elsewhere: the class that holds them, the name, the role or QKV layout
_CHILDREN: tuple[tuple[str, str, Role | QKVLayout], ...] = (
    (r"(?:ForMaskedLM|ForCausalLM)$", r"decoder|head", Role.OUTPUT),
    (_VOCABULARY_HEAD, r"decoder", Role.OUTPUT),
    (r"^Whisper(?:ForConditionalGeneration|ForCausalLM)$", r"proj_out", Role.OUTPUT),
    # per head its query, key and value rows: the forward pass splits heads first, then each head in three
    (r"^DisentangledSelfAttention$", r"in_proj", "grouped"),
    (r"^NemotronHAttention$", r"q_proj", Role.QUERY),
    (r"^NemotronHAttention$", r"k_proj", Role.KEY),
    (r"^NemotronHAttention$", r"v_proj", Role.VALUE),
    (r"^NemotronHAttention$", r"o_proj", Role.ATTN_OUT),
    (r"^NemotronHMLP$", r"(?:up|down)_proj", Role.FFN),
    (r"^NemotronHMoE$", r"fc[12]_latent_proj", Role.FFN),
    (r"^RwkvFeedForward$", r"key|value|receptance", Role.FFN),
)


def read_class_and_name(registration: Registration, shape: tuple[int, ...]) -> NameMatch | None:
    """What a parameter is by the class of its owner, or by its name where the class does not say; None if unknown.

    Args:
        registration: the parameter's name and the modules around it.
        shape: of the parameter.

    Raises:
        RuleNeeded: class and name say different things, or two naming rules do.
    """
    by_class = match_class(registration)
    if by_class is None:
        by_name = match_name(registration.fqn)
        if by_name is None:
            return _convolution(registration)
        problem = _contradiction(registration.owner, by_name)
    else:
        by_name = _name_beside_class(registration.fqn)
        problem = None if by_name is None else _disagreement(registration.owner, by_class, by_name)
    if problem is not None:
        raise RuleNeeded(
            f"{{parameter}} is not clear: {problem}. Give its role.",
            registration.fqn,
            shape,
            {"role": CHOOSE},
            {"role": ROLE_CHOICES},
        )
    return by_class or by_name


def match_class(registration: Registration) -> NameMatch | None:
    """What a parameter is by the class of its owner, or of PyTorch's own module above; None if they do not say."""
    owner, parent, child = registration.owner, registration.parent, registration.linear
    leaf = registration.fqn.rpartition(".")[2]
    if is_norm(owner, parent):
        return NameMatch(Role.NORM, None, False, DIALECT)
    if isinstance(owner, (nn.Embedding, nn.EmbeddingBag)):
        # a table of biases is no table of vectors: what is looked up is added to scores, not to the residual stream
        role = Role.OTHER if _BIAS_TABLE.search(child) else Role.EMBEDDING
        return NameMatch(role, None, False, DIALECT)
    if isinstance(owner, nn.MultiheadAttention):
        if leaf in ("in_proj_weight", "in_proj_bias"):
            return NameMatch(None, "concat", leaf == "in_proj_bias", DIALECT)
        if leaf in _ATTENTION_PARTS:
            return NameMatch(_ATTENTION_PARTS[leaf], None, False, DIALECT)
    bias = is_bias_name(leaf)
    if bias and hasattr(owner, "decoder") and any(re.search(_VOCABULARY_HEAD, name) for name in class_names(owner)):
        return NameMatch(Role.OUTPUT, None, True, DIALECT)
    if is_recurrent(owner) or (parent is not None and is_recurrent(parent)):
        return NameMatch(Role.OTHER, None, bias, DIALECT)
    if isinstance(parent, nn.MultiheadAttention) and child == "out_proj":
        return NameMatch(Role.ATTN_OUT, None, bias, DIALECT)
    if isinstance(parent, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)) and child in ("linear1", "linear2"):
        return NameMatch(Role.FFN, None, bias, DIALECT)
    above = () if parent is None or not isinstance(owner, nn.Linear) else class_names(parent)
    for of, pattern, what in _CHILDREN:
        if re.fullmatch(pattern, child) and any(re.search(of, name) for name in above):
            if isinstance(what, Role):
                return NameMatch(what, None, bias, DIALECT)
            return NameMatch(None, what, bias, DIALECT)
    return None


def is_recurrent(module: nn.Module) -> bool:
    """Whether a module mixes tokens without softmax attention: linear attention, state spaces, short convolutions.

    Its projections are `Role.OTHER`, whatever they are called. arXiv 2502.19002 measured softmax attention only: the
    sharpness behind the multipliers of queries, keys and values is that of a softmax over their products.
    """
    return any(_RECURRENT.search(name) for name in class_names(module))


def attention_of(registration: Registration) -> nn.Module | None:
    """The module whose attributes count a parameter's heads: the one above its owner, or PyTorch's own attention."""
    owner = registration.owner
    return owner if isinstance(owner, nn.MultiheadAttention) else registration.parent


def is_convolution(owner: nn.Module) -> bool:
    """Whether a module's weight is the kernel of a convolution, with its output channels first."""
    return isinstance(owner, _ConvNd) and not isinstance(owner, _ConvTransposeNd)


def check_dims(named: RegisteredParameter, shape: tuple[int, ...], match: NameMatch) -> None:
    """Refuse a parameter whose number of dimensions no weight, bias or norm of its role has.

    Raises:
        RuleNeeded: what its name says does not fit its shape.
    """
    if match.role in (Role.OTHER, Role.ROUTER) or match.dialect in ("rule", "class", *OWN_SHAPES):
        return
    expected = 1 if match.is_bias or match.role is Role.NORM else 2
    of_experts = match.role is Role.FFN and len(shape) == expected + 1
    fits = len(shape) <= 1 if match.role is Role.NORM else len(shape) == expected or of_experts
    if not fits and not (is_convolution(named.first.owner) and not match.is_bias):
        assert match.role is not None
        what = "bias" if match.is_bias else "norm" if match.role is Role.NORM else "weight"
        raise RuleNeeded(
            f"{{parameter}} matches role {match.role.value!r} by name, but a {what} of that role has {expected} "
            f"dimension(s). Give its role.",
            named.fqn,
            shape,
            {"role": CHOOSE},
            {"role": ROLE_CHOICES},
        )


def is_matrix(owner: nn.Module) -> bool:
    """Whether a module is one of PyTorch's that multiply by a matrix or look up its rows."""
    return isinstance(owner, _MATRICES)


def _convolution(registration: Registration) -> NameMatch | None:
    # Convolutions cut images into patches, filter sound and mix neighbouring tokens. The paper measured none of them,
    # so one whose name says nothing gets the smallest multiplier. The rows of a transposed one are its inputs.
    if not is_convolution(registration.owner):
        return None
    return NameMatch(Role.OTHER, None, is_bias_name(registration.fqn.rpartition(".")[2]), DIALECT)


def _name_beside_class(fqn: str) -> NameMatch | None:
    try:
        return match_name(fqn)
    except RuleNeeded:  # two naming rules disagree; the class decides
        return None


def _contradiction(owner: nn.Module, by_name: NameMatch) -> str | None:
    wrong = (by_name.role is Role.NORM and is_matrix(owner)) or (
        by_name.role is Role.EMBEDDING and isinstance(owner, nn.Linear)
    )
    return f"its name says {meaning_of(by_name)}, but it belongs to a {type(owner).__name__}" if wrong else None


def _disagreement(owner: nn.Module, by_class: NameMatch, by_name: NameMatch) -> str | None:
    same = (by_class.role, by_class.qkv_layout) == (by_name.role, by_name.qkv_layout)
    # that dialect's rule is about all that an expert holds, and linear attention has the names of attention
    if same or by_name.dialect == "deepspeed" or by_class.role is Role.OTHER:
        return None
    return f"its name says {meaning_of(by_name)}, but its {type(owner).__name__} says {meaning_of(by_class)}"


def is_norm(owner: nn.Module, parent: nn.Module | None) -> bool:
    """Whether all that a module registers itself are scales and offsets of a norm.

    PyTorch's norms are. Another class is if its name ends like a norm's, it holds no modules with parameters, and its
    parameters are vectors of one length, or have the shape [heads, rows of a head] of the attention that holds it
    (Cohere).
    """
    if isinstance(owner, _NORMS):
        return True
    if not named_like_a_norm(owner) or is_matrix(owner):
        return False
    if any(True for child in owner.children() for _ in child.parameters()):
        return False
    shapes = {shape_of(param) for param in owner.parameters(recurse=False)}
    if len(shapes) != 1:
        return False
    (shape,) = shapes
    return len(shape) <= 1 or shape in _heads_of(parent)


def _heads_of(attention: nn.Module | None) -> tuple[tuple[int, ...], ...]:
    heads = None if attention is None else generic_heads(attention)
    if heads is None or heads.head_dim is None:
        return ()
    return (heads.num_heads, heads.head_dim), (heads.num_kv_heads, heads.head_dim)


def named_like_a_norm(owner: nn.Module) -> bool:
    """Whether the name of a module's class, or of a base of it, ends like a norm's."""
    return any(_NORM_CLASS.search(name) for name in class_names(owner))


def proposed_role(owner: nn.Module, shape: tuple[int, ...], leaf: str) -> Role | None:
    """A role that does no harm for a parameter that nothing knows; None if the user has to choose.

    Only roles with the smallest multiplier are proposed. A wrong one then trains too slowly, and never too fast.

    Args:
        owner: the module that registers the parameter.
        shape: of the parameter.
        leaf: its name in its owner.
    """
    if named_like_a_norm(owner) and not is_matrix(owner):
        return Role.NORM
    of_a_matrix = is_bias_name(leaf) and any(len(shape_of(p)) > 1 for p in owner.parameters(recurse=False))
    is_vector = sum(size > 1 for size in shape) <= 1 and not (is_matrix(owner) and len(shape) > 1)
    return Role.OTHER if is_vector and not of_a_matrix else None


def shape_of(param: nn.Parameter) -> tuple[int, ...]:
    """This rank's shape; ZeRO-3 keeps it in ``ds_shape`` while the parameter itself is empty."""
    return tuple(getattr(param, "ds_shape", param.shape))
