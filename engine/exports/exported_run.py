"""The runs that a format is given, folded once, and the sink it writes to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import BinaryIO, NamedTuple

from ..config import UserError
from ..events import StepTrace
from ..feed import Work
from ..ledger import Ledger
from ..report import Report, RunDocument
from ..run import Run, highest_of


@dataclass(frozen=True)
class ExportedRun:
    """One run, and the step of it that a timeline is of.

    Attributes:
        run: As it is when it is first asked for anything.
        name: Tells it from the others.
        step: The step shown; None: the one with the highest peak.
    """

    run: Run
    name: str
    step: int | None = None

    @cached_property
    def traces(self) -> Sequence[StepTrace]:
        """Traces of the steps kept, in order; the load is step 0.

        Raises:
            UserError: There is none.
        """
        traces = self.run.traces()
        if not traces:
            raise UserError(f"{self.name}: no step of it was traced, so there is nothing to export")
        return traces

    @cached_property
    def trace(self) -> StepTrace:
        """The step shown.

        Raises:
            UserError: It was not traced.
        """
        if self.step is None:
            highest = highest_of(self.traces)
            assert highest is not None
            return highest
        for trace in self.traces:
            if trace.step == self.step:
                return trace
        kept = ", ".join(str(trace.step) for trace in self.traces)
        raise UserError(f"{self.name}: step {self.step} is not in it; it has {kept}")

    @cached_property
    def ledger(self) -> Ledger:
        """The step shown, folded."""
        return Ledger(self.trace)

    @cached_property
    def last(self) -> Ledger:
        """The last step traced, folded."""
        return self.ledger if self.trace is self.traces[-1] else Ledger(self.traces[-1])

    @property
    def events(self) -> int:
        """Allocations and frees of the step shown."""
        return len(self.trace.events)

    @cached_property
    def document(self) -> RunDocument:
        """The run as `run --json` prints it."""
        report = Report()
        for trace in self.traces:
            if not trace.is_complete:
                continue
            known = next((ledger for ledger in (self.ledger, self.last) if ledger.trace is trace), None)
            report.fold(known or Ledger(trace))
        return report.document(self.run)


def named(runs: Sequence[Run], step: int | None = None) -> list[ExportedRun]:
    """Runs with names that tell them apart: their engine's or recording's, and what differs besides.

    Args:
        runs: In any order; those of a job will follow each other by rank.
        step: The step shown of each; None: the one with the highest peak.
    """
    found = []
    jobs = list(dict.fromkeys(run.id[:2] for run in runs))
    for run in sorted(runs, key=lambda run: (jobs.index(run.id[:2]), run.id.rank)):
        akin = [other.id for other in runs if other.id.engine == run.id.engine]
        words = [run.id.engine or run.config.model]
        if len({other.number for other in akin}) > 1:
            words.append(f"run {run.id.number}")
        if len({other.rank for other in akin}) > 1:
            words.append(f"rank {run.id.rank}")
        found.append(ExportedRun(run, " ".join(words), step))
    return found


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
    """The file that a format writes to: counts how far it is, and stops where that is asked for.

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
