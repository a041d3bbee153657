"""A list of requests played to the caching allocator: every block gets its place, and the traces their addresses."""

from __future__ import annotations

import dataclasses
from array import array
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..events import BLOCK, SEGMENT, Counted, Phase, Recompute, StepTrace
from .alloc_requests import AllocRequests
from .caching_allocator import CachingAllocator


@dataclass(frozen=True)
class Replayed:
    """A list of requests after the allocator has served them.

    Attributes:
        traces: With addresses, slack and the allocator's own counters.
        recomputes: With the bytes they held.
        allocated: `memory_allocated` after each row.
        reserved: `memory_reserved` after each row.
        possible_peak_bytes: The most that was allocated together with what a kernel may take besides; 0: none may.
    """

    traces: list[StepTrace]
    recomputes: list[Recompute]
    allocated: npt.NDArray[np.int64]
    reserved: npt.NDArray[np.int64]
    possible_peak_bytes: int


class _Played(NamedTuple):
    """Events that some rows became.

    Attributes:
        events: dtype EVENT.
        begins: By row, where in them it begins; behind the last row, their number.
        segments: dtype SEGMENT.
    """

    events: npt.NDArray[Any]
    begins: npt.NDArray[np.int64]
    segments: npt.NDArray[Any]


class _Player:
    """One pass over a list of requests's rows."""

    def __init__(self, allocator: CachingAllocator) -> None:
        self.allocator = allocator
        self.place: dict[int, int] = {}
        self.allocated, self.reserved = array("q"), array("q")
        self.possible_peak_bytes = 0

    def play(self, rows: npt.NDArray[Any]) -> _Played:
        """Returns what became of the rows: of an instruction nothing, or what warming up takes and gives back."""
        allocator, place = self.allocator, self.place
        allocate, free, pool_of = allocator.allocate, allocator.free, allocator.pool_of
        tell_allocated, tell_reserved = self.allocated.append, self.reserved.append
        origin, sizes, addresses, slack, pools, begins = (array("q") for _ in range(6))
        segments: list[tuple[int, int, int]] = []
        columns = (rows[name].tolist() for name in ("address", "bytes", "slack", "pool"))
        for row, (block, size, said, stream) in enumerate(zip(*columns, strict=True)):
            begins.append(len(origin))
            if size:
                if size > 0:
                    place[block], handed_out = allocate(size, stream)
                address = place[block]
                pools.append(pool_of(address))
                if size < 0:
                    handed_out = -free(address)[1]
                origin.append(row)
                sizes.append(size)
                addresses.append(address)
                slack.append(handed_out - size)
            elif said < 0:
                self.possible_peak_bytes = max(self.possible_peak_bytes, allocator.allocated_bytes - said)
            elif said:
                for address, taken, beyond, pool in self._warm_up(said):
                    origin.append(row)
                    sizes.append(taken)
                    addresses.append(address)
                    slack.append(beyond)
                    pools.append(pool)
            else:
                allocator.empty_cache()
            if grown := allocator.grown():
                segments += [(begins[-1], *each) for each in grown]
            tell_allocated(allocator.allocated_bytes)
            tell_reserved(allocator.reserved_bytes)
        begins.append(len(origin))
        events = rows[np.array(origin)]
        for name, column in (("bytes", sizes), ("address", addresses), ("slack", slack), ("pool", pools)):
            events[name] = np.array(column)
        last = len(origin) - 1
        segments = [(min(event, last), pool, size) for event, pool, size in segments]
        return _Played(events, np.array(begins), np.array(segments, SEGMENT))

    def _warm_up(self, wanted: int) -> list[tuple[int, int, int, int]]:
        """transformers takes one large block for all weights from an empty cache and gives it back.

        Returns:
            Address, bytes, slack and pool of what it takes, and of what it gives back.
        """
        unused = self.allocator.reserved_bytes - self.allocator.allocated_bytes
        size = int((wanted - unused) // 2) * 2  # it counts in 16-bit elements
        if wanted - unused <= unused:
            return []
        address, handed_out = self.allocator.allocate(size)
        pool = self.allocator.pool_of(address)
        self.allocator.free(address)
        slack = handed_out - size
        return [(address, size, slack, pool), (address, -size, -slack, pool)]


def play(requests: AllocRequests, allocator: CachingAllocator) -> Replayed:
    """Give every block of a list of requests its place.

    Args:
        requests: As rehearsed.
        allocator: New; afterwards as the requests's last row has left it.
    """
    player = _Player(allocator)
    traces: list[StepTrace] = []
    recomputes: list[Recompute] = []
    done, waiting = 0, iter(requests.recomputes)
    for start, trace in requests.traces:
        player.play(requests.rows[done:start])
        done = start + len(trace.events)
        begin = np.array(allocator.alive(), BLOCK)
        reserved_before = np.array(
            [(-1, pool, size) for pool, size in enumerate(allocator.reserved_by_pool())], SEGMENT
        )
        # Only those who are alive now have a place that anybody still asks for.
        owned = trace.owners["address"]
        events, begins, segments = player.play(trace.events)
        owners = trace.owners.copy()
        owners["address"] = [player.place.get(block, 0) for block in owned.tolist()]
        phases = tuple(s._replace(begin=int(begins[s.begin]), end=int(begins[s.end])) for s in trace.phases)
        placed = dataclasses.replace(trace, events=events, begin=begin, owners=owners, phases=phases)
        curve = placed.held_bytes
        peak = int(curve.max()) if trace.step else None
        segments = np.concatenate([reserved_before, segments])
        traces.append(dataclasses.replace(placed, counted=Counted(int(curve[-1]), peak), segments=segments))
        for span in phases:
            if span.phase is Phase.RECOMPUTE:
                held = int(curve[span.end] - curve[span.begin])
                recomputes.append(next(waiting)._replace(bytes=held))
    player.play(requests.rows[done:])
    traces = [dataclasses.replace(trace, pools=allocator.pool_table) for trace in traces]
    allocated, reserved = np.array(player.allocated), np.array(player.reserved)
    return Replayed(traces, recomputes, allocated, reserved, player.possible_peak_bytes)
