# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for Megatron-core's wrappers of Transformer Engine, which is not needed to test that it is recognised.

Class names, constructors, shapes and attributes are those of ``megatron/core/extensions/transformer_engine.py`` 0.16
to 0.19 (which adds ``name``) and of the Transformer Engine classes below it, the misleading ones included: every weight
is marked as split, along dimension 0 unless its TE class was told "row", which it isn't for duplicated weights and for
experts. The arithmetic is plain torch, so that whole models run.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from torch import Tensor, nn


def _mark(param: nn.Parameter, te_parallel_mode: str | None, **attributes: object) -> None:
    param.tensor_model_parallel = True
    param.partition_dim = 1 if te_parallel_mode == "row" else 0
    for name, value in attributes.items():
        setattr(param, name, value)


class TELinear(nn.Module):
    def __init__(
        self,
        input_size,
        output_size,
        *,
        parallel_mode,
        config,
        init_method,
        bias,
        skip_bias_add,
        skip_weight_param_allocation=False,
        tp_comm_buffer_name=None,
        is_expert=False,
        tp_group=None,
        stride=1,
        name=None,
    ):
        super().__init__()
        self.config = config
        if tp_group is None:
            tp_group = parallel_state.get_tensor_model_parallel_group()
        self._tp_group = tp_group
        size = 1 if parallel_mode == "duplicated" else tp_group.size()
        expert = is_expert and (size > 1 or config.expert_model_parallel_size > 1)
        te_mode = None if expert or parallel_mode == "duplicated" else parallel_mode
        if parallel_mode == "column":
            output_size //= size
        elif parallel_mode == "row":
            input_size //= size
        self.returns_bias = skip_bias_add and bias
        self.weight = nn.Parameter(torch.empty(output_size, input_size))
        init_method(self.weight)
        _mark(self.weight, te_mode, partition_stride=stride)
        self.bias = nn.Parameter(torch.zeros(output_size)) if bias else None
        if self.bias is not None and parallel_mode == "column":
            _mark(self.bias, te_mode, partition_stride=stride)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        bias = None if self.returns_bias else self.bias
        return nn.functional.linear(x, self.weight, bias), self.bias if self.returns_bias else None


class TEColumnParallelLinear(TELinear):
    def __init__(self, input_size, output_size, *, gather_output, **settings):
        assert not gather_output
        super().__init__(input_size, output_size, parallel_mode="column", **settings)


class TERowParallelLinear(TELinear):
    def __init__(self, input_size, output_size, *, input_is_parallel, **settings):
        assert input_is_parallel
        super().__init__(input_size, output_size, parallel_mode="row", **settings)


class TELayerNormColumnParallelLinear(nn.Module):
    """Not a TELinear: its base is Transformer Engine's LayerNormLinear."""

    def __init__(self, input_size, output_size, *, gather_output, **settings):
        super().__init__()
        linear = TEColumnParallelLinear(input_size, output_size, gather_output=gather_output, **settings)
        self.config, self._tp_group, self.returns_bias = linear.config, linear._tp_group, linear.returns_bias
        self.weight, self.bias = linear.weight, linear.bias
        self.layer_norm_weight = nn.Parameter(torch.ones(input_size))
        self.layer_norm_weight.sequence_parallel = linear.config.sequence_parallel

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        x = nn.functional.rms_norm(x, (x.shape[-1],), self.layer_norm_weight)
        return TELinear.forward(self, x)


class TEGroupedLinear(nn.Module):
    """Weights of the experts are parameters ``weight0``, ``weight1``, ...; ``single`` makes one of three dimensions."""

    single = False

    def __init__(
        self,
        num_gemms,
        input_size,
        output_size,
        *,
        parallel_mode,
        config,
        init_method,
        bias,
        skip_bias_add,
        is_expert,
        tp_comm_buffer_name=None,
        pg_collection=None,
        name=None,
    ):
        super().__init__()
        self.config, self.num_gemms = config, num_gemms
        self._tp_group = pg_collection.expt_tp
        size = self._tp_group.size()
        te_mode = None if size > 1 or config.expert_model_parallel_size > 1 else parallel_mode
        if parallel_mode == "column":
            output_size //= size
        else:
            input_size //= size
        if self.single:
            self.weight = nn.Parameter(torch.empty(num_gemms, output_size, input_size))
        for i in range(0 if self.single else num_gemms):
            setattr(self, f"weight{i}", nn.Parameter(torch.empty(output_size, input_size)))
            if bias:
                setattr(self, f"bias{i}", nn.Parameter(torch.zeros(output_size)))
        for param in self.parameters():
            init_method(param)
            _mark(param, te_mode, allreduce=config.expert_model_parallel_size == 1)


class TEColumnParallelGroupedLinear(TEGroupedLinear):
    def __init__(self, num_gemms, input_size, output_size, **settings):
        super().__init__(num_gemms, input_size, output_size, parallel_mode="column", **settings)


class TERowParallelGroupedLinear(TEGroupedLinear):
    def __init__(self, num_gemms, input_size, output_size, **settings):
        super().__init__(num_gemms, input_size, output_size, parallel_mode="row", **settings)


class TEDotProductAttention(nn.Module):
    """Causal attention of [sequence, batch, heads, dim] tensors; keys and values may differ in size."""

    def __init__(
        self,
        config,
        layer_number,
        attn_mask_type,
        attention_type,
        softmax_scale=None,
        k_channels=None,
        v_channels=None,
        cp_comm_type=None,
        pg_collection=None,
        name=None,
    ):
        super().__init__()
        self.config, self.scale = config, softmax_scale
        self.softmax_offset = None
        if config.softmax_type == "learnable":
            self.softmax_offset = nn.Parameter(torch.zeros(config.num_attention_heads // pg_collection.tp.size()))

    def forward(self, query, key, value, *args, **kwargs):
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=True)
        return mixed.permute(2, 0, 1, 3).flatten(2)
