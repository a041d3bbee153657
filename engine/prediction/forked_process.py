"""A copy of this process that answers on pipes: it has at once what took this one seconds to load. Loads no torch."""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import IO

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

Serve = Callable[[IO[bytes], IO[bytes]], None]

_open: weakref.WeakSet[ForkedProcess] = weakref.WeakSet()


def can_fork() -> bool:
    """True if a copy of this process can predict, and has something loaded that is worth it.

    A copy has the thread alone that forked. Another one may have held a lock; and
    where there is a GPU autograd has threads of its own, without which it refuses.
    """
    torch = sys.modules.get("torch")
    return torch is not None and threading.active_count() == 1 and not torch.cuda.is_available()


class ForkedProcess:
    """The copy, as `subprocess.Popen` has processes.

    Args:
        serve: Reads from one pipe and writes to another, in the copy, until the first one ends.

    Attributes:
        stdin: What is written here it reads.
        stdout: What it writes.
    """

    def __init__(self, serve: Serve) -> None:
        (asked, ask), (answers, answer) = os.pipe(), os.pipe()
        with warnings.catch_warnings():
            # Python counts threads of numerical libraries too, which have their own ways to survive a fork.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._pid = os.fork()
        if self._pid == 0:
            _be_the_copy(serve, asked, answer, (ask, answers))
        os.close(asked)
        os.close(answer)
        self.stdin: IO[bytes] = os.fdopen(ask, "wb")
        self.stdout: IO[bytes] = os.fdopen(answers, "rb")
        self._over = threading.Lock()
        self._waited = False
        _open.add(self)

    def kill(self) -> None:
        """End it, from any thread; nothing happens to one that has been waited for."""
        with self._over:
            if not self._waited:
                os.kill(self._pid, signal.SIGKILL)

    def wait(self) -> None:
        """Wait until it has ended; at once if that has been waited for."""
        if self._waited:
            return
        os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOWAIT)
        with self._over:
            os.waitpid(self._pid, 0)
            self._waited = True


def _be_the_copy(serve: Serve, asked: int, answer: int, others: tuple[int, ...]) -> None:
    """Serve in a session of its own, and end without what this process would do at its end."""
    try:
        os.setsid()
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        for each in _open:  # while anybody has the other end of a pipe open, it does not end
            each.stdin.close()
            each.stdout.close()
        for descriptor in others:
            os.close(descriptor)
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in range(3):
            os.dup2(null, descriptor)
        sys.modules["torch"].set_num_threads(1)  # those of OpenMP are not here
        serve(os.fdopen(asked, "rb"), os.fdopen(answer, "wb"))
    finally:
        os._exit(0)
