"""The lines on standard error after a run has died of it: where it is kept, and what would fit."""

from __future__ import annotations

from contextlib import closing
from typing import NamedTuple

from ..config import UserError
from ..prediction.predictor import PredictingProcess
from ..run import Run, RunKind
from .fixes import OF_A_GPU, FixSearch, settings_text
from .report import Fix, OutOfMemoryReport, Verdict, size_text

LONGEST_S = 90
"""Seconds after which the search for what would fit is given up."""


class Told(NamedTuple):
    """The answer to what would fit.

    Attributes:
        text: In a line.
        fix: The first; None: there is none, or nothing can be predicted.
    """

    text: str
    fix: Fix | None = None


def would_fit(run: Run, report: OutOfMemoryReport) -> Told:
    """The first change that would fit, worked out anew unless it is known.

    Args:
        run: That ran out of memory.
        report: Of that moment.
    """
    if report.verdict is Verdict.GROWN:
        grows = report.growth_owner or "what is held"
        return Told(f"no setting mends this: {grows} grows by {size_text(report.growth_bytes)} a step")
    process = PredictingProcess(longest_s=LONGEST_S)
    search = FixSearch(run, report, process.known_or_predicted)
    try:
        with closing(process):
            fix = next(iter(search), None)
    except UserError as error:
        return Told(f"what would fit cannot be told: {error}")
    if process.ended and (fix is None or not fix.fits):
        return Told(f"what would fit was not found within {LONGEST_S} s; gpumem-tui why looks longer")
    if fix is None or not fix.fits:
        nearest = f", {settings_text(fix.set)} comes nearest" if fix is not None else ""
        return Told(f"nothing that was tried fits{nearest}: {size_text(search.unfit_by_bytes or 0)} too much")
    return Told(described(run, report, fix), fix)


def described(run: Run, report: OutOfMemoryReport, fix: Fix) -> str:
    """A fix in a line: `checkpointing=layers would fit, with about 61.03 GiB of 79.20 GiB`."""
    room = report.allocated_bytes + report.cached_bytes + report.free_bytes
    what = fix.text if run.kind is RunKind.WATCHED else settings_text(fix.set)
    whose = "" if run.environment.on_gpu else f", {OF_A_GPU}"
    return f"{what} would fit, with about {size_text(fix.peak_bytes)} of {size_text(room)}{whose}"
