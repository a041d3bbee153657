"""What a format is given: runs, folded once, and a place to write to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, BinaryIO, NamedTuple

from ..config import RunConfig, UserError
from ..events import Environment, Gauge, Milestone, StepTrace
from ..feed import Source, Work, peak_bytes
from ..ledger import Ledger
from ..report import Report


@dataclass(frozen=True)
class ExportedRun:
    """One run, and the step of it that a timeline is of.

    Attributes:
        name: Tells it from the others.
        config: What ran.
        environment: Where.
        gauge: The last reading; None: there was none.
        traces: Complete steps in order; the load is step 0.
        milestones: Of this run.
        rank: In a job of several processes.
        step: The step shown; None: the one with the highest peak.
    """

    name: str
    config: RunConfig
    environment: Environment
    gauge: Gauge | None
    traces: Sequence[StepTrace]
    milestones: Sequence[Milestone]
    rank: int = 0
    step: int | None = None

    @classmethod
    def of_source(cls, source: Source, name: str, step: int | None = None, rank: int = 0) -> ExportedRun:
        """What a source has now.

        Raises:
            UserError: It has run nothing yet.
        """
        config, environment = source.config(), source.environment()
        if config is None or environment is None:
            raise UserError(f"{name}: no run has started yet")
        milestones = source.milestones(0)
        last = max((m.run for m in milestones), default=0)
        mine = [m for m in milestones if m.run == last]
        return cls(name, config, environment, source.gauge(), source.traces(), mine, rank, step)

    @cached_property
    def trace(self) -> StepTrace:
        """The step shown.

        Raises:
            UserError: It was not traced.
        """
        if not self.traces:
            raise UserError(f"{self.name}: no step of it was traced, so there is nothing to export")
        if self.step is None:
            return max(self.traces, key=peak_bytes)
        for trace in self.traces:
            if trace.step == self.step:
                return trace
        kept = ", ".join(str(trace.step) for trace in self.traces)
        raise UserError(f"{self.name}: step {self.step} is not in it; it has {kept}")

    @cached_property
    def ledger(self) -> Ledger:
        """The step shown, folded."""
        return Ledger(self.trace)

    @property
    def events(self) -> int:
        """Allocations and frees of the step shown."""
        return len(self.trace.events)

    @cached_property
    def document(self) -> dict[str, Any]:
        """The run as `run --json` prints it."""
        report = Report()
        for trace in self.traces:
            report.fold(self.ledger if trace is self.trace else Ledger(trace))
        return report.document(self.environment, self.config, list(self.milestones))


class Format(NamedTuple):
    """A kind of file.

    Attributes:
        name: As in `--format`.
        suffix: Of a file's name, with the dot.
        summary: What opens it and what it shows, in half a sentence.
        write: Writes runs to a sink.
    """

    name: str
    suffix: str
    summary: str
    write: Callable[[Sequence[ExportedRun], Sink], None]


class Sink:
    """Where a format writes: counts how far it is, and stops where that is asked for.

    Args:
        file: Opened for writing bytes.
        work: Told and asked.
        events: To be written in all.
    """

    def __init__(self, file: BinaryIO, work: Work, events: int) -> None:
        self._file, self._work, self._whole = file, work, max(events, 1)
        self._done = 0

    def write(self, data: bytes, events: int = 0) -> None:
        """Write a piece that says so many events.

        Raises:
            OSError: It cannot be written.
            UserError: It was cancelled.
        """
        if self._work.cancelled:
            raise UserError("cancelled")
        self._file.write(data)
        self._done += events
        self._work.share = min(self._done / self._whole, 1.0)
