"""Numbers as text by the column: a million rows in a tenth of the time that formatting each takes."""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Page = npt.NDArray[np.uint8]
"""Characters, shape [rows, width]."""

_DIGITS = 4
"""Taken from a table at once."""
_BASE = np.uint64(10**_DIGITS)
_PAD = b"\0"


def text_rows(template: bytes, *columns: Ints) -> list[bytes]:
    """A row of text for every row of numbers.

    Args:
        template: With a `%` where each column's number goes; no NUL and no
            newline in it.
        columns: Of one length.

    Returns:
        One row each, with no space about the numbers.
    """
    if not len(columns[0]):
        return []
    return unpadded(page(template + b"\n", *map(digits, columns))).split(b"\n")[:-1]


def page(template: bytes, *cells: Page) -> Page:
    """Rows of text of one width, padded with NULs.

    Args:
        template: With a `%` where each column's number goes; no NUL in it.
        cells: The digits of each column, of one length.
    """
    pieces = template.split(b"%")
    width = len(template) - len(cells) + sum(cell.shape[1] for cell in cells)
    rows = np.empty((len(cells[0]), width), np.uint8)
    at = 0
    for piece, cell in zip(pieces, [*cells, None], strict=True):
        rows[:, at : at + len(piece)] = np.frombuffer(piece, np.uint8)
        at += len(piece)
        if cell is not None:
            rows[:, at : at + cell.shape[1]] = cell
            at += cell.shape[1]
    return rows


def unpadded(rows: Page) -> bytes:
    """The rows one after another, without what pads them."""
    return rows.tobytes().translate(None, _PAD)


def digits(column: Ints) -> Page:
    """A column's numbers, at least one, shape [rows, sign and digits], NUL in place of leading zeros."""
    size = np.abs(column.astype(np.int64)).astype(np.uint64)
    groups = -(-len(str(int(size.max()))) // _DIGITS)
    rest, cells = size, np.empty((len(column), groups), np.uint32)
    for group in range(groups - 1, -1, -1):
        above = rest // _BASE
        part = rest - above * _BASE
        part += _BASE * (above > 0)  # what follows a group has its zeros in front
        cells[:, group] = _table(lowest=group == groups - 1)[part]
        rest = above
    shown = cells.view(np.uint8).reshape(len(column), groups * _DIGITS)
    below = column < 0
    return np.column_stack([np.where(below, np.uint8(ord("-")), np.uint8(0)), shown]) if below.any() else shown


@cache
def _table(lowest: bool) -> npt.NDArray[np.uint32]:
    """Every group of digits as four bytes: without the zeros in front, then with them.

    Args:
        lowest: Of a number's last group, in which 0 alone is a digit.
    """
    numbers = range(10**_DIGITS)
    first = [(str(n).encode() if n or lowest else b"").rjust(_DIGITS, _PAD) for n in numbers]
    following = [b"%04d" % n for n in numbers]
    return np.frombuffer(b"".join(first + following), np.uint32)
