"""Being stopped by SIGSTOP and continued, which Textual takes for the end of a ctrl+z."""

from __future__ import annotations

import signal
from typing import Any

from textual.app import App


def outlive_sigstop(app: App[Any]) -> None:
    """Have SIGCONT restart the terminal's modes only where ctrl+z has left them.

    Textual's handler starts its reader and its writer thread once more each
    time; after a SIGSTOP, which it cannot see, there would be two of each, and
    quitting would wait for one for ever. Where the names have changed nothing
    is done.
    """
    driver: Any = app._driver
    resume = getattr(driver, "_sigcont_application", None)
    if resume is None or signal.getsignal(signal.SIGCONT) != resume:
        return

    def continued(*arguments: Any) -> None:
        if getattr(driver, "_must_signal_resume", True):
            resume(*arguments)

    signal.signal(signal.SIGCONT, continued)
