"""`StepTrace`s made of what a tracer took of a step, on a thread of their own.

Turning thousands of the allocator's entries into columns takes longer than
reading them. On the engine's thread it would stand between two steps while the
GPU waits; here it runs while the GPU computes.
"""

from __future__ import annotations

import threading
import time
from array import array
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..allocation_keys import allocation_keys
from ..events import (
    BLOCK,
    COMPLETE,
    EVENT,
    MADE,
    MARK,
    OWNER,
    Counted,
    Ending,
    Made,
    Phase,
    PhaseSpan,
    StepTrace,
)
from .buckets import Buckets, name_buckets
from .recorder import Raw, Recorder, Seen, columns

Publish = Callable[[StepTrace], None]

MODULE_BITS = 24
"""Bits of a mark below its module."""

# A tracer further ahead than this waits: what is not assembled yet is memory on the host.
PENDING = 2

# The longest that the thread keeps still: a run that is held before its first step shows how it was loaded.
STILL_S = 0.5


@dataclass
class Span:
    """A phase: marks and times of its ends; -1 while it is open."""

    phase: Phase
    micro_batch: int
    first_mark: int
    begin_us: int
    last_mark: int = -1
    end_us: int = -1


@dataclass
class Taken:
    """All that is known of a step at an instant; nothing in it changes any more.

    Attributes:
        number: The step.
        micro_batches: Of the step.
        first_mark: What all marks of the recorder are counted from.
        drained: What the recorder saw since it was last drained.
        marks: As `pack` makes them.
        owners: Fields of OWNER, row after row.
        fixed: More owners, as columns.
        spans: Phases and recomputes.
        names: By index.
        descriptions: By index.
        counted: The allocator's own counters; None if the step goes on.
        ending: How the step ended, if it has.
        operators: Pairs of a mark and the description of the operator that set it.
        outputs: Triples of a mark, an address and the description of the tensor there.
        buckets: Of every DDP module.
        taken_us: When.
    """

    number: int
    micro_batches: int
    first_mark: int
    drained: Raw
    marks: array[int]
    owners: array[int]
    fixed: list[npt.NDArray[Any]]
    spans: list[Span]
    names: tuple[str, ...]
    descriptions: tuple[Made, ...]
    counted: Counted | None
    ending: Ending
    operators: array[int]
    outputs: array[int]
    buckets: tuple[Buckets, ...]
    taken_us: int


def pack(phase: int, micro_batch: int, module: int) -> int:
    """A mark in one number: appending one is the cheapest a hook can do."""
    return module << MODULE_BITS | micro_batch << 8 | phase


class Assembler:
    """Makes traces in the order they were taken.

    Args:
        recorder: Reads its own raw form.
        publish: Gets every trace, on this thread.

    Attributes:
        cost_s: Seconds of CPU this thread has taken from the others so far.
    """

    def __init__(self, recorder: Recorder, publish: Publish) -> None:
        self.cost_s = 0.0
        self._recorder, self._publish = recorder, publish
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="assembly")
        self._pending: deque[Future[None]] = deque()
        self._may_work = threading.Event()
        self._may_work.set()
        self._begin = Seen(np.empty(0, BLOCK))
        self._so_far = Seen(np.empty(0, EVENT))
        self._made = np.empty(0, MADE)

    def begin(self, started: Raw) -> None:
        """A step begins with these blocks alive."""
        self._submit(self._start, started)

    def add(self, taken: Taken) -> None:
        """A step as far as it has come.

        Raises:
            Exception: Whatever went wrong with an earlier one.
        """
        self._submit(self._assemble, taken)

    def keep_still(self) -> None:
        """Leave the interpreter to the loop for now: what is taken waits for `go_on`, or `STILL_S`."""
        self._may_work.clear()

    def go_on(self) -> None:
        """Do what waits."""
        self._may_work.set()

    def settle(self) -> None:
        """Wait until everything taken has been published.

        Raises:
            Exception: Whatever went wrong with one of them.
        """
        self.go_on()
        while self._pending:
            self._pending.popleft().result()

    def close(self) -> None:
        """End the thread when it has done what there is to do."""
        self.go_on()
        self._pool.shutdown()
        self._pending.clear()

    def _submit(self, work: Callable[[Any], None], argument: Any) -> None:
        while len(self._pending) > PENDING:
            self._pending.popleft().result()
        try:
            self._pending.append(self._pool.submit(work, argument))
        except RuntimeError:  # the interpreter ends, and its threads have: what there was to do has been done
            self.settle()
            work(argument)

    # --- on the thread --------------------------------------------------------

    def _start(self, started: Raw) -> None:
        self._may_work.wait(STILL_S)
        began = time.thread_time()
        self._begin = self._recorder.alive(started)
        self._so_far = Seen(np.empty(0, EVENT), self._begin.segments)
        self.cost_s += time.thread_time() - began

    def _assemble(self, taken: Taken) -> None:
        self._may_work.wait(STILL_S)
        began = time.thread_time()
        trace = self._trace(taken)
        self.cost_s += time.thread_time() - began
        self._publish(trace)

    def _trace(self, taken: Taken) -> StepTrace:
        self._so_far = self._so_far.and_then(self._recorder.events(taken.drained))
        events, marks = self._so_far.rows.copy(), _marks(taken.marks)
        events["mark"] = _settled(events["mark"] - taken.first_mark)
        if taken.ending is COMPLETE and taken.operators:
            self._made = _learned(events, marks, taken)
        trace = StepTrace(
            step=taken.number,
            events=events,
            marks=marks,
            begin=self._begin.rows,
            owners=np.concatenate([*taken.fixed, columns(taken.owners, OWNER)]),
            names=taken.names,
            phases=_spans(taken, events["mark"]),
            ending=taken.ending,
            micro_batches=taken.micro_batches,
            counted=taken.counted,
            made=self._made,
            descriptions=taken.descriptions,
            segments=_before_the_end(self._so_far.segments, len(events)),
            pools=self._recorder.pools,
        )
        return name_buckets(trace, taken.buckets) if taken.buckets else trace


