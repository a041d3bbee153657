"""The bytes that expandable segments would give back of a traced step, by the allocator's model."""

from __future__ import annotations

from ..events import StepTrace
from .caching_allocator import DEFAULT_STREAM, Block, CachingAllocator


def expandable_reserved_bytes(trace: StepTrace) -> int:
    """The most that the allocator would have reserved for a step with expandable segments.

    Args:
        trace: What was alive when it began is laid out as if it had come in the order of its addresses.
    """
    allocator = CachingAllocator(expandable=True)
    blocks: dict[int, Block] = {}
    streams = (*(pool.stream for pool in trace.pools), DEFAULT_STREAM)  # the last: where no pool is known
    for address, size, _, pool in sorted(trace.begin.tolist()):
        blocks[address] = allocator.allocate(size, streams[pool])
    for address, size, *_, pool in trace.events.tolist():
        if size > 0:
            blocks[address] = allocator.allocate(size, streams[pool])
        elif (block := blocks.pop(address, None)) is not None:
            allocator.free(block)
    return allocator.peak_reserved_bytes
