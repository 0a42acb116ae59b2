# SPDX-License-Identifier: Apache-2.0
"""Small checkpoints folders without an engine: our own, unfinished ones, and those of DeepSpeed alone."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ds_blockwise.checkpoint.folder import publish as publish_folder
from ds_blockwise.checkpoint.folder import start_partial, write_latest
from ds_blockwise.checkpoint.manifest import files_in, sums_of, write_manifest

TOPOLOGY = {"world_size": 2, "dp": 2}


def save(folder: Path, tag: str, steps: int, *, latest: bool = True, publish: bool = True) -> Path:
    """A checkpoint of two files as our own save leaves it; without ``publish`` as a killed save leaves it."""
    partial = start_partial(folder, tag)
    (partial / "deep").mkdir()
    torch.save({"weight": torch.arange(100.0) + steps}, partial / "mp_rank_00_model_states.pt")
    (partial / "deep" / "note.txt").write_text(f"step {steps}", encoding="utf-8")
    sums = sums_of(partial, files_in(partial))
    write_manifest(partial, kind="deepspeed", tag=tag, global_steps=steps, topology=TOPOLOGY, settings=None, files=sums)
    if not publish:
        return partial
    final = publish_folder(partial)
    if latest:
        write_latest(folder, tag)
    return final


def foreign(folder: Path, tag: str, age: int) -> Path:
    """As DeepSpeed alone leaves it."""
    path = folder / tag
    path.mkdir(parents=True)
    torch.save({"weight": torch.randn(3000)}, path / "mp_rank_00_model_states.pt")
    torch.save({"state": torch.randn(500)}, path / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    for file in path.iterdir():
        os.utime(file, (1e9 - age, 1e9 - age))
    return path
