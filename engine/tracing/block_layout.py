"""The caching allocator's cutting of segments into blocks, followed through its trace.

The trace gives the bytes that were asked for; the allocator's counter moves by
the block it handed out. Mostly that is the request rounded up, to 512 bytes, but
a free block whose rest would be too small is handed out whole. Knowing every
block at the start, the rules of `c10/cuda/CUDACachingAllocator.cpp` say which.

A step has thousands of events, and following them one by one would take the
interpreter from the loop for milliseconds: they are followed as columns.
"""

from __future__ import annotations

from array import array
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..allocator_settings import SMALL_BYTES, SMALL_SEGMENT_BYTES, in_force
from ..events import BLOCK, EVENT, SEGMENT, AllocatorPool, CacheState
from ..out_of_memory.pools import pool_of
from .block_uses import Flags, Numbers, Uses
from .recorder import Seen, columns
from .segment_table import Segment, SegmentTable
from .trace_entries import ALLOC, COMPLETED, FREE, SEGMENT_ALLOC, SEGMENT_FREE, SEGMENT_MAP, SEGMENT_UNMAP, Entries

PENDING_STATES = ("active_pending_free", "active_awaiting_free")
"""A snapshot's names for a block that was given up while other streams may be at it."""

PAGE_BYTES = {"small": SMALL_SEGMENT_BYTES, "large": 20 << 20}
"""The pages that an expandable segment is mapped in, by its pool."""

_BEYOND = 1 << 62  # no address


class Blocks(NamedTuple):
    """Blocks that are not free, by address; each of shape (n,).

    Attributes:
        addresses: Of their first bytes.
        requested: Bytes asked for.
        sizes: Bytes handed out.
        pending: Given up, and not to be handed out again: another stream may be at it.
    """

    addresses: Numbers
    requested: Numbers
    sizes: Numbers
    pending: Flags


