"""The layout of blocks: whatever the allocator does, its trace tells every block, its size and its pool."""

from __future__ import annotations

import random
from typing import Any

import pytest

from gpumem_tui.engine.events import AllocatorPool
from gpumem_tui.engine.prediction.caching_allocator import FIRST_ADDRESS, Block, CachingAllocator, OutOfMemoryError
from gpumem_tui.engine.tracing.block_layout import BlockLayout
from gpumem_tui.engine.tracing.trace_entries import read

from .allocator_state import entries, snapshot_block, snapshot_segment, trace_entry

MIB = 1 << 20
PAGE = 20 * MIB


class TracedAllocator:
    """The model of the allocator, writing the trace that PyTorch's would.

    Attributes:
        trace: Entries that were not read yet.
        rows: To be made of them: address, bytes, slack and pool.
        grown: Likewise: the number of the row before which a pool grows, the pool, and by how many bytes.
        alive: Blocks and the bytes asked for.
        pending: Likewise those given up that another stream is at.
    """

    def __init__(self, expandable: bool, deferred: bool) -> None:
        self.expandable, self.deferred = expandable, deferred
        self.model = CachingAllocator(500 * MIB, expandable, place=None if expandable else lambda _: self._grow())
        self.trace: list[dict[str, Any]] = []
        self.rows: list[tuple[int, int, int, AllocatorPool]] = []
        self.grown: list[tuple[int, AllocatorPool, int]] = []
        self.alive: list[tuple[Block, int]] = []
        self.pending: list[tuple[Block, int]] = []
        self._segments: dict[int, tuple[int, int]] = {}
        self._gone: dict[int, int] = {}
        self._pages: dict[int, int] = {}
        self._lowest = FIRST_ADDRESS

    def allocate(self, size: int, stream: int) -> None:
        try:
            block = self.model.allocate(size, stream)
        except OutOfMemoryError:
            self._grow()
            self.trace.append({"action": "oom", "device_free": 0, "size": size, "stream": stream})
            return
        self._grow()
        self.trace.append(trace_entry("alloc", block.address, size, stream))
        self.rows.append(self.row(block, size))
        self.alive.append((block, size))

    def free(self, number: int) -> None:
        block, size = self.alive.pop(number)
        self.trace.append(trace_entry("free_requested", block.address, size))
        address, size, slack, pool = self.row(block, size)
        self.rows.append((address, -size, -slack, pool))
        if self.deferred:
            self.pending.append((block, size))
        else:
            self.model.free(block)

    def complete(self, number: int) -> None:
        block, size = self.pending.pop(number)
        self.trace.append(trace_entry("free_completed", block.address, size))
        self.model.free(block)

    def empty_cache(self) -> None:
        self.model.empty_cache()
        self._grow()

    def row(self, block: Block, size: int) -> tuple[int, int, int, AllocatorPool]:
        return block.address, size, block.size - size, self.model.pool_table[block.pool.number]

    def _grow(self) -> int:
        """Write what segments have done; returns the address of the last."""
        address = 0
        for number, size in self.model.growths:
            pool = self.model.pool_table[number]
            action, address = self._pages_of(number, size) if self.expandable else self._segment_of(number, size)
            self.trace.append(trace_entry(action, address, abs(size), pool.stream))
            self.grown.append((len(self.rows), pool, size))
        self.model.growths.clear()
        return address

    def _pages_of(self, pool: int, size: int) -> tuple[str, int]:
        there = self._pages.get(pool, 0)
        self._pages[pool] = there + size
        start = FIRST_ADDRESS * (pool + 1)
        return ("segment_map", start + there) if size > 0 else ("segment_unmap", start)

    def _segment_of(self, pool: int, size: int) -> tuple[str, int]:
        """A new one takes the addresses of those that are gone, of any pool, as far as they suffice."""
        if size > 0:
            address = next((start for start, there in self._gone.items() if there >= size), self._lowest - size)
            self._lowest = min(self._lowest, address)
            rest = self._gone.pop(address, size) - size
            self._gone |= {address + size: rest} if rest else {}
            self._segments[address] = size, pool
            return "segment_alloc", address
        used = [block.address for block, _ in self.alive + self.pending]
        empty = (start for start in self._segments if not any(start <= address < start - size for address in used))
        address = next(start for start in empty if self._segments[start] == (-size, pool))
        self._gone[address] = self._segments.pop(address)[0]
        return "segment_free", address


