"""A snapshot as runs, one a device; what it does not say is left at what it is by default."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .. import techniques
from ..config import RunConfig
from ..events import Environment, Gauge, Phase, StepTrace
from ..feed import Work
from ..run import Run, RunId, RunKind
from ..run_events import Note, OutOfMemory, RunEnded, RunEvent, RunStarted, StepEnded, placed
from . import read
from .entries import Snapshot
from .imported import refused_bytes, steps_of

DEVICE_NAME = "GPU of a snapshot"


def runs_of(path: Path, name: str = "", work: Work | None = None) -> list[Run]:
    """The runs of a snapshot.

    Args:
        path: The file.
        name: What the runs' engine is called; the file's name if empty.
        work: Told how far reading is; asked whether to go on.

    Raises:
        UserError: It cannot be read, or is no snapshot.
    """
    snapshot = read(path, work)
    devices = [d for d in range(max(len(snapshot.devices), *(d + 1 for d in snapshot.segments), 0))
               if snapshot.segments.get(d) or (d < len(snapshot.devices) and len(snapshot.devices[d]))]  # fmt: skip
    return [_run(snapshot, device, name or path.stem) for device in devices]


def _run(snapshot: Snapshot, device: int, name: str) -> Run:
    steps = steps_of(snapshot, device)
    place = f"cuda:{device}"
    reserved = sum(snapshot.segments.get(device, ())[1::3])
    failed = refused_bytes(snapshot, device)
    # The snapshot does not tell the GPU's memory; it had at least this.
    total = reserved + (failed[1] if failed else 0)
    said = "categories as exported" if snapshot.says_owners else "categories inferred"
    config = RunConfig(
        model=f"PyTorch snapshot, {said}", device=place, batch_size=1, seq_len=1, rows=1, options=techniques.defaults()
    )
    run = Run(RunId(name, 1, device, place), config, Environment(place, DEVICE_NAME, total), RunKind.IMPORTED)
    for index, event in enumerate(_events(snapshot, steps, failed)):
        run.tell(placed(event, index, 0.0, 1))
    run.keep(steps)
    allocated = int(steps[-1].held_bytes[-1])
    run.gauge = run.training_gauge = Gauge(_seconds(steps[-1]), allocated, reserved, 0, None, None, total, Phase.IDLE)
    return run


def _events(snapshot: Snapshot, steps: list[StepTrace], failed: tuple[int, int] | None) -> list[RunEvent]:
    said = "as they were exported" if snapshot.says_owners else "inferred from frames and lifetimes, none is certain"
    found: list[RunEvent] = [
        RunStarted(text="a snapshot of PyTorch's allocator", watched=True),
        Note(text=f"categories are {said}"),
    ]
    for trace in steps:
        if trace.step:
            held, seconds = trace.held_bytes, _seconds(trace)
            text = f"step {trace.step}: {len(trace.events):,} events"
            found.append(StepEnded(text=text, step=trace.step, seconds=seconds, allocated_bytes=int(held[-1]),
                                   peak_bytes=int(held.max()), traced=True))  # fmt: skip
    if failed:
        text = f"out of memory: asked for {failed[0]:,} bytes, {failed[1]:,} were free on the device"
        found.append(OutOfMemory(text=text, step=steps[-1].step, phase="", requested_bytes=failed[0]))
    reason = "failed" if failed else "done"
    found.append(RunEnded(text="the snapshot was taken", reason=reason, steps=steps[-1].step))
    return found


def _seconds(trace: StepTrace) -> float:
    """Seconds from the first event to the last; 0 if the snapshot has no times."""
    times = trace.events["time_us"]
    return float(np.ptp(times)) / 1e6 if len(times) else 0.0
