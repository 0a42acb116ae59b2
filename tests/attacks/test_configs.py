# SPDX-License-Identifier: Apache-2.0
"""Mutations of shipped run files, model shapes, DeepSpeed JSONs and of ``--set``, as ``ds-blockwise check`` sees them.

What must come of an input follows from its mutation: a misspelt key, a wrong kind of value or an unreadable file must
be refused with the name of the entry; another spelling of the same values must be accepted.
"""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from ds_blockwise.runs.check import check_run_file
from ds_blockwise.runs.reading.engine_file import check_engine_file
from tests.helpers import ROOT
from tests.helpers.attacks import Input, attack, number_of_inputs

pytest.importorskip("deepspeed", reason="the JSON is checked by DeepSpeed")

INPUTS = 420
RUNS = sorted((ROOT / "configs" / "run").glob("*.yaml"))
FREE_TEXT = ("name", "output", "directory", "source", "text_key", "tokenizer", "blend")
# Values that no field has.
NEVER: list[Any] = [{"a": 1}, [[1]], [{"a": {"b": 1}}]]
BOMB = b"a: &a [x, x]\n" + b"".join(
    b"%c: &%c [%s]\n" % (98 + i, 98 + i, b", ".join([b"*%c" % (97 + i)] * 9)) for i in range(20)
)
BYTES: dict[str, bytes | None] = {
    "empty": b"",
    "one NUL": b"\0",
    "NULs in the middle": b"name: a\0b\n",
    "not UTF-8": b"\xff\xfe\x00n",
    "half a character": b"name: \xc3",
    "deep lists": b"[" * 5000,
    "deep sections": b"\n".join(b" " * i + b"a:" for i in range(400)),
    "deep objects": b'{"a":' * 3000 + b"1" + b"}" * 3000,
    "alias bomb": BOMB,
    "alias of itself": b"&a [*a]\n",
    "tag of Python": b"!!python/object/apply:os.system [true]\n",
    "tag of a number": b"name: !!int x\n",
    "two documents": b"a: 1\n---\nb: 2\n",
    "a list": b"- 1\n",
    "one word": b"hello",
    "null": b"null",
    "long": b"# " + b"x" * (1 << 21),
    "control characters": b"name: \x1b[31m\n",
    "key that is a list": b"? [a]\n: 1\n",
    "a folder": None,
    "a pipe": None,
}
# Values and lines of `--set` that are wrong for a whole number.
WRONG_NUMBERS = (
    *("[", "010", "1:30", "1_000", "0x10", "yes", "1.5", "-1", "'7'", "{a: 1}", "[1]", "2024-01-01", "&a 1", "*a"),
    *(".inf", "1e999", "9" * 400, "[" * 2000, "!!int 3", "null", "", "\0", "\ud800", "a: b: c", "%", "@", "`"),
)
WRONG_LINES = (
    *("training.step=5", "trainin.steps=5", "steps=5", "=5", ".=5", "training.=5", "training..steps=5", "x", ""),
    *("training=5", "training.steps.x=5", "base=run.yaml", "training.steps", "name.x=1", "a" * 5000 + "=1"),
    *("data=[", "data={", "model=[1]", "deepspeed=nowhere.json", "model=/dev/zero", "deepspeed=/", "\ud800=1"),
)


class Case:
    """A run in files of its own, which a mutation changes."""

    def __init__(self, source: Path) -> None:
        run, problems = check_run_file(source)
        assert run is not None and not problems
        self.run = _merged(source)
        self.model = yaml.safe_load(run.model_file.read_text(encoding="utf-8"))
        self.engine = copy.deepcopy(run.deepspeed)

    def write(self, folder: Path) -> Path:
        folder.mkdir()
        (folder / "model.yaml").write_text(yaml.safe_dump(self.model), encoding="utf-8")
        (folder / "engine.json").write_text(json.dumps(self.engine), encoding="utf-8")
        run = {**self.run, "model": "model.yaml", "deepspeed": "engine.json"}
        (folder / "run.yaml").write_text(yaml.safe_dump(run), encoding="utf-8")
        return folder / "run.yaml"


