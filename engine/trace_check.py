"""Checks of a trace from elsewhere, before anything is folded: every index leads somewhere.

A recording or an engine of another make may hold anything. What passes here,
the ledger, the screens and the exports take as it is.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .categories import N_CATEGORIES
from .events import BLOCK, EVENT, MADE, MARK, OWNER, SEGMENT, Phase, StepTrace

COLUMNS = {"events": EVENT, "marks": MARK, "begin": BLOCK, "owners": OWNER, "made": MADE, "segments": SEGMENT}
MOST_BYTES = 1 << 60
"""A block, and all blocks of a step together: sums of them are whole numbers of 64 bits."""
MOST_US = 1 << 53
"""A time, 285 years: as nanoseconds it is a whole number of 64 bits too."""
LONGEST_NAME = 1000
SIZE_CLASSES = ("small", "large")


def check(trace: StepTrace) -> None:
    """Look at every index and size of a trace, once.

    Raises:
        ValueError: One is none; which, in a few words.
    """
    for column, dtype in COLUMNS.items():
        array = getattr(trace, column)
        if array.dtype != dtype or array.ndim != 1:
            raise ValueError(f"{column} have another layout")
    for column, field, low, high in _ranges(trace):
        values = getattr(trace, column)[field]
        if len(values) and not (low <= values.min() and values.max() < high):
            raise ValueError(f"{column}: {field} is none of {low} to {high - 1}")
    if (trace.begin["bytes"] < 0).any() or (trace.begin["slack"] < 0).any():
        raise ValueError("begin: a block of less than nothing")
    for blocks in (trace.events, trace.begin):
        moved = np.abs(blocks["bytes"].astype(np.float64)) + np.abs(blocks["slack"].astype(np.float64))
        if moved.sum() >= MOST_BYTES:
            raise ValueError("more bytes than any device has")
    if np.abs(trace.segments["bytes"].astype(np.float64)).sum() >= MOST_BYTES:
        raise ValueError("more bytes than any device has")
    if problem := next(_of_the_rest(trace), None):
        raise ValueError(problem)


def _ranges(trace: StepTrace) -> Iterator[tuple[str, str, int, int]]:
    """Column, field, lowest value and the one above the highest."""
    marks, names, made = len(trace.marks), len(trace.names), len(trace.descriptions)
    pools = len(trace.pools)
    yield from (("events", "mark", 0, max(marks, 1)), ("events", "time_us", 0, MOST_US))
    yield from (("events", "pool", -1, pools), ("begin", "pool", -1, pools), ("segments", "pool", 0, pools))
    yield from (("segments", "event", -1, len(trace.events)),)
    yield from (("marks", "phase", 0, len(Phase)), ("marks", "module", 0, names))
    yield from (("owners", "mark", -1, max(marks, 1)), ("owners", "category", 0, N_CATEGORIES))
    yield from (("owners", "name", 0, names), ("owners", "made", -1, made))
    yield from (("made", "phase", 0, len(Phase)), ("made", "module", 0, names), ("made", "made", -1, made))


def _of_the_rest(trace: StepTrace) -> Iterator[str]:
    """Faults beside the columns."""
    if not trace.names or not all(len(name) <= LONGEST_NAME and name.isprintable() for name in trace.names):
        yield "names are lines of text, and there is one"
    if not 0 <= trace.step < MOST_BYTES or not 0 <= trace.micro_batches < MOST_BYTES:
        yield "its step or its number of micro-batches is none"
    events = len(trace.events)
    for span in trace.phases:
        if not (0 <= span.begin <= span.end <= events and 0 <= span.begin_us <= span.end_us < MOST_US):
            yield f"a phase that is none of the {events} events"
    for described in trace.descriptions:
        texts_fit = all(
            len(text) <= LONGEST_NAME and text.isprintable() for text in (described.operator, described.dtype)
        )
        if not texts_fit or not all(0 <= size < MOST_BYTES for size in described.shape):
            yield "a description of no tensor"
    for pool in trace.pools:
        numbers = (pool.stream, *pool.private)
        if pool.size_class not in SIZE_CLASSES or not all(0 <= number < MOST_BYTES for number in numbers):
            yield "a pool that no caching allocator has"
    sizes = (*(trace.counted or ()), getattr(trace, "ending", (0,))[-1])
    if not all(size is None or 0 <= size < MOST_BYTES for size in sizes):
        yield "a count of no bytes"
