"""What the screens show, folded from a source. Plain Python: no terminal, no Textual.

Every tick asks the source for what is new and folds only that: a trace when it
is another object than before, milestones from the last index on.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

from ..engine.config import RunConfig
from ..engine.events import Category, Environment, Gauge, Kind, Milestone, Phase, StepTrace
from ..engine.feed import Source, ViewerRole, peak_bytes
from ..engine.ledger import Bytes, Ledger
from ..engine.techniques import memory_key
from .run_state import STEADY_STEPS, RunState
from .run_summary import RunSummary, of_ended, summarize
from .units import MIB, Unit, unit_for

if TYPE_CHECKING:
    from .recording_set import RecordingSet

KEPT_MILESTONES = 20_000
KEPT_RUNS = 50
INFO_SHOWN_S, PROBLEM_SHOWN_S = 6.0, 60.0


class Filter(IntEnum):
    """Which milestones the log shows."""

    ALL = 0
    NO_RECOMPUTES = 1
    NOTABLE = 2
    PROBLEMS = 3

    @property
    def title(self) -> str:
        """For people."""
        return ("everything", "without recomputes", "without steps and recomputes", "problems only")[self]

    def admits(self, milestone: Milestone) -> bool:
        """Whether a milestone is shown."""
        match self:
            case Filter.ALL:
                return True
            case Filter.NO_RECOMPUTES:
                return milestone.kind is not Kind.RECOMPUTED
            case Filter.NOTABLE:
                return milestone.kind not in (Kind.RECOMPUTED, Kind.STEP_ENDED)
        return is_problem(milestone)


def is_problem(milestone: Milestone) -> bool:
    """Whether something went wrong, a leak included."""
    if milestone.kind is Kind.RUN_ENDED:
        return bool(milestone.data.get("leaked_bytes"))
    if milestone.kind is Kind.ENGINE_ENDED:
        return not milestone.data.get("by")
    return milestone.kind in (Kind.OUT_OF_MEMORY, Kind.RUN_FAILED, Kind.REFUSED)


def _with(runs: list[RunSummary], latest: RunSummary) -> list[RunSummary]:
    """Runs and one more; one that ran before counts again, with the latest figures unless it was cut short."""
    for i, run in enumerate(runs):
        if memory_key(run.config) == memory_key(latest.config):
            stays = latest if latest.steps >= min(run.steps, STEADY_STEPS) else run
            return [*runs[:i], stays._replace(origin=run.origin, times=run.times + 1), *runs[i + 1 :]]
    return [*runs, latest]


@dataclass(frozen=True)
class Message:
    """One line that is shown for a while."""

    text: str
    problem: bool
    until_s: float


class ViewState:
    """The state behind all screens.

    Attributes:
        live: Whether commands have an effect.
        units: The setting: GiB or GB.
        opened: The recordings that are looked at, if they are.
        environment: Where it runs, once known.
        config: The run's, under way or last ended.
        requested: A configuration that was sent and has not started yet.
        stopping: A stop or restart was asked for and has not happened yet.
        gauge: Latest reading.
        run: What the run told.
        now: Fold of the latest trace.
        complete: Fold of the latest complete trace.
        peak: Fold of the trace with the highest peak of the run.
        kept: Complete traces of the run that can be looked at.
        logs: Milestones by filter, oldest first.
        finished: Summaries of the runs before this one.
        measured: Highest peak by configuration, of all runs of this session or of what was opened together,
            as far as they have come to hold all they will.
        loaded: Bytes allocated after loading, by configuration.
        leaked_bytes: Of the run that ended last.
        message: Shown for a while, or None.
        version: Grows with every change.
    """

    def __init__(self) -> None:
        self.live = True
        self.units = "GiB"
        self.opened: RecordingSet | None = None
        self.message: Message | None = None
        self.version = 0
        self._clock_s = 0.0
        self._role: ViewerRole | None = None
        self.begin_again()

    def begin_again(self) -> None:
        """Know nothing of any run: what is looked at is another recording."""
        self.environment: Environment | None = None
        self.config: RunConfig | None = None
        self.requested: RunConfig | None = None
        self.stopping = False
        self.gauge: Gauge | None = None
        self.run = RunState()
        self.now: Ledger | None = None
        self.peak: Ledger | None = None
        self.kept: tuple[StepTrace, ...] = ()
        self.logs: dict[Filter, deque[Milestone]] = {f: deque(maxlen=KEPT_MILESTONES) for f in Filter}
        self.finished: list[RunSummary] = []
        self.measured: dict[str, int] = self.opened.measured() if self.opened is not None else {}
        self.loaded: dict[str, int] = {}
        self.leaked_bytes: int | None = None
        self.version += 1
        self._summary: tuple[object, RunSummary] | None = None
        self._ever: tuple[object, set[Category]] | None = None
        self._next_index = 0
        self._trace: StepTrace | None = None
        self._weighed: set[StepTrace] = set()
        self._folds: dict[StepTrace, Ledger] = {}

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
        self._clock_s = clock_s
        self.live = source.live
        if self.message is not None and clock_s >= self.message.until_s:
            self.dismiss()
        for name in ("environment", "config", "gauge"):
            value = getattr(source, name)()
            if value is not getattr(self, name):
                setattr(self, name, value)
                self.version += 1
        if source.role is ViewerRole.READ_ONLY and self._role is ViewerRole.ATTACHED:
            self.say("another viewer commands this engine now, this one looks on; ! takes over")
        self._role = source.role
        self._read_milestones(source)
        self._read_trace(source)
        return self.version != before

    def _read_milestones(self, source: Source) -> None:
        for milestone in source.milestones(self._next_index):
            self._next_index = milestone.index + 1
            self.version += 1
            for kind, log in self.logs.items():
                if kind.admits(milestone):
                    log.append(milestone)
            self._fold(milestone)

    def _fold(self, milestone: Milestone) -> None:
        if milestone.kind is Kind.RUN_STARTED:
            if summary := self.summary() or of_ended(self.run):
                self.finished = _with(self.finished, summary)[-KEPT_RUNS:]
            self.run = RunState(number=milestone.run)
            self._forget_traces()
        self.run.fold(milestone)
        self._settle(milestone)
        if milestone.kind is Kind.RUN_ENDED:
            self.leaked_bytes = milestone.data.get("leaked_bytes")
        if milestone.kind is Kind.LOADED and self.run.config and "allocated_bytes" in milestone.data:
            self.loaded[memory_key(self.run.config)] = milestone.data["allocated_bytes"]
        if milestone.kind is Kind.STEP_ENDED and self.run.config and self.run.steady and self.run.peak_bytes:
            key = memory_key(self.run.config)
            self.measured[key] = max(self.measured.get(key, 0), self.run.peak_bytes)
        if not self.live:
            return
        if is_problem(milestone) or milestone.kind in (Kind.SAVED, Kind.ENGINE_ENDED):
            self.say(milestone.text, problem=is_problem(milestone))
        elif milestone.kind is Kind.NOTE and not (self.message and self.message.problem):
            self.say(milestone.text)

    def _settle(self, milestone: Milestone) -> None:
        """Take note of what was asked for and has now happened, or will not."""
        match milestone.kind:
            case Kind.RUN_STARTED:
                started = self.requested is None or self.requested == self.run.config
            case Kind.REFUSED | Kind.RUN_FAILED | Kind.OUT_OF_MEMORY | Kind.ENGINE_ENDED:
                started = True
            case Kind.RUN_ENDED:
                started = self.requested is None
            case _:
                return
        if started:
            self.requested, self.stopping = None, False

    def _read_trace(self, source: Source) -> None:
        trace = source.trace()
        if trace is self._trace:
            return
        self._trace = trace
        self.version += 1
        if trace is None:
            self._forget_traces()
            return
        self.kept = tuple(source.traces())
        self._weighed &= set(self.kept)
        self._folds = {t: ledger for t, ledger in self._folds.items() if t in self._weighed}
        for kept in self.kept:
            if kept not in self._weighed:
                self._weighed.add(kept)
                self._weigh(kept, peak_bytes(kept))
        self.now = self.fold(trace)
        self._weigh(trace, peak_bytes(trace))

    def _weigh(self, trace: StepTrace, highest_bytes: int) -> None:
        """Keep the trace's fold if its peak is the highest so far.

        A complete trace replaces the partial one of its own step: it knows
        better what the blocks were for. Of two equal ones the first stays,
        unless it is the first step's, in which the optimizer's state was new.
        """
        peak = self.peak
        if peak is not None:
            if highest_bytes < peak.peak.bytes or peak.trace is trace:
                return
            same_step = peak.trace.step == trace.step and peak.trace.partial
            settled = peak.trace.step > 1 or trace.partial
            if highest_bytes == peak.peak.bytes and settled and not same_step:
                return
        self.peak = self.fold(trace)

    def fold(self, trace: StepTrace) -> Ledger:
        """The fold of a trace, done once for those that are kept."""
        for ledger in (self.now, self.peak, self._folds.get(trace)):
            if ledger is not None and ledger.trace is trace:
                return ledger
        ledger = Ledger(trace)
        if not trace.partial:
            self._folds[trace] = ledger
        return ledger

    def _forget_traces(self) -> None:
        self.now = self.peak = self._trace = None
        self.kept = ()
        self._weighed.clear()
        self._folds.clear()

    # --- what screens ask -----------------------------------------------------

    def summary(self) -> RunSummary | None:
        """The run in small, to be set beside others; None before its first complete step."""
        if not self.kept or not self.kept[-1].step or self.run.config is None:
            return None
        key = (self.run.number, self.run.step, self.kept)
        if self._summary is None or self._summary[0] != key:
            self._summary = (key, summarize(self.run, [self.fold(trace) for trace in self.kept], self.origin))
        return self._summary[1]

    @property
    def origin(self) -> str:
        """A recording's name; empty: runs have numbers."""
        return self.opened.name if self.opened is not None else ""

    @property
    def several(self) -> bool:
        """Whether recordings were opened together."""
        return self.opened is not None and len(self.opened.runs) > 1

    @property
    def runs(self) -> list[RunSummary]:
        """What was opened together, in the order named; or the runs before this one, then this one."""
        if self.opened is not None and self.several:
            return self.opened.runs
        now = self.summary()
        return [*self.finished, now] if now else self.finished

    @property
    def place(self) -> int:
        """Of the run on the screens, among `runs`; beyond them as long as it has no summary."""
        return self.opened.at if self.opened is not None and self.several else len(self.finished)

    def forget(self, index: int) -> None:
        """Drop one of `runs` that is not on the screens."""
        if self.opened is not None and self.several:
            self.opened.forget(index)
        else:
            del self.finished[index]
        self.version += 1

    @property
    def complete(self) -> Ledger | None:
        """Fold of the latest complete trace; of the first one under way while there is none."""
        if not self.kept or (self.kept[-1].step == 0 and self.now is not None):
            return self.now
        return self.fold(self.kept[-1])

    @property
    def status(self) -> str:
        """One word for what the engine is doing."""
        if not self.live:
            return "recording"
        if self.stopping:
            return "restarting" if self.requested is not None else "stopping"
        return self.run.status

    @property
    def over(self) -> bool:
        """Whether the run has ended here: what is allocated since then, no trace says."""
        return self.live and self.run.number > 0 and not self.run.running

    @property
    def current(self) -> bool:
        """Whether `now` is about the present, and not about a step some time ago."""
        if self.now is None or self.gauge is None or self.over:
            return False
        return self.now.trace.step >= self.gauge.step or not self.run.running

    @property
    def latest(self) -> Bytes | None:
        """What the latest trace holds at its end, by category; of a run that is over, only that it is nothing."""
        if self.over:
            nothing = self.gauge is not None and not self.gauge.allocated_bytes
            return dict.fromkeys(Category, 0) if nothing else None
        return self.now.end if self.now is not None else None

    @property
    def phase(self) -> Phase:
        """What the loop is doing."""
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
        """What this run's screens count in; a device's memory, which is on them, is nothing to count in KiB."""
        return unit_for(max(self.largest_bytes, 4 * MIB), self.units)

    @property
    def ever(self) -> set[Category]:
        """Categories that hold anything, now or at the peak."""
        key = (self.now, self.peak)
        if self._ever is None or self._ever[0] != key:
            found: set[Category] = set()
            for sizes in (self.now.end if self.now else {}, self.peak.peak.by_category if self.peak else {}):
                found |= {category for category, size in sizes.items() if size}
            self._ever = (key, found)
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