def assert_followed(layout: BlockLayout, pools: dict[AllocatorPool, int], allocator: TracedAllocator) -> None:
    seen, model = layout.follow(read(allocator.trace)), allocator.model
    table = [*pools, None]
    assert [
        (*row, table[pool]) for *row, pool in seen.rows[["address", "bytes", "slack", "pool"]].tolist()
    ] == allocator.rows
    assert [(event, table[pool], size) for event, pool, size in seen.segments.tolist()] == allocator.grown
    alive = sorted(allocator.row(block, size) for block, size in allocator.alive)
    assert [(*row, table[pool]) for *row, pool in layout.alive().tolist()] == alive
    held = {pool: size for pool, size in zip(model.pool_table, model.reserved_by_pool(), strict=True) if size}
    assert {table[number]: size for number, size in layout.reserved().items()} == held
    allocated = sum(block.size for block, _ in allocator.alive)
    assert layout.cache() == model.cache()._replace(allocated_bytes=allocated)
    allocator.trace, allocator.rows, allocator.grown = [], [], []


@pytest.mark.parametrize("expandable", [False, True], ids=["native", "expandable"])
@pytest.mark.parametrize("deferred", [False, True], ids=["at once", "deferred"])
def test_whatever_is_asked_for_every_block_is_followed(expandable: bool, deferred: bool) -> None:
    """Two streams, until memory runs out and the cache is given back, read in parts of any length."""
    for seed in range(12):
        rng, pools = random.Random(seed), dict[AllocatorPool, int]()
        allocator, layout = TracedAllocator(expandable, deferred), BlockLayout([], deferred, pools)
        for _ in range(300):
            alive, chance = len(allocator.alive), rng.random()
            if chance < 0.5 if alive < 40 else chance < 0.2:
                largest = rng.choice([2000, MIB, 2 * MIB, 12 * MIB, 60 * MIB])
                allocator.allocate(rng.randrange(1, largest), rng.choice([0, 0, 7]))
            elif chance < 0.9 and alive:
                allocator.free(rng.randrange(alive))
            elif chance < 0.93:
                allocator.empty_cache()
            elif chance < 0.96:
                assert_followed(layout, pools, allocator)
            while allocator.pending and rng.random() < 0.4:
                allocator.complete(rng.randrange(len(allocator.pending)))
        assert_followed(layout, pools, allocator)


def test_a_block_that_another_stream_is_at_is_free_once_that_is_completed() -> None:
    """Until then its neighbours stay as they are: what is asked for is cut from what lies between them."""
    layout = BlockLayout([], deferred=True)
    blocks = [("alloc", 4 * MIB * n, 4 * MIB) for n in range(5)]
    layout.follow(entries(("segment_alloc", 0, 20 * MIB), *blocks))
    layout.follow(entries(("free_requested", 4 * MIB, 4 * MIB), ("free_requested", 8 * MIB, 4 * MIB)))
    assert layout.alive()["address"].tolist() == [0, 12 * MIB, 16 * MIB]
    assert layout.cache() == (20 * MIB, 12 * MIB, 0, 0)
    seen = layout.follow(entries(("free_completed", 4 * MIB, 4 * MIB), ("alloc", 4 * MIB, 4 * MIB - 5000)))
    assert seen.rows["slack"].tolist() == [5000], "up to the block that waits"
    again = [("free_requested", 4 * MIB, 4 * MIB - 5000), ("free_completed", 4 * MIB, 4 * MIB - 5000)]
    seen = layout.follow(entries(*again, ("free_completed", 8 * MIB, 4 * MIB), ("alloc", 4 * MIB, 8 * MIB - 5000)))
    assert seen.rows["slack"].tolist() == [-5000, 5000], "of both"


