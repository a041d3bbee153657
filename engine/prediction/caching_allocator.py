"""The CUDA caching allocator, modelled: what it would hand out and reserve.

The rules are those of `c10/cuda/CUDACachingAllocator.cpp`: a small and a large
pool for each stream; best fit among the free blocks, the lowest address among
equals; a block that is too large is split, neighbours that are free are merged;
what is not found is taken from CUDA in segments, which stay their stream's.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from functools import cache

from ..allocator_settings import MIN_BLOCK_BYTES, AllocatorSettings
from ..events import AllocatorPool, CacheState
from ..out_of_memory.pools import by_bytes
from ..out_of_memory.report import Pool
from ..tracing.block_layout import SMALL_BYTES, SMALL_SEGMENT_BYTES

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


class _Block:
    __slots__ = ("address", "after", "before", "free", "pool", "requested", "size")

    def __init__(self, address: int, size: int, pool: _Pool, before: _Block | None, after: _Block | None) -> None:
        self.address, self.size, self.pool = address, size, pool
        self.before, self.after = before, after
        self.free, self.requested = True, 0


class _Pool:
    """Free blocks of a stream in the order the allocator looks through them: by size, then by address.

    Attributes:
        number: Of the allocator's pools.
        reserved_bytes: Held from CUDA.
    """

    def __init__(self, number: int, stream: int, small: bool) -> None:
        self.number, self.stream, self.small = number, stream, small
        self.reserved_bytes = 0
        self.end: _Block | None = None  # the last of its expandable segment
        self.free: list[tuple[int, int]] = []

    def best_fit(self, size: int, last_resort: int | None = None) -> int | None:
        """Take out the smallest block that is large enough; returns its address.

        Args:
            size: How large.
            last_resort: Address of a block that counts as larger than all: it
                can grow.
        """
        free = self.free
        at = bisect_left(free, (size, 0))
        if last_resort is not None and at + 1 < len(free) and free[at][1] == last_resort:
            at += 1
        return free.pop(at)[1] if at < len(free) else None


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
        allocated_bytes: Sum of the blocks handed out (`memory_allocated`).
        reserved_bytes: Sum of the segments (`memory_reserved`).
        peak_reserved_bytes: The most that was.
    """

    def __init__(
        self,
        capacity_bytes: int | None = None,
        expandable: bool = False,
        divisions: int = 0,
        place: Callable[[int], int] | None = None,
    ) -> None:
        self.allocated_bytes = self.reserved_bytes = self.peak_reserved_bytes = 0
        self.capacity_bytes, self.expandable = capacity_bytes, expandable
        self._rounded_bytes = cache(AllocatorSettings(expandable, divisions).rounded_bytes)
        self._place = place or self._below
        self._lowest_address = LAST_ADDRESS
        self._pools: dict[tuple[int, bool], _Pool] = {}
        self._blocks: dict[int, _Block] = {}
        self._grown: list[tuple[int, int]] = []

    def allocate(self, size: int, stream: int = DEFAULT_STREAM) -> tuple[int, int]:
        """Hand out a block; returns its address and its size.

        Args:
            size: Bytes asked for.
            stream: Number of the stream that is current.

        Raises:
            OutOfMemoryError: The capacity does not suffice.
        """
        rounded = self._rounded_bytes(size)
        pool = self._pool(stream, rounded <= SMALL_BYTES)
        address = pool.best_fit(rounded, pool.end.address if pool.end is not None else None)
        block = self._blocks[address] if address is not None else self._more(rounded, pool)
        rest = block.size - rounded
        if rest >= MIN_BLOCK_BYTES if pool.small or self.expandable else rest > SMALL_BYTES:
            self._split(block, rounded)
        block.free, block.requested = False, size
        self.allocated_bytes += block.size
        return block.address, block.size

    def free(self, address: int) -> tuple[int, int]:
        """Take a block back; returns the bytes asked for and those handed out."""
        block = self._blocks[address]
        requested, size = block.requested, block.size
        self.allocated_bytes -= size
        block.free, block.requested = True, 0
        before, after = block.before, block.after
        if after is not None and after.free:
            self._take_out(after)
            self._absorb(block)
        if before is not None and before.free:
            self._take_out(before)
            self._absorb(before)
            block = before
        insort(block.pool.free, (block.size, block.address))
        return requested, size

    def empty_cache(self) -> None:
        """Give CUDA back every segment that is free as a whole."""
        for block in list(self._blocks.values()):
            if block.free and block.before is None and block.after is None:
                self._take_out(block)
                del self._blocks[block.address]
                if block.pool.end is block:
                    block.pool.end = None
                self._grow(block.pool, -block.size)

    def alive(self) -> list[tuple[int, int, int, int]]:
        """Address, bytes asked for, bytes beyond them and the pool's number, of what is allocated."""
        blocks = self._blocks.values()
        return [(b.address, b.requested, b.size - b.requested, b.pool.number) for b in blocks if not b.free]

    @property
    def pool_table(self) -> tuple[AllocatorPool, ...]:
        """The pools by number."""
        pools = self._pools.values()
        return tuple(AllocatorPool(pool.stream, "small" if pool.small else "large") for pool in pools)

    def pool_of(self, address: int) -> int:
        """Number of the pool of a block that is allocated."""
        return self._blocks[address].pool.number

    def reserved_by_pool(self) -> list[int]:
        """Bytes held from CUDA by each pool, by number."""
        return [pool.reserved_bytes for pool in self._pools.values()]

    def grown(self) -> Sequence[tuple[int, int]]:
        """Pools that have taken memory or given it back since this was last asked, and how many bytes, in order."""
        if not self._grown:
            return ()
        grown, self._grown = self._grown, []
        return grown

    def pools(self) -> tuple[Pool, ...]:
        """Free blocks by stream, of its small pool and of its large one."""
        return by_bytes(
            Pool(
                stream=pool.stream,
                pool="small" if pool.small else "large",
                cached_bytes=sum(size for size, _ in pool.free),
                largest_free_block_bytes=pool.free[-1][0],
            )
            for pool in self._pools.values()
            if pool.free
        )

    def cache(self) -> CacheState:
        """The state of the allocator now."""
        free = [block for block in self._blocks.values() if block.free]
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

    def _pool(self, stream: int, small: bool) -> _Pool:
        pool = self._pools.get((stream, small))
        if pool is None:
            pool = self._pools[stream, small] = _Pool(len(self._pools), stream, small)
        return pool

    def _more(self, rounded: int, pool: _Pool) -> _Block:
        """A new segment, or more of an expandable one."""
        size = segment_bytes(rounded)
        if self.expandable:
            return self._expand(rounded, pool)
        self._reserve(size, pool)
        block = _Block(self._place(size), size, pool, None, None)
        self._blocks[block.address] = block
        return block

    def _expand(self, rounded: int, pool: _Pool) -> _Block:
        """Map as many pages behind the pool's last block as are missing."""
        page = SMALL_SEGMENT_BYTES if pool.small else LARGE_SEGMENT_BYTES
        end = pool.end
        there = end.size if end is not None and end.free else 0
        size = -(-(rounded - there) // page) * page
        self._reserve(size, pool)
        if end is not None and end.free:
            self._take_out(end)
            end.size += size
            return end
        # Each pool reserves more addresses than any device has memory.
        address = end.address + end.size if end is not None else FIRST_ADDRESS * (pool.number + 1)
        block = _Block(address, size, pool, end, None)
        if end is not None:
            end.after = block
        self._blocks[address] = pool.end = block
        return block

    def _reserve(self, size: int, pool: _Pool) -> None:
        if self.capacity_bytes is not None and self.reserved_bytes + size > self.capacity_bytes:
            self.empty_cache()
            if self.reserved_bytes + size > self.capacity_bytes:
                raise OutOfMemoryError
        self._grow(pool, size)
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)

    def _grow(self, pool: _Pool, size: int) -> None:
        self.reserved_bytes += size
        pool.reserved_bytes += size
        self._grown.append((pool.number, size))

    def _below(self, size: int) -> int:
        self._lowest_address -= -(-size // ROUND_LARGE_BYTES) * ROUND_LARGE_BYTES
        return self._lowest_address

    # --- blocks -------------------------------------------------------------

    def _split(self, block: _Block, size: int) -> None:
        """Keep the first `size` bytes; the rest becomes a free block."""
        rest = _Block(block.address + size, block.size - size, block.pool, block, block.after)
        if block.after is not None:
            block.after.before = rest
        elif block.pool.end is block:
            block.pool.end = rest
        block.after, block.size = rest, size
        self._blocks[rest.address] = rest
        insort(rest.pool.free, (rest.size, rest.address))

    def _absorb(self, block: _Block) -> None:
        """Merge the free block that follows into this one."""
        gone = block.after
        assert gone is not None
        del self._blocks[gone.address]
        block.size += gone.size
        block.after = gone.after
        if gone.after is not None:
            gone.after.before = block
        elif block.pool.end is gone:
            block.pool.end = block

    def _take_out(self, block: _Block) -> None:
        free = block.pool.free
        del free[bisect_left(free, (block.size, block.address))]
