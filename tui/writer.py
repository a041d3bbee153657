"""The one place that touches Textual's private names: what goes to the terminal past its compositor."""

from __future__ import annotations

from typing import Any

from textual.app import App


def writing(app: App[Any]) -> bool:
    """True if frames wait to be written.

    Textual's writer thread holds thirty of them and then blocks the event loop:
    on a slow link everything would lag by that much. Where the names have
    changed, or there is no such thread (tests, other drivers), the answer is no.
    """
    try:
        queue = app._driver._writer_thread._queue  # type: ignore[union-attr]
        return bool(queue.qsize() > 0)
    except AttributeError:
        return False


def send(app: App[Any], text: str) -> bool:
    """Write to the terminal, after everything that Textual has written.

    Returns:
        False, and nothing is written, where the screen is not the app's alone
        (the command palette is open), or there is no terminal.
    """
    driver = getattr(app, "_driver", None)
    if driver is None or app.is_headless or len(app.screen_stack) != 1:
        return False
    driver.write(text)
    return True
