"""Runs as one JSON document, of the schema in `export.schema.json`. The page (`html`) shows just this document.

Sizes are whole bytes, times since the step began are microseconds; what is not
known is null.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from ..events import Category
from ..ledger import Ledger
from ..report import composition
from .exported_run import ExportedRun, Format, Sink

SCHEMA = "gpumem-export/1"
POINTS = 600
"""Of a timeline: each is the highest instant of its part of the step, so that no peak is lost."""


def write(runs: Sequence[ExportedRun], sink: Sink) -> None:
    """One document for all runs."""
    sink.write(msgspec.json.encode(document(runs)) + b"\n", sum(run.events for run in runs))


FORMAT = Format("json", ".json", "everything that is known of a run, in a published schema, for programs", write)


def schema_text() -> str:
    """The JSON schema that every document of this format conforms to."""
    return Path(__file__).with_name("export.schema.json").read_text(encoding="utf-8")


def document(runs: Sequence[ExportedRun], latest: int | None = None) -> dict[str, Any]:
    """What is written.

    Args:
        runs: At least one.
        latest: So many steps, recomputes and events of each, the last ones; None: all.
    """
    known = [
        {"key": c.key, "letter": c.info.letter, "title": c.info.title, "meaning": c.info.meaning} for c in Category
    ]
    return {"schema": SCHEMA, "categories": known, "runs": [_run(run, latest) for run in runs]}


def _run(run: ExportedRun, latest: int | None) -> dict[str, Any]:
    last = run.ledger if run.trace is run.traces[-1] else Ledger(run.traces[-1])
    gauge, report = run.gauge, dict(run.document)
    if latest is not None:
        report |= {key: report[key][-latest:] for key in ("steps", "recomputes")}
    events = run.milestones if latest is None else run.milestones[-latest:]
    return {
        "name": run.name,
        "rank": run.rank,
        "now": composition(last.end)
        | {
            "step": last.trace.step,
            "reserved_bytes": gauge.reserved_bytes if gauge else None,
            "managed_bytes": gauge.managed_bytes if gauge else None,
            "process_bytes": gauge.process_bytes if gauge else None,
            "context_bytes": gauge.context_bytes if gauge else None,
            "others_bytes": gauge.others_bytes if gauge else None,
            "device_used_bytes": gauge.device_used_bytes if gauge else None,
            "device_total_bytes": run.environment.device_total_bytes,
        },
        "report": report,
        "step": _step(run.ledger),
        "events": [
            {"time_s": round(m.time_s, 3), "kind": str(m.kind), "text": m.text} for m in events
        ],
    }  # fmt: skip


def _step(ledger: Ledger) -> dict[str, Any]:
    """The step's course: its phases, and what was held by category along it."""
    trace, total = ledger.trace, ledger.total
    times = trace.events["time_us"]
    spans = [span.begin_us for span in trace.phases]
    began = min([*spans[:1], *(int(t) for t in times[:1])], default=0)
    at = _points(total)
    where = [ledger.where(index - 1) for index in at]
    held = {category.key: ledger.curve[category][at].tolist() for category in Category}
    return {
        "step": trace.step,
        "micro_batches": trace.micro_batches,
        "events": len(trace.events),
        "begin_allocated_bytes": int(total[0]),
        "peak_event": ledger.peak.event,
        "phases": [
            {
                "phase": span.phase.title,
                "micro_batch": span.micro_batch,
                "begin_event": span.begin,
                "end_event": span.end,
                "begin_us": span.begin_us - began,
                "end_us": span.end_us - began,
            }
            for span in trace.phases
        ],
        "timeline": {
            "event": [index - 1 for index in at],
            "time_us": [int(times[index - 1]) - began if index else 0 for index in at],
            "phase": [phase.title for phase, _, _ in where],
            "module": [module for _, _, module in where],
            "allocated_bytes": total[at].tolist(),
            "by_category": {key: sizes for key, sizes in held.items() if any(sizes)},
        },
    }


def _points(total: Any) -> list[int]:
    """Indices into a curve: its ends, and the first highest of every part."""
    edges = np.unique(np.linspace(0, len(total), min(POINTS, len(total)) + 1).astype(np.int64))
    highest = {begin + int(np.argmax(total[begin:end])) for begin, end in pairwise(edges)}
    return sorted(map(int, highest | {0, len(total) - 1}))
