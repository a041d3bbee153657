"""The CUDA caching allocator, modelled: what it would hand out and reserve.

The rules are those of `c10/cuda/CUDACachingAllocator.cpp`: a small and a large
pool for each stream; best fit among the free blocks, the lowest address among
equals; a block that is too large is split, neighbours that are free are merged;
what is not found is taken from CUDA in segments, which stay their stream's.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable
from functools import cache

from ..allocator_settings import MIN_BLOCK_BYTES, SMALL_BYTES, SMALL_SEGMENT_BYTES, AllocatorSettings
from ..events import AllocatorPool, CacheState
from ..out_of_memory.pools import by_bytes
from ..out_of_memory.report import Pool

LARGE_SEGMENT_BYTES = 20 << 20
"""The segment that requests from 1 to 10 MiB take from CUDA (kLargeBuffer)."""
MIN_LARGE_BYTES = 10 << 20
"""Requests from here on get a segment of their own size (kMinLargeAlloc)..."""
ROUND_LARGE_BYTES = 2 << 20
"""...rounded up to this (kRoundLarge)."""
DEFAULT_STREAM = 0
FIRST_ADDRESS = 1 << 40
LAST_ADDRESS = 1 << 46
_DEFAULT = AllocatorSettings()


def rounded_bytes(size: int) -> int:
    """Bytes that the allocator's counter moves by for a request, at the least, if it rounds as by default."""
    return _DEFAULT.rounded_bytes(size)


