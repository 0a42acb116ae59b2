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
