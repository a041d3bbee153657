"""Standard input, output and error as they may be: closed, full, ASCII only, not waiting."""

from __future__ import annotations

import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ..engine.config import UserError


class _Output(io.FileIO):
    """Descriptor 1; what it does not take is a line that says so."""

    def write(self, data: Any) -> int:
        try:
            while (written := super().write(data)) is None:  # somebody else's O_NONBLOCK, and its reader is slow
                select.select([], [self], [])
        except BrokenPipeError:
            raise
        except OSError as error:
            raise UserError(f"standard output: cannot write: {error.strerror}") from None
        return written


@contextmanager
def standard_streams() -> Iterator[None]:
    """Descriptors 0 to 2 are open, and all that was printed has been written when this ends.

    A character that the encoding of standard output does not have is printed as `?`.

    Raises:
        UserError: Standard output is closed or full.
        BrokenPipeError: Its reader has gone.
    """
    _open_closed()
    before = sys.__stdout__
    if before is None or sys.stdout is not before:  # whoever has put something else there reads it from there
        yield
        return
    raw = io.BufferedWriter(_Output(1, "w", closefd=False))
    output = io.TextIOWrapper(raw, before.encoding, "replace", line_buffering=before.isatty())
    sys.stdout = output
    try:
        yield
    finally:
        sys.stdout = before
        _flush(output)


def _flush(output: io.TextIOWrapper) -> None:
    try:
        output.flush()
    except BaseException:
        # Python would try again when it ends, and complain of that in lines of its own.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.close(null)
        output.flush()
        raise


def _open_closed() -> None:
    """Nothing that is opened later becomes standard output: what a library prints would go into a recording."""
    # Output that was closed takes nothing, as one opened for reading; complaints that nobody hears are dropped.
    for name, mode, flags in (("stdin", "r", os.O_RDONLY), ("stdout", "w", os.O_RDONLY), ("stderr", "w", os.O_WRONLY)):
        if getattr(sys, f"__{name}__") is not None:
            continue
        wanted = ("stdin", "stdout", "stderr").index(name)
        opened = os.open(os.devnull, flags)
        if opened != wanted:
            os.dup2(opened, wanted)
            os.close(opened)
        stream = os.fdopen(wanted, mode, encoding="utf-8", errors="backslashreplace", closefd=False)
        setattr(sys, f"__{name}__", stream)
        setattr(sys, name, stream)


def complain(text: str) -> None:
    """A line on standard error, if it takes one: the exit code says the rest."""
    with suppress(OSError):
        sys.stderr.write(f"gpumem-tui: {text}\n")
        sys.stderr.flush()