def _before_the_end(segments: npt.NDArray[Any], events: int) -> npt.NDArray[Any]:
    """Segments of a step of so many events: what happened after the last counts to it."""
    segments = segments.copy()
    segments["event"] = np.minimum(segments["event"], events - 1)
    return segments


def _settled(marks: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Marks that never fall back.

    A thread of autograd's own may still carry the tag it was last given when
    the main thread has moved on; the later tag is the true one.
    """
    return np.maximum(np.maximum.accumulate(marks), 0) if len(marks) else marks


def _marks(packed: array[int]) -> npt.NDArray[Any]:
    values = np.frombuffer(packed, np.int64) if packed else np.empty(0, np.int64)
    marks = np.empty(len(values), MARK)
    marks["phase"], marks["micro_batch"], marks["module"] = values & 0xFF, values >> 8 & 0xFFFF, values >> MODULE_BITS
    return marks


def _spans(taken: Taken, marks: npt.NDArray[np.int64]) -> tuple[PhaseSpan, ...]:
    """Phases as ranges of events, in the order they began."""
    began = sorted(taken.spans, key=lambda span: span.first_mark)
    ends = [(span.first_mark, span.last_mark) for span in began]
    ranges = np.searchsorted(marks, np.array(ends, np.int64).reshape(-1, 2) - taken.first_mark).tolist()
    return tuple(
        PhaseSpan(span.phase, span.micro_batch, begin, len(marks), span.begin_us, taken.taken_us)
        if span.last_mark < 0
        else PhaseSpan(span.phase, span.micro_batch, begin, end, span.begin_us, span.end_us)
        for span, (begin, end) in zip(began, ranges, strict=True)
    )


def _learned(events: npt.NDArray[Any], marks: npt.NDArray[Any], taken: Taken) -> npt.NDArray[Any]:
    """Describe every allocation of a step whose operators were watched; dtype MADE.

    An allocation under an operator's mark is the operator's; the last one at an
    address that it returned is the tensor it returned, the others are its buffers.
    """
    allocs = events[events["bytes"] > 0]
    operators = {mark - taken.first_mark: made for mark, made in _rows(taken.operators, 2)}
    described = np.array([operators.get(mark, -1) for mark in allocs["mark"].tolist()], np.int64)
    last = {key: i for i, key in enumerate(zip(allocs["mark"].tolist(), allocs["address"].tolist(), strict=True))}
    for mark, address, made in _rows(taken.outputs, 3):
        index = last.get((mark - taken.first_mark, address))
        if index is not None:
            described[index] = made
    keys = allocation_keys(marks, allocs["mark"], allocs["bytes"])
    learned = np.empty(len(keys), MADE)
    for column in keys.dtype.names or ():
        learned[column] = keys[column]
    learned["made"] = described
    return learned


def _rows(flat: array[int], width: int) -> list[list[int]]:
    rows: list[list[int]] = np.frombuffer(flat, np.int64).reshape(-1, width).tolist() if flat else []
    return rows
