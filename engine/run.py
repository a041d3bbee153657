"""The Run: one configuration on one rank, from start to end. Everything that can be looked at is one.

A run under way, one that has ended, a recording, a watched script, a prediction
and one rank of many are Runs alike: what can be done with one can be done with
each. Whoever makes a run writes it; anybody may read it from any thread.
Loads neither torch nor textual.
"""

from __future__ import annotations

import bisect
import enum
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .config import RunConfig
from .events import Environment, Gauge, Phase, StepTrace, Whole
from .run_events import OutOfMemory, RunEnded, RunEvent


class RunId(NamedTuple):
    """The identity of a run.

    Attributes:
        engine: Name of the engine, the recording or the GPU predicted for.
        number: From 1, in the order in which the engine's runs began.
        rank: Of the job; 0 for a job of one.
        device: `cuda:0`.
    """

    engine: str
    number: Whole
    rank: Whole = 0
    device: str = ""


class RunKind(enum.StrEnum):
    """The origin of a run."""

    TRAINED = "trained"
    """Our own loop trains it."""
    WATCHED = "watched"
    """The loop is somebody's own; the configuration says what could be told of it."""
    PREDICTED = "predicted"
    """It has not happened: the loop ran over fake tensors."""
    IMPORTED = "imported"
    """A snapshot of PyTorch's allocator: its categories are inferred from frames and lifetimes."""


class EventLog:
    """Events in order; what comes with every step is forgotten in the end, since a run may last for weeks."""

    KEPT_FREQUENT = 10_000

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._events: list[RunEvent] = []

    def append(self, event: RunEvent) -> None:
        """Add one whose index is larger than those of all before."""
        with self._lock:
            self._events.append(event)
            if len(self._events) > 2 * self.KEPT_FREQUENT:
                old, recent = self._events[: -self.KEPT_FREQUENT], self._events[-self.KEPT_FREQUENT :]
                self._events = [event for event in old if not event.frequent] + recent

    def since(self, index: int) -> Sequence[RunEvent]:
        """All events that are kept from an index on."""
        with self._lock:
            return self._events[bisect.bisect_left(self._events, index, key=lambda event: event.index) :]


class Run:
    """One run.

    Args:
        run_id: Its identity.
        config: What it runs; `config` may be set anew while more becomes known of a watched script.
        environment: Where.
        kind: How it comes to be.

    Attributes:
        gauge: Latest reading of its device; None before the first.
        training_gauge: Latest reading from within a training step.
        latest: Latest trace, of a step that may still be going on.
    """

    KEPT_TRACES = 8

    def __init__(
        self, run_id: RunId, config: RunConfig, environment: Environment, kind: RunKind = RunKind.TRAINED
    ) -> None:
        self.id, self.config, self.environment, self.kind = run_id, config, environment, kind
        self.gauge: Gauge | None = None
        self.training_gauge: Gauge | None = None
        self.latest: StepTrace | None = None
        self._log = EventLog()
        self._lock = threading.Lock()
        self._first: list[StepTrace] = []
        self._recent: deque[StepTrace] = deque(maxlen=self.KEPT_TRACES)
        self._highest: tuple[int, StepTrace] | None = None

    # --- whoever makes it writes ----------------------------------------------------

    def tell(self, event: RunEvent) -> None:
        """Add an event."""
        self._log.append(event)

    def publish_gauge(self, gauge: Gauge) -> None:
        """Offer a reading; the last one from within a training step is kept for recordings."""
        self.gauge = gauge
        if gauge.phase not in (Phase.IDLE, Phase.LOAD):
            self.training_gauge = gauge

    def publish_trace(self, trace: StepTrace) -> None:
        """Offer a trace; of steps that have ended the load, the first, the highest peak and the latest are kept."""
        self.latest = trace
        if trace.is_open:
            return
        peak = peak_bytes(trace)
        with self._lock:
            if trace.step <= 1:
                self._first.append(trace)
            self._recent.append(trace)
            if self._highest is None or outweighs((peak, trace), self._highest):
                self._highest = (peak, trace)

    def keep(self, traces: Sequence[StepTrace]) -> None:
        """Have exactly these traces, in order: those of a recording or a prediction."""
        with self._lock:
            self._first, self._recent, self._highest = [], deque(traces), None
        self.latest = traces[-1] if traces else None

    def settle(self) -> None:
        """Another run has begun: keep the load, the first step, the highest peak and the last trace only."""
        with self._lock:
            self._recent = deque([*self._recent][-1:], maxlen=self.KEPT_TRACES)
        self.latest = self._recent[-1] if self._recent else None

    # --- anybody reads -----------------------------------------------------------------

    def events(self, since: int = 0) -> Sequence[RunEvent]:
        """Events of this run from an index on."""
        return self._log.since(since)

    def traces(self) -> Sequence[StepTrace]:
        """Traces kept, in order: complete ones, and the one that an error ended."""
        with self._lock:
            kept = {trace.step: trace for trace in (*self._first, *self._recent)}
            if self._highest is not None:
                kept[self._highest[1].step] = self._highest[1]
            return [kept[step] for step in sorted(kept)]

    @property
    def ended(self) -> RunEnded | None:
        """The event that ended the run; None while it goes on."""
        return next((event for event in reversed(self.events()) if isinstance(event, RunEnded)), None)

    @property
    def refused(self) -> OutOfMemory | None:
        """The last allocation that was refused; None if none was, or nothing is known of it."""
        refused = (event for event in reversed(self.events()) if isinstance(event, OutOfMemory))
        return next((event for event in refused if event.report is not None), None)


def peak_bytes(trace: StepTrace) -> int:
    """The most allocated at any event of a trace, without naming anything."""
    return int(trace.held_bytes.max())


def outweighs(one: tuple[int, StepTrace], highest: tuple[int, StepTrace]) -> bool:
    """True if the peak that is told of a run is that of another step than so far, from the bytes at their peaks.

    Of two equal ones the first stays, unless it is that of the first step, in which
    the optimizer's state was new, and the other step has ended.
    """
    (size, trace), (highest_bytes, before) = one, highest
    return size > highest_bytes or (size == highest_bytes and before.step <= 1 and not trace.is_open)


def highest_of(traces: Iterable[StepTrace]) -> StepTrace | None:
    """The trace whose peak is told of a run, from those kept of it in order; None if there is none."""
    highest: tuple[int, StepTrace] | None = None
    for trace in traces:
        weighed = peak_bytes(trace), trace
        if highest is None or outweighs(weighed, highest):
            highest = weighed
    return highest[1] if highest is not None else None
