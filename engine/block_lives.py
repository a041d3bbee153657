"""Blocks: each allocation of a step joined with its free."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .categories import Category
from .events import StepTrace

BLOCK_ROW = np.dtype(
    [
        ("address", "u8"),
        ("bytes", "i8"),
        ("slack", "i8"),
        ("born", "i8"),  # event index; -1: alive when the trace began
        ("died", "i8"),  # event index; number of events: still alive
        ("born_mark", "i8"),
        ("died_mark", "i8"),  # -1: still alive
        ("category", "u1"),
        ("name", "i4"),
        ("made", "i4"),  # index of its description; -1: none
        ("pool", "i2"),  # index of the pool it is cut from; -1: not known
    ]
)


def paired(trace: StepTrace) -> tuple[npt.NDArray[Any], int]:
    """Join allocs with their frees: one row a block, all UNKNOWN, names 0.

    Returns:
        The rows in order of birth, and the number of frees without an alloc.
    """
    events, begin = trace.events, trace.begin
    n_begin, n = len(begin), len(begin) + len(events)
    # Columns of their own: a field of an array of rows is gathered many times slower.
    addresses, sizes, slacks, pools = (
        np.concatenate((begin[column], events[column])) for column in ("address", "bytes", "slack", "pool")
    )
    order = np.argsort(addresses, kind="stable")
    is_alloc = sizes[order] >= 0
    address = addresses[order]
    follows_same = np.zeros(n, bool)
    follows_same[:-1] = address[1:] == address[:-1]
    # Whatever happens next at an address ends the block there: normally its
    # free; another alloc means the free was lost.
    ends = np.full(n, n, np.int64)
    ends[:-1] = np.where(follows_same[:-1], order[1:], n)
    previous_is_alloc = np.zeros(n, bool)
    previous_is_alloc[1:] = follows_same[:-1] & is_alloc[:-1]
    unmatched = int(np.count_nonzero(~is_alloc & ~previous_is_alloc))

    end_of = np.zeros(n, np.int64)
    end_of[order] = ends
    position = np.flatnonzero(sizes >= 0)
    end = end_of[position]
    rows = np.zeros(len(position), BLOCK_ROW)
    for column, values in (("address", addresses), ("bytes", sizes), ("slack", slacks), ("pool", pools)):
        rows[column] = values[position]
    rows["born"] = np.maximum(position - n_begin, -1)
    rows["died"] = end - n_begin
    marks = np.concatenate((np.full(n_begin, -1), events["mark"], [-1]))  # -1: still alive
    rows["born_mark"], rows["died_mark"] = marks[position], marks[end]
    rows["category"] = Category.UNKNOWN
    rows["made"] = -1
    return rows, unmatched
