"""The boundary between an engine and whoever looks at it: a `Source` is a set of Runs and a place for commands.

The engine writes, others read, from any thread: the latest gauge and trace win,
events are lossless. Publishing costs the engine an attribute write.
"""

from __future__ import annotations

import enum
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from .config import RunConfig
from .events import Environment, Gauge, StepTrace
from .run import EventLog, Run, RunId, RunKind
from .run_events import RunEvent, placed


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
    """Write a recording of a run so far, or export it.

    Attributes:
        path: Where to.
        run: Which; None: the run under way or last ended.
        format: One of `engine.exports`; empty: a recording.
        work: How far it is.
    """

    path: Path
    run: Run | None = None
    format: str = ""
    work: Work = field(default_factory=Work, compare=False)


@dataclass(frozen=True, slots=True)
class TakeOver:
    """The command that makes a viewer the commander; the one before may only look."""


@dataclass(frozen=True, slots=True)
class End:
    """End the run and the engine's process."""


Command = Start | Pause | Stop | Save | TakeOver | End


class ViewerRole(enum.StrEnum):
    """A viewer's rights on an engine."""

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
    """A set of Runs that may grow: an engine here or behind a socket, or recordings opened together.

    Every method returns at once and may be called from any thread.
    """

    @property
    def live(self) -> bool:
        """True if commands have an effect; False for recordings."""
        ...

    @property
    def role(self) -> ViewerRole:
        """The viewer's rights on the engine."""
        ...

    @property
    def gone(self) -> bool:
        """True if the engine has gone and no other can be started in its place: nothing can be run any more."""
        ...

    def environment(self) -> Environment | None:
        """The machine and device that a run would have; None until the engine has looked."""
        ...

    def gauge(self) -> Gauge | None:
        """The latest reading of its device."""
        ...

    def runs(self) -> Sequence[Run]:
        """All runs that are kept, the one under way or begun last at the end."""
        ...

    def events(self, since: int) -> Sequence[RunEvent]:
        """Events of all runs and of the engine itself, from index `since` on."""
        ...

    def command(self, command: Command) -> None:
        """Ask for something; the answer comes as events.

        Raises:
            UserError: It is refused at once: the configuration cannot run, or
                this source takes no commands.
        """
        ...


class Feed:
    """Runs as an engine publishes them. Readers never block the writer for longer than a list append.

    Args:
        name: Of the engine, for the runs' identity.
        on_trace: Gets every trace on the engine's thread, for a consumer that
            must not miss one (`gpumem-tui run`).
        rank: Of its runs.
    """

    KEPT_RUNS = 24
    """Runs kept beside the latest, with the traces that `Run.settle` leaves; older runs are forgotten."""

    def __init__(self, name: str = "", on_trace: Callable[[StepTrace], None] | None = None, rank: int = 0) -> None:
        self.name, self.rank = name, rank
        self.environment: Environment | None = None
        self.gauge: Gauge | None = None
        self._on_trace = on_trace
        self._began_s = time.monotonic()
        self._lock = threading.Lock()
        self._runs: list[Run] = []
        self._begun = 0
        self._log = EventLog()
        self._next_index = 0

    def clock_s(self) -> float:
        """Seconds since the feed was made."""
        return time.monotonic() - self._began_s

    # --- the engine writes ----------------------------------------------------

    def begin_run(self, config: RunConfig, kind: RunKind = RunKind.TRAINED) -> Run:
        """Add a run; what it publishes from now on is the latest."""
        assert self.environment is not None
        self._begun += 1
        run = Run(RunId(self.name, self._begun, self.rank, self.environment.device), config, self.environment, kind)
        self.add_run(run)
        return run

    def add_run(self, run: Run) -> None:
        """Take over a run that has an identity already."""
        with self._lock:
            self._begun = run.id.number
            for before in self._runs[-1:]:
                before.settle()
            self._runs = [*self._runs[-self.KEPT_RUNS :], run]

    def publish_gauge(self, gauge: Gauge) -> None:
        """Offer a reading of the device, to the run under way as well."""
        self.gauge = gauge
        if self._runs:
            self._runs[-1].publish_gauge(gauge)

    def publish_trace(self, trace: StepTrace) -> None:
        """Offer a trace of the run under way."""
        self._runs[-1].publish_trace(trace)
        if self._on_trace is not None:
            self._on_trace(trace)

    def tell(self, event: RunEvent) -> None:
        """Record something that must not be lost: it gets its place here."""
        with self._lock:
            self._append(placed(event, self._next_index, self.clock_s(), self._begun))

    def relay(self, event: RunEvent) -> None:
        """Take over an event of another feed, with its run and time; it gets an index of this one."""
        with self._lock:
            self._append(placed(event, self._next_index, event.time_s, event.run))

    def _append(self, event: RunEvent) -> None:
        self._next_index += 1
        self._log.append(event)
        for run in reversed(self._runs):
            if run.id.number == event.run:
                run.tell(event)
                return

    # --- anybody reads --------------------------------------------------------

    @property
    def run(self) -> Run | None:
        """The run under way or begun last."""
        return self._runs[-1] if self._runs else None

    def runs(self) -> Sequence[Run]:
        """All runs that are kept, in the order they began."""
        return self._runs

    def events(self, since: int) -> Sequence[RunEvent]:
        """Events that are kept, from index `since` on."""
        return self._log.since(since)


class Published:
    """The reading half of a `Source` over a feed."""

    _feed: Feed

    @property
    def gone(self) -> bool:
        """False: the engine is in this process."""
        return False

    def environment(self) -> Environment | None:
        """The machine and device of runs; None until they are known."""
        return self._feed.environment

    def gauge(self) -> Gauge | None:
        """The latest reading of its device."""
        return self._feed.gauge

    @property
    def run(self) -> Run | None:
        """The run under way or begun last."""
        return self._feed.run

    def runs(self) -> Sequence[Run]:
        """All runs that are kept."""
        return self._feed.runs()

    def events(self, since: int = 0) -> Sequence[RunEvent]:
        """Events from an index on."""
        return self._feed.events(since)
