"""The terminal's background, dark or light: from COLORFGBG, or from the terminal itself (OSC 11)."""

from __future__ import annotations

import contextlib
import os
import re
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from functools import partial

from .interrupt import answered_by, end

LOCAL_WAIT_S, SSH_WAIT_S = 0.2, 1.0

# The second question (device attributes) is one that every terminal answers: once
# its answer is there, nothing more will come to be taken for keys.
QUESTION = b"\x1b]11;?\x1b\\\x1b[c"
COLOUR = re.compile(rb"\x1b\]11;rgba?:([0-9a-fA-F]+)/([0-9a-fA-F]+)/([0-9a-fA-F]+)")
ANSWERED = re.compile(rb"\x1b\[\?[0-9;]*c")


@contextlib.contextmanager
def asked_background(ask: bool) -> Iterator[Callable[[], str]]:
    """Ask, and do something useful while the answer is on its way.

    Args:
        ask: False: do not; it is said to be dark.

    Yields:
        What waits for the answer: `dark` or `light`.
    """
    known = from_environment(os.environ.get("COLORFGBG", ""))
    if not ask or known or not sys.stdin.isatty():
        yield lambda: known or "dark"
        return
    terminal = sys.stdin.fileno()
    restore = partial(termios.tcsetattr, terminal, termios.TCSANOW, termios.tcgetattr(terminal))
    with answered_by(lambda: (restore(), end())):
        try:
            tty.setcbreak(terminal)
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, QUESTION)
            yield lambda: from_answer(_read(terminal, SSH_WAIT_S if "SSH_CONNECTION" in os.environ else LOCAL_WAIT_S))
        finally:
            restore()


def _read(terminal: int, wait_s: float) -> bytes:
    """The terminal's answers, up to the one that comes last."""
    answer, deadline = b"", time.monotonic() + wait_s
    while not ANSWERED.search(answer):
        ready, _, _ = select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        answer += os.read(terminal, 1024)
    return answer


def from_answer(answer: bytes) -> str:
    """`dark` or `light` from `rgb:1e1e/1e1e/1e1e`; dark if it says nothing."""
    match = COLOUR.search(answer)
    if match is None:
        return "dark"
    red, green, blue = (int(part, 16) / (16 ** len(part) - 1) for part in match.groups())
    return "light" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.5 else "dark"


def from_environment(colours: str) -> str:
    """The same from `COLORFGBG` (`15;0`); empty if it says nothing."""
    background = colours.rsplit(";", 1)[-1]
    if not background.isdigit():
        return ""
    return "light" if int(background) in (7, 15) else "dark"
