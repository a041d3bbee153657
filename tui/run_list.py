"""The runs that a source has, as the screens list them: in small, in the order they began."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from ..engine.events import StepTrace
from ..engine.feed import Source
from ..engine.ledger import Ledger
from ..engine.run import Run, RunKind
from ..engine.techniques import memory_key
from .run_state import STEADY_STEPS, RunState
from .run_summary import RunSummary, summarize

Found = TypeVar("Found")


class RunList:
    """Knows of each run what it told, and sums it up once for what is known of it.

    Attributes:
        runs: All of the source, the one under way or begun last at the end.
    """

    def __init__(self) -> None:
        self.runs: Sequence[Run] = ()
        self._live = True
        self._states: dict[Run, RunState] = {}
        self._summaries: dict[Run, tuple[object, RunSummary]] = {}
        self._forgotten: set[Run] = set()
        self._known: dict[str, tuple[object, Any]] = {}

    def update(self, source: Source) -> None:
        """See which runs there are."""
        self.runs, self._live = source.runs(), source.live

    @property
    def latest(self) -> Run | None:
        """The run under way or begun last."""
        return self.runs[-1] if self.runs else None

    def is_of_latest(self, run: Run) -> bool:
        """True if a run is the latest, or another rank of its job."""
        return self.latest is not None and run.id.number == self.latest.id.number

    def state_of(self, run: Run) -> RunState:
        """The run's state, with all it has told by now."""
        state = self._states.setdefault(run, RunState(run))
        state.fold_new()
        return state

    def origin_of(self, run: Run) -> str:
        """The origin of a run, for people: `run 2`, a recording's name, the GPU it is predicted for."""
        if run.kind is RunKind.PREDICTED and run not in self.runs:
            return f"predicted for {run.id.engine}"
        if self._live:
            return f"run {run.id.number}"
        same = [other.id for other in self.runs if other.id.engine == run.id.engine]
        rank = f", rank {run.id.rank}" * any(other.rank != run.id.rank for other in same)
        return run.id.engine + f", run {run.id.number}" * any(other.number != run.id.number for other in same) + rank

    def summary_of(self, run: Run, fold: Callable[[StepTrace], Ledger] = Ledger) -> RunSummary:
        """A run in small.

        Args:
            run: Which.
            fold: Folds a trace, or knows its fold.
        """
        state, traces = self.state_of(run), run.traces()
        key = (state.step, len(traces), traces[-1] if traces else None, run.config)
        known = self._summaries.get(run)
        if known is None or known[0] != key:
            known = self._summaries[run] = (key, summarize(run, self.origin_of(run), state, fold))
        return known[1]

    @property
    def listed(self) -> list[list[Run]]:
        """The runs to compare and to look at; those of one configuration are one.

        Of an engine's runs those that hold a step; of recordings all.
        """
        return self._once("listed", self._list)

    def _list(self) -> list[list[Run]]:
        groups: dict[object, list[Run]] = {}
        for run in self.runs:
            if run in self._forgotten:
                continue
            if not self._live:
                groups[run] = [run]
            elif any(trace.step for trace in run.traces()):
                # The one under way is not counted to those before it until it has ended.
                key = "latest" if self.is_of_latest(run) else memory_key(run.config)
                groups.setdefault(key, []).append(run)
        return list(groups.values())

    def summaries(self, fold_of: Callable[[Run], Callable[[StepTrace], Ledger]]) -> list[RunSummary]:
        """The runs in `listed`, in small: each with its latest figures, unless that run was cut short.

        Args:
            fold_of: What folds the traces of a run.
        """
        found = []
        for group in self.listed:
            small = [self.summary_of(run, fold_of(run)) for run in group]
            chosen = small[0]
            for summary in small[1:]:
                chosen = summary if summary.steps >= min(chosen.steps, STEADY_STEPS) else chosen
            times = len({run.id.number for run in group})
            found.append(chosen._replace(origin=small[0].origin, times=times))
        return found

    def place_of(self, run: Run | None) -> int:
        """The place of a run in `listed`; beyond them if it is not there."""
        groups = self.listed
        return next((i for i, group in enumerate(groups) if run in group), len(groups))

    def forget(self, index: int) -> None:
        """Drop one of `listed`."""
        self._forgotten.update(self.listed[index])
        self._known.clear()

    def measured(self, beside: Run | None) -> dict[str, int]:
        """Highest peak by what decides memory, of the runs that ran where another one did.

        The same device and the same libraries: with others, a difference would not be the technique's.
        """
        found: dict[str, int] = {}
        for run in self.runs:
            if run.kind is RunKind.PREDICTED or beside is None or not _same_place(run, beside):
                continue
            state = self.state_of(run)
            if state.steady and state.peak_bytes:
                key = memory_key(run.config)
                found[key] = max(found.get(key, 0), state.peak_bytes)
        return found

    @property
    def loaded(self) -> dict[str, int]:
        """Bytes allocated after loading, by what decides memory."""
        states = ((memory_key(run.config), self.state_of(run)) for run in self.runs)
        return {key: state.loaded_bytes for key, state in states if state.loaded_bytes is not None}

    def _once(self, name: str, work_out: Callable[[], Found]) -> Found:
        """Something that is asked for many times while one picture is drawn."""
        key = tuple((run, run.latest, run.config) for run in self.runs)
        known = self._known.get(name)
        if known is None or known[0] != key:
            known = self._known[name] = (key, work_out())
        found: Found = known[1]
        return found


def _same_place(one: Run, other: Run) -> bool:
    places = [(run.environment.device_name, run.environment.packages) for run in (one, other)]
    return places[0] == places[1]
