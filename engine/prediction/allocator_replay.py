"""A list of requests served by the caching allocator: every block gets its place, and the traces their addresses."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..allocator_settings import SMALL_BYTES
from ..events import BLOCK, SEGMENT, Counted, Phase, Recompute, StepTrace
from .alloc_requests import AllocRequests, Ints, born_at
from .caching_allocator import Block, CachingAllocator
from .steady_state import once_more


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
    allocated: Ints
    reserved: Ints
    possible_peak_bytes: int


class _Grown(NamedTuple):
    """Memory that a pool has taken from CUDA, or given back, when a row was served."""

    row: int
    pool: int
    bytes: int


class _WarmedUp(NamedTuple):
    """A block that a row has taken and given back."""

    row: int
    address: int
    bytes: int
    slack: int
    pool: int


class _Columns(NamedTuple):
    """The requests' rows after they have been served.

    Attributes:
        address: By row, of its block; where there is none it means nothing, as in `pool`.
        moved: By row, bytes handed out; negative: taken back.
        pool: By row, that of its block.
        events: By row, how many it has become: of an instruction none, or what warming up takes and gives back.
        made: By allocation, its row.
        gone: By allocation, the row that frees it; behind the last row: it stays.
    """

    address: Ints
    moved: Ints
    pool: Ints
    events: Ints
    made: Ints
    gone: Ints


class Replay:
    """Requests on their way through the allocator.

    While they are served only that is written down which follows from nothing else: what each allocation got,
    and the rare rows in which a pool grew. The rest is put together by `replayed`.

    Args:
        requests: As rehearsed.
        allocator: New; afterwards as the last of them has left it.

    Raises:
        OutOfMemoryError: The allocator's capacity does not suffice.
    """

    def __init__(self, requests: AllocRequests, allocator: CachingAllocator) -> None:
        self._requests, self._allocator = requests, allocator
        rows = requests.rows
        self._sizes: Ints = rows["bytes"]
        self._allocation = (np.cumsum(self._sizes > 0) - 1)[born_at(rows, rows["address"])]
        self._blocks: list[Block | None] = []
        self._addresses: list[int] = []
        self._handed_out: list[int] = []
        self._grown: list[_Grown] = []
        self._warmed_up: list[_WarmedUp] = []
        self._serve(0, self._allocation, self._sizes, rows["pool"])

    def repeat(self) -> None:
        """Serve one more step, for the allocator alone."""
        before, last = (slice(start, start + len(trace.events)) for start, trace in self._requests.traces[-2:])
        rows, again = once_more(self._allocation, self._sizes, before, last)
        self._serve(len(self._sizes), again, self._sizes[rows], self._requests.rows["pool"][rows])

    def _serve(self, first_row: int, allocations: Ints, sizes: Ints, streams: Ints) -> None:
        """Serve rows.

        Args:
            first_row: Number of the first.
            allocations: Number of the allocation that each frees.
            sizes: Bytes of each; negative: it frees.
            streams: Number of the stream that each allocates on.
        """
        allocator, blocks, growths = self._allocator, self._blocks, self._allocator.growths
        allocate, free = allocator.allocate, allocator.free
        hand_out, tell_address, tell_size = blocks.append, self._addresses.append, self._handed_out.append
        columns = (column.tolist() for column in (allocations, sizes, streams))
        for row, allocation, size, stream in zip(count(first_row), *columns, strict=False):
            if size < 0:
                block, blocks[allocation] = blocks[allocation], None
                free(block)
                continue  # which makes no pool grow
            if size:
                hand_out(block := allocate(size, stream))
                tell_address(block.address)
                tell_size(block.size)
            else:
                self._instruct(row)
            if growths:
                self._grown += [_Grown(row, *each) for each in growths]
                growths.clear()

    def _instruct(self, row: int) -> None:
        """Tell the allocator what a row of no bytes says."""
        said = int(self._requests.rows["slack"][row])
        if said > 0:
            self._warm_up(row, said)
        elif said == 0:
            self._allocator.empty_cache()

    def _warm_up(self, row: int, wanted: int) -> None:
        """transformers takes one large block for all weights from an empty cache and gives it back."""
        unused = self._allocator.reserved_bytes - self._allocator.allocated_bytes
        if wanted - unused <= unused:
            return
        size = (wanted - unused) // 2 * 2  # it counts in 16-bit elements
        block = self._allocator.allocate(size)
        self._warmed_up.append(_WarmedUp(row, block.address, size, block.size - size, block.pool.number))
        self._allocator.free(block)

    # --- what came of it --------------------------------------------------------------

    def replayed(self) -> Replayed:
        """The requests with their places."""
        columns = self._columns()
        traces: list[StepTrace] = []
        recomputes: list[Recompute] = []
        waiting = iter(self._requests.recomputes)
        for start, trace in self._requests.traces:
            placed = self._placed(start, trace, columns)
            curve = placed.held_bytes
            peak = int(curve.max()) if trace.step else None
            traces.append(dataclasses.replace(placed, counted=Counted(int(curve[-1]), peak)))
            for span in placed.phases:
                if span.phase is Phase.RECOMPUTE:
                    held = int(curve[span.end] - curve[span.begin])
                    recomputes.append(next(waiting)._replace(bytes=held))
        allocated, said = np.cumsum(columns.moved), self._requests.rows["slack"]
        may_take = np.flatnonzero((self._requests.rows["bytes"] == 0) & (said < 0))
        possible = int((allocated[may_take] - said[may_take]).max(initial=0))
        reserved = np.zeros(len(allocated), np.int64)
        for row, _, size in self._grown:
            if row < len(reserved):  # not when the last step was repeated
                reserved[row] += size
        return Replayed(traces, recomputes, allocated, np.cumsum(reserved), possible)

    def _columns(self) -> _Columns:
        """Columns that say what became of each row."""
        sizes, nth = self._sizes, self._allocation
        made, freed = np.flatnonzero(sizes > 0), np.flatnonzero(sizes < 0)
        gone = np.full(len(made), len(sizes))
        gone[nth[freed]] = freed
        addresses, handed_out = (np.array(told, np.int64) for told in (self._addresses, self._handed_out))
        events = (sizes != 0).astype(np.int64)
        events[[taken.row for taken in self._warmed_up]] = 2
        moved = np.sign(sizes) * handed_out[nth]
        return _Columns(addresses[nth], moved, self._pools(made)[nth], events, made, gone)

    def _pools(self, rows: Ints) -> Ints:
        """The numbers of the pools that rows allocate from; rounding makes no small request a large one."""
        streams, small = self._requests.rows["pool"][rows], self._sizes[rows] <= SMALL_BYTES
        pools = np.empty(len(rows), np.int64)
        for number, pool in enumerate(self._allocator.pool_table):
            pools[(streams == pool.stream) & (small == (pool.size_class == "small"))] = number
        return pools

    def _placed(self, start: int, trace: StepTrace, columns: _Columns) -> StepTrace:
        """A trace with the places of its blocks, before the allocator's counters."""
        end = start + len(trace.events)
        begins = np.concatenate([[0], np.cumsum(columns.events[start:end])])
        origin = np.repeat(np.arange(end - start), columns.events[start:end])
        events = trace.events[origin]
        events["address"] = columns.address[start:end][origin]
        events["slack"] = columns.moved[start:end][origin] - events["bytes"]
        events["pool"] = columns.pool[start:end][origin]
        for row, address, size, slack, pool in self._warmed_up:
            if start <= row < end:
                both = events[begins[row - start] :][:2]
                both["address"], both["bytes"], both["slack"], both["pool"] = address, size, slack, pool
                both[1]["bytes"], both[1]["slack"] = -size, -slack
        owners = trace.owners.copy()
        born = born_at(self._requests.rows, owners["address"])
        owners["address"] = np.where((born >= 0) & (born < end), columns.address[born], 0)
        phases = tuple(s._replace(begin=int(begins[s.begin]), end=int(begins[s.end])) for s in trace.phases)
        return dataclasses.replace(
            trace,
            events=events,
            begin=self._alive(start, columns),
            owners=owners,
            phases=phases,
            segments=self._segments(start, end, begins),
            pools=self._allocator.pool_table,
        )

    def _alive(self, row: int, columns: _Columns) -> npt.NDArray[Any]:
        """The blocks alive before a row, dtype BLOCK."""
        made = columns.made[(columns.made < row) & (columns.gone >= row)]
        alive = np.empty(len(made), BLOCK)
        alive["address"], alive["pool"] = columns.address[made], columns.pool[made]
        alive["bytes"] = self._requests.rows["bytes"][made]
        alive["slack"] = columns.moved[made] - alive["bytes"]
        return alive

    def _segments(self, start: int, end: int, begins: Ints) -> npt.NDArray[Any]:
        """The growths of a trace by event, after what each pool held before, dtype SEGMENT."""
        held: dict[int, int] = {}
        for row, pool, size in self._grown:
            if row < start:
                held[pool] = held.get(pool, 0) + size
        last = int(begins[-1]) - 1
        grown = [
            (min(int(begins[row - start]), last), pool, size) for row, pool, size in self._grown if start <= row < end
        ]
        return np.array([*((-1, pool, size) for pool, size in held.items()), *grown], SEGMENT)
