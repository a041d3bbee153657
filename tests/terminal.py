"""A terminal with the real program in it: a pty, as an SSH session has one."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from .vt import Screen

T = TypeVar("T")


def until(condition: Callable[[], T], what: Callable[[], object] = lambda: "", seconds: float = 60.0) -> T:
    """Wait until a condition holds and return what it gave; fails loudly instead of hanging."""
    deadline, never = time.monotonic() + seconds, threading.Event()
    while not (found := condition()):
        assert time.monotonic() < deadline, what()
        never.wait(0.01)
    return found


OWN_THE_TERMINAL = """
import fcntl, os, signal, sys, termios
for number in (signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN if str(int(number)) in sys.argv[2].split(",") else signal.SIG_DFL)
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.close(int(sys.argv[1]))
os.execv(sys.argv[3], sys.argv[3:])
"""
"""A login shell's part: the session has a terminal, and no signal is ignored whatever we ourselves were started by."""


class Terminal:
    """Runs `gpumem-tui ARGUMENTS` as the leader of a session on a pty of its own.

    Args:
        ignored: Signals that it starts with ignored, as under `nohup`.

    Attributes:
        output: All that was drawn.
    """

    def __init__(
        self,
        *arguments: str,
        environment: dict[str, str],
        folder: Path,
        rows: int = 24,
        ignored: Sequence[signal.Signals] = (),
    ) -> None:
        self.master, slave = pty.openpty()
        self.resize(rows, 80)
        self.before = termios.tcgetattr(slave)
        self._slave = slave  # kept open, so that the modes can be read when the program has gone

        began, begins = os.pipe()
        program = [sys.executable, "-m", "gpumem_tui.tui", *arguments]
        numbers = ",".join(str(int(number)) for number in ignored)
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-c", OWN_THE_TERMINAL, str(begins), numbers, *program], pass_fds=[begins],
            stdin=slave, stdout=slave, stderr=slave, start_new_session=True, cwd=folder,
            env=os.environ | environment | {"TERM": "xterm-256color"},
        )  # fmt: skip
        os.close(begins)
        os.read(began, 1)  # ends when it becomes the program
        os.close(began)
        self.output = b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self.master, 1 << 16)
            except OSError:
                return
            if not data:
                return
            self.output += data

    def press(self, *keys: str) -> None:
        for key in keys:
            os.write(self.master, key.encode())

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))

    def sees(self, text: str) -> None:
        """Wait for a text: written in one piece, or put together on the screen from the cells that differed."""
        looked_at = -1

        def is_there() -> bool:
            nonlocal looked_at
            before, looked_at = looked_at, len(self.output)
            return before != looked_at and (text.encode() in self.output or text in self.screen())

        until(is_there, lambda: self.output[-2000:])

    def screen(self) -> str:
        """What is on the screen now."""
        screen = Screen(400, 200)
        screen.feed(self.output[max(0, self.output.rfind(b"\x1b[?1049h")) :].decode(errors="ignore"))
        return "\n".join(screen.lines)

    def wait(self) -> int:
        return self.process.wait(60)

    def sane(self, used: bool = True) -> bool:
        """Whether the program left the terminal as it found it: its modes, the normal screen, the cursor.

        Args:
            used: It has drawn a screen of its own, and left that too.
        """
        modes: list[Any] = termios.tcgetattr(self._slave)
        if not used:
            return bool(modes == self.before)
        left_screen = self.output.rfind(b"\x1b[?1049l") > self.output.rfind(b"\x1b[?1049h")
        shown = self.output.rfind(b"\x1b[?25h") > self.output.rfind(b"\x1b[?25l")
        return bool(modes == self.before and left_screen and shown)

    def hang_up(self) -> None:
        """As a dropped SSH connection does: the terminal goes, and SIGHUP comes."""
        os.close(self._slave)
        os.close(self.master)
        self.process.wait(60)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait(60)
        for handle in (self.master, self._slave):
            try:
                os.close(handle)
            except OSError:  # it has been hung up
                continue
