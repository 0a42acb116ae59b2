# SPDX-License-Identifier: Apache-2.0
"""A user's script in a process of its own, with its own cache of compiled kernels."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

USER = """
    import ds_blockwise, torch
    from ds_blockwise import BlockwiseAdamMini, tag_parameters

    model = torch.nn.ModuleDict({"embedding": torch.nn.Embedding(8, 4), "mlp": torch.nn.Linear(4, 4)})
    tag_parameters(model, rules=[{"match": "mlp", "role": "ffn"}, {"match": "emb", "role": "embedding"}])
    for _ in range(2):
        optimizer = BlockwiseAdamMini(model.parameters(), lr=0.1, backend=BACKEND)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    print("stepped by", optimizer.backend_of(next(model.parameters())), "of", ds_blockwise.__file__)
"""


def as_user(
    tmp_path: Path, backend: str, *, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A user's script in a process of its own, with its own cache of compiled kernels."""
    code = f"BACKEND = {backend!r}\n" + textwrap.dedent(USER)
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"TORCH_EXTENSIONS_DIR": str(tmp_path)} | environment,
        capture_output=True,
        text=True,
        timeout=240,
        cwd=cwd,
        check=False,
    )


RANK_OF_TWO = """
    import os
    import torch, deepspeed, ds_blockwise

    rank = int(os.environ["RANK"])
    torch.distributed.init_process_group("gloo", store=torch.distributed.FileStore(STORE, 2), rank=rank, world_size=2)
    model = torch.nn.ModuleDict({"mlp": torch.nn.Linear(4, 4)})
    config = {
        "train_batch_size": 2,
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "BlockwiseAdamMini", "params": {"rules": [{"match": "mlp", "role": "ffn"}]}},
    }
    deepspeed.initialize(model=model, config=config)
"""


def as_two_ranks(tmp_path: Path, *environments: dict[str, str]) -> list[tuple[int, str]]:
    """Two ranks start a ZeRO engine, each with variables of its own; exit status and errors of each."""
    code = f"STORE = {str(tmp_path / 'store')!r}\n" + textwrap.dedent(RANK_OF_TWO)
    ranks = []
    for rank, environment in enumerate(environments):
        places = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        ranks.append(subprocess.Popen([sys.executable, "-c", code], env=os.environ | places | environment, **pipes))
    try:
        said = [process.communicate(timeout=240)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    return [(process.returncode, text) for process, text in zip(ranks, said, strict=True)]
