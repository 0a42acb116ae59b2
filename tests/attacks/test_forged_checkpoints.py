# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are damaged or forged: each is refused with an error for people, or what is read is the original.

Small checkpoints of an earlier version are changed at random places: bytes, entries of JSON and of pickles, files.
With the manifest as it was nothing wrong may be accepted. Where the manifest is gone or made anew, as an attacker can,
values that are possible cannot be told from the original's; but nothing may run, hang, crash or be impossible.
"""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ds_blockwise
from ds_blockwise.checkpoint.given_files import load_torch_file
from ds_blockwise.checkpoint.manifest import (
    MANIFEST,
    CheckpointError,
    NoRecordError,
    NotReadError,
    files_in,
    sums_of,
    write_manifest,
)
from ds_blockwise.checkpoint.portable import Portable
from ds_blockwise.checkpoint.portable_index import KINDS
from ds_blockwise.hosts.deepspeed.checkpoint.inspect import convert_checkpoint, describe_checkpoint
from tests.data.checkpoints.format_1 import write as old
from tests.helpers import ROOT
from tests.helpers.attacks import Input, attack, number_of_inputs

pytest.importorskip("deepspeed", reason="DeepSpeed's files need the extra 'deepspeed'")
pytest.importorskip("transformers", reason="the model of these checkpoints needs the extra 'hf'")

SOURCE = ROOT / "tests/data/checkpoints/format_1"
REFUSALS = (ValueError, CheckpointError, NoRecordError, NotReadError)
NAN, INF = float("nan"), float("inf")
VALUES: tuple[Any, ...] = (
    *(None, True, "", "x", "../../x", "\0", "a" * 5000, -1, 0, 3, 10**7, 2**62, -(2**63), 10**400, 0.5),
    *(NAN, INF, -INF, [], [[]], {}, {"x": 1}, [1, 2, 3], [None] * 9, {"numel": -1}),
)


class Runs:
    """Unpickled, it makes a folder: the mark that code has run."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.makedirs, (str(self.marker),)


# ------------------------------------------------------------------------------ the mutations


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in nested containers, as the keys that lead there."""
    if at:
        yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*at, key))


def put(tree: Any, at: tuple[Any, ...], value: Any) -> None:
    for key in at[:-1]:
        tree = tree[key]
    if value is DELETED:
        del tree[at[-1]]
    else:
        tree[at[-1]] = value


DELETED = object()


def wrong_value(draw: random.Random, old_value: Any, marker: Path) -> tuple[str, Any]:
    """Something else than what was there."""
    if isinstance(old_value, torch.Tensor) and draw.random() < 0.7:
        changed: dict[str, Callable[[], Any]] = {
            "shorter": lambda: old_value.reshape(-1)[: old_value.numel() // 2].clone(),
            "longer": lambda: torch.cat([old_value.reshape(-1).float()] * 2),
            "expanded": lambda: torch.zeros((), dtype=torch.float32).expand(10**12),
            "meta": lambda: torch.empty(old_value.shape, device="meta"),
            "sparse": lambda: torch.sparse_coo_tensor(size=tuple(old_value.shape) or (1,)),
            "int64": lambda: old_value.long(),
            "NaN": lambda: torch.full_like(old_value, NAN) if old_value.is_floating_point() else old_value,
            "negative": lambda: -old_value.abs() - 1 if old_value.numel() else old_value,
            "empty": lambda: torch.zeros(0),
            "bool": lambda: old_value.bool(),
        }
        name = draw.choice(sorted(changed))
        return name, changed[name]()
    kind = draw.random()
    if kind < 0.15:
        return "deleted", DELETED
    if kind < 0.3:
        return "code", Runs(marker)
    if kind < 0.4 and isinstance(old_value, (int, float)) and not isinstance(old_value, bool):
        return "off by one", old_value + draw.choice((-1, 1))
    value = draw.choice(VALUES)
    return repr(value)[:30], copy.deepcopy(value)


def change_json(draw: random.Random, folder: Path) -> str:
    path = draw.choice(sorted(folder.glob("*.json")))
    tree = json.loads(path.read_text(encoding="utf-8"))
    at = draw.choice(list(places(tree)))
    value = draw.choice([*VALUES, DELETED])
    put(tree, at, value if value is DELETED else copy.deepcopy(value))
    path.write_text(json.dumps(tree), encoding="utf-8")
    return f"{path.name} {at} = {'deleted' if value is DELETED else repr(value)[:30]}"


def change_pickle(draw: random.Random, folder: Path) -> str:
    path = draw.choice(sorted(folder.glob("*.pt")))
    tree = torch.load(path, weights_only=False)
    if draw.random() < 0.05:
        torch.save(Runs(marker_of(folder)), path)
        return f"{path.name} is code"
    at = draw.choice(list(places(tree)))
    old_value = tree
    for key in at:
        old_value = old_value[key]
    what, value = wrong_value(draw, old_value, marker_of(folder))
    put(tree, at, value)
    torch.save(tree, path)
    return f"{path.name} {at} = {what}"


def change_places(draw: random.Random, folder: Path) -> str:
    """States by other numbers than those of the groups, or in another order than the record's."""
    (path,) = folder.glob("*.pt")
    tree = torch.load(path, weights_only=False)
    saved = tree["optimizer"]
    one, two = draw.sample(range(len(saved["state"])), 2)
    what = draw.choice(("numbers as text", "a number too many", "exchanged"))
    if what == "numbers as text":
        saved["state"] = {str(number): state for number, state in saved["state"].items()}
    elif what == "a number too many":
        saved["state"][10**6 + one] = saved["state"].pop(two)
    else:
        tensors = saved["ds_blockwise"]["tensors"]
        tensors[one], tensors[two] = tensors[two], tensors[one]
    torch.save(tree, path)
    return f"{path.name} {what} ({one}, {two})"


