# SPDX-License-Identifier: Apache-2.0
"""The rule for tags: a tag is the name of one folder in a folder of checkpoints, and of nothing else.

A tag is checked before anything is written and before anything is read, a tag that the file ``latest`` holds too.
"""

from __future__ import annotations

import glob
import logging
import numbers
import os
import re
from pathlib import PurePath
from typing import Literal

from ds_blockwise.parallel.agree import gather, is_first_rank, together

logger = logging.getLogger(__name__)

LATEST = "latest"
LATEST_UNIVERSAL = "latest_universal"
PARTIAL = ".partial"  # suffix of a checkpoint that is being written
REPLACED = ".replaced"  # suffix of an older one with the same tag, while the new one takes its place
MAX_BYTES = 190  # file systems take names of 255 bytes; a folder that is being written has a longer name than its tag

# What a save puts beside the tag folders: this package, and DeepSpeed's recovery scripts
_TAKEN = (LATEST, LATEST_UNIVERSAL, "zero_to_fp32.py", "zero_to_torch.py")
_SEPARATORS = "/\\"
_PATTERNS = "*?[]"  # DeepSpeed looks for the files of a checkpoint with glob
RULE = (
    f"A tag is the name of one folder: 1 to {MAX_BYTES} bytes of printable characters without {' '.join(_SEPARATORS)} "
    f"{' '.join(_PATTERNS)}, with no dot at its beginning and no blank at its ends"
)

Validation = Literal["fail", "warn", "ignore"]
"""DeepSpeed's ``checkpoint.tag_validation``: what to do where the ranks' tags differ."""


def checked_tag(tag: object, what: str = "tag") -> str:
    """The tag as text, if it can name a checkpoint.

    Args:
        tag: text, an integer (written in digits) or a path of one part.
        what: where it was given, for the error.

    Raises:
        TypeError: it is something else.
        ValueError: it breaks the rule.
    """
    if isinstance(tag, bool) or not isinstance(tag, (str, PurePath, numbers.Integral)):
        raise TypeError(f"{what} must be a string or an integer, got {tag!r:.80} ({type(tag).__name__})")
    if isinstance(tag, numbers.Integral) and int(tag).bit_length() > 8 * MAX_BYTES:
        raise ValueError(f"{what} is an integer of more than {MAX_BYTES} digits. {RULE}, such as 'step_100'.")
    text = str(tag)
    reason = _misfit(text)
    if reason is not None:
        proper = proper_tag(text)
        raise ValueError(f"{what} {shown(text)} cannot name a checkpoint: {reason}. {RULE}, such as {proper!r}.")
    return text


def shown(text: str) -> str:
    """A tag as an error shows it: quoted, on one line, not longer than a line."""
    return repr(text) if len(text) <= 80 else f"{text[:80]!r}..."


def _misfit(tag: str) -> str | None:
    lower = tag.casefold()  # some file systems take LATEST for latest
    found = [mark for mark in (*_SEPARATORS, *_PATTERNS) if mark in tag]
    if not tag:
        return "it is empty"
    if found:
        return f"it has {' '.join(found)} in it"
    if not tag.isprintable():
        return "it has characters that cannot be printed"
    if tag != tag.strip():
        return "it begins or ends with a blank"
    if tag.startswith("."):
        return "it begins with a dot"
    if lower in _TAKEN:
        return "a file of that name lies beside the checkpoints"
    if lower.endswith((PARTIAL, REPLACED)):
        return f"folders that end in {PARTIAL} or {REPLACED} are what an interrupted save leaves, and are removed"
    return _not_stored(tag)


def _not_stored(tag: str) -> str | None:
    try:
        size = len(os.fsencode(tag))
    except UnicodeEncodeError as error:
        return f"this machine cannot write {error.object[error.start]!r} in a file's name ({error.encoding})"
    return f"it has {size} bytes" if size > MAX_BYTES else None


def proper_tag(text: str) -> str:
    """A tag that is allowed and reminds of one that is not."""
    ascii_only = re.sub(r"[^\w.+=,@ -]+", "_", text, flags=re.ASCII)
    near = re.sub(r"[_ ]{2,}", "_", ascii_only).strip("._ ")[:60].rstrip("._ ")
    for suffix in (PARTIAL, REPLACED):
        near = near[: -len(suffix)] if near.casefold().endswith(suffix) else near
    return near if near and _misfit(near) is None else "step_100"


def has_patterns(path: str | PurePath) -> bool:
    """Whether glob would take a part of the path for a pattern."""
    return glob.escape(str(path)) != str(path)


def refuse_patterns(load_dir: str | PurePath) -> None:
    """Refuse what DeepSpeed would not find: it looks for files by patterns that hold the path as it is.

    Raises:
        ValueError: glob would take a part of the path for a pattern.
    """
    if has_patterns(load_dir):
        raise ValueError(
            f"load_dir {str(load_dir)!r} has one of * ? [ in it, which DeepSpeed takes for a pattern of names. Rename "
            f"that folder, or load through a link to it that has another name."
        )


def agreed_tag(tag: object, validation: Validation = "fail") -> str | None:
    """Collective over all ranks: the tag that all of them gave, checked.

    Args:
        tag: this rank's; None for the default of whoever calls.
        validation: what to do where they differ: ``warn`` and ``ignore`` take rank 0's, with a warning or without.

    Raises:
        TypeError, ValueError: on every rank: a tag breaks the rule, or they differ.
    """
    text = together(lambda: None if tag is None else checked_tag(tag))
    tags = gather(text)
    if len(set(tags)) == 1:
        return text
    listed = ", ".join(sorted({repr(given) for given in tags}))
    if validation == "fail":
        raise ValueError(f"all ranks must give one tag, got {listed}. Make it of what all share, such as the step.")
    if validation == "warn" and is_first_rank():
        logger.warning("the ranks gave different tags (%s): rank 0's, %r, is taken", listed, tags[0])
    return tags[0]
