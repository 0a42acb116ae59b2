# SPDX-License-Identifier: Apache-2.0
"""Bytes from a stranger in the store of the rendezvous: the job goes on without them, or names the stranger."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

pytest.importorskip("deepspeed", reason="launch/ needs the extra 'deepspeed'")
pytest.importorskip("megatron.core", reason="launch/ needs the extra 'megatron'")

import torch.distributed as dist

from job import rendezvous
from preflight import are_facts, compare
from tests.helpers.attacks import Input, attack, number_of_inputs

INPUTS = 300
FACTS = {"compared": [["package", "torch", "2"], ["layout", "WORLD_SIZE", "2"]], "problems": [], "gpu": None}
RANKS = [
    {"rank": rank, "world_size": 2, "local_rank": rank, "local_world_size": 2, "host": "node1"} for rank in range(2)
]
RIGHT = {"rank": RANKS[1], "addresses": ["10.0.0.1"], "facts": FACTS}
JUNK: list[Any] = [None, True, -1, 0, 7, 1.5, "", "x", [], {}, [[]], {"a": {}}, 2**70, "\ud800", [1, "a", None], [None]]
BYTES = {
    "nothing": b"",
    "no JSON": b"GET / HTTP/1.1\r\n\r\n",
    "not UTF-8": b"\xff\xfe\xfd",
    "deep lists": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "long number": b"9" * 10_000,
    "a number": b"1",
    "null": b"null",
    "NaN": b"NaN",
    "NULs": b"\0" * 1000,
}


def places(values: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key in values if isinstance(values, dict) else range(len(values)) if isinstance(values, list) else ():
        yield (*way, key)
        yield from places(values[key], (*way, key))


def mutated(rng: random.Random) -> dict[str, Any]:
    """An entry with one value replaced by junk, removed, or one key too many."""
    entry: dict[str, Any] = copy.deepcopy(RIGHT)
    way = rng.choice(list(places(entry)))
    at: Any = entry
    for key in way[:-1]:
        at = at[key]
    kind = rng.randrange(3)
    if kind == 0:
        at[way[-1]] = rng.choice(JUNK)
    elif kind == 1:
        del at[way[-1]]
    elif isinstance(at, dict):
        at["more"] = rng.choice(JUNK)
    else:
        at.append(rng.choice(JUNK))
    return entry


def is_right(entry: dict[str, Any]) -> bool:
    """Whether an entry may be a rank's: said once more, by another way than the program's."""

    def texts(value: object) -> bool:
        return isinstance(value, list) and all(isinstance(v, str) and "\ud800" not in v for v in value)

    try:
        info, facts = entry["rank"], entry["facts"]
        sizes = [info[key] for key in ("rank", "world_size", "local_rank", "local_world_size")]
        pairs = facts["compared"]
        return (
            [len(entry), len(info), len(facts)] == [3, 5, 3]
            and {type(size) for size in sizes} == {int}
            and all(0 <= size < 10**6 for size in sizes)
            and info["rank"] == 1
            and texts([info["host"]])
            and texts(entry["addresses"])
            and all(isinstance(pair, list) and len(pair) == 3 and texts(pair) for pair in pairs)
            and all(pair[0] in ("package", "layout") for pair in pairs)
            and texts(facts["problems"])
            and facts["gpu"] is None
        )
    except (KeyError, TypeError):
        return False


def join(value: bytes) -> object:
    """Rank 0 of two ranks, where something else has written for rank 1."""
    store = dist.HashStore()
    store.set("facts/1", value)
    store.add("read", 1)  # rank 0 waits for rank 1 to read a refusal
    info = rendezvous.RankInfo(**RANKS[0])
    try:
        return rendezvous.join(info, store, FACTS, compare, are_facts)
    except ValueError as error:
        if "differs" in str(error) or "must" in str(error) or "allowed" in str(error) or "[only on" in str(error):
            return None  # an entry in the right form with other facts: the answer names them
        raise


def inputs(count: int) -> Iterator[Input]:
    for label, value in BYTES.items():
        yield Input(label, partial(join, value))
    yield Input("what a rank writes", partial(join, json.dumps(RIGHT).encode()), "accept")
    for seed in range(count - len(BYTES) - 1):
        rng = random.Random(seed)
        if seed % 4 == 0:
            value = bytearray(json.dumps(RIGHT).encode())
            value = value[: rng.randrange(len(value))]
            yield Input(f"{seed}: cut", partial(join, bytes(value)))
            continue
        entry = mutated(rng)
        right = is_right(entry)
        yield Input(f"{seed}: {entry}", partial(join, json.dumps(entry).encode()), "accept" if right else "refuse")


def names_the_stranger(error: BaseException) -> str | None:
    text = str(error)
    return None if "no rank of this job wrote into the store for rank 1" in text else "does not name the stranger"


def test_entries_of_a_stranger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAUNCH_JOIN_SECONDS", "0.005")
    monkeypatch.setattr(rendezvous, "_LOOK_SECONDS", 0.005)
    made = inputs(number_of_inputs(INPUTS))
    attack("the rendezvous port", made, refusals=(TimeoutError,), unfit=names_the_stranger).keep("rendezvous")


@pytest.mark.parametrize("value", [*BYTES.values(), b'{"came": 1, "missing": "", "problems": [], "hosts": [[1, 2]]}'])
def test_an_answer_of_a_stranger(value: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "node1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    store = dist.HashStore()
    store.set("answer", value)
    with pytest.raises(ValueError, match="node1:29500 is no answer of rank 0: something else writes") as error:
        rendezvous.join(rendezvous.RankInfo(**RANKS[1]), store, FACTS, compare, are_facts)
    assert type(error.value) is ValueError
