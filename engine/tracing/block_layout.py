"""The caching allocator's cutting of segments into blocks, followed event by event.

The trace gives the bytes that were asked for; the allocator's counter moves by
the block it handed out. Mostly that is the request rounded up, to 512 bytes, but
a free block whose rest would be too small is handed out whole. Knowing every
block at the start, the rules of `c10/cuda/CUDACachingAllocator.cpp` say which.
"""

from __future__ import annotations

from typing import Any

from ..allocator_settings import MIN_BLOCK_BYTES, in_force
from ..events import AllocatorPool, CacheState
from ..out_of_memory.pools import pool_of

SMALL_BYTES = 1 << 20
"""Requests up to this come from the small pool (kSmallSize)."""
SMALL_SEGMENT_BYTES = 2 << 20
"""The segment that the small pool takes from CUDA (kSmallBuffer)."""

PENDING_STATES = ("active_pending_free", "active_awaiting_free")
"""A snapshot's names for a block that was given up while other streams may be at it."""

PAGE_BYTES = 20 << 20
"""The pages that an expandable segment of the large pool is mapped in."""


class _Block:
    __slots__ = ("after", "before", "free", "pending", "pool", "requested", "size", "small")

    def __init__(self, size: int, requested: int, free: bool, small: bool, pool: int) -> None:
        self.size, self.requested, self.free, self.small, self.pool = size, requested, free, small, pool
        self.pending = False  # given up, and not to be handed out again: another stream may be at it
        self.before: int | None = None
        self.after: int | None = None


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
        self._blocks: dict[int, _Block] = {}
        self._pools = {} if pools is None else pools
        self.deferred = deferred
        self._rounded_bytes = in_force().rounded_bytes
        self._expandable = any(segment.get("is_expandable") for segment in segments)
        for segment in segments:
            # Expandable segments split as finely as the small pool does.
            small = segment["segment_type"] == "small" or bool(segment.get("is_expandable"))
            before, pool = None, self._number(pool_of(segment))
            for row in segment["blocks"]:
                free = row["state"] == "inactive"
                block = _Block(row["size"], row["requested_size"], free, small, pool)
                block.pending = row["state"] in PENDING_STATES
                self._insert(row["address"], block, before, None)
                before = row["address"]

    def alive(self) -> list[tuple[int, int, int, int]]:
        """Address, bytes asked for, bytes beyond them and the pool's number, of what is allocated."""
        return [
            (a, b.requested, b.size - b.requested, b.pool) for a, b in self._blocks.items() if not (b.free or b.pending)
        ]

    def reserved(self) -> dict[int, int]:
        """Bytes held from the device, by the pool's number."""
        held: dict[int, int] = {}
        for block in self._blocks.values():
            held[block.pool] = held.get(block.pool, 0) + block.size
        return held

    def cache(self) -> CacheState:
        """The allocator as it is now."""
        blocks = self._blocks.values()
        free = [block for block in blocks if block.free]
        reserved = sum(block.size for block in blocks)
        # A free block that is a segment, or pages of an expandable one, is given back when memory runs out.
        gaps = (
            [b.size for b in free if b.size < PAGE_BYTES]
            if self._expandable
            else [b.size for b in free if b.before is not None or b.after is not None]
        )
        return CacheState(
            reserved_bytes=reserved,
            allocated_bytes=sum(block.size for block in blocks if not (block.free or block.pending)),
            largest_free_block_bytes=max((block.size for block in free), default=0),
            gaps_bytes=sum(gaps),
        )

    def allocate(self, address: int, size: int, stream: int = 0) -> tuple[int, int]:
        """Follow an allocation; returns the size of the block handed out, and its pool's number."""
        rounded = self._rounded_bytes(size)
        block = self._blocks.get(address)
        if block is None or not block.free or block.size < rounded:
            # A segment the trace did not announce: believe the request.
            block = _Block(rounded, size, False, False, self._of_stream(stream, rounded <= SMALL_BYTES))
            self._blocks[address] = block
            return rounded, block.pool
        rest = block.size - rounded
        if rest >= MIN_BLOCK_BYTES if block.small else rest > SMALL_BYTES:
            remaining = _Block(rest, 0, True, block.small, block.pool)
            self._insert(address + rounded, remaining, address, block.after)
            block.size = rounded
        block.free, block.requested = False, size
        return block.size, block.pool

    def free(self, address: int, size: int) -> tuple[int, int, int]:
        """Follow a free; returns the bytes asked for, those of the block, and its pool's number (-1: not known)."""
        block = self._blocks.get(address)
        if block is None or block.free or block.pending:
            return size, self._rounded_bytes(size), -1
        requested, handed_out = block.requested, block.size
        block.pending = True
        if not self.deferred:
            self._complete(address)
        return requested, handed_out, block.pool

    def follow(
        self, action: str, address: int, size: int, stream: int = 0, private: tuple[int, int] = (0, 0)
    ) -> tuple[int, int] | None:
        """Follow what a segment does, or a free that is completed.

        Args:
            action: The trace's name for it.
            address: Of the segment, or of its part.
            size: In bytes.
            stream: Whose it is.
            private: Identity of the pool apart that it is of; (0, 0): of none.

        Returns:
            The number of the pool that has grown, and by how many bytes (negative: it has shrunk); None: none has.
        """
        if action == "free_completed":
            self._complete(address)
        elif action == "segment_alloc":
            small = size == SMALL_SEGMENT_BYTES
            block = self._blocks[address] = _Block(size, 0, True, small, self._of_stream(stream, small, private))
            return block.pool, size
        elif action == "segment_free":  # it was one free block
            gone = self._blocks.pop(address, None)
            return (gone.pool, -size) if gone is not None else None
        elif action == "segment_map":
            self._expandable = True
            return self._map(address, size, self._of_stream(stream, size == SMALL_SEGMENT_BYTES, private)), size
        elif action == "segment_unmap":
            pool = self._unmap(address, size)
            return (pool, -size) if pool is not None else None
        return None

    def _of_stream(self, stream: int, small: bool, private: tuple[int, int] = (0, 0)) -> int:
        return self._number(AllocatorPool(stream, "small" if small else "large", private))

    def _number(self, pool: AllocatorPool) -> int:
        return self._pools.setdefault(pool, len(self._pools))

    def _complete(self, address: int) -> None:
        """A block that was given up can be handed out again."""
        block = self._blocks.get(address)
        if block is not None and block.pending:
            block.pending, block.free = False, True
            self._merge(address, block)

    def _map(self, address: int, size: int, pool: int) -> int:
        """Follow an expandable segment that grows: free bytes, at one with the free blocks they touch.

        Returns:
            The number of its pool: that of what is there of it already, otherwise as given.
        """
        before = next((a for a, b in self._blocks.items() if a + b.size == address), None)
        after = address + size if address + size in self._blocks else None
        there = before if before is not None else after
        mapped = _Block(size, 0, True, True, pool if there is None else self._blocks[there].pool)
        self._insert(address, mapped, before, after)
        self._merge(address, mapped)
        return mapped.pool

    def _unmap(self, address: int, size: int) -> int | None:
        """Follow an expandable segment that shrinks: pages within one free block, which falls apart.

        Returns:
            The number of its pool; None: there is no such block.
        """
        start = next((a for a, b in self._blocks.items() if b.free and a <= address < a + b.size), None)
        if start is None:
            return None
        block = self._blocks.pop(start)
        end = start + block.size
        for neighbour, side in ((block.before, "after"), (block.after, "before")):
            if neighbour is not None:
                setattr(self._blocks[neighbour], side, None)
        if start < address:
            self._insert(start, _Block(address - start, 0, True, True, block.pool), block.before, None)
        if address + size < end:
            self._insert(address + size, _Block(end - address - size, 0, True, True, block.pool), None, block.after)
        return block.pool

    def _insert(self, address: int, block: _Block, before: int | None, after: int | None) -> None:
        block.before, block.after = before, after
        self._blocks[address] = block
        if before is not None:
            self._blocks[before].after = address
        if after is not None:
            self._blocks[after].before = address

    def _merge(self, address: int, block: _Block) -> None:
        """Make one block of a free one and its free neighbours."""
        if block.after is not None and self._blocks[block.after].free:
            self._absorb(address, block)
        if block.before is not None and self._blocks[block.before].free:
            self._absorb(block.before, self._blocks[block.before])

    def _absorb(self, address: int, block: _Block) -> None:
        """Merge the block that follows into this one."""
        assert block.after is not None
        gone = self._blocks.pop(block.after)
        block.size += gone.size
        block.after = gone.after
        if gone.after is not None:
            self._blocks[gone.after].before = address