class BlockLayout:
    """The blocks of one device.

    Args:
        segments: `segments` of a memory snapshot, of this device only.
        deferred: Frees may wait for other streams, and the trace says when they are completed; otherwise
            every one is at once.
        pools: Numbers of the pools that are known; gets those that are new.

    Attributes:
        deferred: As above.
    """

    def __init__(
        self, segments: list[dict[str, Any]], deferred: bool = False, pools: dict[AllocatorPool, int] | None = None
    ) -> None:
        self._pools = {} if pools is None else pools
        self.deferred = deferred
        self._settings = in_force()
        self._expandable = any(segment.get("is_expandable") for segment in segments)
        self._segments = SegmentTable(self._read(segment) for segment in segments)
        rows = sorted(
            (block["address"], block["requested_size"], block["size"], block["state"] in PENDING_STATES)
            for segment in segments
            for block in segment["blocks"]
            if block["state"] != "inactive"
        )
        table = np.array(rows, np.int64).reshape(-1, 4)
        self._blocks = Blocks(table[:, 0], table[:, 1], table[:, 2], table[:, 3] > 0)

    def alive(self) -> npt.NDArray[Any]:
        """Rows of what is allocated, by address; dtype BLOCK."""
        blocks, alive = self._blocks, ~self._blocks.pending
        addresses, requested, sizes = (column[alive] for column in (blocks.addresses, blocks.requested, blocks.sizes))
        segments = self._segments.columns()
        rows = np.empty(len(addresses), BLOCK)
        rows["address"], rows["bytes"], rows["slack"] = addresses, requested, sizes - requested
        rows["pool"] = segments.pools[segments.find(addresses)]
        return rows

    def reserved(self) -> dict[int, int]:
        """Bytes held from the device, by the pool's number."""
        held: dict[int, int] = {}
        for segment in self._segments.now:
            held[segment.pool] = held.get(segment.pool, 0) + segment.end - segment.start
        return held

    def cache(self) -> CacheState:
        """The allocator as it is now."""
        blocks, segments = self._blocks, self._segments.columns()
        starts, ends = segments.starts[1:], segments.ends[1:]
        # Free bytes begin with a segment or behind a block, and end before the next block or with the segment.
        begins = np.sort(np.concatenate([starts, blocks.addresses + blocks.sizes]))
        free = np.sort(np.concatenate([blocks.addresses, ends])) - begins
        # A free block that is a segment, or pages of an expandable one, is given back when memory runs out.
        if self._expandable:
            pages = np.array([PAGE_BYTES[pool.size_class] for pool in self._pools], np.int64)
            gaps = free[free < pages[segments.pools[segments.find(begins)]]].sum()
        else:
            empty = np.searchsorted(blocks.addresses, starts) == np.searchsorted(blocks.addresses, ends)
            gaps = free.sum() - (ends - starts)[empty].sum()
        return CacheState(
            reserved_bytes=int((ends - starts).sum()),
            allocated_bytes=int(blocks.sizes[~blocks.pending].sum()),
            largest_free_block_bytes=int(free.max(initial=0)),
            gaps_bytes=int(gaps),
        )

    def follow(self, entries: Entries) -> Seen:
        """Follow what happens next.

        Returns:
            Its rows, dtype EVENT, with the slack and the pool of every block; and how pools grow.
        """
        is_row = entries.actions <= FREE
        before = np.cumsum(is_row)
        parts, begin, grown = [], 0, array("q")
        for at in np.flatnonzero((entries.actions >= SEGMENT_ALLOC) & (entries.actions <= SEGMENT_UNMAP)).tolist():
            action, address, size = int(entries.actions[at]), int(entries.addresses[at]), int(entries.sizes[at])
            grows = action in (SEGMENT_ALLOC, SEGMENT_MAP)
            if grows and self._segments.seen(address, size):
                # From here on the addresses are those of another segment.
                parts.append(self._follow_blocks(entries.part(begin, at)))
                self._segments.forget()
                begin = at
            pool = self._follow_segment(action, address, size, entries, at)
            if pool is not None:
                grown.extend((before[at], pool, size if grows else -size))
        parts.append(self._follow_blocks(entries.part(begin, len(is_row))))
        self._segments.forget()
        requested, sizes, pools = (np.concatenate(column) for column in zip(*parts, strict=True))
        rows, sign = np.empty(len(requested), EVENT), entries.signs[is_row]
        rows["address"], rows["mark"], rows["time_us"], rows["pool"] = (
            *(column[is_row] for column in (entries.addresses, entries.marks, entries.times_us)),
            pools,
        )
        rows["bytes"], rows["slack"] = sign * requested, sign * (sizes - requested)
        return Seen(rows, columns(grown, SEGMENT))

    # --- segments and their pools ----------------------------------------------

    def _read(self, segment: dict[str, Any]) -> Segment:
        """A segment of a snapshot; it begins with its first block."""
        start = segment["blocks"][0]["address"]
        size = sum(block["size"] for block in segment["blocks"])
        # Expandable segments split as finely as the small pool does.
        fine = segment["segment_type"] == "small" or bool(segment.get("is_expandable"))
        return Segment(start, start + size, self._number(pool_of(segment)), fine)

    def _follow_segment(self, action: int, address: int, size: int, entries: Entries, at: int) -> int | None:
        """Follow what a segment does; returns the number of its pool, None if nobody knew it."""
        small = size == SMALL_SEGMENT_BYTES

        def pool() -> int:
            return self._of_stream(entries.raw[at]["stream"], small, entries.private.get(address, (0, 0)))

        if action == SEGMENT_ALLOC:
            number = pool()
            self._segments.allocate(Segment(address, address + size, number, small))
            return number
        if action == SEGMENT_FREE:
            return self._segments.free(address)
        if action == SEGMENT_MAP:
            self._expandable = True
            return self._segments.map(address, size, pool)
        return self._segments.unmap(address, size)

    def _of_stream(self, stream: int, small: bool, private: tuple[int, int] = (0, 0)) -> int:
        return self._number(AllocatorPool(stream, "small" if small else "large", private))

    def _number(self, pool: AllocatorPool) -> int:
        return self._pools.setdefault(pool, len(self._pools))

    # --- blocks ---------------------------------------------------------------

    def _follow_blocks(self, entries: Entries) -> tuple[Numbers, Numbers, Numbers]:
        """Follow blocks while no address is of two segments.

        Returns:
            Bytes asked for and handed out, and the pool's number (-1: not known), of every allocation and free.
        """
        there, moves = self._blocks, np.flatnonzero(entries.actions <= COMPLETED)
        if not len(moves):
            nothing = np.empty(0, np.int64)
            return nothing, nothing, nothing
        count = len(there.addresses)
        actions = np.concatenate([np.where(there.pending, FREE, ALLOC).astype(np.int8), entries.actions[moves]])
        addresses = np.concatenate([there.addresses, entries.addresses[moves]])
        requested = np.concatenate([there.requested, entries.sizes[moves]])
        sizes = np.concatenate([there.sizes, np.zeros(len(moves), np.int64)])
        uses = Uses(actions, addresses, count, self.deferred)
        new = np.flatnonzero(actions[count:] == ALLOC) + count
        sizes[new] = self._settings.rounded_sizes(requested[new])
        sizes[uses.unknown] = self._settings.rounded_sizes(requested[uses.unknown])
        found = self._segments.columns().find(uses.addresses)[uses.places]
        if not found[new].all():
            self._believe(entries, moves[new - count], sizes[new])
            found = self._segments.columns().find(addresses)
        segments = self._segments.columns()
        _hand_out_whole(sizes, addresses, uses, new[~segments.fine[found[new]]], segments.ends[~segments.fine])
        requested, sizes, held = requested[uses.owners], sizes[uses.owners], uses.held
        self._blocks = Blocks(addresses[held], requested[held], sizes[held], uses.pending)
        rows = np.flatnonzero(actions[count:] != COMPLETED) + count
        return requested[rows], sizes[rows], np.where(uses.unknown, -1, segments.pools[found])[rows]

    def _believe(self, entries: Entries, allocations: npt.NDArray[np.intp], rounded: Numbers) -> None:
        """Take the requests for segments that the trace did not announce."""
        addresses = entries.addresses[allocations]
        for at in np.flatnonzero(self._segments.columns().find(addresses) == 0).tolist():
            address, size = int(addresses[at]), int(rounded[at])
            if not self._segments.seen(address, 1):
                pool = self._of_stream(entries.raw[allocations[at]]["stream"], size <= SMALL_BYTES)
                self._segments.allocate(Segment(address, address + size, pool, False))