def change_bytes(draw: random.Random, folder: Path) -> str:
    path = draw.choice(sorted(p for p in folder.iterdir() if p.is_file()))
    content = bytearray(path.read_bytes())
    if draw.random() < 0.3:
        cut = draw.randrange(len(content))
        path.write_bytes(content[:cut])
        return f"{path.name} cut at {cut}"
    where = [draw.randrange(len(content)) for _ in range(draw.choice((1, 1, 8)))]
    for at in where:
        content[at] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    return f"{path.name} flipped at {where}"


def change_files(draw: random.Random, folder: Path) -> str:
    names = sorted(p.name for p in folder.iterdir())
    one, two = draw.sample(names, 2)
    first, second = folder / one, folder / two
    what = draw.choice(("missing", "swapped", "twice", "link", "pipe", "zeros", "folder", "loop", "deep"))
    if what == "missing":
        first.unlink()
    elif what == "swapped":
        content = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(content)
    elif what == "twice":
        name = draw.choice((f"copy_{one}", one.replace("rank_0", "rank_1"), one.replace("00", "01"), one + "x"))
        if not (folder / name).exists():
            shutil.copy(first, folder / name)
    elif what == "deep":
        first.write_text("[" * 100_000, encoding="utf-8")
    else:
        first.unlink()
        if what == "link":
            first.symlink_to(SOURCE / "plain" / "BlockwiseAdamW_compact.pt")
        elif what == "pipe":
            os.mkfifo(first)
        elif what == "zeros":
            first.symlink_to("/dev/zero")
        elif what == "folder":
            first.mkdir()
        else:
            first.symlink_to(first)
    return f"{one} {what} ({two})"


CHANGES = (change_json, change_pickle, change_pickle, change_bytes, change_files)


def marker_of(folder: Path) -> Path:
    return folder.parent / "ran"


def manifest_anew(folder: Path) -> None:
    """As an attacker writes it: right for the files as they are."""
    said = json.loads((SOURCE / folder.parent.name / folder.name / MANIFEST).read_text(encoding="utf-8"))
    (folder / MANIFEST).unlink(missing_ok=True)
    names = [name for name in files_in(folder) if not (folder / name).is_symlink()]
    keys = ("kind", "tag", "global_steps", "topology", "settings")
    write_manifest(folder, files=sums_of(folder, names), **{key: said[key] for key in keys})


# ------------------------------------------------------------------------------ the interfaces


def contents(folder: Path) -> dict[str, torch.Tensor]:
    portable = Portable(folder)
    return {f"{kind}/{name}": portable.tensor(kind, name) for kind in KINDS for name in portable.tensors[kind]}


def checked(folder: Path) -> Any:
    """``ds-blockwise check``; its problems are a refusal."""
    found = describe_checkpoint(folder.parent)
    json.dumps(found, allow_nan=False)
    if found["problems"]:
        raise CheckpointError("\n".join(found["problems"]))
    return None


def converted(folder: Path) -> dict[str, torch.Tensor]:
    """``ds-blockwise convert``, and what it wrote."""
    written, _ = convert_checkpoint(folder.parent, folder.parent.parent / "output")
    found = contents(written)
    assert Portable(written).problems(values=True) == []
    return found


