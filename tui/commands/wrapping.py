"""Text within the terminal's width."""

from __future__ import annotations

import shutil
import textwrap


def columns() -> int:
    """Characters of a line that no terminal of this width wraps."""
    return shutil.get_terminal_size().columns - 1


def within(width: int, text: str, first: str = "", others: str = "") -> list[str]:
    """Lines of a text, broken between words alone: a setting stays as it can be pasted.

    Args:
        width: Characters of a line.
        text: Of one paragraph.
        first: Begins the first line.
        others: Begins the others.
    """
    return textwrap.wrap(
        text,
        width,
        initial_indent=first,
        subsequent_indent=others,
        break_on_hyphens=False,
        break_long_words=False,
    )
