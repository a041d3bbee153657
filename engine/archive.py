"""Zip files from elsewhere, of which nothing is read that is larger than it may be."""

from __future__ import annotations

import ast
import os
import stat
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

MOST_BYTES = 1 << 30
"""Unpacked, all parts together: the traces of a hundred steps of a hundred thousand allocations each."""
MOST_TEXT_BYTES = 1 << 26
"""The largest part that is JSON: as objects it takes twenty times that."""
NPY_1 = b"\x93NUMPY\x01\x00"
_NPY = struct.Struct("<8sH")
PACKED_AS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def regular_file(path: Path) -> BinaryIO:
    """A file opened for reading, if it is one: a pipe would be waited for, and a device read, for ever.

    Raises:
        OSError: It is not there, or cannot be read.
        ValueError: It is something else.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ValueError("no regular file")
    return os.fdopen(handle, "rb")


class Archive:
    """A zip file.

    Args:
        file: Open as long as this is used.

    Raises:
        ValueError: It declares more than `MOST_BYTES`.
        zipfile.BadZipFile: It is no zip file.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._zip = zipfile.ZipFile(file)
        self._parts = {part.filename: part for part in self._zip.infolist()}
        if sum(part.file_size for part in self._parts.values()) > MOST_BYTES:
            raise ValueError(f"more than {MOST_BYTES >> 20} MiB when unpacked")

    @property
    def names(self) -> list[str]:
        """Names of the parts, in order."""
        return [*self._parts]

    def text(self, name: str) -> bytes:
        """A part that is JSON.

        Raises:
            ValueError: There is none, or it is too large.
        """
        return self._read(name, MOST_TEXT_BYTES)

    def column(self, name: str) -> npt.NDArray[Any]:
        """A part that is a NumPy array of one dimension, of numbers or records of numbers; it cannot be written to.

        NumPy's own reader makes room for as much as a header declares before it looks at what there is.

        Raises:
            Exception: There is none, or it is another array.
        """
        data = self._read(name, MOST_BYTES)
        magic, length = _NPY.unpack_from(data)
        begin = _NPY.size + length
        head = ast.literal_eval(data[_NPY.size : begin].decode("latin-1")) if magic == NPY_1 else {}
        dtype, (count,) = np.lib.format.descr_to_dtype(head["descr"]), head["shape"]
        if dtype.hasobject or count * dtype.itemsize != len(data) - begin:
            raise ValueError(f"{name} has another layout")
        return np.frombuffer(data, dtype, offset=begin)

    def _read(self, name: str, most: int) -> bytes:
        part = self._parts.get(name)
        if part is None:
            raise ValueError(f"{name} is missing")
        if part.compress_type not in PACKED_AS or part.file_size > most:
            raise ValueError(f"{name} is packed in another way, or too large")
        return self._zip.read(part)
