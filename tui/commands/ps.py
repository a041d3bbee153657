"""`gpumem-tui ps`: the engines that are running."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator

from ...engine import engine_registry
from ...engine.config import printable
from ...engine.engine_registry import EngineDir, Job
from ...engine.remote import peek
from ..units import IN_MIB, UNKNOWN, clock

HEAD = ("NAME", "PID", "MODEL", "TECHNIQUES", "DEVICE", "STATE", "STEP", "MIB", "AGE", "VIEWERS")


def add(parser: argparse.ArgumentParser) -> None:
    """No flags."""
    parser.set_defaults(command=main)


def main(_flags: argparse.Namespace) -> int:
    """Print a line an engine, and one for each rank below its job's."""
    rows = [HEAD, *(row for job in engine_registry.jobs() for row in _rows(job))]
    rows += map(_server_row, engine_registry.warm_servers())
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if len(rows) == 1:
        sys.stdout.write("no engine is running\n")
        return 0
    for row in rows:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        sys.stdout.write(f"{line.rstrip()}\n")
    return 0


def _rows(job: Job) -> Iterator[tuple[str, ...]]:
    """The row of an engine that is alone; of a job, what all ranks have in common, and below it what each has."""
    rows = [_row(engine_dir) for engine_dir in job.members]
    if job.ranks == 1 and len(rows) == 1 and rows[0][0] == job.name:
        yield rows[0]
        return
    first = rows[0]
    here = "" if len(rows) == job.ranks else f", {len(rows)} here"
    yield (job.name, "", *first[2:4], f"{job.ranks} ranks{here}", first[5], first[6], "", first[8], "")
    for row in rows:
        yield (f"  {row[0]}", row[1], "", "", *row[4:8], "", row[9])


def _server_row(engine_dir: EngineDir) -> tuple[str, ...]:
    """The row of a server that predicts."""
    info = engine_dir.info()
    pid, age = (str(info.pid), clock(time.time() - info.started_s)) if info is not None else ("", "")
    return tuple(map(printable, (engine_dir.name, pid, "", "", "", "warm: predicts", "", "", age, "")))


def _row(engine_dir: EngineDir) -> tuple[str, ...]:
    status, info = peek(engine_dir), engine_dir.info()
    if status is None:
        return (engine_dir.name, str(info.pid if info else ""), "", "", "", "does not answer", "", "", "", "")
    state = f"{status.state}, own script" if status.kind == "watch" else status.state
    cells = (
        status.name, str(status.pid), status.model or UNKNOWN, status.techniques or UNKNOWN, status.device, state,
        str(status.step), IN_MIB.show(status.allocated_bytes), clock(status.age_s), str(status.viewers),
    )  # fmt: skip
    return tuple(map(printable, cells))
