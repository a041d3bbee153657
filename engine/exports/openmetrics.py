"""Gauges as OpenMetrics text, for Prometheus and what reads its files.

Every family is a gauge in the base unit, so that a reader of the older
Prometheus text format (node_exporter's textfile collector) takes it as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ..events import Gauge
from ..ledger import Bytes
from .exported_run import ExportedRun, Format, Sink

CONTENT_TYPE = "application/openmetrics-text; version=1.0.0; charset=utf-8"


class Reading(NamedTuple):
    """A run at an instant. None: not known.

    Attributes:
        labels: What tells the run from others.
        step: Steps that have ended.
        now: Composition as the last traced step ended.
        peak: Composition at the highest peak traced.
        gauge: The latest reading of the device.
    """

    labels: Mapping[str, str]
    step: int
    now: Bytes | None
    peak: Bytes | None
    gauge: Gauge | None


FAMILIES = {
    "gpumem_allocated_bytes": "Held by the allocator as the last traced step ended, by category.",
    "gpumem_peak_bytes": "Held at the highest peak traced, by category.",
    "gpumem_allocator_allocated_bytes": "Allocated now by the allocator's own counter.",
    "gpumem_reserved_bytes": "Held by the caching allocator.",
    "gpumem_managed_bytes": "CUDA managed memory of paged optimizers.",
    "gpumem_pinned_bytes": "Pinned memory of the host, what was offloaded among it.",
    "gpumem_process_bytes": "On the device by this process.",
    "gpumem_device_used_bytes": "On the device by everybody.",
    "gpumem_device_total_bytes": "Capacity of the device.",
    "gpumem_step": "Optimizer steps that have ended.",
}


def write(runs: Sequence[ExportedRun], sink: Sink) -> None:
    """One set of gauges a run."""
    sink.write(exposition([_reading(run) for run in runs]), sum(run.events for run in runs))


FORMAT = Format("openmetrics", ".prom", "gauges for Prometheus and its textfile collector", write)


def exposition(readings: Sequence[Reading]) -> bytes:
    """The text of several runs; a family that nobody knows is left out."""
    samples: dict[str, list[str]] = {name: [] for name in FAMILIES}
    for reading in readings:
        for family, sizes in (("gpumem_allocated_bytes", reading.now), ("gpumem_peak_bytes", reading.peak)):
            for category, size in (sizes or {}).items():
                samples[family].append(_sample(family, {**reading.labels, "category": category.key}, size))
        for family, value in _gauges(reading).items():
            if value is not None:
                samples[family].append(_sample(family, reading.labels, value))
    lines = []
    for family, found in samples.items():
        if found:
            lines += [f"# TYPE {family} gauge"]
            lines += [f"# UNIT {family} bytes"] if family.endswith("_bytes") else []
            lines += [f"# HELP {family} {FAMILIES[family]}", *found]
    return "\n".join([*lines, "# EOF", ""]).encode()


def _gauges(reading: Reading) -> dict[str, int | None]:
    gauge = reading.gauge
    known = {"gpumem_step": reading.step}
    if gauge is None:
        return dict(known)
    return known | {
        "gpumem_allocator_allocated_bytes": gauge.allocated_bytes,
        "gpumem_reserved_bytes": gauge.reserved_bytes,
        "gpumem_managed_bytes": gauge.managed_bytes,
        "gpumem_pinned_bytes": gauge.pinned_bytes,
        "gpumem_process_bytes": gauge.process_bytes,
        "gpumem_device_used_bytes": gauge.device_used_bytes,
        "gpumem_device_total_bytes": gauge.device_total_bytes,
    }


def _sample(family: str, labels: Mapping[str, str], value: int) -> str:
    named = ",".join(f'{name}="{_escaped(text)}"' for name, text in labels.items())
    return f"{family}{{{named}}} {value}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _reading(exported: ExportedRun) -> Reading:
    run, last = exported.run, exported.last
    return Reading(labels_of(exported), last.trace.step, last.end, exported.ledger.peak.by_category, run.gauge)


def labels_of(exported: ExportedRun) -> dict[str, str]:
    """The labels that tell a run from others in a time series."""
    run = exported.run
    return {"run": exported.name, "rank": str(run.id.rank), "device": run.environment.device}