def segment_bytes(rounded: int) -> int:
    """The bytes taken from CUDA when no free block will do."""
    if rounded <= SMALL_BYTES:
        return SMALL_SEGMENT_BYTES
    if rounded < MIN_LARGE_BYTES:
        return LARGE_SEGMENT_BYTES
    return -(-rounded // ROUND_LARGE_BYTES) * ROUND_LARGE_BYTES


class OutOfMemoryError(Exception):
    """CUDA has no more, even after all that is cached was given back."""


class Block:
    """A piece of a segment, between its neighbours.

    Attributes:
        address: Where it begins, as long as it is.
        size: Bytes.
        pool: That the segment belongs to.
        before: Its neighbour below in the segment; None: it is the first.
        after: Its neighbour above; None: it is the last.
        free: Not handed out.
    """

    __slots__ = ("address", "after", "before", "free", "pool", "size")

    def __init__(self, address: int, size: int, pool: BlockPool, before: Block | None, after: Block | None) -> None:
        self.address, self.size, self.pool = address, size, pool
        self.before, self.after = before, after
        self.free = True


class BlockPool:
    """Free blocks of a stream in the order the allocator looks through them, by size, then by address.

    Attributes:
        number: Of the allocator's pools.
        stream: Number of the stream.
        small: Of blocks up to 1 MiB.
        reserved_bytes: Held from CUDA.
        free: Size, address and the block itself, in order.
        end: The last block of the expandable segment; None: there is none.
    """

    def __init__(self, number: int, stream: int, small: bool) -> None:
        self.number, self.stream, self.small = number, stream, small
        self.reserved_bytes = 0
        self.free: list[tuple[int, int, Block]] = []
        self.end: Block | None = None

    def take_out(self, block: Block) -> None:
        """Remove a block that grows, or is given back to CUDA."""
        del self.free[bisect_left(self.free, (block.size, block.address))]


class CachingAllocator:
    """One device's allocator.

    Args:
        capacity_bytes: What CUDA can give; None: without end.
        expandable: As with PYTORCH_ALLOC_CONF=expandable_segments:True.
        divisions: As with roundup_power2_divisions.
        place: Address of a new segment by its size, to follow a real trace; by
            default each lies below the one before, as CUDA mostly places them.

    Attributes:
        capacity_bytes: As above.
        expandable: As above.
        reserved_bytes: Sum of the segments (`memory_reserved`).
        peak_reserved_bytes: The most that was.
        growths: Pools that have taken memory or given it back, and how many bytes, in order; to be cleared by
            whoever reads it.
    """

    def __init__(
        self,
        capacity_bytes: int | None = None,
        expandable: bool = False,
        divisions: int = 0,
        place: Callable[[int], int] | None = None,
    ) -> None:
        self.reserved_bytes = self.peak_reserved_bytes = 0
        self.capacity_bytes, self.expandable = capacity_bytes, expandable
        self._rounded_bytes = cache(AllocatorSettings(expandable, divisions).rounded_bytes)
        self._place = place or self._below
        self._lowest_address = LAST_ADDRESS
        self._pools: dict[tuple[int, bool], BlockPool] = {}
        self.growths: list[tuple[int, int]] = []

    def allocate(self, size: int, stream: int = DEFAULT_STREAM) -> Block:
        """Hand out a block.

        Args:
            size: Bytes asked for.
            stream: Number of the stream that is current.

        Raises:
            OutOfMemoryError: The capacity does not suffice.
        """
        rounded = self._rounded_bytes(size)
        pool = self._pools.get((stream, rounded <= SMALL_BYTES)) or self._new_pool(stream, rounded <= SMALL_BYTES)
        free = pool.free
        at = bisect_left(free, (rounded,))
        if at < len(free):
            # An expandable segment's last block counts as larger than all: it can grow.
            if free[at][2] is pool.end and at + 1 < len(free):
                at += 1
            block = free.pop(at)[2]
        else:
            block = self._more(rounded, pool)
        rest = block.size - rounded
        if rest >= MIN_BLOCK_BYTES if pool.small or self.expandable else rest > SMALL_BYTES:
            # Keep the first bytes; the rest becomes a free block.
            block.size, address, after = rounded, block.address + rounded, block.after
            block.after = other = Block(address, rest, pool, block, after)
            if after is not None:
                after.before = other
            elif pool.end is block:
                pool.end = other
            insort(free, (rest, address, other))
        block.free = False
        return block

    def free(self, block: Block) -> None:
        """Take a block back; with neighbours that are free it becomes one."""
        pool, size = block.pool, block.size
        free = pool.free
        block.free = True
        after, before = block.after, block.before
        if after is not None and after.free:
            del free[bisect_left(free, (after.size, after.address))]
            size += after.size
            if pool.end is after:
                pool.end = block
            block.after = after = after.after
            if after is not None:
                after.before = block
        if before is not None and before.free:
            del free[bisect_left(free, (before.size, before.address))]
            size += before.size
            if pool.end is block:
                pool.end = before
            before.after = after
            if after is not None:
                after.before = before
            block = before
        block.size = size
        insort(free, (size, block.address, block))

    def empty_cache(self) -> None:
        """Give CUDA back every segment that is free as a whole."""
        for pool in self._pools.values():
            for _, _, block in [*pool.free]:
                if block.before is None and block.after is None:
                    pool.take_out(block)
                    if pool.end is block:
                        pool.end = None
                    self._grow(pool, -block.size)

    @property
    def allocated_bytes(self) -> int:
        """Sum of the blocks handed out (`memory_allocated`)."""
        return self.reserved_bytes - sum(size for pool in self._pools.values() for size, *_ in pool.free)

    @property
    def pool_table(self) -> tuple[AllocatorPool, ...]:
        """The pools by number."""
        pools = self._pools.values()
        return tuple(AllocatorPool(pool.stream, "small" if pool.small else "large") for pool in pools)

    def reserved_by_pool(self) -> list[int]:
        """Bytes held from CUDA by each pool, by number."""
        return [pool.reserved_bytes for pool in self._pools.values()]

    def pools(self) -> tuple[Pool, ...]:
        """Free blocks by stream, of its small pool and of its large one."""
        return by_bytes(
            Pool(
                stream=pool.stream,
                pool="small" if pool.small else "large",
                cached_bytes=sum(size for size, *_ in pool.free),
                largest_free_block_bytes=pool.free[-1][0],
            )
            for pool in self._pools.values()
            if pool.free
        )

    def cache(self) -> CacheState:
        """The state of the allocator now."""
        free = [block for pool in self._pools.values() for _, _, block in pool.free]
        # A free block that is a segment is given back when memory runs out, as are an expandable one's pages.
        gaps = (
            [b.size for b in free if b.size < (SMALL_SEGMENT_BYTES if b.pool.small else LARGE_SEGMENT_BYTES)]
            if self.expandable
            else [b.size for b in free if b.before is not None or b.after is not None]
        )
        return CacheState(
            reserved_bytes=self.reserved_bytes,
            allocated_bytes=self.allocated_bytes,
            largest_free_block_bytes=max((block.size for block in free), default=0),
            gaps_bytes=sum(gaps),
        )

    # --- segments -----------------------------------------------------------

    def _new_pool(self, stream: int, small: bool) -> BlockPool:
        pool = self._pools[stream, small] = BlockPool(len(self._pools), stream, small)
        return pool

    def _more(self, rounded: int, pool: BlockPool) -> Block:
        """A new segment, or more of an expandable one."""
        size = segment_bytes(rounded)
        if self.expandable:
            return self._expand(rounded, pool)
        self._reserve(size, pool)
        return Block(self._place(size), size, pool, None, None)

    def _expand(self, rounded: int, pool: BlockPool) -> Block:
        """Map as many pages behind the pool's last block as are missing."""
        size = self._missing(rounded, pool)
        if self._exceeds(size):
            self.empty_cache()  # the pool's own last block may be given back as well
            size = self._missing(rounded, pool)
        self._reserve(size, pool)
        end = pool.end
        if end is not None and end.free:
            pool.take_out(end)
            end.size += size
            return end
        # Each pool reserves more addresses than any device has memory.
        address = end.address + end.size if end is not None else FIRST_ADDRESS * (pool.number + 1)
        block = Block(address, size, pool, end, None)
        if end is not None:
            end.after = block
        pool.end = block
        return block

    @staticmethod
    def _missing(rounded: int, pool: BlockPool) -> int:
        page = SMALL_SEGMENT_BYTES if pool.small else LARGE_SEGMENT_BYTES
        there = pool.end.size if pool.end is not None and pool.end.free else 0
        return -(-(rounded - there) // page) * page

    def _exceeds(self, size: int) -> bool:
        return self.capacity_bytes is not None and self.reserved_bytes + size > self.capacity_bytes

    def _reserve(self, size: int, pool: BlockPool) -> None:
        if self._exceeds(size):
            self.empty_cache()
            if self._exceeds(size):
                raise OutOfMemoryError
        self._grow(pool, size)
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)

    def _grow(self, pool: BlockPool, size: int) -> None:
        self.reserved_bytes += size
        pool.reserved_bytes += size
        self.growths.append((pool.number, size))

    def _below(self, size: int) -> int:
        self._lowest_address -= -(-size // ROUND_LARGE_BYTES) * ROUND_LARGE_BYTES
        return self._lowest_address
