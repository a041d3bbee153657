"""The state of the screens, folded from a source and the Run of it that is looked at. Plain Python: no terminal.

Every tick asks for what is new and folds only that: a trace when it is another
object than before, events from the last index on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..engine.categories import Category
from ..engine.config import RunConfig
from ..engine.events import Environment, Gauge, Phase, StepTrace
from ..engine.feed import Source, ViewerRole
from ..engine.ledger import Bytes, Ledger
from ..engine.run import Run
from ..engine.run_events import (
    EngineEnded,
    Note,
    OutOfMemory,
    Refused,
    RunEnded,
    RunEvent,
    RunFailed,
    RunStarted,
    Saved,
    StepEnded,
)
from .event_log import EventLog
from .job_ranks import of_job
from .run_list import RunList
from .run_state import RunState
from .run_summary import RunSummary
from .shown_traces import ShownTraces
from .units import MIB, Unit, unit_for

INFO_SHOWN_S, PROBLEM_SHOWN_S = 6.0, 60.0


@dataclass(frozen=True)
class Message:
    """One line that is shown for a while."""

    text: str
    problem: bool
    until_s: float


class ViewState:
    """The state behind all screens: one Run of a source is looked at, the others are known in small.

    Attributes:
        live: Whether commands have an effect.
        units: The setting: GiB or GB.
        shown: The run on the screens: the latest, unless another is looked at; None before the first.
        requested: A configuration that was sent and has not started yet.
        stopping: A stop or restart was asked for and has not happened yet.
        gauge: Latest reading.
        run: What the run on the screens told.
        run_list: The runs there are.
        traces: Those of the run on the screens, folded.
        logs: Events by filter, oldest first.
        refused: The run that ended last by running out of memory, or the recording of one that is looked at.
        leaked_bytes: Of the run that ended last.
        message: Shown for a while, or None.
        version: Grows with every change.
    """

    def __init__(self) -> None:
        self.live = True
        self.units = "GiB"
        self.requested: RunConfig | None = None
        self.stopping = False
        self.leaked_bytes: int | None = None
        self.refused: Run | None = None
        self.message: Message | None = None
        self.version = 0
        self.shown: Run | None = None
        self.gauge: Gauge | None = None
        self.logs = EventLog()
        self.run_list = RunList()
        self.traces = ShownTraces()
        self._following = True
        self._clock_s = 0.0
        self._role: ViewerRole | None = None
        self._gone = False
        self._next_index = self._next_logged = 0
        self._ever: tuple[object, set[Category]] = (None, set())
        self._measured: tuple[int, dict[str, int]] | None = None
        self._environment: Environment | None = None
        self.run = RunState()

    # --- folding ------------------------------------------------------------

    def update(self, source: Source, clock_s: float) -> bool:
        """Fold what is new.

        Args:
            source: Asked for everything.
            clock_s: Any clock that goes on; messages disappear by it.

        Returns:
            Whether anything changed.
        """
        before = self.version
        self._clock_s, self.live = clock_s, source.live
        if self.message is not None and clock_s >= self.message.until_s:
            self.dismiss()
        self.run_list.update(source)
        if source.role is ViewerRole.READ_ONLY and self._role is ViewerRole.ATTACHED:
            self.say("another viewer commands this engine now, this one looks on; ! takes over")
        self._role, self._gone = source.role, source.gone
        if not self.live:
            self._follow()
        self._read_events(source)
        self._follow()
        for name, value in (("_environment", source.environment()), ("gauge", self._gauge_of(source))):
            if value is not getattr(self, name):
                setattr(self, name, value)
                self.version += 1
        self.version += self.run.fold_new()
        self.version += self.traces.read(self.shown)
        return self.version != before

    def look_at(self, run: Run) -> None:
        """Have a run on the screens: one of the source's, or one of nobody's, as a prediction is."""
        self._following = self.live and run is self.run_list.latest
        self._look(run)

    def _look(self, run: Run) -> None:
        self.shown, self.run = run, self.run_list.state_of(run)
        self.traces.forget()
        if not self.live:  # the log of a recording is that of the run looked at
            self._note_refused(run)
            self.logs.clear()
            self._next_logged = 0
        self.version += 1

    def _follow(self) -> None:
        """A live source's latest run comes on the screens as it begins; of recordings the first is looked at.

        Of a job it is the lowest rank.
        """
        runs = self.run_list.runs
        if not runs:
            return
        if self.live and self._following:
            if self.shown is not runs[-1]:
                self._look(runs[-1])
        elif self.shown is None:
            self._look(of_job(runs[0], runs)[0])

    def _gauge_of(self, source: Source) -> Gauge | None:
        newest = self.live and self.shown is self.run_list.latest
        return source.gauge() if newest or self.shown is None else self.shown.gauge

    def _read_events(self, source: Source) -> None:
        """A live source's log tells of all its runs; that of a recording is of the run looked at."""
        for event in source.events(self._next_index):
            self._next_index = event.index + 1
            self._take_in(event)
            if self.live:
                self._log(event)
        if not self.live and self.shown is not None:
            for event in self.shown.events(self._next_logged):
                self._next_logged = event.index + 1
                self._log(event)

    def _log(self, event: RunEvent) -> None:
        self.version += 1
        self.logs.add(event)

    def _take_in(self, event: RunEvent) -> None:
        if isinstance(event, RunStarted):
            self._following = True
        if isinstance(event, RunEnded):
            self.leaked_bytes = event.leaked_bytes
        if isinstance(event, RunEnded | EngineEnded):  # of several ranks, those may have died that nobody looks at
            for run in self.run_list.runs:
                if isinstance(event, EngineEnded) or run.id.number == event.run:
                    self._note_refused(run)
        if isinstance(event, EngineEnded) and self.shown is None:  # no run tells of it
            self.run.fold(event)
        self._settle(event)
        self.version += 1
        if event.is_problem or isinstance(event, Saved | EngineEnded):
            self.say(event.text, problem=event.is_problem)
        elif isinstance(event, Note) and not (self.message and self.message.problem):
            self.say(event.text)

    def _note_refused(self, run: Run) -> None:
        """Take note of a run that has ended by running out of memory; a loop that has gone on after it has not."""
        refused = run.refused
        if refused is not None and not any(isinstance(event, StepEnded) for event in run.events(refused.index)):
            self.refused = run

    def _settle(self, event: RunEvent) -> None:
        """Take note of what was asked for and has now happened, or will not."""
        match event:
            case RunStarted():
                config = next((run.config for run in reversed(self.run_list.runs) if run.id.number == event.run), None)
                started = self.requested is None or self.requested == config
            case Refused() | RunFailed() | OutOfMemory() | EngineEnded():
                started = True
            case RunEnded():
                started = self.requested is None
            case _:
                return
        if started:
            self.requested, self.stopping = None, False

    # --- the runs there are ---------------------------------------------------

    @property
    def now(self) -> Ledger | None:
        """Fold of the latest trace of the run on the screens."""
        return self.traces.now

    @property
    def peak(self) -> Ledger | None:
        """Fold of its trace with the highest peak."""
        return self.traces.peak

    @property
    def kept(self) -> tuple[StepTrace, ...]:
        """Its traces that can be looked at."""
        return self.traces.kept

    @property
    def complete(self) -> Ledger | None:
        """Fold of its latest complete trace."""
        return self.traces.complete

    def fold(self, trace: StepTrace) -> Ledger:
        """The fold of one of its traces, done once."""
        return self.traces.fold(trace)

    def origin_of(self, run: Run) -> str:
        """The origin of a run, for people."""
        return self.run_list.origin_of(run)

    def summary_of(self, run: Run) -> RunSummary:
        """A run in small."""
        return self.run_list.summary_of(run, self._fold_of(run))

    def _fold_of(self, run: Run) -> Callable[[StepTrace], Ledger]:
        return self.traces.fold if run is self.shown else Ledger

    @property
    def listed(self) -> list[list[Run]]:
        """The runs to compare and to look at; those of one configuration are one."""
        return self.run_list.listed

    @property
    def runs(self) -> list[RunSummary]:
        """The runs in `listed`, in small."""
        return self.run_list.summaries(self._fold_of)

    @property
    def place(self) -> int:
        """The place of the run on the screens among `runs`; beyond them if it is not there."""
        return self.run_list.place_of(self.shown)

    @property
    def several(self) -> bool:
        """True if there is another run to look at."""
        return len(self.listed) > 1 or self.place >= len(self.listed) > 0

    @property
    def job(self) -> list[Run]:
        """The ranks of the job that is on the screens, by rank; a run alone is its own only one."""
        return of_job(self.shown, self.run_list.runs) if self.shown is not None else []

    @property
    def under_way(self) -> bool:
        """True if what is on the screens is the engine's latest run, or a rank of the latest job."""
        return self.live and self.shown is not None and self.run_list.is_of_latest(self.shown)

    @property
    def under_way_or_to_come(self) -> bool:
        """True if the engine has a run under way, whichever is looked at, or will have one: asked for, or its first."""
        latest = [self.run_list.state_of(run) for run in self.run_list.runs if self.run_list.is_of_latest(run)]
        asked = self.requested is not None or any(state.running for state in latest)
        return asked or (not latest and self.run.status == "starting")

    def forget(self, index: int) -> None:
        """Drop one of `runs` that is not on the screens."""
        self.run_list.forget(index)
        self.version += 1

    @property
    def measured(self) -> dict[str, int]:
        """Highest peak by what decides memory, of the runs that ran where the one on the screens did."""
        if self._measured is None or self._measured[0] != self.version:
            self._measured = (self.version, self.run_list.measured(self.shown))
        return self._measured[1]

    @property
    def loaded(self) -> dict[str, int]:
        """Bytes allocated after loading, by what decides memory."""
        return self.run_list.loaded

    # --- what screens ask -----------------------------------------------------

    @property
    def environment(self) -> Environment | None:
        """The environment of the run on the screens, or of one to come; None until the engine has looked."""
        return self.shown.environment if self.shown is not None else self._environment

    @property
    def config(self) -> RunConfig | None:
        """The configuration of the run on the screens."""
        return self.shown.config if self.shown is not None else None

    def summary(self) -> RunSummary | None:
        """The run on the screens in small; None before its first step that is kept."""
        if self.shown is None or not self.kept or not self.kept[-1].step:
            return None
        return self.summary_of(self.shown)

    @property
    def origin(self) -> str:
        """The origin of the run on the screens; empty: it is the engine's latest."""
        return "" if self.shown is None or self.under_way else self.origin_of(self.shown)

    @property
    def status(self) -> str:
        """One word for what the engine is doing."""
        if self.run.predicted:
            return "prediction"
        if self.run.imported:
            return "snapshot"
        if not self.live:
            return "recording"
        if not self.under_way:
            return self.run.status
        if self.stopping:
            return "restarting" if self.requested is not None else "stopping"
        return self.run.status

    @property
    def acts(self) -> bool:
        """True if there is an engine for commands to have an effect on, or one to start, whoever may send them."""
        return self.live and not self._gone

    @property
    def over(self) -> bool:
        """True if the run has ended here: what is allocated since then, no trace says."""
        return self.under_way and not self.run.running

    @property
    def current(self) -> bool:
        """True if `now` is about the present, and not about a step some time ago."""
        if self.now is None or self.gauge is None or self.over:
            return False
        return self.now.trace.step >= self.gauge.step or not self.run.running

    @property
    def latest(self) -> Bytes | None:
        """Bytes that the latest trace holds at its end, by category; of a run that is over, only that it is nothing."""
        if self.over:
            nothing = self.gauge is not None and not self.gauge.allocated_bytes
            return dict.fromkeys(Category, 0) if nothing else None
        return self.now.end if self.now is not None else None

    @property
    def phase(self) -> Phase:
        """The phase that the loop is in."""
        return self.gauge.phase if self.gauge is not None else Phase.IDLE

    @property
    def largest_bytes(self) -> int:
        """The largest total there is to show; it decides the unit."""
        sizes = [ledger.peak.bytes for ledger in (self.peak,) if ledger is not None]
        sizes += [self.gauge.allocated_bytes] if self.gauge is not None else []
        sizes += [self.run.peak_bytes] if self.run.peak_bytes is not None else []
        return max(sizes, default=0)

    @property
    def unit(self) -> Unit:
        """The unit of this run's screens; a device's memory, which is on them, is nothing to count in KiB."""
        return unit_for(max(self.largest_bytes, 4 * MIB), self.units)

    @property
    def ever(self) -> set[Category]:
        """Categories of which the run shown has been seen to hold anything, so that a row once there stays."""
        if self._ever[0] is not self.shown:
            self._ever = (self.shown, set())
        for sizes in (self.now.end if self.now else {}, self.peak.peak.by_category if self.peak else {}):
            self._ever[1].update(category for category, size in sizes.items() if size)
        return self._ever[1]

    # --- messages -------------------------------------------------------------

    def say(self, text: str, problem: bool = False) -> None:
        """Show one line for a while; a problem until it has surely been seen."""
        shown_s = PROBLEM_SHOWN_S if problem else INFO_SHOWN_S
        self.message = Message(" ".join(text.split()), problem, self._clock_s + shown_s)
        self.version += 1

    def dismiss(self) -> None:
        """Take the message away."""
        self.message = None
        self.version += 1
