"""Bytes that the caching allocator holds free, by stream and pool: read off its snapshot."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..events import AllocatorPool
from .report import Pool


def pools_of(segments: Iterable[Mapping[str, Any]]) -> tuple[Pool, ...]:
    """The free blocks of a memory snapshot's segments, by stream and pool, most bytes first.

    Args:
        segments: `segments` of the snapshot, of one device.
    """
    free: dict[AllocatorPool, list[int]] = {}
    for segment in segments:
        sizes = [block["size"] for block in segment["blocks"] if block["state"] == "inactive"]
        if sizes:
            free.setdefault(pool_of(segment), []).extend(sizes)
    return by_bytes(
        Pool(stream=pool.stream, pool=pool.name, cached_bytes=sum(sizes), largest_free_block_bytes=max(sizes))
        for pool, sizes in free.items()
    )


def by_bytes(pools: Iterable[Pool]) -> tuple[Pool, ...]:
    """Pools, the one with the most bytes first."""
    return tuple(sorted(pools, key=lambda pool: (-pool.cached_bytes, pool.stream, pool.pool)))


def pool_of(segment: Mapping[str, Any]) -> AllocatorPool:
    """The pool of one of a memory snapshot's segments."""
    owner, number = segment.get("segment_pool_id", (0, 0))
    return AllocatorPool(segment["stream"], str(segment["segment_type"]), (owner, number))
