"""Bytes of the caching allocator's pools: what each has reserved, handed out and keeps for itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .events import AllocatorPool, StepTrace


class PoolBytes(NamedTuple):
    """A pool at an event.

    Attributes:
        pool: Which.
        reserved_bytes: Held from the device.
        allocated_bytes: Handed out, of that; slack included.
        slack_bytes: Handed out beyond what was asked for.
    """

    pool: AllocatorPool
    reserved_bytes: int
    allocated_bytes: int
    slack_bytes: int

    @property
    def unused_bytes(self) -> int:
        """Reserved and not handed out: no other pool is given it."""
        return self.reserved_bytes - self.allocated_bytes


class StreamBytes(NamedTuple):
    """The pools of one stream, or the private ones that it has in common with no other.

    Attributes:
        name: `default`; the others are numbered in the order they came up.
        reserved_bytes: Held from the device.
        unused_bytes: Of that, not handed out.
    """

    name: str
    reserved_bytes: int
    unused_bytes: int


def by_pool(trace: StepTrace, event: int, alive: npt.NDArray[Any]) -> list[PoolBytes]:
    """Bytes of each pool after an event, in the order they came up.

    Args:
        trace: Of a step.
        event: After which; -1: when the trace began.
        alive: The blocks alive then, dtype BLOCK_ROW.
    """
    segments = trace.segments[trace.segments["event"] <= event]
    reserved, allocated, slack = np.zeros((3, len(trace.pools) + 1), np.int64)  # the last: of no known pool
    np.add.at(reserved, segments["pool"], segments["bytes"])
    np.add.at(allocated, alive["pool"], alive["bytes"] + alive["slack"])
    np.add.at(slack, alive["pool"], alive["slack"])
    sums = zip(reserved.tolist(), allocated.tolist(), slack.tolist(), strict=True)
    return [PoolBytes(pool, *sizes) for pool, sizes in zip(trace.pools, sums, strict=False)]


def by_stream(pools: Iterable[PoolBytes]) -> list[StreamBytes]:
    """Bytes of each stream that holds any, most first; a private pool is told from the stream's others."""
    pools = [held for held in pools if held.reserved_bytes]
    numbers = {
        stream: number for number, stream in enumerate(dict.fromkeys([0, *(held.pool.stream for held in pools)]))
    }
    found: dict[str, StreamBytes] = {}
    for held in pools:
        stream, private = held.pool.stream, held.pool.private
        name = (f"stream {numbers[stream]}" if stream else "default") + (f" {private}" if any(private) else "")
        _, reserved, unused = found.get(name, StreamBytes(name, 0, 0))
        found[name] = StreamBytes(name, reserved + held.reserved_bytes, unused + held.unused_bytes)
    return sorted(found.values(), key=lambda stream: -stream.reserved_bytes)
