"""The memory that the caching allocator holds from the device, by address."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterable
from itertools import chain
from operator import attrgetter
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

_start, _end = attrgetter("start"), attrgetter("end")


class Segment(NamedTuple):
    """Bytes one after the other, that one pool cuts blocks from.

    Attributes:
        start: Address of the first.
        end: Address behind the last.
        pool: Number of the pool.
        fine: Every block is cut to the rounded request: in the small pool, and in expandable segments.
    """

    start: int
    end: int
    pool: int
    fine: bool


class SegmentColumns(NamedTuple):
    """Segments by address, each of shape (n + 1,): the first has no bytes, and stands for addresses in none."""

    starts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]
    pools: npt.NDArray[np.int64]
    fine: npt.NDArray[np.bool_]

    def find(self, addresses: npt.NDArray[np.int64]) -> npt.NDArray[np.intp]:
        """The segment that each address lies in; 0: in none."""
        found = np.searchsorted(self.starts, addresses, "right") - 1
        return np.where(addresses < self.ends[found], found, 0)


def columns(segments: Iterable[Segment]) -> SegmentColumns:
    """Segments as columns.

    Args:
        segments: By address.
    """
    flat = chain(Segment(-1, -1, -1, False), chain.from_iterable(segments))
    starts, ends, pools, fine = np.fromiter(flat, np.int64).reshape(-1, 4).T.copy()
    return SegmentColumns(starts, ends, pools, fine > 0)


class SegmentTable:
    """The segments of one device.

    One that is gone can be looked up until its addresses are used again: up to
    there what is asked of many instants has the same answer, and is asked at once.

    Attributes:
        now: Those that are there, by address; an expandable one's pages that touch are one.
    """

    def __init__(self, segments: Iterable[Segment]) -> None:
        self.now = sorted(segments)
        self._seen = list(self.now)
        self._columns: SegmentColumns | None = None

    def forget(self) -> None:
        """Keep none that is gone."""
        if self._seen != self.now:
            self._seen, self._columns = list(self.now), None

    def columns(self) -> SegmentColumns:
        """Those that are there or have been since `forget`."""
        if self._columns is None:
            self._columns = columns(self._seen)
        return self._columns

    def seen(self, address: int, size: int) -> bool:
        """True if any of these bytes lies in one of the columns."""
        at = bisect_right(self._seen, address, key=_end)
        return at < len(self._seen) and self._seen[at].start < address + size

    def allocate(self, segment: Segment) -> None:
        """Follow a segment that is taken from the device."""
        _cut_out(self.now, segment.start, segment.end)
        insort(self.now, segment)
        self._see(segment)

    def free(self, address: int) -> int | None:
        """Follow a segment that is given back; returns its pool's number, None if there is no such segment."""
        at = bisect_left(self.now, address, key=_start)
        if at == len(self.now) or self.now[at].start != address:
            return None
        return self.now.pop(at).pool

    def map(self, address: int, size: int, pool: Callable[[], int]) -> int:
        """Follow an expandable segment that grows.

        Returns:
            The number of its pool: that of what is there of it already, otherwise as given.
        """
        start, end = address, address + size
        _cut_out(self.now, start, end)
        at = bisect_left(self.now, start, key=_start)
        before = [segment for segment in self.now[max(0, at - 1) : at] if segment.end == start]
        after = [segment for segment in self.now[at : at + 1] if segment.start == end]
        number = next((segment.pool for segment in before + after), None)
        mapped = Segment(start, end, pool() if number is None else number, True)
        whole = [*before, mapped, *after]
        self.now[at - len(before) : at + len(after)] = [mapped._replace(start=whole[0].start, end=whole[-1].end)]
        self._see(mapped)
        return mapped.pool

    def unmap(self, address: int, size: int) -> int | None:
        """Follow an expandable segment that shrinks; returns its pool's number, None if there is none."""
        return _cut_out(self.now, address, address + size)

    def _see(self, segment: Segment) -> None:
        _cut_out(self._seen, segment.start, segment.end)
        insort(self._seen, segment)
        self._columns = None


def _cut_out(segments: list[Segment], start: int, end: int) -> int | None:
    """Leave nothing between two addresses; returns the number of the pool of what was, None if nothing was."""
    first = bisect_right(segments, start, key=_end)
    last = bisect_left(segments, end, key=_start)
    gone = segments[first:last]
    if not gone:
        return None
    rests = (gone[0]._replace(end=start), gone[-1]._replace(start=end))
    segments[first:last] = [rest for rest in rests if rest.start < rest.end]
    return gone[0].pool
