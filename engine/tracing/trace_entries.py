"""Entries of the caching allocator's trace as columns, read off its dictionaries at the speed of C."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from operator import itemgetter
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

ALLOC, FREE, COMPLETED, SEGMENT_ALLOC, SEGMENT_FREE, SEGMENT_MAP, SEGMENT_UNMAP, OUT_OF_MEMORY, OTHER = range(9)

_NUMBERS = defaultdict(
    lambda: OTHER,
    alloc=ALLOC,
    free_requested=FREE,
    free_completed=COMPLETED,
    segment_alloc=SEGMENT_ALLOC,
    segment_free=SEGMENT_FREE,
    segment_map=SEGMENT_MAP,
    segment_unmap=SEGMENT_UNMAP,
    oom=OUT_OF_MEMORY,
)


class _Marks(dict[str, int]):
    """Marks by what was stamped; most entries share theirs with others."""

    def __missing__(self, stamped: str) -> int:
        mark = self[stamped] = int(stamped or -1)
        return mark


class Entries(NamedTuple):
    """Part of a trace, in order.

    Attributes:
        actions: Numbers of this module, shape (n,).
        addresses: Of the block, or of the segment's part, shape (n,).
        sizes: Bytes asked for, or the segment's, shape (n,).
        marks: As they were stamped; -1: nothing was, shape (n,).
        times_us: On the host's clock, shape (n,).
        raw: The dictionaries: what few entries are asked for is read where it is needed.
        private: Identity of the private pool that a segment is of, by its address; the entries do not say it.
    """

    actions: npt.NDArray[np.int8]
    addresses: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    marks: npt.NDArray[np.int64]
    times_us: npt.NDArray[np.int64]
    raw: Sequence[Mapping[str, Any]]
    private: Mapping[int, tuple[int, int]] = MappingProxyType({})

    def part(self, begin: int, end: int) -> Entries:
        """The entries from one to before another."""
        at = slice(begin, end)
        return Entries(
            self.actions[at], self.addresses[at], self.sizes[at], self.marks[at], self.times_us[at], self.raw[at],
            self.private,
        )  # fmt: skip

    @property
    def signs(self) -> npt.NDArray[np.int64]:
        """Signs of the bytes that entries allocate: 1, or -1 for a free; 0 for what does neither."""
        return np.equal(self.actions, ALLOC).astype(np.int64) - np.equal(self.actions, FREE)

    def highest(self) -> int:
        """Number of entries after which most was allocated, rounding aside."""
        return int(np.argmax(np.append(0, np.cumsum(self.signs * self.sizes))))


def read(entries: Sequence[Mapping[str, Any]], private: Mapping[int, tuple[int, int]] | None = None) -> Entries:
    """The columns of a trace.

    Args:
        entries: `device_traces` of a memory snapshot, of one device. Those of memory that ran out are left
            away: they have no address, as nothing was handed out.
        private: As in `Entries`.
    """
    actions = np.fromiter(map(_NUMBERS.__getitem__, map(itemgetter("action"), entries)), np.int8, len(entries))
    if OUT_OF_MEMORY in actions:
        return read([entries[at] for at in np.flatnonzero(actions != OUT_OF_MEMORY).tolist()], private)
    addresses, sizes, times_us = (
        np.fromiter(map(itemgetter(key), entries), np.int64, len(entries)) for key in ("addr", "size", "time_us")
    )
    marks = np.fromiter(map(_Marks().__getitem__, map(itemgetter("user_metadata"), entries)), np.int64, len(entries))
    return Entries(actions, addresses, sizes, marks, times_us, entries, private or {})
