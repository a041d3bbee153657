"""Bytes by key in a folder that several processes share and anybody may delete. Knows nothing of what they are."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path

_MAGIC = b"gpumem cache 1\n"
_DIGEST_BYTES = 32


class DiskCache:
    """Entries, each a file: written whole or not at all, and read only as it was written.

    Whatever is wrong with the folder or a file, the entry is not there.

    Args:
        folder: Made when something is put; None: nothing is kept.
        largest_bytes: Of all entries together; when there are more, a quarter goes: what was not asked for longest.
    """

    def __init__(self, folder: Path | None, largest_bytes: int) -> None:
        self._folder, self._largest_bytes = folder, largest_bytes

    def get(self, key: str) -> bytes | None:
        """The entry of a key; None if there is none. A damaged entry is dropped."""
        path = self._path(key)
        if path is None:
            return None
        try:
            content = path.read_bytes()
        except OSError:
            return None
        start = len(_MAGIC) + _DIGEST_BYTES
        value = content[start:]
        if content[:start] != _head(value):
            self.drop(key)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # asked for now
        return value

    def put(self, key: str, value: bytes) -> None:
        """Keep something. What cannot be written is not kept."""
        path = self._path(key)
        if path is None:
            return
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".")
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(_head(value) + value)
                Path(temporary).replace(path)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise
            self._make_room(path.parent)

    def drop(self, key: str) -> None:
        """Forget an entry, if it is there."""
        path = self._path(key)
        if path is not None:
            with contextlib.suppress(OSError):
                path.unlink()

    def _path(self, key: str) -> Path | None:
        return self._folder / hashlib.sha256(key.encode()).hexdigest() if self._folder is not None else None

    def _make_room(self, folder: Path) -> None:
        found = [(entry.stat(), entry.path) for entry in os.scandir(folder)]
        total = sum(status.st_size for status, _ in found)
        if total <= self._largest_bytes:
            return
        for status, path in sorted(found, key=lambda one: one[0].st_mtime):
            if total <= self._largest_bytes * 3 // 4:
                return
            Path(path).unlink(missing_ok=True)
            total -= status.st_size


def _head(value: bytes) -> bytes:
    return _MAGIC + hashlib.sha256(value).digest()
