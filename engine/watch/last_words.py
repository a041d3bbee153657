"""Lines on standard error about a script that has run out of memory, after what Python says of it."""

from __future__ import annotations

import atexit
import contextlib
import sys

from ..forks import in_child
from ..out_of_memory.report import OutOfMemoryReport
from ..out_of_memory.telling import would_fit
from ..run import Run


def say(text: str) -> None:
    """Write a line now."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # standard error closed, or none at all
        sys.stderr.write(f"gpumem-tui: {text}\n")
        sys.stderr.flush()


class LastWords:
    """The last words on a run that its script has died of: where it is kept, and what would fit.

    The second takes as long as predicting it takes; Ctrl-C ends that.

    Args:
        kept: Said of the recording.
        run: That ran out of memory.
        report: Of that moment.
    """

    def __init__(self, kept: str, run: Run, report: OutOfMemoryReport) -> None:
        self._kept, self._run, self._report = kept, run, report

    def say_when_it_ends(self) -> None:
        """Print them when the interpreter ends, which prints the error before."""
        atexit.register(self.say)
        in_child(self._forget)

    def say(self) -> None:
        """Print them."""
        say(self._kept)
        with contextlib.suppress(Exception, KeyboardInterrupt):
            say(would_fit(self._run, self._report).text)

    def _forget(self) -> None:
        atexit.unregister(self.say)
