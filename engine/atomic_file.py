"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes its place when it is whole; if it cannot be written, what was there stays.

    A device or a pipe, whose place nothing could take, is written to as it is.

    Args:
        path: The file; where it is a link, what it leads to.

    Raises:
        OSError: It cannot be written; nothing of it is left.
    """
    path = path.resolve()
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder")
    if path.exists() and not path.is_file():
        with path.open("wb") as place:
            yield place
        return
    temporary = path.parent / f".gpumem-{secrets.token_hex(8)}"
    file = temporary.open("xb")  # with the permissions that the user's umask leaves
    try:
        with file:
            yield file
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
