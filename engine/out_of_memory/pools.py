"""Bytes that the caching allocator holds free, by stream and pool: read off its snapshot."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .report import Pool

DEFAULT_POOL = (0, 0)
"""`segment_pool_id` of segments that are no private pool's."""


def pools_of(segments: Iterable[Mapping[str, Any]]) -> tuple[Pool, ...]:
    """The free blocks of a memory snapshot's segments, by stream and pool, most bytes first.

    Args:
        segments: `segments` of the snapshot, of one device.
    """
    free: dict[tuple[int, str], list[int]] = {}
    for segment in segments:
        sizes = [block["size"] for block in segment["blocks"] if block["state"] == "inactive"]
        if sizes:
            free.setdefault((segment["stream"], _name(segment)), []).extend(sizes)
    return by_bytes(
        Pool(stream=stream, pool=pool, cached_bytes=sum(sizes), largest_free_block_bytes=max(sizes))
        for (stream, pool), sizes in free.items()
    )


def by_bytes(pools: Iterable[Pool]) -> tuple[Pool, ...]:
    """Pools, the one with the most bytes first."""
    return tuple(sorted(pools, key=lambda pool: (-pool.cached_bytes, pool.stream, pool.pool)))


def _name(segment: Mapping[str, Any]) -> str:
    private = tuple(segment.get("segment_pool_id", DEFAULT_POOL))
    name = str(segment["segment_type"])
    return name if private == DEFAULT_POOL else f"{name} ({private[0]}, {private[1]})"
