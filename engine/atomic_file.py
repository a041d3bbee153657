"""Files that are there whole or not at all."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes its place when it is whole; if it cannot be written, what was there stays.

    Args:
        path: The file; where it is a link, what it leads to.

    Raises:
        OSError: It cannot be written; nothing of it is left.
    """
    path = path.resolve()
    temporary = path.parent / f".gpumem-{secrets.token_hex(8)}"
    file = temporary.open("xb")  # with the permissions that the user's umask leaves
    try:
        with file:
            yield file
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
