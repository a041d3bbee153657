"""Runs as one JSON document. The page (`html`) shows just this document.

The classes here are the format: `schema` makes the published JSON schema of
them. Sizes are whole bytes; what is not known is null.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from ..categories import Category
from ..ledger import Ledger
from ..report import Composition, PeakFigures, RunDocument, composition, mapping_as_dict, peak_of
from .exported_run import ExportedRun, Format, Sink

SCHEMA = "gpumem-export/1"
POINTS = 600
"""Points of a timeline: each is the highest instant of its part of the step, so that no peak is lost."""


class CategoryFigures(msgspec.Struct, frozen=True):
    """A category: its key in this document, and how it is shown to people."""

    key: str
    letter: str
    title: str
    meaning: str


class NowFigures(Composition, frozen=True):
    """Bytes held as the last traced step ended, and the last reading of the device.

    Attributes:
        step: The last traced.
        reserved_bytes: Held by the caching allocator.
        managed_bytes: CUDA managed memory of paged optimizers.
        pinned_bytes: Pinned memory of the host.
        process_bytes: On the device by this process.
        context_bytes: CUDA context and libraries.
        nccl_bytes: Buffers of NCCL's communicators; None: there are none, or they are among the context's.
        others_bytes: On the device by other processes.
        device_used_bytes: On the device by everybody.
        device_total_bytes: Capacity.
    """

    step: int
    reserved_bytes: int | None
    managed_bytes: int | None
    pinned_bytes: int | None
    process_bytes: int | None
    context_bytes: int | None
    nccl_bytes: int | None
    others_bytes: int | None
    device_used_bytes: int | None
    device_total_bytes: int


class PhaseFigures(msgspec.Struct, frozen=True):
    """A phase of a step; events from `begin_event` to `end_event` (exclusive), times since the step began."""

    phase: str
    micro_batch: int
    begin_event: int
    end_event: int
    begin_us: int
    end_us: int


class TimelineFigures(msgspec.Struct, frozen=True):
    """Points along a step: its ends, and the highest instant of each of at most 600 parts. All lists are of one length.

    Attributes:
        event: After which event; -1: before the first.
        time_us: Since the step began; of a prediction: 1 for every event so far, since nothing was timed.
        phase: What the loop was doing.
        module: At work; empty: the model itself.
        allocated_bytes: In all.
        by_category: The categories that are not 0 all along; they sum to `allocated_bytes` at every point.
    """

    event: list[int]
    time_us: list[int]
    phase: list[str]
    module: list[str]
    allocated_bytes: list[int]
    by_category: dict[str, list[int]]


class StepCourse(msgspec.Struct, frozen=True):
    """The step with the highest peak, or the one asked for, from its begin to its end.

    Attributes:
        step: From 1; 0: loading the model.
        micro_batches: Of the step.
        ending: `complete`, or `aborted` by an error.
        events: Allocations and frees.
        begin_allocated_bytes: Before the first of them.
        peak_event: After which most was allocated.
        phases: In the order they began; recomputes lie within backward.
        timeline: What was held.
    """

    step: int
    micro_batches: int
    ending: str
    events: int
    begin_allocated_bytes: int
    peak_event: int
    phases: list[PhaseFigures]
    timeline: TimelineFigures


class LogEntry(msgspec.Struct, frozen=True):
    """Something that the run told of itself; seconds are the engine's."""

    time_s: float
    kind: str
    text: str


class RunExport(msgspec.Struct, frozen=True):
    """One run.

    Attributes:
        name: Tells it from the others.
        kind: `trained`, `watched`, `predicted` or another way to come to be.
        number: Of the engine's runs.
        rank: In a job of several processes.
        device: `cuda:0`.
        now: As the last step ended.
        peak: Of the step shown.
        report: The run as `gpumem-tui run --json` prints it.
        step: A step from its begin to its end.
        events: What it told of itself.
    """

    name: str
    kind: str
    number: int
    rank: int
    device: str
    now: NowFigures
    peak: PeakFigures
    report: RunDocument
    step: StepCourse
    events: list[LogEntry]


class Export(msgspec.Struct, frozen=True):
    """The document that `gpumem-tui export --format json` writes, for one or several runs.

    Attributes:
        schema: Name and version of this form.
        categories: All there are, in the order of the stacked bars.
        runs: In the order named.
    """

    schema: str
    categories: list[CategoryFigures]
    runs: list[RunExport]


