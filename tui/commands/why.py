"""`gpumem-tui why`: why a run ran out of memory, and what would have fitted."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...engine.config import UserError
from ...engine.run_events import OutOfMemory
from ..palette import Palette
from . import frames
from .common import end_progress, opened, refuse_unwritable, tell, write_document

if TYPE_CHECKING:
    from ...engine.out_of_memory.report import OutOfMemoryReport
    from ...engine.run import Run
    from ..predictions import FoundFixes

NARROWEST, WIDEST = 60, 140
"""Columns of what is printed."""


def add(parser: argparse.ArgumentParser) -> None:
    """Flags of this command."""
    about = "a .gpumem recording of a run that ran out of memory (default: the one that was kept last)"
    parser.add_argument("file", metavar="FILE", nargs="?", help=about)
    parser.add_argument("--json", metavar="FILE", help="write the report as JSON; - for standard output")
    parser.set_defaults(command=main)


def main(flags: argparse.Namespace) -> int:
    """Print the report of the last run in a recording that ran out of memory."""
    path = Path(flags.file) if flags.file else _kept_last()
    refuse_unwritable("json", flags.json)
    run, report = _refused_in(path)
    found = _found(run, report)
    if flags.json:
        write_document(document(report, found), flags.json)
    if flags.json != "-":
        sys.stdout.write(text(path, run, report, found))
    return 0


def _kept_last() -> Path:
    from ...engine.out_of_memory.kept import kept_folder, latest

    path = latest()
    if path is None:
        where = kept_folder()
        raise UserError(f"no run that ran out of memory is kept{f' in {where}' if where else ''}")
    return path


def _refused_in(path: Path) -> tuple[Run, OutOfMemoryReport]:
    """The run that ran out of memory, of several the last.

    Raises:
        UserError: None did.
    """
    runs = opened([path]).runs()
    for run in reversed(runs):
        if run.refused is not None and run.refused.report is not None:
            return run, run.refused.report
    if any(isinstance(event, OutOfMemory) for run in runs for event in run.events()):
        raise UserError(f"{path}: memory ran out in it, but the moment was not recorded")
    raise UserError(f"{path}: nothing in it ran out of memory")


def _found(run: Run, report: OutOfMemoryReport) -> FoundFixes:
    from ...engine.out_of_memory.fixes import FixSearch
    from ...engine.prediction.known import predicted
    from ..fix_finder import found_at_once

    tell("predicting what would have fitted")
    try:
        return found_at_once(FixSearch(run, report, predicted))
    finally:
        end_progress()


def document(report: OutOfMemoryReport, found: FoundFixes) -> dict[str, Any]:
    """The report for programs; sizes in whole bytes, null if not known."""
    names = ("asked_bytes", "step", "phase", "module", "rank", "allocated_bytes", "by_category", "cached_bytes",
             "largest_free_block_bytes", "outside_torch_bytes")  # fmt: skip
    of_fix = ("set", "peak_bytes", "fits", "keeps_mathematics")
    return {
        **{name: getattr(report, name) for name in names},
        "verdict": report.verdict.value,
        "reason": report.reason,
        "fixes": [{name: getattr(fix, name) for name in of_fix} for fix in found.fixes],
    }


def text(path: Path, run: Run, report: OutOfMemoryReport, found: FoundFixes) -> str:
    """The report for people, as wide as the terminal."""
    from ...engine.techniques import label
    from ..draw import Row
    from ..out_of_memory_rows import ReportRows

    palette = Palette(mono=True, ascii=not frames.prints_unicode())
    width = max(NARROWEST, min(shutil.get_terminal_size((100, 40)).columns, WIDEST))
    drawn = ReportRows(report, run.config, palette, width)
    rows = [
        Row().add(f" {run.config.model}  {label(run.config)}"),
        drawn.title(),
        drawn.asked(),
        Row(),
        drawn.device(),
        *drawn.categories(room=len(report.by_category) + 1),
        *drawn.totals(),
        Row(),
        *drawn.reason(),
        Row(),
        *drawn.fixes(found, most=len(found.fixes), numbered=False, whole=True),
        Row(),
        *drawn.largest(),
        *([Row(), *drawn.pools()] if report.pools else []),
        Row(),
        Row().add(f" gpumem-tui open {path}"),
    ]
    return "\n".join(row.text.rstrip() for row in rows) + "\n"
