"""The boundary between the engine and whoever watches it.

The engine writes, others read, from any thread: the latest gauge and trace win,
milestones are lossless. Publishing costs the engine an attribute write.
"""

from __future__ import annotations

import bisect
import dataclasses
import enum
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from .config import RunConfig
from .events import Environment, Gauge, Kind, Milestone, Phase, StepTrace


@dataclass(frozen=True, slots=True)
class Start:
    """Run this configuration; a run under way is stopped and freed first."""

    config: RunConfig


@dataclass(frozen=True, slots=True)
class Pause:
    """Hold the loop at the next micro-batch, or let it go on."""

    paused: bool


@dataclass(frozen=True, slots=True)
class Stop:
    """End the run at the next micro-batch and free everything."""


@dataclass(slots=True)
class Work:
    """Long work between two threads: one tells how far it is, the other may cancel it.

    Attributes:
        share: How much of it is done, 0 to 1.
        cancelled: It is to be left.
        over: It has ended, one way or another.
    """

    share: float = 0.0
    cancelled: bool = False
    over: bool = False


@dataclass(frozen=True, slots=True)
class Save:
    """Write a recording of the run so far."""

    path: Path
    work: Work = field(default_factory=Work, compare=False)


@dataclass(frozen=True, slots=True)
class TakeOver:
    """From now on it is this viewer that commands; the one before may only look."""


@dataclass(frozen=True, slots=True)
class End:
    """End the run and the engine's process."""


Command = Start | Pause | Stop | Save | TakeOver | End


class ViewerRole(enum.StrEnum):
    """How a viewer stands to the engine."""

    OWNER = "owner"
    """It made the engine, which ends with it; or there is none."""
    ATTACHED = "attached"
    """The engine is a process of its own, and this viewer commands it."""
    READ_ONLY = "read-only"
    """Another viewer commands."""
    WATCHING = "watching"
    """The loop is somebody's own script: it can be looked at and not changed."""
    GONE = "engine gone"
    """The engine's process has ended."""


class Source(Protocol):
    """All that the app knows of an engine: here, behind a socket, or a recording.

    Every method returns at once and may be called from any thread.
    """

    @property
    def live(self) -> bool:
        """Whether commands have an effect; False for a recording."""
        ...

    @property
    def role(self) -> ViewerRole:
        """How the viewer stands to the engine."""
        ...

    def environment(self) -> Environment | None:
        """Where it runs; None until the engine has looked."""
        ...

    def config(self) -> RunConfig | None:
        """The run under way or last ended; None before the first."""
        ...

    def gauge(self) -> Gauge | None:
        """The latest reading."""
        ...

    def trace(self) -> StepTrace | None:
        """The latest trace of this run, of a step that may still be going on (`partial`)."""
        ...

    def traces(self) -> Sequence[StepTrace]:
        """The traces of this run that are kept: the load, the first step, the highest peak, the latest few.

        Complete steps only, in order.
        """
        ...

    def milestones(self, since: int) -> Sequence[Milestone]:
        """All milestones from index `since` on."""
        ...

    def command(self, command: Command) -> None:
        """Ask for something; the answer comes as milestones.

        Raises:
            UserError: It is refused at once: the configuration cannot run, or
                this source takes no commands.
        """
        ...