def _merged(source: Path) -> dict[str, Any]:
    """A run file with its bases, as one mapping; the reader's own merge is not used."""
    values = yaml.safe_load(source.read_text(encoding="utf-8"))
    merged = _merged(source.parent / values.pop("base")) if "base" in values else {}
    for key, value in values.items():
        merged[key] = {**merged.get(key, {}), **value} if isinstance(value, dict) else value
    return merged


def entries(values: dict[str, Any], way: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in values.items():
        yield (*way, key), value
        if isinstance(value, dict):
            yield from entries(value, (*way, key))


def holder(values: dict[str, Any], way: tuple[str, ...]) -> dict[str, Any]:
    for key in way[:-1]:
        values = values[key]
    return values


def misspelt(word: str, rng: random.Random) -> str:
    at = rng.randrange(len(word))
    other = rng.choice("abcdefghijklmnopqrstuvwxyz")
    return rng.choice(
        [word[:at] + word[at + 1 :], word[:at] + other + word[at:], word[:at] + other + word[at + 1 :], word.upper()]
    )


Act = Callable[[], object]
Made = tuple[str, Literal["refuse", "accept", "either"], Act]


def check(path: Path, overrides: tuple[str, ...] = ()) -> object:
    """What the command does: an error for people if there is a problem, as a list; else nothing.

    The JSON is checked by itself too; whether it is refused then is its own test's.
    """
    _, problems = check_run_file(path, overrides)
    _, alone = check_engine_file(path.parent / "engine.json")
    for line in (*problems.lines, *alone.lines):
        line.encode()  # a terminal can show it
        assert "\n" not in line and len(line) < 2000, line
    problems.raise_if_any()
    return None


def misspelt_key(case: Case, folder: Path, rng: random.Random) -> Made:
    which = rng.choice(["run", "model", "engine"])
    values = getattr(case, which)
    way, value = rng.choice([(w, v) for w, v in entries(values) if w[0] not in ("model", "deepspeed")])
    section = holder(values, way)
    key = misspelt(way[-1], rng)
    if key in section or key == "base":
        key = way[-1] + "_"
    del section[way[-1]]
    section[key] = value
    return f"{which}: {'.'.join(way)} -> {key!r}", "refuse", partial(check, case.write(folder))


def wrong_kind(case: Case, folder: Path, rng: random.Random) -> Made:
    which = rng.choice(["run", "model", "engine"])
    values = getattr(case, which)
    way, old = rng.choice([(w, v) for w, v in entries(values) if w[-1] not in ("model", "deepspeed")])
    kinds = [*NEVER, None, "some text", 1.5, True, -1, 10**400]
    if isinstance(old, bool):
        kinds = [k for k in kinds if k is not True]
    elif isinstance(old, float) or (which == "engine" and isinstance(old, int) and not isinstance(old, bool)):
        kinds = [*NEVER, "some text", True, -1, [0.1, "x"]]
    elif isinstance(old, str):
        kinds = [*NEVER, None, True, 7] if way[-1] not in FREE_TEXT else [{"a": 1}, True, 7]
    elif isinstance(old, (dict, list)):
        kinds = ["some text", 7, True, [[1]]]
    new = rng.choice(kinds)
    holder(values, way)[way[-1]] = new
    return f"{which}: {'.'.join(way)} = {str(new)[:40]}", "refuse", partial(check, case.write(folder))


def key_twice(case: Case, folder: Path, rng: random.Random) -> Made:
    path = case.write(folder)
    name = rng.choice(["run.yaml", "model.yaml", "engine.json"])
    lines = (folder / name).read_text(encoding="utf-8").splitlines()
    if name == "engine.json":
        key = rng.choice(list(case.engine))
        text = "{" + f'"{key}": 1, ' + "".join(lines)[1:]
    else:
        at = rng.choice([i for i, line in enumerate(lines) if ": " in line])
        text = "\n".join([*lines[: at + 1], lines[at], *lines[at + 1 :]]) + "\n"
    (folder / name).write_text(text, encoding="utf-8")
    return f"{name}: a key twice", "refuse", partial(check, path)


def other_bytes(case: Case, folder: Path, rng: random.Random) -> Made:
    path = case.write(folder)
    name = rng.choice(["run.yaml", "model.yaml", "engine.json"])
    label = rng.choice(list(BYTES))
    (folder / name).unlink()
    if label == "a folder":
        (folder / name).mkdir()
    elif label == "a pipe":
        os.mkfifo(folder / name)
    else:
        content = BYTES[label]
        assert content is not None
        (folder / name).write_bytes(content)
    return f"{name}: {label}", "refuse", partial(check, path)


def cut_or_flipped(case: Case, folder: Path, rng: random.Random) -> Made:
    path = case.write(folder)
    file = folder / rng.choice(["run.yaml", "model.yaml", "engine.json"])
    content = bytearray(file.read_bytes())
    at = rng.randrange(len(content))
    if rng.random() < 0.5:
        content = content[:at]
    else:
        content[at] ^= 1 << rng.randrange(8)
    file.write_bytes(bytes(content))
    return f"{file.name}: {at} of {bytes(content)!r}"[:200], "either", partial(check, path)


def override(case: Case, folder: Path, rng: random.Random) -> Made:
    key = rng.choice(["training.steps", "training.global_batch_size", "parallel.tensor", "cluster.nodes"])
    value = rng.choice(WRONG_NUMBERS)
    return f"--set {key}={value[:40]!r}", "refuse", partial(check, case.write(folder), (f"{key}={value}",))


def override_key(case: Case, folder: Path, rng: random.Random) -> Made:
    text = rng.choice(WRONG_LINES)
    return f"--set {text[:40]!r}", "refuse", partial(check, case.write(folder), (text,))


def same_meaning(case: Case, folder: Path, rng: random.Random) -> Made:
    """Another order, style, spelling or encoding of the same values."""
    path = case.write(folder)
    kind = rng.choice(["flow style", "byte order mark", "JSON with 5e8", "quoted text", "comments", "set", "CRLF"])
    if kind == "flow style":
        for name in ("run.yaml", "model.yaml"):
            values = yaml.safe_load((folder / name).read_text(encoding="utf-8"))
            (folder / name).write_text(yaml.safe_dump(values, default_flow_style=True), encoding="utf-8")
    elif kind == "byte order mark":
        for file in folder.iterdir():
            file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    elif kind == "JSON with 5e8":
        case.engine.setdefault("zero_optimization", {})["reduce_bucket_size"] = 5e8
        (folder / "engine.json").write_text(json.dumps(case.engine), encoding="utf-8")
    elif kind == "CRLF":
        for file in folder.iterdir():
            file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    elif kind != "set":
        text = path.read_text(encoding="utf-8")
        more = "# nothing: [here\n" if kind == "comments" else ""
        path.write_text(more + text.replace("model: model.yaml", "model: 'model.yaml'"), encoding="utf-8")
    overrides = ("training.seed=7", "name='a: b'", "data.validation_fraction=5e-2") if kind == "set" else ()
    return kind, "accept", partial(check, path, overrides)


MUTATIONS = [
    *(misspelt_key, wrong_kind) * 3,
    *(key_twice, other_bytes, override, override_key, cut_or_flipped, same_meaning),
]


def inputs(cases: list[Case], folder: Path, count: int) -> Iterator[Input]:
    for seed in range(count):
        rng = random.Random(seed)
        mutate = MUTATIONS[seed % len(MUTATIONS)]
        label, must, act = mutate(copy.deepcopy(rng.choice(cases)), folder / str(seed), rng)
        yield Input(f"{mutate.__name__} {seed}: {label}", act, must)


def says_what_to_do(error: BaseException) -> str | None:
    lines = str(error).splitlines()[1:]
    poor = [line for line in lines if " = " not in line or ("allowed: " not in line and "ds.json" not in line)]
    poor = [line for line in poor if "optimizer" not in line and "scheduler" not in line]  # their own checks' words
    return f"does not say what is allowed: {poor[0]}" if poor else None


def test_mutated_configs(tmp_path: Path) -> None:
    cases = [Case(path) for path in RUNS]
    made = inputs(cases, tmp_path, number_of_inputs(INPUTS))
    attack("run files, model shapes, DeepSpeed JSONs, `--set`", made, unfit=says_what_to_do).keep("configs")
