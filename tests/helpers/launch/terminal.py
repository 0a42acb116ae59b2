# SPDX-License-Identifier: Apache-2.0
"""A command as a user runs it: in the foreground of a terminal, whose Ctrl-C goes to the whole process group."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import termios
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

_CTRL_C = b"\x03"
_ROWS_AND_COLUMNS = (40, 120)


def hear_interrupts() -> None:
    """Undo what a shell does to whatever it starts in the background: a program that ignores SIGINT passes that on."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def in_terminal(
    command: Sequence[str], folder: Path, env: Mapping[str, str], *, limit: float, ctrl_c_after: str = ""
) -> tuple[int, str]:
    """Run a command in a new terminal to its end.

    Args:
        command: found on ``PATH``.
        folder: its working directory.
        env: its environment.
        limit: seconds until everything in the terminal is killed.
        ctrl_c_after: press Ctrl-C once, as soon as this text is on the screen.

    Returns:
        Exit status (negative: the signal that ended it), and all that the screen showed.

    Raises:
        AssertionError: it still ran at the limit.
    """
    pid, terminal = pty.fork()
    if pid == 0:
        try:
            os.chdir(folder)
            hear_interrupts()
            os.execvpe(command[0], list(command), dict(env))
        finally:
            os._exit(127)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", *_ROWS_AND_COLUMNS, 0, 0))
    deadline = time.monotonic() + limit
    shown, wanted = b"", ctrl_c_after.encode()
    while time.monotonic() < deadline:
        if not select.select([terminal], [], [], 1.0)[0]:
            continue
        try:
            found = os.read(terminal, 1 << 16)
        except OSError:  # Linux's way to say that the last process has closed the terminal
            found = b""
        if not found:
            break
        shown += found
        if wanted and wanted in shown:
            os.write(terminal, _CTRL_C)
            wanted = b""
    else:
        os.killpg(pid, signal.SIGKILL)
    os.close(terminal)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    text = shown.decode(errors="replace").replace("\r\n", "\n")
    assert time.monotonic() < deadline, f"still running after {limit:.0f} s: {command}\n{text[-3000:]}"
    return status, text
