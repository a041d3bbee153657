"""The modelled caching allocator hands out, merges and gives back blocks as PyTorch's does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gpumem_tui.engine.prediction.caching_allocator import Block, CachingAllocator, OutOfMemoryError


@pytest.mark.parametrize(
    ("name", "expandable"), [("gpt2-h200", False), ("polyglot-expandable-h200", True)], ids=["native", "expandable"]
)
def test_a_real_trace_reserves_what_it_reserved(name: str, expandable: bool) -> None:
    """Three steps on an H200, every allocation and segment of the process in order: same bytes at every one."""
    with np.load(Path(__file__).parent / "data" / f"{name}.npz", allow_pickle=False) as trace:
        actions = trace["actions"][trace["action"]].tolist()
        addresses, sizes = trace["address"].tolist(), trace["size"].tolist()
    segments = iter([a for a, action in zip(addresses, actions, strict=True) if action == "segment_alloc"])
    allocator = CachingAllocator(expandable=expandable, place=None if expandable else lambda _: next(segments))
    blocks: dict[int, Block] = {}
    reserved = 0
    for action, address, size in zip(actions, addresses, sizes, strict=True):
        if action in ("segment_alloc", "segment_map"):
            reserved += size
        elif action == "alloc":
            blocks[address] = allocator.allocate(size)
            assert allocator.reserved_bytes == reserved
            assert expandable or blocks[address].address == address
        elif action == "free_requested":
            allocator.free(blocks.pop(address))
    assert allocator.peak_reserved_bytes == reserved > 7 * 10**9


def test_small_requests_share_a_segment_and_large_ones_have_their_own() -> None:
    allocator = CachingAllocator()
    allocator.allocate(1)
    allocator.allocate(700)
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (512 + 1024, 2 << 20)
    allocator.allocate(3 << 20)
    assert allocator.reserved_bytes == (2 << 20) + (20 << 20)
    allocator.allocate((11 << 20) + 1)  # from what the last one left
    assert allocator.reserved_bytes == (2 << 20) + (20 << 20)
    allocator.allocate((31 << 20) + 1)
    assert allocator.reserved_bytes == (2 << 20) + (20 << 20) + (32 << 20)


def test_a_rest_that_is_too_small_is_handed_out_as_well() -> None:
    allocator = CachingAllocator()
    block = allocator.allocate((12 << 20) - 1000)
    assert block.size == allocator.allocated_bytes == 12 << 20
    allocator.free(block)
    assert allocator.allocated_bytes == 0


def test_free_neighbours_are_merged_and_given_back_whole() -> None:
    allocator = CachingAllocator()
    blocks = [allocator.allocate(4 << 20) for _ in range(4)]
    for block in blocks:
        allocator.free(block)
    merged = allocator.allocate(16 << 20)
    assert merged.address == min(block.address for block in blocks)
    allocator.free(merged)
    allocator.empty_cache()
    assert allocator.reserved_bytes == 0 < allocator.peak_reserved_bytes


@pytest.mark.parametrize("expandable", [False, True])
def test_what_a_stream_freed_no_other_stream_is_given(expandable: bool) -> None:
    allocator = CachingAllocator(expandable=expandable)
    block = allocator.allocate(30 << 20, stream=1)
    address = block.address
    allocator.free(block)
    assert allocator.allocate(30 << 20).address != address
    assert allocator.reserved_bytes >= 60 << 20
    again = allocator.allocate(30 << 20, stream=1)
    assert again.address == address
    assert allocator.pool_table == ((1, "large", (0, 0)), (0, "large", (0, 0)))
    assert (again.pool.number, allocator.allocated_bytes) == (0, 60 << 20)
    assert allocator.reserved_by_pool() == 2 * [(40 if expandable else 30) << 20]


def test_what_is_cached_is_given_back_before_memory_runs_out() -> None:
    allocator = CachingAllocator(capacity_bytes=40 << 20)
    allocator.free(allocator.allocate(30 << 20))
    allocator.allocate(36 << 20)
    with pytest.raises(OutOfMemoryError):
        allocator.allocate(30 << 20)


def test_pages_that_a_pool_has_cached_itself_are_given_back_as_well() -> None:
    """What is missing then is all of it, not what was missing beside them."""
    allocator = CachingAllocator(capacity_bytes=60 << 20, expandable=True)
    for block in (allocator.allocate(30 << 20, stream=1), allocator.allocate(15 << 20)):
        allocator.free(block)
    allocator.allocate(50 << 20)
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (50 << 20, 60 << 20)
    assert allocator.reserved_by_pool() == [0, 60 << 20]


def test_expandable_segments_reserve_page_by_page() -> None:
    fixed, expandable = CachingAllocator(), CachingAllocator(expandable=True)
    for allocator in (fixed, expandable):
        for size in (12, 30, 14, 50):
            allocator.allocate((size << 20) + 4096)
    assert expandable.reserved_bytes <= -(-(106 << 20) // (20 << 20)) * (20 << 20) + (20 << 20)
    assert expandable.allocated_bytes <= fixed.allocated_bytes
