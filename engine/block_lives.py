"""Blocks: each allocation of a step joined with its free."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .categories import Category
from .events import EVENT, StepTrace

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
    n_begin, n = len(begin), len(events)
    stream = np.zeros(n_begin + n, EVENT)
    for column in ("address", "bytes", "slack", "pool"):
        stream[column][:n_begin] = begin[column]
    stream[n_begin:] = events
    order = np.lexsort((np.arange(len(stream)), stream["address"]))
    is_alloc = stream["bytes"][order] >= 0
    address = stream["address"][order]
    follows_same = np.zeros(len(stream), bool)
    follows_same[:-1] = address[1:] == address[:-1]
    # Whatever happens next at an address ends the block there: normally its
    # free; another alloc means the free was lost.
    ends = np.full(len(stream), n_begin + n, np.int64)
    ends[:-1] = np.where(follows_same[:-1], order[1:], n_begin + n)
    previous_is_alloc = np.zeros(len(stream), bool)
    previous_is_alloc[1:] = follows_same[:-1] & is_alloc[:-1]
    unmatched = int(np.count_nonzero(~is_alloc & ~previous_is_alloc))

    allocs = np.flatnonzero(is_alloc)
    allocs = allocs[np.argsort(order[allocs], kind="stable")]
    rows = np.zeros(len(allocs), BLOCK_ROW)
    position, end = order[allocs], ends[allocs]
    for column in ("address", "bytes", "slack", "pool"):
        rows[column] = stream[column][position]
    rows["born"] = np.maximum(position - n_begin, -1)
    rows["died"] = end - n_begin
    rows["born_mark"] = np.where(position >= n_begin, stream["mark"][position], -1)
    dies = end < n_begin + n
    rows["died_mark"] = np.where(dies, stream["mark"][np.minimum(end, max(len(stream) - 1, 0))], -1) if n else -1
    rows["category"] = Category.UNKNOWN
    rows["made"] = -1
    return rows, unmatched