def write(runs: Sequence[ExportedRun], sink: Sink) -> None:
    """One document for all runs."""
    sink.write(encoded(document(runs)) + b"\n", sum(run.events for run in runs))


FORMAT = Format("json", ".json", "everything that is known of a run, in a published schema, for programs", write)


def schema() -> dict[str, Any]:
    """The JSON schema (2020-12) of every document of this format."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": SCHEMA, **msgspec.json.schema(Export)}


def document(runs: Sequence[ExportedRun], latest: int | None = None) -> Export:
    """The document of one or several runs.

    Args:
        runs: At least one.
        latest: So many steps, recomputes and events of each, the last ones; None: all.
    """
    known = [CategoryFigures(c.key, c.info.letter, c.info.title, c.info.meaning) for c in Category]
    return Export(SCHEMA, known, [_run(run, latest) for run in runs])


def _run(exported: ExportedRun, latest: int | None) -> RunExport:
    run, report, events = exported.run, exported.document, [*exported.run.events()]
    if latest is not None:
        steps, recomputes = report.steps[-latest:], report.recomputes[-latest:]
        report = msgspec.structs.replace(report, steps=steps, recomputes=recomputes)
        events = events[-latest:]
    return RunExport(
        name=exported.name,
        kind=str(run.kind),
        number=run.id.number,
        rank=run.id.rank,
        device=run.environment.device,
        now=_now(exported),
        peak=peak_of(exported.ledger),
        report=report,
        step=_step(exported.ledger),
        events=[LogEntry(round(event.time_s, 3), event.kind, event.text) for event in events],
    )


def _now(exported: ExportedRun) -> NowFigures:
    last, gauge = exported.last, exported.run.training_gauge or exported.run.gauge
    held = composition(last.end)
    return NowFigures(
        allocated_bytes=held.allocated_bytes,
        by_category=held.by_category,
        step=last.trace.step,
        reserved_bytes=gauge.reserved_bytes if gauge else None,
        managed_bytes=gauge.managed_bytes if gauge else None,
        pinned_bytes=gauge.pinned_bytes if gauge else None,
        process_bytes=gauge.process_bytes if gauge else None,
        context_bytes=gauge.context_bytes if gauge else None,
        nccl_bytes=gauge.nccl_bytes if gauge else None,
        others_bytes=gauge.others_bytes if gauge else None,
        device_used_bytes=gauge.device_used_bytes if gauge else None,
        device_total_bytes=exported.run.environment.device_total_bytes,
    )


def _step(ledger: Ledger) -> StepCourse:
    trace, times = ledger.trace, ledger.trace.events["time_us"]
    began = min([*(span.begin_us for span in trace.phases[:1]), *(int(t) for t in times[:1])], default=0)
    return StepCourse(
        step=trace.step,
        micro_batches=trace.micro_batches,
        ending=str(trace.ending.kind),
        events=len(trace.events),
        begin_allocated_bytes=int(ledger.total[0]),
        peak_event=ledger.peak.event,
        phases=[
            PhaseFigures(
                s.phase.title, s.micro_batch, s.begin, s.end, s.begin_us - began, s.end_us - began
            )
            for s in trace.phases
        ],
        timeline=_timeline(ledger, began),
    )  # fmt: skip


def _timeline(ledger: Ledger, began: int) -> TimelineFigures:
    at, times = _points(ledger.total), ledger.trace.events["time_us"]
    where = [ledger.where(index - 1) for index in at]
    held = {category.key: ledger.curve[category][at].tolist() for category in Category}
    return TimelineFigures(
        event=[index - 1 for index in at],
        time_us=[int(times[index - 1]) - began if index else 0 for index in at],
        phase=[phase.title for phase, _, _ in where],
        module=[module for _, _, module in where],
        allocated_bytes=ledger.total[at].tolist(),
        by_category={key: sizes for key, sizes in held.items() if any(sizes)},
    )


def _points(total: npt.NDArray[np.int64]) -> list[int]:
    """Indices into a curve: its ends, and the first highest of every part."""
    edges = np.unique(np.linspace(0, len(total), min(POINTS, len(total)) + 1).astype(np.int64))
    highest = {begin + int(np.argmax(total[begin:end])) for begin, end in pairwise(edges)}
    return sorted(map(int, highest | {0, len(total) - 1}))


def encoded(plain: Export) -> bytes:
    """The document as JSON; a loss that is no number becomes null."""
    return msgspec.json.encode(plain, enc_hook=mapping_as_dict)