def read_portable(folder: Path) -> dict[str, torch.Tensor]:
    """What a portable load reads, as the engine does: files first, then everything in them."""
    found = describe_checkpoint(folder.parent)["problems"]
    if found:
        raise CheckpointError("\n".join(found))
    portable = Portable(folder)
    portable.training_state()
    return contents(folder)


INTERFACES: dict[str, dict[str, Callable[[Path], Any]]] = {
    "deepspeed": {"check": checked, "convert": converted},
    "portable": {"check": checked, "read": read_portable},
}


def folder_inputs(tmp_path: Path, kind: str, count: int) -> Iterator[Input]:
    original = contents(SOURCE / "portable" / old.TAG)
    for seed in range(count):
        draw = random.Random(f"{kind}{seed}")
        root = tmp_path / f"{kind}-{seed}"
        shutil.copytree(SOURCE / kind / old.TAG, root / kind / old.TAG)
        (root / kind / "latest").write_text(old.TAG, encoding="utf-8")
        folder = root / kind / old.TAG
        change = draw.choice(CHANGES)
        mode = draw.choice(("kept", "gone", "anew"))
        what = change(draw, folder)
        if mode == "gone" and (folder / MANIFEST).is_file():
            (folder / MANIFEST).unlink()
        elif mode == "anew" and not (folder / MANIFEST).is_dir() and all(p.is_file() for p in folder.iterdir()):
            manifest_anew(folder)
        for name, act in INTERFACES[kind].items():
            yield Input(
                f"{kind} {seed} {name}: {what}, manifest {mode}",
                lambda act=act, folder=folder: act(folder),
                must="refuse" if "code" in what else "either",
                wrong=lambda result, mode=mode, folder=folder: wrong(result, original, mode, folder),
            )
        shutil.rmtree(root, ignore_errors=True)


def wrong(result: Any, original: dict[str, torch.Tensor], mode: str, folder: Path) -> str | None:
    if marker_of(folder).exists():
        return "code has run"
    if result is None:
        return None
    if {k: v.shape for k, v in result.items()} != {k: v.shape for k, v in original.items()}:
        return "other tensors than the original's"
    if mode == "kept" and not all(torch.equal(value, original[key]) for key, value in result.items()):
        return "not the original's values"
    return None


@pytest.mark.parametrize("kind", INTERFACES)
def test_forged_folders(tmp_path: Path, kind: str) -> None:
    inputs = folder_inputs(tmp_path, kind, number_of_inputs(100))
    tally = attack(f"forged {kind} checkpoints", inputs, refusals=REFUSALS)
    tally.keep(f"forged_{kind}_checkpoints")


def test_forged_state_dicts(tmp_path: Path) -> None:
    """Plain PyTorch: an optimizer's state dict that torch.load gave, changed at a random place."""

    def inputs(count: int) -> Iterator[Input]:
        model = old.build()
        ds_blockwise.tag_parameters(model)
        for seed in range(count):
            draw = random.Random(f"plain{seed}")
            name, form = draw.choice(old.OPTIMIZERS), draw.choice(old.FORMATS)
            folder = tmp_path / str(seed)
            folder.mkdir()
            shutil.copy(SOURCE / "plain" / f"{name}_{form}.pt", folder / "state.pt")
            change = draw.choice((change_pickle, change_pickle, change_bytes, change_places))
            what = change(draw, folder)
            optimizer = getattr(ds_blockwise, name)(model.parameters(), **old.SETTINGS)
            yield Input(
                f"{name} {form} {seed}: {what}",
                lambda optimizer=optimizer, path=folder / "state.pt": load_plain(optimizer, path),
                must="refuse" if "code" in what or change is change_places else "either",
                wrong=lambda state, folder=folder: not_possible(state, marker_of(folder)),
            )

    tally = attack("forged state dicts", inputs(number_of_inputs(100)), refusals=REFUSALS)
    tally.keep("forged_state_dicts")


def load_plain(optimizer: Any, path: Path) -> Any:
    saved = load_torch_file(path)
    if not isinstance(saved, dict) or not isinstance(saved.get("optimizer"), dict):
        raise ValueError("no state dict of an optimizer")
    before = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(saved["optimizer"])
    except ValueError:
        after = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        assert not optimizer.state and after == before, "changed by a load that failed"
        raise
    return optimizer


def not_possible(optimizer: Any, marker: Path) -> str | None:
    if marker.exists():
        return "code has run"
    for param, state in optimizer.state.items():
        if state and state["exp_avg"].shape != param.shape:
            return "a first moment of another shape"
        if state and not (type(state["step"]) is int and 0 <= state["step"] < 2**62):
            return f"step {state['step']!r}"
    return None
