# SPDX-License-Identifier: Apache-2.0
"""Attack an interface with many inputs made from fixed seeds, and count what came of each.

Every input must end in one of two ways: it is accepted and the result is right, or it is refused with an error that is
meant for people. `attack` counts the rest: tracebacks of our internals, hangs, wrong inputs that were accepted. A test
in ``tests/attacks`` asserts that there are none; ``make reliability`` runs them with more inputs and writes the counts
into `docs/reliability.md`.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Literal

from tests.helpers import ROOT

HANG_S = 10.0
"""An input that computes for longer hangs, in seconds of processor time: the machine may be busy with other tests."""

WAIT_S = 60.0
"""An input that takes longer hangs, even if it only waits; seconds."""

COUNTS = ROOT / "runs" / "reliability"
"""Where `Tally.keep` leaves a file for each attack; ignored by git."""


def number_of_inputs(default: int) -> int:
    """How many inputs to make: ``default``, times ``ATTACK_TIMES`` where the environment has it."""
    return default * int(os.environ.get("ATTACK_TIMES", "1"))


@dataclass(frozen=True)
class Input:
    """One input of an attack.

    Attributes:
        label: what it is, for the message of a failing test; enough to make it again.
        act: gives it to the interface and returns the result.
        must: ``"refuse"``: only a refusal is right; ``"accept"``: only a result; ``"either"``: both are.
        wrong: what is wrong with a result, None if nothing.
    """

    label: str
    act: Callable[[], object]
    must: Literal["refuse", "accept", "either"] = "refuse"
    wrong: Callable[[object], str | None] = lambda result: None


@dataclass
class Tally:
    """What came of the inputs of one attack; the lists hold labels with what happened.

    Attributes:
        what: what was attacked, in the words of the docs page.
        inputs: their number.
        refused: number of inputs refused with an error for people.
        accepted: number of inputs accepted with a right result.
        tracebacks: other exceptions.
        hangs: inputs that took longer than `HANG_S` or `WAIT_S`.
        silent: wrong inputs that were accepted, and wrong results.
        unfit: right inputs that were refused, and refusals that do not say what to do.
        slowest_s: the longest processor time of one input, seconds.
    """

    what: str
    inputs: int = 0
    refused: int = 0
    accepted: int = 0
    tracebacks: list[str] = field(default_factory=list)
    hangs: list[str] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)
    unfit: list[str] = field(default_factory=list)
    slowest_s: float = 0.0

    def keep(self, name: str) -> None:
        """Leave the counts for the docs page, and fail if an input ended wrongly.

        Args:
            name: of the attack's file in `COUNTS`.
        """
        COUNTS.mkdir(parents=True, exist_ok=True)
        (COUNTS / f"{name}.json").write_text(json.dumps(asdict(self)), encoding="utf-8")
        kinds = ("tracebacks", "hangs", "silent", "unfit")
        wrong = [f"{kind}: {text}" for kind in kinds for text in getattr(self, kind)]
        assert not wrong, f"{len(wrong)} of {self.inputs} inputs ended wrongly:\n" + "\n".join(wrong[:20])
        assert self.inputs, "no inputs were made"


class _TookTooLongError(BaseException):
    pass


@contextmanager
def _limit() -> Iterator[None]:
    """Interrupt what computes for longer than `HANG_S` or waits for longer than `WAIT_S`; in the main thread."""

    def stop(signum: int, frame: object) -> None:
        raise _TookTooLongError

    timers = ((signal.SIGPROF, signal.ITIMER_PROF, HANG_S), (signal.SIGALRM, signal.ITIMER_REAL, WAIT_S))
    before = [signal.signal(number, stop) for number, _, _ in timers]
    for _, timer, seconds in timers:
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for (number, timer, _), handler in zip(timers, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)


def attack(
    what: str,
    inputs: Iterable[Input],
    *,
    refusals: tuple[type[BaseException], ...] = (ValueError,),
    unfit: Callable[[BaseException], str | None] = lambda error: None,
) -> Tally:
    """Run every input and count.

    Args:
        what: what is attacked.
        inputs: made one after the other.
        refusals: errors that are meant for people; subclasses that Python itself raises (`UnicodeError`,
            `json.JSONDecodeError`) count as tracebacks unless they are named.
        unfit: what is wrong with the text of a refusal, None if nothing.
    """
    tally = Tally(what)
    for item in inputs:
        tally.inputs += 1
        begin = time.process_time()
        try:
            with _limit():
                result = item.act()
        except _TookTooLongError:
            tally.hangs.append(item.label)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            if type(error) not in refusals:
                tally.tracebacks.append(f"{item.label}: {type(error).__name__}: {str(error)[:300]}")
            elif item.must == "accept" or (said := unfit(error)) is not None:
                reason = "is right, but refused" if item.must == "accept" else said
                tally.unfit.append(f"{item.label}: {reason}: {str(error)[:300]}")
            else:
                tally.refused += 1
        else:
            said = "accepted" if item.must == "refuse" else item.wrong(result)
            if said is None:
                tally.accepted += 1
            else:
                tally.silent.append(f"{item.label}: {said}")
        tally.slowest_s = max(tally.slowest_s, time.process_time() - begin)
    return tally
