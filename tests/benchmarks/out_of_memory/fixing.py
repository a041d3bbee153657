"""The first fix of a run that died, and the next smaller change: looked for in processes of their own."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

from gpumem_tui.engine import techniques
from gpumem_tui.engine.config import RunConfig, UserError, Value
from gpumem_tui.engine.out_of_memory.fixes import FixSearch, gpu_with_room, ladders_of
from gpumem_tui.engine.out_of_memory.report import Fix, OutOfMemoryReport
from gpumem_tui.engine.prediction.known import predicted
from gpumem_tui.engine.recording import read
from gpumem_tui.engine.run import Run
from gpumem_tui.engine.run_events import OutOfMemory
from gpumem_tui.profiles import resolved


class Found(NamedTuple):
    """What was found for a run.

    Attributes:
        fix: The first; None: there is none.
        smaller: The next smaller change of the same kind; None: there is none, the run as it was comes next.
        seconds: Until the first was known.
    """

    fix: Fix | None
    smaller: dict[str, Value] | None
    seconds: float


def report_of(run: Run, which: int = -1) -> OutOfMemoryReport | None:
    """A report of a run: the last, or another that it got over."""
    told = [event.report for event in run.events() if isinstance(event, OutOfMemory)]
    return told[which] if told else None


def find(path: Path) -> Found:
    """Look for the fix of the run in a recording."""
    (run,) = read(path)
    run.config = resolved(run.config)
    report = report_of(run)
    assert report is not None
    began = time.perf_counter()
    fix = next((fix for fix in FixSearch(run, report, predicted) if fix.fits), None)
    seconds = time.perf_counter() - began
    return Found(fix, None if fix is None else _smaller(run, report, fix), seconds)


def _smaller(run: Run, report: OutOfMemoryReport, fix: Fix) -> dict[str, Value] | None:
    """The next smaller change: of those of the same options the one that needs least beyond the fix."""
    config, gpu = run.config, gpu_with_room(run.environment, report)
    rungs = [rung for rung in _rungs(config, fix.set) if rung.keys() == fix.set.keys() and rung != fix.set]
    needs: list[tuple[int, dict[str, Value]]] = []
    for rung in rungs:
        try:
            needs.append((predicted(config.with_(rung), gpu).peak_bytes, rung))
        except UserError:  # it cannot be run at all
            continue
    least = predicted(config.with_(fix.set), gpu).peak_bytes
    now = predicted(config, gpu).peak_bytes
    larger = [(need, rung) for need, rung in needs if least < need < now]
    return min(larger, key=lambda one: one[0])[1] if larger else None


def _rungs(config: RunConfig, settings: dict[str, Value]) -> list[dict[str, Value]]:
    """Other values of the same options."""
    (name, value), *more = settings.items()
    if not more and name in ("batch_size", "seq_len"):
        step = 1 << max(0, config.integer(name).bit_length() - (7 if name == "batch_size" else 5))
        return [{name: int(value) + step}] if int(value) + step < config.integer(name) else []
    found: list[dict[str, Any]] = []
    for technique in techniques.registry().values():
        if technique.name in settings:
            found += [dict(rung) for ladder in ladders_of(technique, config) for rung in ladder.rungs]
    return found