def test_a_block_that_waits_in_a_snapshot_is_neither_allocated_nor_free() -> None:
    waits = snapshot_block(4 * MIB, 8 * MIB, "active_pending_free")
    segment = snapshot_segment(snapshot_block(0, 4 * MIB), waits, snapshot_block(12 * MIB, 8 * MIB, "inactive"))
    layout = BlockLayout([segment], deferred=True)
    assert layout.alive().tolist() == [(0, 4 * MIB, 0, 0)]
    assert layout.cache() == (20 * MIB, 4 * MIB, 8 * MIB, 8 * MIB)
    layout.follow(entries(("free_completed", 4 * MIB, 8 * MIB)))
    assert layout.cache() == (20 * MIB, 4 * MIB, 16 * MIB, 16 * MIB)


def test_the_addresses_of_a_segment_are_used_again_by_one_of_another_pool() -> None:
    """Within one part of the trace: every block is of the pool whose segment was there then."""
    layout = BlockLayout([])
    small = [("segment_alloc", 0, 2 * MIB), ("alloc", 0, 600), ("free_requested", 0, 600), ("segment_free", 0, 2 * MIB)]
    large = [("segment_alloc", 0, 20 * MIB, 7), ("alloc", 0, 20 * MIB - 600, 7)]
    seen = layout.follow(entries(*small, *large))
    assert seen.rows[["slack", "pool"]].tolist() == [(424, 0), (-424, 0), (600, 1)]
    assert seen.segments.tolist() == [(0, 0, 2 * MIB), (2, 0, -2 * MIB), (2, 1, 20 * MIB)]
    assert layout.reserved() == {1: 20 * MIB}


def test_an_expandable_segment_gives_back_pages_between_blocks() -> None:
    layout = BlockLayout([])
    layout.follow(entries(("segment_map", 0, 3 * PAGE), ("alloc", 0, MIB), ("alloc", MIB, 3 * PAGE - 2 * MIB)))
    layout.follow(entries(("alloc", 3 * PAGE - MIB, MIB), ("free_requested", MIB, 3 * PAGE - 2 * MIB)))
    assert layout.follow(entries(("segment_unmap", PAGE, PAGE))).segments.tolist() == [(0, 0, -PAGE)]
    assert layout.cache() == (2 * PAGE, 2 * MIB, PAGE - MIB, 2 * (PAGE - MIB))
    layout.follow(entries(("segment_map", PAGE, PAGE)))
    assert layout.cache() == (3 * PAGE, 2 * MIB, 3 * PAGE - 2 * MIB, 0), "one free block again"


def test_a_segment_of_a_private_pool_is_known_by_its_address() -> None:
    pools = dict[AllocatorPool, int]()
    trace = [trace_entry("segment_alloc", 0, 2 * MIB), trace_entry("alloc", 0, 512)]
    assert BlockLayout([], pools=pools).follow(read(trace, {0: (0, 3)})).rows["pool"].tolist() == [0]
    assert list(pools) == [AllocatorPool(0, "small", (0, 3))]


def test_what_the_trace_has_missed_is_believed() -> None:
    """A block in no segment, then freed and taken again; and frees of what nobody allocated."""
    pools = dict[AllocatorPool, int]()
    layout = BlockLayout([], pools=pools)
    unannounced = [("alloc", 0, 3 * MIB - 5, 7), ("free_requested", 0, 3 * MIB - 5), ("alloc", 0, 2 * MIB, 7)]
    unknown = [("free_requested", 9 * MIB, 700), ("free_requested", 0, 2 * MIB), ("free_requested", 0, 2 * MIB)]
    seen = layout.follow(entries(*unannounced, *unknown, ("segment_free", 50 * MIB, 2 * MIB), ("snapshot", 0, 0)))
    assert seen.rows["pool"].tolist() == [0, 0, 0, -1, 0, -1]
    assert seen.rows["slack"].tolist() == [5, -5, MIB, -324, -MIB, 0]
    assert list(pools) == [AllocatorPool(7, "large")]
    assert layout.cache() == (3 * MIB, 0, 3 * MIB, 0) and not len(seen.segments)
