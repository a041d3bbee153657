"""The line at the end of a command under `gpumem-tui exec` where nothing was watched.

`exec` becomes the command, so there is nobody else to say it: the command does
itself, if it is a Python. Processes that it has started, as torchrun its
workers, leave a file where they are watched.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from pathlib import Path

PROCESS_VARIABLE = "GPUMEM_EXEC_PID"
"""The environment variable with the id of the process that `exec` has become."""
FILE_VARIABLE = "GPUMEM_EXEC_WATCHED"
"""The environment variable with the path of the file that is there once another process is watched."""
NOTHING_WATCHED = (
    "gpumem-tui: nothing was watched: that begins with the first forward pass, with gradients, of a model whose "
    "parameters an optimizer of torch's has\n"
)

_said = False


def tell_at_exit() -> None:
    """Have the process that `exec` has become say at its end if nothing was watched."""
    if _is_the_command() and (path := os.environ.get(FILE_VARIABLE)):
        atexit.register(_tell, Path(path))


def note_watched() -> None:
    """This process is watched, or has said why it is not."""
    global _said  # noqa: PLW0603 (of a process there is one)
    _said = True
    path = os.environ.get(FILE_VARIABLE)
    if path and not _is_the_command():
        with contextlib.suppress(OSError):
            Path(path).touch()


def _is_the_command() -> bool:
    return os.environ.get(PROCESS_VARIABLE) == str(os.getpid())


def _tell(path: Path) -> None:
    if not _is_the_command():  # a fork that ends as its parent will
        return
    try:
        path.unlink()
    except OSError:
        if not _said:
            with contextlib.suppress(Exception):
                sys.stderr.write(NOTHING_WATCHED)