class Feed:
    """What an engine publishes. Readers never block the writer for longer than a list append.

    Args:
        on_trace: Gets every trace on the engine's thread, for a consumer that
            must not miss one (`gpumem-tui run`).
    """

    # A run may last for weeks; what comes with every step is forgotten in the end.
    KEPT_FREQUENT = 10_000
    KEPT_TRACES = 8

    def __init__(self, on_trace: Callable[[StepTrace], None] | None = None) -> None:
        self.environment: Environment | None = None
        self.config: RunConfig | None = None
        self.gauge: Gauge | None = None
        self.training_gauge: Gauge | None = None
        self.latest: StepTrace | None = None
        self.run = 0
        self._on_trace = on_trace
        self._began_s = time.monotonic()
        self._lock = threading.Lock()
        self._milestones: list[Milestone] = []
        self._next_index = 0
        self._first: list[StepTrace] = []
        self._recent: deque[StepTrace] = deque(maxlen=self.KEPT_TRACES)
        self._highest: tuple[int, StepTrace] | None = None

    def clock_s(self) -> float:
        """Seconds since the feed was made."""
        return time.monotonic() - self._began_s

    # --- the engine writes ----------------------------------------------------

    def publish_gauge(self, gauge: Gauge) -> None:
        """Offer a reading; the last one from within a training step is kept for recordings."""
        self.gauge = gauge
        if gauge.phase not in (Phase.IDLE, Phase.LOAD):
            self.training_gauge = gauge

    def begin_run(self, config: RunConfig) -> None:
        """Forget the traces of the run before; its milestones stay."""
        with self._lock:
            self.run += 1
            self.config, self.latest, self._highest, self.training_gauge = config, None, None, None
            self._first.clear()
            self._recent.clear()

    def publish_trace(self, trace: StepTrace) -> None:
        """Offer a trace; of complete ones the load, the first step, the highest peak and the latest are kept."""
        self.latest = trace
        if self._on_trace is not None:
            self._on_trace(trace)
        if trace.partial:
            return
        peak = peak_bytes(trace)
        with self._lock:
            if trace.step <= 1:
                self._first.append(trace)
            self._recent.append(trace)
            if self._highest is None or peak > self._highest[0]:
                self._highest = (peak, trace)

    def milestone(self, kind: Kind, text: str, **data: Any) -> None:
        """Record something that must not be lost."""
        with self._lock:
            self._milestones.append(Milestone(self._next_index, self.clock_s(), kind, self.run, text, data))
            self._next_index += 1
            if len(self._milestones) > 2 * self.KEPT_FREQUENT:
                self._forget()

    def relay(self, milestone: Milestone) -> None:
        """Take over a milestone of another feed; it gets an index of this one."""
        with self._lock:
            self._milestones.append(dataclasses.replace(milestone, index=self._next_index))
            self._next_index += 1
            if len(self._milestones) > 2 * self.KEPT_FREQUENT:
                self._forget()

    def _forget(self) -> None:
        old, recent = self._milestones[: -self.KEPT_FREQUENT], self._milestones[-self.KEPT_FREQUENT :]
        rare = [m for m in old if m.kind not in (Kind.STEP_ENDED, Kind.RECOMPUTED, Kind.OUTPUT)]
        self._milestones = rare + recent

    # --- anybody reads --------------------------------------------------------

    def milestones(self, since: int) -> Sequence[Milestone]:
        """All that are kept from index `since` on."""
        with self._lock:
            start = bisect.bisect_left(self._milestones, since, key=lambda m: m.index)
            return self._milestones[start:]

    def traces(self) -> Sequence[StepTrace]:
        """The traces kept, in order."""
        with self._lock:
            kept = {trace.step: trace for trace in (*self._first, *self._recent)}
            if self._highest is not None:
                kept[self._highest[1].step] = self._highest[1]
            return [kept[step] for step in sorted(kept)]


class Published:
    """The reading half of a `Source` over a feed."""

    _feed: Feed

    def environment(self) -> Environment | None:
        """Where it runs; None until that is known."""
        return self._feed.environment

    def config(self) -> RunConfig | None:
        """Of the run under way or last ended."""
        return self._feed.config

    def gauge(self) -> Gauge | None:
        """The latest reading."""
        return self._feed.gauge

    def trace(self) -> StepTrace | None:
        """The latest trace, partial or not."""
        return self._feed.latest

    def traces(self) -> Sequence[StepTrace]:
        """The traces kept of this run."""
        return self._feed.traces()

    def milestones(self, since: int) -> Sequence[Milestone]:
        """Milestones from an index on."""
        return self._feed.milestones(since)


def peak_bytes(trace: StepTrace) -> int:
    """The most allocated at any event of a trace, without naming anything."""
    began = int(trace.begin["bytes"].sum() + trace.begin["slack"].sum())
    if not len(trace.events):
        return began
    return began + max(0, int((trace.events["bytes"] + trace.events["slack"]).cumsum().max()))
