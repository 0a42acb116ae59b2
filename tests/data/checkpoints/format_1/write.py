# SPDX-License-Identifier: Apache-2.0
"""Writes the checkpoints in this folder, and beside them the state that they must bring back.

    python tests/data/checkpoints/format_1/write.py OUTPUT

It needs transformers and DeepSpeed and takes the ``ds_blockwise`` that Python finds. The files here were written once;
see README.md. Weights and gradients are integers times a power of two: the mean over two equal ranks is then exact.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

STEPS = 3
SIZES = {"hidden": 8, "heads": 2, "kv_heads": 1, "head_dim": 4, "ffn": 10, "vocab": 11}
LR_MULTIPLIERS = {"emb": 10, "head": 10, "qk": 8, "ffn": 6, "vo": 4, "norm": 1, "other": 1}
SETTINGS: dict[str, Any] = {
    **{"lr": 2e-2, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1},
    "lr_multipliers": LR_MULTIPLIERS,
}
OPTIMIZERS = ("BlockwiseAdamMini", "BlockwiseAdamW")
FORMATS = ("expanded", "compact")
TAG = "step_3"
WORLD_SIZE = 2


def build() -> nn.Module:
    """A LLaMA of one layer with small weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=SIZES["vocab"],
            hidden_size=SIZES["hidden"],
            num_attention_heads=SIZES["heads"],
            num_key_value_heads=SIZES["kv_heads"],
            head_dim=SIZES["head_dim"],
            intermediate_size=SIZES["ffn"],
            num_hidden_layers=1,
            max_position_embeddings=8,
            tie_word_embeddings=False,
        )
    )
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.copy_(_numbers(parameter, 37, 11 * index, 61) * 2.0**-10)
    return model


def gradients(model: nn.Module, step: int) -> dict[str, torch.Tensor]:
    """The gradient of every parameter at step 0, 1, ..."""
    named = enumerate(model.named_parameters())
    return {name: _numbers(p, 53, 17 * step + 7 * index, 127) * 2.0**-8 for index, (name, p) in named}


def _numbers(like: torch.Tensor, factor: int, offset: int, modulus: int) -> torch.Tensor:
    return ((torch.arange(like.numel()) * factor + offset) % modulus - modulus // 2).float().view(like.shape)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> None:
    """Updates of a model in one process."""
    for step in steps:
        for name, gradient in gradients(model, step).items():
            model.get_parameter(name).grad = gradient
        optimizer.step()


def feed(engine: Any, step: int) -> None:
    """One update of an engine; every rank feeds the same gradients, whose mean over ranks is then exact."""
    model = engine.module
    planned = gradients(model, step)
    model.forward = lambda: sum((p * planned[name]).sum() for name, p in model.named_parameters())
    engine.backward(engine())
    engine.step()


def engine_json(optimizer: str) -> dict[str, Any]:
    """A DeepSpeed JSON with ZeRO-2 in fp32."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "optimizer": {"type": optimizer, "params": SETTINGS | {"betas": list(SETTINGS["betas"])}},
        "zero_optimization": {"stage": 2},
    }


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Weights and state as they lie in memory, flat, by ``<kind>/<parameter>``."""
    found = {}
    for name, p in model.named_parameters():
        found[f"weights/{name}"] = p.detach().reshape(-1).clone()
        for kind in ("exp_avg", "exp_avg_sq"):
            found[f"{kind}/{name}"] = optimizer.state[p][kind].reshape(-1).clone()
    return found


def partition_of(engine: Any) -> dict[str, torch.Tensor]:
    """Weights and state of one rank's ZeRO-2 partition as they lie in memory."""
    optimizer = engine.basic_optimizer
    ((flat,),) = (group["params"] for group in optimizer.param_groups)
    state = {kind: optimizer.state[flat][kind].reshape(-1).clone() for kind in ("exp_avg", "exp_avg_sq")}
    return {"weights": flat.detach().clone(), **state}


def write_plain(folder: Path) -> None:
    """State dicts of both optimizers in both forms, in plain PyTorch, and what was in memory."""
    from safetensors.torch import save_file

    import ds_blockwise

    folder.mkdir(parents=True)
    for name in OPTIMIZERS:
        for form in FORMATS:
            model = build()
            ds_blockwise.tag_parameters(model)
            optimizer = getattr(ds_blockwise, name)(model.parameters(), checkpoint_format=form, **SETTINGS)
            train(model, optimizer, range(STEPS))
            saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(saved, folder / f"{name}_{form}.pt")
        save_file(state_of(model, optimizer), folder / f"{name}_memory.safetensors")


def write_deepspeed(rank: int, folder: str, rendezvous: str) -> None:
    """One rank of a ZeRO-2 run. The scripts that are saved with a checkpoint are not kept."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD_SIZE), "DS_ACCELERATOR": "cpu"}
    store = torch.distributed.FileStore(rendezvous, WORLD_SIZE)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=WORLD_SIZE)
    import deepspeed
    from safetensors.torch import save_file

    import ds_blockwise  # noqa: F401 - registers the optimizers

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled
    model = build()
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=list(model.parameters()), config=engine_json("BlockwiseAdamMini")
    )
    for step in range(STEPS):
        feed(engine, step)
    engine.save_checkpoint(folder, tag=TAG, client_state={"note": "kept"})
    save_file(partition_of(engine), Path(folder) / f"memory_rank_{rank}.safetensors")
    torch.distributed.barrier()
    if rank == 0:
        for script in Path(folder).glob("*.py"):
            script.unlink()
    torch.distributed.destroy_process_group()


def write_portable(source: Path, output: Path) -> None:
    """The portable form of a DeepSpeed checkpoint."""
    for name in (
        "ds_blockwise.hosts.deepspeed.checkpoint.inspect",
        "ds_blockwise.cli_checkpoint",
    ):  # now, and when it was written
        try:
            convert = importlib.import_module(name).convert_checkpoint
        except ModuleNotFoundError:
            continue
        convert(source, output)
        return
    raise ImportError("this ds_blockwise has no convert_checkpoint where it is looked for")


def main(output: Path) -> None:
    """Write everything into a new folder."""
    write_plain(output / "plain")
    with tempfile.TemporaryDirectory() as shared:
        arguments = (str(output / "deepspeed"), str(Path(shared) / "store"))
        torch.multiprocessing.spawn(write_deepspeed, arguments, nprocs=WORLD_SIZE)
    write_portable(output / "deepspeed", output / "portable")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
