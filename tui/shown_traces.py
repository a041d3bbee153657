"""Traces of the run that is looked at, folded: the latest, the highest peak, and those that are kept."""

from __future__ import annotations

from ..engine.events import StepTrace
from ..engine.ledger import Ledger
from ..engine.run import Run, outweighs, peak_bytes


class ShownTraces:
    """Folds each trace once, for as long as it is kept.

    Attributes:
        now: Fold of the latest trace.
        peak: Fold of the trace with the highest peak.
        kept: Traces that can be looked at.
    """

    def __init__(self) -> None:
        self.now: Ledger | None = None
        self.peak: Ledger | None = None
        self.kept: tuple[StepTrace, ...] = ()
        self._latest: StepTrace | None = None
        self._weighed: set[StepTrace] = set()
        self._folds: dict[StepTrace, Ledger] = {}

    def read(self, run: Run | None) -> bool:
        """Take in what is new of a run; returns whether anything is."""
        trace = run.latest if run is not None else None
        if trace is self._latest:
            return False
        self._latest = trace
        if trace is None or run is None:
            self.forget()
            return True
        self.kept = tuple(run.traces())
        self._weighed &= set(self.kept)
        self._folds = {t: ledger for t, ledger in self._folds.items() if t in self._weighed}
        for kept in self.kept:
            if kept not in self._weighed:
                self._weighed.add(kept)
                self._weigh(kept, peak_bytes(kept))
        self.now = self.fold(trace)
        self._weigh(trace, peak_bytes(trace))
        return True

    def forget(self) -> None:
        """Know of no trace: another run is looked at."""
        self.now = self.peak = self._latest = None
        self.kept = ()
        self._weighed.clear()
        self._folds.clear()

    def fold(self, trace: StepTrace) -> Ledger:
        """The fold of a trace, done once for those that are kept."""
        for ledger in (self.now, self.peak, self._folds.get(trace)):
            if ledger is not None and ledger.trace is trace:
                return ledger
        ledger = Ledger(trace)
        if not trace.is_open:
            self._folds[trace] = ledger
        return ledger

    def _weigh(self, trace: StepTrace, highest_bytes: int) -> None:
        """Keep the trace's fold if its peak is the highest so far.

        A complete trace replaces the open one of its own step: it knows
        better what the blocks were for.
        """
        peak = self.peak
        if peak is not None:
            same_step = peak.trace.step == trace.step and peak.trace.is_open and highest_bytes == peak.peak.bytes
            weighs_more = outweighs((highest_bytes, trace), (peak.peak.bytes, peak.trace))
            if peak.trace is trace or not (same_step or weighs_more):
                return
        self.peak = self.fold(trace)

    @property
    def complete(self) -> Ledger | None:
        """Fold of the latest complete trace; of the first one under way while there is none."""
        if not self.kept or (self.kept[-1].step == 0 and self.now is not None):
            return self.now
        return self.fold(self.kept[-1])
