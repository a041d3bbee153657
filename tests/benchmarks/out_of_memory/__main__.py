"""The table."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import torch

from gpumem_tui.engine.config import RunConfig, Value, show
from gpumem_tui.engine.out_of_memory.report import OutOfMemoryReport, Verdict
from gpumem_tui.engine.recording import write
from gpumem_tui.engine.run import Run
from gpumem_tui.engine.run_events import OutOfMemory

from . import __doc__ as about
from . import ranks, runs, scripts, timing
from .fixing import Found, find, report_of

GIB = 1 << 30
OTHERS_BYTES = 6 * GIB
WITHIN_S = 1.0
WORKERS = 12


@dataclasses.dataclass
class Row:
    """One case."""

    name: str
    expected: str
    verdict: str = ""
    reason: str = ""
    report_s: float | None = None
    exact: bool = False
    leaked_bytes: int | None = None
    fix: dict[str, Value] | None = None
    fix_found_s: float | None = None
    fix_fits: bool | None = None
    smaller_dies: bool | None = None
    problem: str = ""

    def take(self, report: OutOfMemoryReport | None, report_s: float | None = None) -> None:
        """What the report says, and after how many seconds; None: as was measured in this process."""
        if report is None:
            self.problem = self.problem or "no report"
            return
        self.verdict, self.reason = report.verdict.value, report.reason
        unknown = report.by_category.get("unknown", 0) if report.traced else 0
        self.exact = sum(report.by_category.values()) == report.allocated_bytes and not unknown
        self.report_s = timing.report_s() if report_s is None else report_s

    @property
    def good(self) -> bool:
        """As it should be, fixes aside."""
        quick = self.report_s is not None and self.report_s <= WITHIN_S
        return self.verdict == self.expected and self.exact and quick and not self.leaked_bytes and not self.problem


@contextlib.contextmanager
def noting(row: Row) -> Iterator[None]:
    """One case that fails does not end the rest."""
    try:
        yield
    except Exception as error:
        row.problem = f"{type(error).__name__}: {error}"
        sys.stderr.write(f"{row.name}:\n{traceback.format_exc()}")


# --- runs of our own ------------------------------------------------------------------


def died(bench: runs.Bench, case: runs.Case, row: Row, folder: Path) -> Path | None:
    """Have a run die; its recording."""
    with noting(row):
        run = bench.run(bench.limited(case))
        row.take(report_of(run))
        row.leaked_bytes = run.ended.leaked_bytes if run.ended is not None else None
        if row.verdict:
            path = folder / f"{case.name.replace(' ', '-')}.gpumem"
            write(path, [run])
            return path
    return None


@contextlib.contextmanager
def somebody_else() -> Iterator[None]:
    """Another process holds some of the GPU."""
    tensor = f"torch.empty({OTHERS_BYTES}, dtype=torch.uint8, device='cuda')"
    code = f"import torch; held = {tensor}; print(1, flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield
        process.kill()


def beside_somebody(bench: runs.Bench, rows: list[Row]) -> None:
    """Runs that would have fitted, were it not for another process."""
    for name, settings in (("full", runs.FULL), ("LoRA", runs.LORA)):
        case = runs.Case(f"{name}, another process", settings, lambda needs: OTHERS_BYTES + runs.share(0.5)(needs))
        row = Row(case.name, Verdict.SOMEBODY_ELSES.value)
        rows.append(row)
        with noting(row):
            config = bench.limited(case)
            with somebody_else():
                run = bench.run(config)
            row.take(report_of(run))
            row.leaked_bytes = run.ended.leaked_bytes if run.ended is not None else None
        show_row(row)


def try_fix(bench: runs.Bench, config: RunConfig, row: Row, found: Found) -> None:
    """Run with the fix, and with the next smaller change."""
    row.fix_found_s = found.seconds
    if found.fix is None or not found.fix.set.keys() <= {*config.options, "batch_size", "seq_len"}:
        return
    row.fix = found.fix.set
    row.fix_fits = _lives(bench.run(config.with_(found.fix.set)))
    row.smaller_dies = found.smaller is None or not _lives(bench.run(config.with_(found.smaller)))


def _lives(run: Run) -> bool:
    return not any(isinstance(event, OutOfMemory) for event in run.events())


# --- scripts --------------------------------------------------------------------------


def script_died(watched: scripts.Watched, device: torch.device, row: Row) -> None:
    """Have a script die."""
    on_gpu = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if on_gpu else 0
    with noting(row):
        watching = scripts.run(watched, device)
        run = watching.source.run
        row.take(report_of(run, 0) if run is not None else None)
        if watched.body is scripts.smaller_batches and (run is None or run.ended is None or run.ended.reason != "done"):
            row.problem = "it was not watched on"
        del watching, run
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
        row.leaked_bytes = torch.cuda.memory_allocated(device) - before


Save = Callable[[list[Row]], None]

# --- the whole ------------------------------------------------------------------------


def all_rows(device: torch.device, quick: bool, fixes: bool, only: str, save: Save) -> list[Row]:
    """Every case, one after the other.

    Args:
        device: Where.
        quick: Every fourth only.
        fixes: Whether those of the runs are looked for and tried.
        only: Cases with this in their names.
        save: Called with all rows so far after every case: a run that is cut off loses nothing.
    """
    on_gpu = device.type == "cuda"
    bench = runs.Bench(str(device))
    rows: list[Row] = []
    cases = [case for case in runs.CASES if not (case.cpu_only if on_gpu else case.gpu_only) and only in case.name]
    watched = [one for one in scripts.SCRIPTS if (on_gpu or not one.gpu_only) and only in one.name]
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name, ProcessPoolExecutor(WORKERS if on_gpu else 1, context) as pool:
        os.environ["XDG_STATE_HOME"] = name  # what somebody has kept there is not to be pushed out
        folder, jobs = Path(name), list[tuple[RunConfig, Row, Future[Found]]]()
        for case in cases[:: 4 if quick else 1]:
            row = Row(case.name, case.expected.value)
            rows.append(row)
            path = died(bench, case, row, folder)
            if path is not None and fixes:
                jobs.append((bench.limited(case), row, pool.submit(find, path)))
            show_row(row)
            save(rows)
        if on_gpu and not only:
            beside_somebody(bench, rows)
        for script in watched[:: 4 if quick else 1]:
            row = Row(script.name, script.expected.value)
            rows.append(row)
            script_died(script, device, row)
            show_row(row)
            save(rows)
        if not only and (not on_gpu or torch.cuda.device_count() > 1):
            row = Row("two ranks, of which one dies", Verdict.FULL.value)
            rows.append(row)
            with noting(row):
                row.take(*ranks.run(folder))
            show_row(row)
            save(rows)
        for config, row, job in jobs:
            with noting(row):
                try_fix(bench, config, row, job.result(180))
            save(rows)
    bench.close()
    return rows


def show_row(row: Row) -> None:
    """A line of the table, fixes aside."""
    quick = "-" if row.report_s is None else f"{row.report_s:.2f}"
    right = "" if row.verdict == row.expected else f" (not {row.expected})"
    exact, leaked = "exact" if row.exact else "OFF", "-" if row.leaked_bytes is None else str(row.leaked_bytes)
    print(f"{row.name:<30}{row.verdict + right:<28}{quick:>6} s {exact:<6}{leaked:>8}", flush=True)
    if row.problem or right:
        print(f"    {row.problem or row.reason}"[:200], flush=True)


def goals(rows: Sequence[Row]) -> list[tuple[str, float, float]]:
    """Each goal: its name, its share, and what it should be at least."""
    fixed = [row for row in rows if row.fix is not None]
    shares: list[tuple[str, list[bool], float]] = [
        ("verdict as constructed", [row.verdict == row.expected for row in rows], 0.95),
        ("report within 1 s", [row.report_s is not None and row.report_s <= WITHIN_S for row in rows], 1.0),
        ("bytes sum exactly, 0 unknown", [row.exact for row in rows], 1.0),
        ("nothing leaked", [not row.leaked_bytes for row in rows], 1.0),
        ("first fix fits", [bool(row.fix_fits) for row in fixed], 0.98),
        ("first fix is the smallest", [bool(row.smaller_dies) for row in fixed], 0.9),
    ]
    return [(name, sum(held) / len(held), least) for name, held, least in shares if held]


def main(arguments: list[str] | None = None) -> int:
    """Print the table; 0 if the goals hold."""
    flags = argparse.ArgumentParser("tests.benchmarks.out_of_memory", description=about)
    flags.add_argument("--json", metavar="FILE", help="write the rows as JSON")
    flags.add_argument("--quick", action="store_true", help="every fourth case")
    flags.add_argument("--without-fixes", action="store_true", help="look for none, which takes most of the time")
    flags.add_argument("--only", default="", metavar="TEXT", help="cases with this in their name")
    given = flags.parse_args(arguments)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    timing.measure()
    began = time.monotonic()

    def save(rows: list[Row]) -> None:
        if given.json:
            document = json.dumps([dataclasses.asdict(row) for row in rows], indent=1)
            Path(given.json).write_text(document, encoding="utf-8")

    rows = all_rows(device, given.quick, not given.without_fixes, given.only, save)
    print()
    for row in (row for row in rows if row.fix is not None):
        change = " ".join(f"{name}={show(value)}" for name, value in (row.fix or {}).items())
        fits = "fits" if row.fix_fits else "DOES NOT FIT"
        smallest = "the smallest" if row.smaller_dies else "not the smallest"
        print(f"{row.name:<30}{change:<50}{fits}, {smallest}, found in {row.fix_found_s:.1f} s")
    print(f"\n{len(rows)} cases in {time.monotonic() - began:.0f} s")
    missed = 0
    for name, part, least in goals(rows):
        missed += part < least
        print(f"{name:<30}{100 * part:6.1f} %  (at least {100 * least:.0f} %)")
    return min(missed, 1)


if __name__ == "__main__":
    sys.exit(main())