def _hand_out_whole(
    sizes: Numbers, addresses: Numbers, uses: Uses, allocations: npt.NDArray[np.intp], ends: Numbers
) -> None:
    """Add what is handed out beyond the rounded request where so little of a free block would be left.

    Free neighbours are always merged: a free block reaches up to the next that is
    not free, or up to the end of its segment.

    Args:
        sizes: Rounded requests, shape (n,); added to.
        addresses: Of the blocks, shape (n,).
        uses: Of them.
        allocations: Those from segments that are not cut finely.
        ends: Of such segments.
    """
    stops = np.concatenate([ends, uses.addresses, [_BEYOND]])
    order = np.argsort(stops, kind="stable")
    stops, used = stops[order], order - len(ends)
    behind = addresses[allocations] + sizes[allocations]
    at = np.searchsorted(stops, behind)
    while len(allocations):
        rest = stops[at] - behind
        near = rest <= SMALL_BYTES
        allocations, behind, at, rest = allocations[near], behind[near], at[near], rest[near]
        stopped = used[at] < 0
        stopped[~stopped] = uses.taken(used[at[~stopped]], allocations[~stopped])
        sizes[allocations[stopped]] += rest[stopped]
        allocations, behind, at = allocations[~stopped], behind[~stopped], at[~stopped] + 1
