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


Row = tuple[int, int, int, int, int, int]
"""An event's fields."""


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
        became: list[Row] = []
        segments: list[tuple[int, int, int]] = []
        begins = []
        for block, size, said, mark, time_us, stream in rows.tolist():
            begins.append(len(became))
            if size > 0:
                address, handed_out = allocate(size, stream)
                place[block] = address
                became.append((address, size, handed_out - size, mark, time_us, pool_of(address)))
            elif size < 0:
                address = place[block]
                pool = pool_of(address)
                _, handed_out = free(address)
                became.append((address, size, -size - handed_out, mark, time_us, pool))
            elif said < 0:
                self.possible_peak_bytes = max(self.possible_peak_bytes, allocator.allocated_bytes - said)
            elif said:
                became += self._warm_up(said, mark, time_us)
            else:
                allocator.empty_cache()
            if grown := allocator.grown():
                segments += [(begins[-1], pool, size) for pool, size in grown]
            tell_allocated(allocator.allocated_bytes)
            tell_reserved(allocator.reserved_bytes)
        last = len(became) - 1
        segments = [(min(event, last), pool, size) for event, pool, size in segments]
        begins.append(len(became))
        return _Played(np.array(became, rows.dtype), np.array(begins, np.int64), np.array(segments, SEGMENT))

    def _warm_up(self, wanted: int, mark: int, time_us: int) -> list[Row]:
        """transformers takes one large block for all weights from an empty cache and gives it back."""
        unused = self.allocator.reserved_bytes - self.allocator.allocated_bytes
        size = int((wanted - unused) // 2) * 2  # it counts in 16-bit elements
        if wanted - unused <= unused:
            return []
        address, handed_out = self.allocator.allocate(size)
        pool = self.allocator.pool_of(address)
        self.allocator.free(address)
        slack = handed_out - size
        return [(address, size, slack, mark, time_us, pool), (address, -size, -slack, mark, time_us, pool)]


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
