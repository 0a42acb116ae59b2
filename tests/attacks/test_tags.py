# SPDX-License-Identifier: Apache-2.0
"""Tags of every kind, given to everything that takes one: each is refused, or names one folder that is found again.

A tree around the folder of checkpoints holds another whole checkpoint and a user's files; it must never change.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from ds_blockwise.checkpoint import folder as files
from ds_blockwise.checkpoint.folder import Checkpoint
from ds_blockwise.checkpoint.folder_rules.lock import holding
from ds_blockwise.checkpoint.folder_rules.tags import agreed_tag, checked_tag
from ds_blockwise.checkpoint.manifest import CheckpointError, files_in, sums_of, write_manifest
from ds_blockwise.hosts.deepspeed.checkpoint.inspect import convert_checkpoint, describe_checkpoint
from tests.helpers.attacks import Input, attack, number_of_inputs
from tests.helpers.checkpoint_folders import TOPOLOGY

SAFE = "abzAZ09_-+=,:@#%^~() .äß模型'\"$&;!{}"
POISON = (
    *("/", "\\", "../", "//", "*", "?", "[", "]", "\0", "\n", "\r", "\t", "\x1b[2J", "\x7f", "\x85", "\u2028"),
    *("\u202e", "\u200b", "\xa0", "\ud800", "\udcff", "\ufeff"),
)
WHOLE = (
    *("", ".", "..", "...", "/", "//", "~/", "/etc/passwd", "../x", "../../x", "a/b", "a/", "/a", "./a", "a/../b"),
    *("latest", "Latest", "LATEST", "latest_universal", "zero_to_fp32.py", "zero_to_torch.py", ".ds_blockwise.lock"),
    *("x.partial", "x.replaced", "X.PARTIAL", "latest.partial", "step_1.vm-1-0123abcd.partial", "..partial"),
    *(" ", " a", "a ", "\ta", "a\n", "\n", "C:\\x", "\\\\host\\share", "a" * 191, "a" * 5000, "模" * 64, "*", "[a]"),
)
GOOD = (
    *("global_step10", "pytorch_model", "step_0000005", "epoch 3", "loss=0.5", "v1.0", "x.partial.1", "partial"),
    *("0", "-1"),
)
NO_TEXT = (None, True, 1.5, b"x", [], {}, object(), (1,), {"a"}, float("nan"))


def tags() -> Iterator[tuple[object, Literal["refuse", "accept"]]]:
    """Tags with what must come of them."""
    yield from ((tag, "refuse") for tag in (*WHOLE, *NO_TEXT[1:], 10**5000))
    yield from ((tag, "accept") for tag in (*GOOD, *range(3), Path("best")))
    chance = random.Random(16)
    for _ in range(number_of_inputs(100)):
        good = "a" + "".join(chance.choices(SAFE, k=chance.randrange(40))) + "z"
        yield good, "accept"
        at = chance.randrange(len(good) + 1)
        yield good[:at] + chance.choice(POISON) + good[at:], "refuse"
        yield chance.choice(("..", "/", "../", "./", " ", ".")) + good, "refuse"
        yield good + chance.choice((".partial", ".replaced", ".PARTIAL", "/", " ", "\n", "x" * 200)), "refuse"


class World:
    """A folder of checkpoints, and what lies around it."""

    def __init__(self, root: Path) -> None:
        self.folder = root / "mine"
        write(root / "others", "x")
        write(self.folder, "step_1")
        (root / "precious").write_text("precious", encoding="utf-8")
        self.root = root
        self.before = self.around()

    def around(self) -> dict[str, tuple[int, int]]:
        """Everything but what is in the folder itself."""
        found = (p for p in self.root.rglob("*") if self.folder not in p.parents and p != self.folder)
        return {str(p): (p.lstat().st_ino, p.lstat().st_mtime_ns) for p in found}

    def wrong(self, expected: str, found: object) -> str | None:
        """What is wrong after a tag was accepted."""
        if self.around() != self.before:
            return "something outside the folder has changed"
        if not isinstance(found, Checkpoint) or found.folder != self.folder / expected:
            return f"another checkpoint was found: {found}"
        return None


def write(folder: Path, tag: str) -> Path:
    """The smallest checkpoint, as a save writes it."""
    with holding(folder):
        partial = files.start_partial(folder, tag)
        (partial / "mp_rank_00_model_states.pt").write_bytes(b"weights")
        sums = sums_of(partial, files_in(partial))
        write_manifest(partial, kind="deepspeed", tag=tag, global_steps=1, topology=TOPOLOGY, settings=None, files=sums)
        final = files.publish(partial)
        files.write_latest(folder, tag)
    return final


def save_and_load(world: World, tag: object) -> Checkpoint | None:
    """What `save_checkpoint` and `load_checkpoint` do with a tag, without an engine."""
    agreed = agreed_tag(tag)
    assert agreed is not None
    write(world.folder, agreed)
    by_latest = files.resolve_tag(world.folder)
    by_tag = files.resolve_tag(world.folder, agreed)
    assert by_latest is not None
    assert by_tag is not None
    assert by_latest.folder == by_tag.folder
    assert sorted(p.name for p in world.folder.iterdir()) == sorted({agreed, "latest", "step_1"})
    files.remove_checkpoint(by_tag.folder)
    files.write_latest(world.folder, "step_1")
    return by_tag


def unfit(error: BaseException) -> str | None:
    """A refusal is one line, not long, and proposes a tag that is allowed."""
    text = str(error)
    if not text.isprintable() or len(text) > 600:
        return "not one short line"
    proposed = re.search(r"such as '(.*)'\.", text)
    return None if proposed is None or checked_tag(proposed[1]) == proposed[1] else "proposes a wrong tag"


def test_a_tag_names_one_folder_or_is_refused(tmp_path: Path) -> None:
    """Saved, found by its name and by ``latest``, and nothing else touched."""
    world = World(tmp_path)

    def inputs() -> Iterator[Input]:
        for tag, must in tags():
            label = f"{type(tag).__name__} {str(tag)[:60]!r}" if isinstance(tag, (str, Path)) else f"{type(tag)}"
            yield Input(
                label, lambda t=tag: save_and_load(world, t), must, lambda found, t=tag: world.wrong(str(t), found)
            )

    attack("tags of a save", inputs(), refusals=(ValueError, TypeError), unfit=unfit).keep("tags_save")
    assert world.around() == world.before


def test_a_tag_to_read_finds_nothing_outside(tmp_path: Path) -> None:
    """As an argument, as the contents of ``latest``, and for the commands: nothing is found, and nothing changes."""
    world = World(tmp_path)
    whole = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    output = tmp_path / "output"

    def by_latest(tag: str) -> object:
        (world.folder / "latest").write_bytes(tag.encode("utf-8", "surrogatepass"))
        found = files.resolve_tag(world.folder)
        # with blanks around it, `latest` still names that tag; and without one, the newest is taken and a note says so
        assert found is not None
        assert found.notes or tag.strip() == "step_1"
        return found if found.folder == world.folder / "step_1" else None

    ways: dict[str, Callable[[str], object]] = {
        "tag": lambda tag: files.resolve_tag(world.folder, tag),
        "latest": by_latest,
        "check": lambda tag: describe_checkpoint(world.folder, tag=tag),
        "convert": lambda tag: convert_checkpoint(world.folder, output, tag=tag),
    }

    def inputs() -> Iterator[Input]:
        given = [tag for tag, must in tags() if must == "refuse" and isinstance(tag, str)]
        for way, act in ways.items():
            for tag in given[:: 1 if way in ("tag", "latest") else 5]:
                must: Literal["refuse", "either"] = "either" if way == "latest" else "refuse"
                wrong = lambda found: None if found is not None else "found elsewhere"  # noqa: E731
                yield Input(f"{way} {tag[:60]!r}", lambda t=tag, a=act: a(t), must, wrong)

    attack("tags of a load", inputs(), refusals=(ValueError, CheckpointError)).keep("tags_load")
    (world.folder / "latest").write_text("step_1", encoding="utf-8")
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == whole
    assert not output.exists()
