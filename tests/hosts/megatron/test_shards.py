# SPDX-License-Identifier: Apache-2.0
"""Each tensor-parallel shard of Megatron-core's layers, against the slice that Megatron-core itself cut.

``use_cpu_initialization`` draws the same whole weights at every tensor-parallel size and cuts the shard out of them.
"""

import pytest
import torch

from ds_blockwise import tag_parameters
from tests.helpers.distributed import passes

pytest.importorskip("megatron.core", reason="the layers are Megatron-core's")
import megatron_patch
from tests.helpers.megatron import models
from tests.helpers.megatron.groups import megatron_groups

LAYER = "decoder.layers.0."
CUTS = {
    "llama": models.LLAMA,
    "biases and q/k norms": {"qk_layernorm": True},
    "output gate": {**models.LLAMA, "attention_output_gate": True},
    "one query group": {**models.LLAMA, "num_query_groups": 1},
    "experts": {**models.EXPERTS, "sequence_parallel": False},
    "latent attention": models.LATENT_WITH_NORMS,
}
# all on four ranks: with tp 2 two tensor-parallel groups do the same
CASES = {f"{name}, tp {tp}": (4, (name, tp)) for name in CUTS for tp in (2, 4)}


def run_case(context, case):
    """Build whole and split from one seed; what our shard calls this rank's part must be this rank's tensor."""
    from megatron.core import parallel_state

    name, tp = case
    megatron_patch.cpu_shims()
    config = CUTS[name]
    settings = {"num_experts": 4} if name == "experts" else {"qk_layernorm": config.get("qk_layernorm", False)}
    weights = {}
    for size in (1, tp):
        with megatron_groups(tensor_model_parallel_size=size):
            with models.te_symbols():
                spec = models.latent_spec(te=False) if name == "latent attention" else None
                model = models.gpt(spec, spec_settings=settings, **config)
            tag_parameters(model)
            weights[size] = dict(model.named_parameters())
            tp_rank = parallel_state.get_tensor_model_parallel_rank()
    assert weights[1].keys() == weights[tp].keys()
    for fqn, part in weights[tp].items():
        whole, shard = weights[1][fqn], part.block_shard
        assert part.block_spec == whole.block_spec, fqn
        if shard is not None:
            kept = [i for start, end in shard.chunks[tp_rank] for i in range(start, end)]
            whole = whole.index_select(shard.dim, torch.tensor(kept))
        assert torch.equal(part, whole), f"{fqn}: {shard}"
    split = {fqn for fqn, p in weights[tp].items() if p.block_shard is not None}
    assert f"{LAYER}self_attention.linear_proj.weight" in split and f"{LAYER}input_layernorm.weight" not in split


@pytest.mark.parametrize("name", CASES)
def test_shards_are_the_slices_that_megatron_core_cuts(outcome, name):
    """With fewer query groups than ranks a head lies on two of them; only global rows tell which."""
    passes(outcome, name)
