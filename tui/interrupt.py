"""Ctrl-C, from the program's first line to its last: it ends at once, in order, with exit code 130.

Python's own way is a KeyboardInterrupt wherever the main thread happens to be: in the
middle of an import (torch then aborts the process), in a callback that swallows it, or
in a wait for a thread that is deep in a kernel. So the program ends right where it is,
with no clean-up but the kernel's, unless a part of it has said what is to be done first.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

INTERRUPTED = 130
ERASE_LINE = b"\r\x1b[K"

_answers: list[Callable[[], object]] = []


def install() -> None:
    """Answer Ctrl-C from here on; one that is ignored (a job in a script's background) stays ignored."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _interrupted)


@contextmanager
def answered_by(answer: Callable[[], object]) -> Iterator[None]:
    """Have Ctrl-C do this instead, as long as the context lasts.

    Args:
        answer: Called on the main thread, between any two instructions of it.
    """
    _answers.append(answer)
    try:
        yield
    finally:
        _answers.remove(answer)


def raise_interrupt() -> NoReturn:
    """The answer of a part that has `finally` clauses to run.

    Raises:
        KeyboardInterrupt: Always.
    """
    raise KeyboardInterrupt


def end() -> NoReturn:
    """End the process now, its line of progress erased."""
    if sys.__stderr__ is not None and sys.__stderr__.isatty():
        os.write(sys.__stderr__.fileno(), ERASE_LINE)
    os._exit(INTERRUPTED)


def leave(code: int) -> NoReturn:
    """End the program; when it was interrupted, without waiting for threads that are inside of torch."""
    if code == INTERRUPTED:
        end()
    if "torch" in sys.modules:
        gc.freeze()  # or Python looks through all that it has made for what else could be freed: a second
    sys.exit(code)


def _interrupted(*_: object) -> None:
    (_answers[-1] if _answers else end)()
