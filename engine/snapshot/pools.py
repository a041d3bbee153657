"""The pools of a snapshot's events: by the segment that lies there as it was taken, otherwise by stream and size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..events import SEGMENT, AllocatorPool
from .entries import ALLOC, GIVEN_BACK, MOST_POOLS, RESERVED

SMALL_BYTES, SMALL_SEGMENT_BYTES = 1 << 20, 2 << 20
"""Requests up to this, and the segments that they are cut from, are of the small pool (kSmallSize, kSmallBuffer)."""

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Pooled:
    """The pools of a device's columns.

    Attributes:
        pools: By number.
        of_events: By event, the number of its pool.
        of_begin: Likewise of each block that was there before.
        segments: dtype SEGMENT, of all events.
    """

    pools: tuple[AllocatorPool, ...]
    of_events: Ints
    of_begin: Ints
    segments: npt.NDArray[Any]

    def segments_of(self, begin: int, end: int) -> npt.NDArray[Any]:
        """Segments of the step from event `begin` to `end` (exclusive), dtype SEGMENT; the last step has the rest."""
        event, pool, size = (self.segments[name] for name in ("event", "pool", "bytes"))
        held = np.zeros(len(self.pools), np.int64)
        np.add.at(held, pool[event < begin], size[event < begin])
        last = len(self.of_events) if end >= len(self.of_events) else end - 1
        within = self.segments[(event >= begin) & (event <= last)].copy()
        within["event"] = np.minimum(within["event"], end - 1) - begin
        rows = np.zeros(len(held), SEGMENT)
        rows["event"], rows["pool"], rows["bytes"] = -1, np.arange(len(held)), held
        return np.concatenate([rows, within])


class Segments:
    """The segments of a device as the snapshot was taken, in the order of their addresses.

    Args:
        rows: Address, bytes, and the pool by its place in `pools`.
        pools: Of the snapshot, of other devices too.

    Attributes:
        size: Of each, in bytes.
        pool: Of each, the number.
        numbers: Of the device's pools; those that come up later are added.
    """

    def __init__(self, rows: Ints, pools: Sequence[AllocatorPool]) -> None:
        rows = rows[np.argsort(rows[:, 0], kind="stable")]
        self.numbers: dict[AllocatorPool, int] = {}
        known, which = np.unique(rows[:, 2], return_inverse=True)
        self._start, self.size = rows[:, 0], rows[:, 1]
        self.pool = np.array([self._number(pools[place]) for place in known.tolist()], np.int64)[which]
        self._stream = np.array([pools[place].stream for place in known.tolist()], np.int64)[which]

    def pools_at(self, address: Ints, stream: Ints, small: npt.NDArray[np.bool_]) -> Ints:
        """Numbers of the pools of what lies at addresses."""
        at = np.searchsorted(self._start, address, side="right") - 1
        inside = at >= 0
        inside[inside] = address[inside] < (self._start + self.size)[at[inside]]
        inside[inside] = (stream[inside] < 0) | (stream[inside] == self._stream[at[inside]])
        found = np.zeros(len(address), np.int64)
        found[inside] = self.pool[at[inside]]
        others, which = np.unique(np.stack([np.maximum(stream, 0), small])[:, ~inside], axis=1, return_inverse=True)
        named = [
            self._number(AllocatorPool(of, "small" if is_small else "large")) for of, is_small in others.T.tolist()
        ]
        found[~inside] = np.array(named, np.int64)[which.ravel()]
        return found

    def _number(self, pool: AllocatorPool) -> int:
        return self.numbers.setdefault(pool, len(self.numbers))


def pooled(entries: Ints, freed: int, begin: Ints, segments: Segments) -> Pooled:
    """Tell the pools of a device's entries.

    Args:
        entries: Rows of a `DeviceTrace`.
        freed: The action that is a free.
        begin: Address, bytes and stream (-1: that of its segment) of each block that was there before.
        segments: As the snapshot was taken.

    Raises:
        ValueError: There are more pools than any program has.
    """
    is_event = (entries[:, 0] == ALLOC) | (entries[:, 0] == freed)
    moves = (entries[:, 0] == RESERVED) | (entries[:, 0] == GIVEN_BACK)
    events, moved = entries[is_event], entries[moves]
    of_events = segments.pools_at(events[:, 1], events[:, 6], events[:, 2] <= SMALL_BYTES)
    of_begin = segments.pools_at(begin[:, 0], begin[:, 2], begin[:, 1] <= SMALL_BYTES)
    rows = np.zeros(len(moved), SEGMENT)
    rows["event"] = np.cumsum(is_event)[moves]
    rows["pool"] = segments.pools_at(moved[:, 1], moved[:, 6], moved[:, 2] == SMALL_SEGMENT_BYTES)
    rows["bytes"] = np.where(moved[:, 0] == RESERVED, 1, -1) * moved[:, 2]
    if len(segments.numbers) > MOST_POOLS:
        raise ValueError("there are more streams than any program has")
    before = np.zeros(len(segments.numbers), np.int64)
    np.add.at(before, segments.pool, segments.size)
    np.subtract.at(before, rows["pool"], rows["bytes"])
    held = np.zeros(len(segments.numbers), SEGMENT)
    held["event"], held["pool"], held["bytes"] = -1, np.arange(len(segments.numbers)), np.maximum(before, 0)
    return Pooled(tuple(segments.numbers), of_events, of_begin, np.concatenate([held, rows]))
