"""A terminal that vanishes while SIGHUP is ignored (`nohup`, `disown`, a script's job) ends the app all the same."""

from __future__ import annotations

import os
import select
import threading

HUNG_UP = 129
"""Exit code, as of a shell's child that SIGHUP has ended."""
LOOK_EVERY_MS = 1000
"""Not every kernel wakes who waits for nothing but a hang-up."""


def end_with_terminal(descriptor: int) -> None:
    """End the process when a terminal hangs up, at once: there is nothing left to draw on or to restore.

    Textual's reader would go round and round at the end of the file. An engine
    goes on, as after any lost connection.
    """
    threading.Thread(target=_wait, args=(descriptor,), name="hang-up", daemon=True).start()


def _wait(descriptor: int) -> None:
    poll = select.poll()
    poll.register(descriptor, 0)
    while not (found := poll.poll(LOOK_EVERY_MS)):
        continue
    if found[0][1] & select.POLLHUP:  # not where the system cannot poll terminals
        os._exit(HUNG_UP)
